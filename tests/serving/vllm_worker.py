"""Runs in an interpreter that has vLLM and lowbit: engines one after another, their answers or complaints as JSON.

python vllm_worker.py REQUEST.json
{"runs": {name: {"engine": keyword arguments of vllm.LLM, "prompts": [token ids], "audio": [samples file.npy] or absent,
 "tokens": how many new ones, greedy, "environment": variables while the engine is made}}, "out": file}
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

DEFAULTS = {"enforce_eager": True, "max_num_seqs": 4, "max_model_len": 128, "enable_prefix_caching": False}


def answers(run: dict[str, Any]) -> list[dict[str, Any]]:
    """For every prompt the new tokens, their log-probabilities, and those of the prompt's tokens after the first."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    before = dict(os.environ)
    os.environ.update(run.get("environment", {}))
    llm = None
    try:
        llm = LLM(
            **{"enforce_eager": True, "max_num_seqs": 4, "max_model_len": 128, "enable_prefix_caching": False} | run["engine"]
        )
        audio = run.get("audio")
        how = SamplingParams(
            temperature=0.0, max_tokens=run["tokens"], ignore_eos=True, logprobs=1, prompt_logprobs=None if audio else 1
        )
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in run["prompts"]]
        if audio:
            for prompt, file in zip(prompts, audio, strict=True):
                prompt["multi_modal_data"] = {"audio": (np.load(file), 16_000)}
        found = []
        for out in llm.generate(prompts, how, use_tqdm=False):
            made = out.outputs[0]
            steps = zip(out.prompt_token_ids, out.prompt_logprobs or [], strict=False)
            found.append(
                {
                    "ids": list(out.prompt_token_ids),
                    "tokens": list(made.token_ids),
                    "text": made.text,
                    "logprobs": [step[token].logprob for token, step in zip(made.token_ids, made.logprobs, strict=True)],
                    "prompt": [step[token].logprob for token, step in steps if step],
                }
            )
        return found
    finally:
        del llm
        os.environ.clear()
        os.environ.update(before)
        gc.collect()
        cleanup_dist_env_and_memory()


def main(request: dict[str, Any]) -> None:
    found: dict[str, Any] = {}
    for name, run in request["runs"].items():
        try:
            found[name] = answers(run)
        except Exception as error:  # what the user would read
            found[name] = str(error)
        Path(request["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
