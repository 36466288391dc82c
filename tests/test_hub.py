"""`quantize push` against a stand-in of the Hub: the folder arrives, nothing of this machine does, refusals are one line."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

from quant.cli import main

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """Those calls of the Hub's API that a commit makes. files: of the repository; commits, private: what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.private: list[bool] = []
        self.allowed = True
        self.unknown: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "orgs": [{"name": "we"}]})
        else:
            self.server.unknown.append(self.path)
            self.answer({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self.read()
        self.answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self.read()
        if not hub.allowed:
            self.answer({"error": "no rights"}, 403)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.private.append(asked.get("visibility", "private" if asked.get("private") else "public") == "private")
            self.answer({"url": f"{hub.url}/me/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/models/me/model/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes.items()]})
        elif self.path == "/me/model.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}} for o in objects]
            self.answer({"transfer": "basic", "objects": upload})
        elif self.path == "/api/models/me/model/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                else:
                    blob = hub.blobs[value["oid"]]
                    assert hashlib.sha256(blob).hexdigest() == value["oid"]
                    hub.files[value["path"]] = blob
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/me/model/commit/{'1' * 40}"})
        else:
            hub.unknown.append(self.path)
            self.answer({"error": "unknown"}, 404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def quantize(hub: Hub, folder: Path, *words: str, token: str = TOKEN) -> tuple[int, str, str]:
    """Exit code, output and error stream of the command."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(constants, "ENDPOINT", hub.url)  # read from HF_ENDPOINT when the module was imported
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go through LFS
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        patch.setenv("HF_TOKEN", token)
        return main(words), out.getvalue(), err.getvalue()


def test_the_folder_arrives_in_one_commit(hub: Hub, packed: Callable[..., Path], tmp_path: Path) -> None:
    folder = packed("rtn")
    source = json.loads((folder / "report.json").read_text())["source"]
    assert Path(source).is_absolute(), "the test needs a local path that must not be published"
    code, out, err = quantize(hub, tmp_path, "push", str(folder), "me/model", "--private")
    assert code == 0, err
    assert f"{hub.url}/me/model/commit/" in out
    assert hub.unknown == []
    assert hub.commits == ["Quantized by lowbit"]
    assert hub.private == [True]
    assert hub.files.keys() == {path.name for path in folder.iterdir()}
    for name, data in hub.files.items():
        assert data == (folder / name).read_bytes().replace(source.encode(), Path(source).name.encode()), name
        assert str(Path(source).parent).encode() not in data


def test_refusals_are_one_line(
    hub: Hub, packed: Callable[..., Path], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cut = str(packed("rtn")), str(shutil.copytree(packed("rtn"), tmp_path / "cut"))
    os.truncate(Path(cut, "model.safetensors"), 5000)
    cases = [
        (["push", str(llama), "me/model"], TOKEN, "was not written by quantize"),
        (["push", folder, "me/model/more"], TOKEN, "'me/model/more' is no name of a repository"),
        (["push", cut, "me/model"], TOKEN, "model.safetensors"),
        ([str(llama), "--push-to", "you/model", "-o", str(tmp_path / "out")], TOKEN, "in no namespace of me; allowed: me, we"),
        ([str(llama), "--push-to", "me/model", "-o", str(tmp_path / "out")], "hf_wrong", "the token is not valid"),
    ]
    for words, token, line in cases:
        code, _, err = quantize(hub, tmp_path, *words, token=token)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert line in err
    assert not (tmp_path / "out").exists(), "the token is looked at before the work"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in quantize(hub, tmp_path, "push", folder, "me/model")[2]
    monkeypatch.undo()
    assert "no token for the Hub" in quantize(hub, tmp_path, "push", folder, "me/model", token="")[2]
    hub.allowed = False
    assert "the token may not write there" in quantize(hub, tmp_path, "push", folder, "me/model")[2]
    hub.url = "http://127.0.0.1:9"  # nobody listens there
    assert "cannot reach the Hub" in quantize(hub, tmp_path, "push", folder, "me/model")[2]
    assert hub.files == {}
