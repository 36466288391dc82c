"""llama.cpp through the C functions of llama-cpp-python: prefill in one batch, then one greedy token per call.

Its defaults are kept (memory mapping, repacking, flash attention by its own choice, float16 KV cache); only the thread
counts, the context and the batch sizes are set. The source build compiles for the machine it runs on.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from quant.eval.rivals import gguf_writer
from quant.eval.rivals.base import Rival
from quant.eval.speed_worker import Repeat, Workload, prompt_ids, text_metrics

LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
silent = LOG(lambda level, text, data: None)  # kept here: the library calls it as long as the process lives


def load_model(file: Path) -> tuple[Any, int]:
    """A GGUF file on the CPU, and how many tokens it knows. Raises ValueError when llama.cpp does not read it."""
    import llama_cpp

    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(bytes(file), options)
    if not model:
        raise ValueError(f"llama.cpp does not load {file}; give a whole GGUF file of an architecture that it knows")
    return model, llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))


class LlamaCpp(Rival):
    """Weights of a Llama in one of ggml's formats."""

    distribution, pinned, module, kind = "llama-cpp-python", ">=0.3.30,<0.4", "llama_cpp", "text"
    variants = {  # noqa: RUF012
        "Q4_0": "weights 4 bit in groups of 32, activations 8 bit, embedding and output 6 or 8 bit",
        "Q8_0": "weights 8 bit in groups of 32, activations 8 bit",
        "Q4_K_M": "weights 4 to 6 bit in superblocks of 256 (groups of 32 where K is no multiple), activations 8 bit",
        "F16": "weights float16",
    }

    def convert(self, source: Path, variant: str, out: Path) -> int:
        import llama_cpp

        whole, small = out / "F16.gguf", out / f"{variant}.gguf"
        gguf_writer.write(source, whole)
        if small != whole:
            options = llama_cpp.llama_model_quantize_default_params()
            options.nthread = 1
            options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{variant}")
            llama_cpp.llama_log_set(silent, None)
            if llama_cpp.llama_model_quantize(bytes(whole), bytes(small), options) != 0:
                raise ValueError(f"llama_model_quantize could not make {variant} of {source}")
            whole.unlink()
        return small.stat().st_size

    def open(self, source: Path, made: Path, variant: str, work: Workload, threads: int) -> Callable[[], Repeat]:
        import llama_cpp

        model, size = load_model(made / f"{variant}.gguf")
        context_options = llama_cpp.llama_context_default_params()
        context_options.n_ctx = work.prompt + work.new
        context_options.n_batch = context_options.n_ubatch = work.prompt
        context_options.n_threads = context_options.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, context_options)
        if not context:
            raise ValueError(f"llama.cpp makes no context of {work.prompt + work.new} tokens for {source}")
        ids = prompt_ids(size, work)[0].tolist()

        def greedy(tokens: list[int]) -> int:
            batch = (llama_cpp.llama_token * len(tokens))(*tokens)
            code = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(batch, len(tokens)))
            if code != 0:
                raise RuntimeError(f"llama_decode ended with {code} on {len(tokens)} tokens")
            logits = llama_cpp.llama_get_logits_ith(context, -1)
            return int(np.ctypeslib.as_array(logits, (size,)).argmax())

        def repeat() -> Repeat:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            start = time.perf_counter()
            said = [greedy(ids)]
            first = time.perf_counter()
            for _ in range(work.new):
                said.append(greedy(said[-1:]))
            end = time.perf_counter()
            return Repeat(metrics=text_metrics(work.prompt, work.new, first - start, end - first), ids=tuple(said))

        return repeat


RIVAL = LlamaCpp()
