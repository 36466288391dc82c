"""vLLM's OpenAI-compatible server with our plugin: 200 requests at once, all answered as offline, then a clean stop."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quant.kernels.activation import from_config as rule_from
from quant.kernels.formats.int4_dual import Int4Dual

from .conftest import VLLM_PYTHON, Engines, environment
from .test_vllm import llama

pytestmark = pytest.mark.skipif(not VLLM_PYTHON, reason="make test-vllm sets LOWBIT_VLLM")

REQUESTS, NEW, START_SECONDS, STOP_SECONDS = 200, 8, 600, 120
PROMPTS = [[5 + i, 300 - i, 17, 40 + i % 7] for i in range(REQUESTS)]


@pytest.fixture(scope="module")
def folder(pack: Any, tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dgq-like Llama."""
    root = tmp_path_factory.mktemp("server")
    scheme = Int4Dual(group=32), rule_from("int8_token")
    made: Path = pack(llama(root / "float", tiny, 2), root / "packed", lambda name: scheme if ".layers." in name else None)
    return made


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The running server and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    module = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "m"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*module, *options], env=environment(), stdout=log, stderr=log)
        try:
            end = time.monotonic() + START_SECONDS
            while not alive(port):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, "the server did not come up"
                time.sleep(1)
            yield process, port
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def alive(port: int) -> bool:
    try:
        return call(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def call(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """One request to loopback."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def complete(port: int, prompt: list[int]) -> str:
    """The greedy text."""
    body = {"model": "m", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    status, answer = call(port, "POST", "/v1/completions", body)
    assert status == 200, answer
    text: str = json.loads(answer)["choices"][0]["text"]
    return text


def test_two_hundred_at_once(server: tuple[subprocess.Popen[bytes], int], folder: Path, engines: Engines) -> None:
    process, port = server
    with ThreadPoolExecutor(REQUESTS) as pool:
        texts = list(pool.map(lambda prompt: complete(port, prompt), PROMPTS))
    process.send_signal(signal.SIGINT)
    assert process.wait(STOP_SECONDS) == 0
    with pytest.raises(OSError, match="refused"):
        call(port, "GET", "/health")
    run = {"engine": {"model": str(folder), "dtype": "float32", "max_num_seqs": 64}, "prompts": PROMPTS, "tokens": NEW}
    offline = engines({"offline": run})["offline"]
    assert texts == [answer["text"] for answer in offline]
