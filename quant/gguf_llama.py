"""A Llama checkpoint from a GGUF file: weights dequantized to float16, configuration, tokenizer, chat template.

Only what a demo model needs: architecture `llama`, a byte-level BPE vocabulary, tied or separate head. Nothing in the file is
executed. A few rows at a time are float32; the rest is held as the float16 that is written.

GGUF stores the query and key projections with each head's rows interleaved for adjacent-pair rotary embedding; transformers
rotates the two halves of a head, so the rows are put back:  row 2i + j of a head  ->  row j * head_dim / 2 + i,  j in {0, 1}.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # transformers' word -> GGUF's
CHUNK_VALUES = 1 << 22  # values dequantized at once
CONTROL_TOKEN = 3  # value in tokenizer.ggml.token_type


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. Raises ValueError for a name Llama does not have."""
    stem, _, kind = name.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"model.layers.{layer}."
    if stem not in NAMES:
        raise ValueError(f"GGUF tensor {name!r} has no place in a Llama model; known stems: {', '.join(NAMES)}")
    return f"{prefix}{NAMES[stem]}.{kind}"


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, K] with rows interleaved per head -> the same rows in half-split order."""
    rows, k = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, k).transpose(1, 2).reshape(rows, k)


def convert(gguf_file: Path, out: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors (float16) and the tokenizer into the folder `out`.

    Raises ValueError when the file is not a Llama with a byte-level BPE vocabulary.
    """
    from gguf import GGUFReader, dequantize
    from transformers import GenerationConfig, LlamaConfig

    reader = GGUFReader(str(gguf_file))

    def meta(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    given = (meta("general.architecture"), meta("tokenizer.ggml.model"))
    if given != ("llama", "gpt2"):
        raise ValueError(f"GGUF architecture and tokenizer are {given}; only ('llama', 'gpt2') is read here")
    heads, kv_heads = meta("llama.attention.head_count"), meta("llama.attention.head_count_kv")
    heads_of = {"attn_q": heads, "attn_k": kv_heads}
    state = {}
    for tensor in reader.tensors:
        # a few rows at a time, because the temporaries of a whole embedding would be the peak of memory
        blocks = np.array_split(tensor.data, math.ceil(tensor.n_elements / CHUNK_VALUES))
        weight = torch.cat([torch.tensor(dequantize(rows, tensor.tensor_type), dtype=torch.float16) for rows in blocks])
        stem = tensor.name.split(".")[-2]
        if stem in heads_of:
            weight = unpermute(weight, heads_of[stem])
        state[hf_name(tensor.name)] = weight.contiguous()

    special = {f"{kind}_token_id": meta(f"tokenizer.ggml.{key}_token_id") for kind, key in SPECIAL.items()}
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=state["model.embed_tokens.weight"].shape[0],
        hidden_size=meta("llama.embedding_length"),
        intermediate_size=meta("llama.feed_forward_length"),
        num_hidden_layers=meta("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=meta("llama.context_length"),
        # stored as float32: seven significant digits bring back the number that was written, 1e-05 and not 9.99999974e-06
        rms_norm_eps=float(f"{meta('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(meta("llama.rope.freq_base", 10000.0))},
        tie_word_embeddings="lm_head.weight" not in state,
        dtype="float16",
        **special,
    )
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(out)
    GenerationConfig(**{key: special[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}).save_pretrained(out)
    _save_tokenizer(meta, out)


def pre_tokenizers() -> dict[str, Any]:
    """GGUF's name of a `pre` rule -> how text is split: `smollm` splits every digit before the GPT-2 rule."""
    from tokenizers import pre_tokenizers as parts

    splits: dict[str, list[Any]] = {"smollm": [parts.Digits(individual_digits=True)], "gpt-2": []}
    return {rule: parts.Sequence([*before, parts.ByteLevel(add_prefix_space=False)]) for rule, before in splits.items()}


def _save_tokenizer(meta: Any, out: Path) -> None:
    """Byte-level BPE exactly as the `pre` rule of the file says."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = meta("tokenizer.ggml.tokens"), meta("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in meta("tokenizer.ggml.merges")]
    known, rule = pre_tokenizers(), meta("tokenizer.ggml.pre")
    if rule not in known:
        raise ValueError(f"GGUF pre-tokenizer {rule!r} is not known here; known: {', '.join(known)}")
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = known[rule]
    bpe.decoder = decoders.ByteLevel()
    controls = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in controls])
    names = {f"{kind}_token": meta(f"tokenizer.ggml.{key}_token_id") for kind, key in SPECIAL.items()}
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=meta("llama.context_length"),
        chat_template=meta("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in names.items() if i is not None},
    ).save_pretrained(out)
    # transformers 5 writes the name of its own base class, which version 4 does not know; both know this one
    path = out / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
