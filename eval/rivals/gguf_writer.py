"""A GGUF file from a Llama checkpoint in Hugging Face layout, without a tokenizer: benchmarks feed token ids.

The weights are stored without loss: float16 as it is, anything else as float32; one-dimensional tensors as float32, as
ggml wants them. llama.cpp rotates adjacent pairs, transformers the two halves of a head, so query and key rows move:
    row j * head_dim / 2 + i of a head  ->  row 2i + j,  j in {0, 1}
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from quant.gguf_llama import NAMES
from quant.models import Weights, model_class


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


def write(source: Path, out: Path) -> None:
    """Write the checkpoint folder `source` to the file `out`.

    Raises ValueError for architectures other than Llama, scaled rotary embeddings, and tensors without a GGUF name.
    """
    from gguf import GGUFWriter

    config, cls = model_class(source)
    if cls.__name__ != "LlamaForCausalLM":
        raise ValueError(f"{source} is a {cls.__name__}; GGUF files are written for LlamaForCausalLM only")
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(f"{source} scales its rotary embedding ({rope['rope_type']}); GGUF files are written for default only")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = GGUFWriter(out, "llama")
    writer.add_tokenizer_model("none")
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
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    weights = Weights(source)
    for name in weights.names():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = weights.read(name)
        target = gguf_name(name)
        if ".attn_q." in target or ".attn_k." in target:
            weight = permute(weight, heads if ".attn_q." in target else kv_heads)
        whole = weight.dtype != torch.float16 or weight.ndim == 1
        writer.add_tensor(target, (weight.float() if whole else weight).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
