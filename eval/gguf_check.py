"""Whether llama.cpp gets our perplexity from an exported file: `python -m quant.eval.gguf_check OUT FILE.gguf [--text TEXT]`.

Both score the same windows of token ids. They cannot agree exactly: llama.cpp rounds activations to 8 bits in blocks of 32.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from quant.eval import loading, perplexity
from quant.eval.rivals.base import Choice
from quant.eval.rivals.llama_cpp import load_model


def llama_perplexity(file: Path, windows: Tensor, threads: int) -> float:
    """exp of the mean cross-entropy of `windows` [W, L], each scored from its second token on.

    Raises ValueError when llama.cpp does not load the file or its vocabulary is smaller than the ids.
    """
    import llama_cpp

    model, size = load_model(file)
    if int(windows.max()) >= size:
        raise ValueError(f"{file} has {size} tokens and the text has token {int(windows.max())}; is it of another model?")
    length = windows.shape[1]
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = length
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    batch = llama_cpp.llama_batch_init(length, 0, 1)
    batch.n_tokens = length
    losses = []
    for window in windows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        for at, token in enumerate(window.tolist()):
            batch.token[at], batch.pos[at], batch.logits[at] = token, at, True
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        if (code := llama_cpp.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama_decode ended with {code} on {length} tokens")
        start = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        logits = torch.from_numpy(np.ctypeslib.as_array(start, (length, size)).copy())
        losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], window[1:])))
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return math.exp(sum(losses) / len(losses))


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--text", help="As of `quantize eval`.")
@click.option("--length", type=int, default=1024, show_default=True, help="Tokens of a window.")
@click.option("--limit", type=int, default=8, show_default=True, help="Windows.")
def main(out: Path, file: Path, text: str | None, length: int, limit: int) -> None:
    """The perplexity of OUT by quant.load in float32 and of FILE by llama.cpp, and their ratio."""
    from transformers import AutoTokenizer

    from quant.text import documents, windows

    if why := Choice(name="llama.cpp", variant="F16").missing():
        raise click.UsageError(f"llama.cpp is {why}")
    loading.quiet()
    ids = windows(AutoTokenizer.from_pretrained(out), documents(text, "evaluation"), length, limit, seed=None).tokens
    ours = perplexity.evaluate(loading.load(out, torch.float32, "cpu", False), ids).perplexity
    theirs = llama_perplexity(file, ids, torch.get_num_threads())
    change = 100 * (theirs / ours - 1)
    click.echo(f"{len(ids)} windows of {length}: quant.load {ours:.4f}, llama.cpp {theirs:.4f}, {change:+.2f} %")


if __name__ == "__main__":
    main()
