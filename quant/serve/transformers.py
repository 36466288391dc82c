"""lowbit checkpoints in transformers: `AutoModel*.from_pretrained(OUT)` and `save_pretrained` after `import quant`.

transformers has no entry point for quantizers. `import quant` therefore registers this file as soon as transformers'
quantizer registry is imported (`serve/hook.py`).
"""

from __future__ import annotations

import re
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quant import checkpoint
from quant.checkpoint import METHOD, SENTINEL_SHAPE, check_layers, has_bias, require_version, scheme_of, softmax_bits
from quant.embedding import PackedEmbedding, install, packable, replace, size_of
from quant.experts import PARTS, stacks_of, unstack
from quant.linear import PackedLinear
from quant.models import read_header
from quant.naming import renamings
from quant.serve.dequantize import dequantize
from quant.siblings import link
from quant.stacks import disk_layers


@register_quantization_config(METHOD)
class LowbitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` section, kept as it was read."""

    def __init__(self, **section: Any) -> None:
        require_version(section)
        self.section = {**section, "quant_method": METHOD}
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """What goes back into config.json."""
        return dict(self.section)

    def to_diff_dict(self) -> dict[str, Any]:
        """There are no defaults to leave out."""
        return self.to_dict()


@register_quantizer(METHOD)
class LowbitQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces linears by empty PackedLinears before transformers reads the tensors."""

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Everything needed is a dependency of this package."""
        if not self.pre_quantized:
            raise ValueError("a lowbit config only describes a packed checkpoint; make one with: quantize --recipe dgq MODEL")

    def update_device_map(self, device_map: Any) -> Any:
        """As it is given. Packed tensors are buffers in the layout of a kernel, so accelerate cannot take them away again."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            warnings.warn(
                "device_map puts layers on disk: only what is in float goes there, packed layers stay in memory", stacklevel=2
            )
        return device_map

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: Any = None, **kwargs: Any) -> None:
        section = self.quantization_config.section
        self.loading = weakref.ref(model)
        unstack(model)
        if checkpoint_files:  # transformers would fill what is missing with random numbers
            check_layers(section, {n: e for file in checkpoint_files for n, e in read_header(Path(file)).items()}, model)
        layers = packable(model)
        names = disk_layers(model, list(layers), checkpoint_files or [])
        replaced = []
        for name, module in layers.items():
            scheme = scheme_of(section, names.get(name, name))
            if scheme is None or (names and name not in names):
                continue
            (n, k), weight = size_of(module), module.get_parameter("weight")
            if isinstance(module, nn.Embedding):
                table = PackedEmbedding(k, n, *scheme, bias=False, device=weight.device, dtype=weight.dtype)
                install(model, name, table)
            else:
                bias = has_bias(section, names.get(name, name), module)
                replace(model, name, PackedLinear(k, n, *scheme, bias=bias, device=weight.device, dtype=weight.dtype))
            replaced.append(name)
        if not replaced:
            raise ValueError("no rule of quantization_config matches a linear of this model; config.json is damaged")
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self.sentinel = f"{replaced[0]}.weight"
        ignored: set[str] = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        ignored |= {rf"^{re.escape(name)}\.weight$" for name in (replaced[0], names.get(replaced[0], replaced[0]))}
        setattr(model, "_keys_to_ignore_on_load_unexpected", ignored)  # noqa: B010

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Experts are loaded one by one, not merged. transformers 5.17 does not say for which model it asks."""
        self.stock = weight_conversions
        return renamings(self.loading() if model is None else model, weight_conversions)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not hasattr(HfQuantizer, "get_new_dtype"):
            recast(model, self.dtypes)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                module.require_valid(name)
                module.requires_grad_(False)  # transformers has made the bias trainable
        # not above: model code may be half imported when this file is
        from quant.kernels.cpu import library
        from quant.serve import attention, pointwise, softmax, token_bits

        link(model)
        places = {str(place) for place in getattr(model, "hf_device_map", {"": model.device.type}).values()}
        if places <= {"cpu", "disk"} and library.available():
            pointwise.install(model)
            if model.config._attn_implementation == "sdpa":
                attention.register()
                model.set_attn_implementation(attention.NAME)
        bits = softmax_bits(self.quantization_config.section)
        if bits is not None:
            model.set_attn_implementation(softmax.register(bits))
        thresholds = checkpoint.token_thresholds(self.quantization_config.section)
        if thresholds is not None:
            token_bits.install(model, thresholds)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """See quant/serve/dequantize.py. Raises ValueError where the model's class has no place for what was packed."""
        if extra := self.quantization_config.section.get("bias"):
            kind = type(model).__name__
            raise ValueError(f"{extra[0]} was given a bias, which a float {kind} has no place for; this model stays packed")
        merged = [f"{name}.{param}" for name in stacks_of(model) for param in PARTS]
        dequantize(model, model.dtype if dtype is None else dtype)
        section = self.quantization_config.section
        if softmax_bits(section) is not None or checkpoint.token_thresholds(section) is not None:
            model.set_attn_implementation("sdpa")
        if merged:  # save_pretrained names and takes apart what is one tensor again
            used = model._weight_conversions or []
            model._weight_conversions = [s for s in self.stock if s in used or makes(s, merged)]
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The canonical bytes of every packed layer, and the sentinel that stops loaders that do not know us."""
        state = model.state_dict()
        state[self.sentinel] = torch.empty(SENTINEL_SHAPE, dtype=torch.uint8)
        return state, {}

    def is_serializable(self) -> bool:
        """save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False


def makes(step: Any, names: list[str]) -> bool:
    """Whether a weight transform of transformers makes one of these parameters."""
    return any(name.endswith(pattern.rstrip("$")) for pattern in step.target_patterns for name in names)


def recast(model: Any, wanted: dict[str, torch.dtype]) -> None:
    """Float parameters to the dtype they were made in: transformers 5.17 to 5.20 load what they rename in that of the disk."""
    kept = model._get_dtype_plan(model.dtype)  # name or part of it -> float32
    for name, parameter in model.named_parameters():
        exempt = any(re.search(rf"(^|[.]){re.escape(part)}([.]|$)", name) for part in kept)
        if not exempt and parameter.dtype != wanted.get(name, parameter.dtype):
            parameter.data = parameter.data.to(wanted[name])
