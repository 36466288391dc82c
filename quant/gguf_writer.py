"""A GGUF file of a Llama, tensor by tensor: names, metadata, and the order of rows that llama.cpp wants.

llama.cpp rotates adjacent pairs, transformers the two halves of a head, so query and key rows move:
    row j * head_dim / 2 + i of a head  ->  row 2i + j,  j in {0, 1}
One-dimensional tensors must be float32. The inverse is `gguf_llama.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.gguf_llama import NAMES

ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor to be written.

    name: in transformers. kind: ggml type ("Q4_0"), None: that of the dtype. make: called when its turn comes; float16 or
    float32 values of that shape, or uint8 [rows, bytes of a row].
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    kind: str | None = None

    @property
    def nbytes(self) -> int:
        """Of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def permute(weight: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, ...] with rows in half-split order -> the same rows interleaved per head."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`. Raises ValueError for a tensor Llama does not have."""
    stem, _, kind = name.rpartition(".")
    prefix = ""
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        prefix = f"blk.{layer}."
    for short, long in NAMES.items():
        if stem == long:
            return f"{prefix}{short}.{kind}"
    raise ValueError(f"tensor {name} has no place in llama.cpp's llama architecture")


def lossless(name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> Stored:
    """A float tensor as it is: float16 matrices stay, anything else becomes float32."""
    kept = torch.float16 if dtype == torch.float16 and len(shape) > 1 else torch.float32
    return Stored(name=name, shape=shape, dtype=kept, make=lambda: make().to(kept))


def require_llama(source: Path, config: Any, cls: Any) -> None:
    """Raise ValueError for architectures other than Llama and for scaled rotary embeddings."""
    if cls.__name__ != ARCHITECTURE:
        raise ValueError(f"{source} is a {cls.__name__}; GGUF files are written for {ARCHITECTURE} only")
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(f"{source} scales its rotary embedding ({rope['rope_type']}); GGUF files are written for default only")


def write(config: Any, tensors: Sequence[Stored], out: Path, describe: Callable[[Any], None]) -> None:
    """Write the file `out`, one tensor in memory at a time.

    config: of a model that `require_llama` took. describe: adds the tokenizer, and what else is to be said, to the writer.
    Raises ValueError for tensors without a GGUF name.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    heads_of = {"attn_q": heads, "attn_k": kv_heads}
    writer = GGUFWriter(out, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    describe(writer)
    names = [gguf_name(tensor.name) for tensor in tensors]
    for name, tensor in zip(names, tensors, strict=True):
        kind = None if tensor.kind is None else GGMLQuantizationType[tensor.kind]
        dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        writer.add_tensor_info(name, tensor.shape, dtype, tensor.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in zip(names, tensors, strict=True):
        value = tensor.make()
        assert (value.dtype, tuple(value.shape)) == (tensor.dtype, tensor.shape), tensor.name
        stem = name.split(".")[-2]
        value = permute(value, heads_of[stem]) if stem in heads_of else value
        writer.write_tensor_data(value.contiguous().numpy())
    writer.close()
