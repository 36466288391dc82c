"""Tokens per second of vLLM with concurrent requests, folders in turns: `python -m quant.eval.serving_speed OUT MODEL`.

It runs in the environment that has vLLM (see quant/serve/vllm). Every turn is an engine in a process of its own, on the cores
that this process may use; random prompts of one length, a fixed number of new tokens each, greedy, all requests at once.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import click

TURN = "import sys; from quant.eval.serving_speed import turn; turn(sys.argv[1])"


def turn(request: str) -> None:
    """Print the seconds of each repeat, as JSON, after one to warm up."""
    import torch
    from vllm import LLM, SamplingParams

    asked: dict[str, Any] = json.loads(request)
    length = asked["prompt"] + asked["new"]
    engine = {
        "dtype": asked["dtype"],
        "max_model_len": length,
        "max_num_seqs": asked["requests"],
        "enable_prefix_caching": False,
    }
    llm = LLM(asked["folder"], enforce_eager=asked["eager"], **engine)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, llm.get_tokenizer().vocab_size, (asked["requests"], asked["prompt"]), generator=draw).tolist()
    how = SamplingParams(temperature=0.0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
    seconds = []
    for _ in range(asked["repeats"] + 1):
        start = time.perf_counter()
        answers = llm.generate([{"prompt_token_ids": row} for row in ids], how, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        assert all(len(answer.outputs[0].token_ids) == asked["new"] for answer in answers)
    print("SECONDS", json.dumps(seconds[1:]), flush=True)


def measure(request: dict[str, Any]) -> list[float]:
    """New tokens per second of each repeat of one turn."""
    cores = sorted(os.sched_getaffinity(0))
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    done = subprocess.run(
        [sys.executable, "-c", TURN, json.dumps(request)],
        env={**settings, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ, "OMP_NUM_THREADS": str(len(cores))},
        capture_output=True,
        text=True,
        check=False,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    if not found:
        raise click.ClickException(f"vLLM did not serve {request['folder']}: {done.stderr.strip().splitlines()[-1:]}")
    return [request["requests"] * request["new"] / s for s in json.loads(found[0].removeprefix("SECONDS "))]


@click.command()
@click.argument("folders", nargs=-1, required=True)
@click.option("--requests", default=8, show_default=True, help="At once.")
@click.option("--prompt", default=128, show_default=True, help="Tokens of a prompt.")
@click.option("--new", default=64, show_default=True, help="New tokens of a request.")
@click.option("--turns", default=2, show_default=True, help="Engines per folder.")
@click.option("--repeats", default=3, show_default=True, help="Timed runs per engine.")
@click.option("--eager", is_flag=True, help="Without torch.compile.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True, help="Of tokens.")
def main(
    folders: tuple[str, ...], requests: int, prompt: int, new: int, turns: int, repeats: int, eager: bool, dtype: str
) -> None:
    """New tokens per second, prefill included: median and range over all repeats, and the first folder over each other."""
    rates: dict[str, list[float]] = {folder: [] for folder in folders}
    sizes = {"requests": requests, "prompt": prompt, "new": new, "repeats": repeats, "eager": eager, "dtype": dtype}
    for _ in range(turns):
        for folder in folders:
            rates[folder] += measure({"folder": folder, **sizes})
    first = statistics.median(rates[folders[0]])
    for folder, seen in rates.items():
        middle = statistics.median(seen)
        print(f"{folder}: {middle:.1f} [{min(seen):.1f}, {max(seen):.1f}] tokens/s; {folders[0]} is {first / middle:.2f}x")


if __name__ == "__main__":
    main()
