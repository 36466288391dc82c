"""Norms and activations of a loaded model on our CPU kernels: fewer passes than torch's, and the bits that graphs compute.

A module keeps its weights, its name and its place; only its class changes. Where our kernels cannot serve a call (another
device, gradients, unequal dtypes), torch computes the same formula.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.kernels.cpu import library, pointwise

assert pointwise.KINDS  # importing it registers the operators

OPS = torch.ops.lowbit
RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")  # of transformers: one formula


def serves(x: Tensor, *weights: Tensor) -> bool:
    """Whether our kernels take this call."""
    if x.device.type != "cpu" or x.dtype not in library.DTYPES:
        return False
    if torch.is_grad_enabled() and any(one.requires_grad for one in (x, *weights)):
        return False
    return all(one.dtype == x.dtype for one in weights)


class RMSNorm(nn.Module):
    """y = weight * (x / sqrt(mean(x^2) + eps)), the bracket rounded to x's dtype."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        if serves(x, self.weight):
            y: Tensor = OPS.cpu_rms_norm(x.contiguous(), self.weight, self.variance_epsilon)
            return y
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class LayerNorm(nn.LayerNorm):
    """Over the last dimension, with weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        if not serves(x, self.weight, self.bias):
            return super().forward(x)
        y: Tensor = OPS.cpu_layer_norm(x.contiguous(), self.weight, self.bias, self.eps)
        return y


class SiLU(nn.Module):
    """x / (1 + e^-x)."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = OPS.cpu_silu(x.contiguous()) if serves(x) else functional.silu(x)
        return y


class GELU(nn.Module):
    """With the error function, not an approximation of it."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = OPS.cpu_gelu(x.contiguous()) if serves(x) else functional.gelu(x)
        return y


def replacement(module: nn.Module) -> type[nn.Module] | None:
    """Our class for `module`, or None where there is none that computes the same."""
    kind = type(module)
    if isinstance(module, nn.LayerNorm):
        whole = len(module.normalized_shape) == 1 and module.weight is not None and module.bias is not None
        return LayerNorm if kind is nn.LayerNorm and whole else None
    if not kind.__module__.startswith("transformers."):
        return SiLU if kind is nn.SiLU else None
    if kind.__name__ in RMS_NORMS:
        return RMSNorm
    if kind.__name__ == "GELUActivation":
        return GELU if getattr(module, "act", None) is functional.gelu else None
    return SiLU if kind.__name__ == "SiLUActivation" else None


def install(model: nn.Module) -> None:
    """Give every norm and activation that we have a kernel for our class."""
    for module in model.modules():
        if (ours := replacement(module)) is not None:
            module.__class__ = ours
