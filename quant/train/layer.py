"""A packed linear in training: what is continuous in its format moves, tokens are rounded straight through.

    W(theta, codes) = format.dequantize(codes, start * exp(theta))         theta: one number per stored scale, 0 at first

Entries of a codebook may pass through 0: they are start + rms(start) theta. For PV-Tuning (Malinovskii et al., 2024) this is
the P step; `latent.py` has the V step, on codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.kernels.activations.adaptive_token import TAGS
from quant.kernels.format import Codes, Fields
from quant.linear import PackedLinear

CONTINUOUS = (torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32)


class Trained(nn.Module):
    """In the place of a PackedLinear [N, K]. `refresh` makes the dense weight of forward, `collect` takes its gradient."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.format, self.activation = packed.format, packed.activation
        self.n, self.k = packed.out_features, packed.in_features
        fields = packed.fields()
        found = self.format.unpack(fields, self.n, self.k)
        self.codes = found.codes
        self.start = dict(found.params)
        self.inputs = {name: fields[name] for name in self.activation.fields(self.k)}
        self.tags = packed.tags
        fixed = self.format.whole - self.format.additive  # NVFP4's divisor is shared by the layers that engines fuse
        moving = [name for name, value in self.start.items() if value.dtype in CONTINUOUS and name not in fixed]
        self.theta = nn.ParameterDict({name: torch.zeros_like(self.start[name], dtype=torch.float32) for name in moving})
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.detach().float())
        self.dense = torch.empty(0)

    def params(self) -> dict[str, Tensor]:
        """The format's parameters as they would be stored, differentiable in theta."""
        found = dict(self.start)
        for name, theta in self.theta.items():
            dtype = self.start[name].dtype
            start = self.start[name].float()
            value = start + start.square().mean().sqrt() * theta if name in self.format.additive else start * theta.exp()
            stored = value.clamp(max=torch.finfo(dtype).max).to(dtype).float()  # NVFP4 starts its largest scale there
            found[name] = value + (stored - value).detach()
        return found

    def weight(self, codes: Tensor) -> Tensor:
        """float32 [N, K]."""
        return self.format.dequantize(Codes(codes, self.params()))

    def refresh(self, dtype: torch.dtype) -> None:
        """Make the dense weight of the next forward passes, a leaf that gathers their gradients."""
        with torch.no_grad():
            self.dense = self.weight(self.codes).to(dtype)
        self.dense.requires_grad_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation.rotated(x)
        if self.activation.name != "none":
            fields = self.inputs if self.tags is None else {**self.inputs, TAGS: self.tags.of(x)}
            x = x + (self.activation.quantize(x, fields).to(x.dtype) - x).detach()
        return nn.functional.linear(x, self.dense, self.bias)  # of two dtypes only under autocast, which keeps `dense` as it is

    def collect(self) -> Tensor | None:
        """Pass the dense weight's gradient on to theta, whose .grad is set; returns it as float32 [N, K], None without one."""
        if self.dense.grad is None:
            return None
        grad = self.dense.grad.float()
        if self.theta:  # mxfp4 stores no number that could move a little
            self.weight(self.codes).backward(grad)  # type: ignore[no-untyped-call]
        return grad

    @torch.no_grad()
    def fields(self) -> Fields:
        """What is stored: the format's bytes and the activation rule's tensors."""
        params = {name: value.to(self.start[name].dtype) for name, value in self.params().items()}
        return self.format.pack(Codes(self.codes, params)) | self.inputs
