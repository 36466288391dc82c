"""LLaDA and Dream: on the hub they come with code of their own, which is never run here; transformers has their layers.

LLaDA (Nie et al., 2025) is a Llama, Dream (Ye et al., 2025) a Qwen2, both with attention to both sides. LLaDA spells its
configuration and its tensors in its own way. `register` makes transformers know both, without remote code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

KEYS = {  # of a LLaDA config.json -> of a Llama's
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}
LLAMA = {  # what a LLaDA config.json must say, where it says it, for its blocks to be a Llama's
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
}
BLOCK = r"model\.transformer\.blocks\.(\d+)\."
TENSORS = {  # of LLaDA -> of Llama
    BLOCK + r"attn_norm\.": r"model.layers.\1.input_layernorm.",
    BLOCK + r"q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    BLOCK + r"k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    BLOCK + r"v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    BLOCK + r"attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    BLOCK + r"ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    BLOCK + r"ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    BLOCK + r"up_proj\.": r"model.layers.\1.mlp.up_proj.",
    BLOCK + r"ff_out\.": r"model.layers.\1.mlp.down_proj.",
    r"model\.transformer\.wte\.": "model.embed_tokens.",
    r"model\.transformer\.ln_f\.": "model.norm.",
    r"model\.transformer\.ff_out\.": "lm_head.",
}


def as_llama(values: Mapping[str, Any]) -> dict[str, Any]:
    """A LLaDA config.json with the keys of a Llama's. Raises ValueError for blocks that are no Llama's."""
    for key, known in LLAMA.items():
        if values.get(key) not in (None, known):
            raise ValueError(f"a LLaDA model with {key} {values[key]!r} is not known; known is {known!r}")
    found = {KEYS.get(key, key): value for key, value in values.items()}
    if values.get("embedding_size"):
        found["vocab_size"] = values["embedding_size"]  # rows of the table; those beyond the vocabulary are never read
    if "d_model" in values and not values.get("mlp_hidden_size"):
        found["intermediate_size"] = values["mlp_ratio"] * values["d_model"]
    return found | {"is_causal": False}


class LLaDAConfig(LlamaConfig):  # type: ignore[misc]
    """config.json of LLaDA."""

    model_type = "llada"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does, from either spelling."""
        return super().from_dict(as_llama(config_dict), **kwargs)


class LLaDAModelLM(LlamaForCausalLM):  # type: ignore[misc]
    """LLaDA under the name that its config.json gives."""

    config_class = LLaDAConfig


class DreamConfig(Qwen2Config):  # type: ignore[misc]
    """config.json of Dream."""

    model_type = "Dream"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does, with attention to both sides."""
        return super().from_dict({**config_dict, "is_causal": False}, **kwargs)


class DreamModel(Qwen2ForCausalLM):  # type: ignore[misc]
    """Dream under the name that its config.json gives."""

    config_class = DreamConfig


CLASSES = {cls.__name__: cls for cls in (LLaDAModelLM, DreamModel)}


def register() -> None:
    """Make transformers' auto classes open LLaDA and Dream folders. Does nothing the second time."""
    for cls in CLASSES.values():
        AutoConfig.register(cls.config_class.model_type, cls.config_class, exist_ok=True)
        AutoModelForCausalLM.register(cls.config_class, cls, exist_ok=True)
    steps = [WeightRenaming(source_patterns=old, target_patterns=new) for old, new in TENSORS.items()]
    register_checkpoint_conversion_mapping(LLaDAModelLM.__name__, steps, overwrite=True)
