"""A packed linear in training: float tensors of its format move by gradient, codes by a latent weight, tokens straight through.

    W(theta, codes) = format.dequantize(codes, start * exp(theta))         theta: one number per stored scale, 0 at first
    U <- U - codes_rate * step * clip(g / rms(g), -3, 3)                   g = dL/dW, rms over a row, U = W at first
    codes <- nearest(U) where |U - W| is among the largest tau of the layer

so a weight changes its code when gradients of many batches agree, and few do at a time (PV-Tuning, Malinovskii et al., 2024:
a P step on what is continuous, a V step on codes in latent mode with the subspace limit tau; its authors use LAMB where this
divides by a row's RMS). Nothing is kept per weight but U.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.kernels.format import Codes, Fields
from quant.linear import PackedLinear

REACH = 3.0  # of a latent's move, in units of the row's RMS gradient: one outlier token must not throw codes about
CONTINUOUS = (torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32)


class Trained(nn.Module):
    """In the place of a PackedLinear [N, K]. `refresh` makes the dense weight of forward, `collect` takes its gradient."""

    def __init__(self, packed: PackedLinear, codes: bool) -> None:
        super().__init__()
        self.format, self.activation = packed.format, packed.activation
        self.n, self.k = packed.out_features, packed.in_features
        fields = packed.fields()
        found = self.format.unpack(fields, self.n, self.k)
        self.codes = found.codes
        self.start = dict(found.params)
        self.inputs = {name: fields[name] for name in self.activation.fields(self.k)}
        moving = [name for name, value in self.start.items() if value.dtype in CONTINUOUS and name not in self.format.whole]
        self.theta = nn.ParameterDict({name: torch.zeros_like(self.start[name], dtype=torch.float32) for name in moving})
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.detach().float())
        self.dense = torch.empty(0)
        self.latent = self.weight(codes=self.codes).detach() if codes else None

    def params(self) -> dict[str, Tensor]:
        """The format's parameters as they would be stored, differentiable in theta."""
        found = dict(self.start)
        for name, theta in self.theta.items():
            dtype = self.start[name].dtype
            value = self.start[name].float() * theta.exp()
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
            x = x + (self.activation.quantize(x, self.inputs).to(x.dtype) - x).detach()
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
    def move_codes(self, grad: Tensor, rate: float, tau: float) -> int:
        """One V step along `grad` [N, K]; returns how many codes changed."""
        assert self.latent is not None
        params = self.params()
        size = grad.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        step = self.format.steps(params).abs()
        move = (grad / size).clamp_(-REACH, REACH).view(*step.shape, -1) * (rate * step.unsqueeze(-1))
        self.latent -= move.view_as(self.latent)
        wanted = self.format.project(self.latent, params)
        now = self.weight(self.codes)
        moved = self.weight(wanted) != now  # by value: a float format has two codes for zero
        most = max(1, int(tau * moved.numel()))
        if int(moved.sum()) > most:
            far = torch.where(moved, (self.latent - now).abs(), 0.0)
            moved &= far >= far.flatten().topk(most).values[-1]
        self.codes = torch.where(moved, wanted, self.codes)
        return int(moved.sum())

    @torch.no_grad()
    def fields(self) -> Fields:
        """What is stored: the format's bytes and the activation rule's tensors."""
        params = {name: value.to(self.start[name].dtype) for name, value in self.params().items()}
        return self.format.pack(Codes(self.codes, params)) | self.inputs
