"""vLLM's quantization config for `quant_method: lowbit`: which method a layer gets. Importing this file registers it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from quant.checkpoint import METHOD, require_version, scheme_of
from quant.serve.vllm.methods import PackedLinearMethod, PackedTableMethod, TiedHeadMethod
from quant.serve.vllm.names import Architecture, architecture_of, fused_names, one_scheme


@register_quantization_config(METHOD)
class LowbitConfig(QuantizationConfig):  # type: ignore[misc]
    """config.json's `quantization_config`. Unknown keys are vLLM's own; a newer version of the format is refused."""

    def __init__(self, section: dict[str, Any]) -> None:
        super().__init__()
        require_version(section)
        self.section = section
        self.architecture: Architecture | None = None

    def get_name(self) -> str:
        """As in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What kernels take as x."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: the kernels refuse for themselves, with their reasons."""
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowbitConfig:
        """vLLM's constructor."""
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM calls this before it builds the model."""
        self.architecture = architecture_of(self.section, getattr(hf_config, "architectures", None) or [])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer that vLLM calls `prefix`; None leaves it as it is."""
        assert self.architecture is not None, "vLLM did not call maybe_update_config"
        name, table = self.architecture.on_disk(prefix), self.architecture.table
        if isinstance(layer, LinearBase):
            names = fused_names(name, self.packed_modules_mapping)
            scheme = one_scheme(self.section, names)
            if scheme is None:
                return UnquantizedLinearMethod()
            new_bias = set(self.section.get("bias", ()))
            return PackedLinearMethod(names, scheme, [n for n in names if n in new_bias])
        if not isinstance(layer, VocabParallelEmbedding):
            return None
        tied = scheme_of(self.section, table)  # an input embedding is packed where the head multiplies by it, and only there
        if not isinstance(layer, ParallelLMHead):
            return None if tied is None else PackedTableMethod(table, tied)
        if (own := scheme_of(self.section, name)) is not None:
            return PackedTableMethod(name, own)
        return None if tied is None else TiedHeadMethod(table, tied)
