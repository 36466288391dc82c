"""A GGUF file from a Llama checkpoint in Hugging Face layout, without a tokenizer: benchmarks feed token ids.

The weights are stored without loss.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from quant import gguf_writer
from quant.models import Weights, model_class


def write(source: Path, out: Path) -> None:
    """Write the checkpoint folder `source` to the file `out`.

    Raises ValueError for architectures other than Llama, scaled rotary embeddings, and tensors without a GGUF name.
    """
    config, cls = model_class(source)
    gguf_writer.require_llama(source, config, cls)
    weights = Weights(source)
    tensors = [
        gguf_writer.lossless(name, weights.shape(name), weights.dtype(name), partial(weights.read, name))
        for name in weights.names()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    ]
    gguf_writer.write(config, tensors, out, lambda writer: writer.add_tokenizer_model("none"))
