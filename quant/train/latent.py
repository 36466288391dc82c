"""A trained linear whose codes are, at any time, the rounding of a latent weight, straight through.

    W = dequantize(nearest(V step), step),   dL/dV := step dL/dW        V: `steps`, [N, K]; W / step at first

so every weight can change its code in a short training. V counts in steps of its group and is held between the lowest and the
highest level of the grid: from an end it is as far to the next code as from anywhere else, and no weight is lost beyond it. A
change of the scale alone changes no code.

EfficientQAT (Chen et al., 2024) trains weights, scales and zero points of a block so, by Adam, from latents at the float
weight. That throws away the choice of codes which GPTQ made together; a short training does not win it back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quant.kernels.format import Codes
from quant.linear import PackedLinear
from quant.train.layer import Trained


class Latent(Trained):
    """In the place of a PackedLinear [N, K]; `refresh` rounds."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__(packed, codes=False)
        step = self.spread(self.format.steps(self.start))
        self.low, self.high = (self.end(step, sign) for sign in (-1.0, 1.0))
        self.steps = nn.Parameter(self.weight(self.codes).detach() / step)

    def spread(self, step: Tensor) -> Tensor:
        """[N, K // G] -> [N, K]."""
        return step.repeat_interleave(self.k // step.shape[1], 1)

    def end(self, step: Tensor, sign: float) -> Tensor:
        """The lowest (sign -1) or highest level of each group's grid, in steps: [N, K // G, 1]; step [N, K]."""
        codes = self.format.project(sign * 1e6 * step, self.start)
        levels = self.format.dequantize(Codes(codes, self.start)) / step
        return levels.view(self.n, -1, self.k // self.format.steps(self.start).shape[1])[..., :1].clone()

    @torch.no_grad()
    def hold(self) -> None:
        """Bring the latents back between the ends of their grids."""
        self.steps.view(*self.low.shape[:2], -1).clamp_(self.low, self.high)

    def collect(self) -> Tensor | None:
        grad = super().collect()
        if grad is not None:
            with torch.no_grad():
                self.steps.grad = grad * self.spread(self.format.steps(self.params()))
        return grad

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        params = self.params()
        self.codes = self.format.project(self.steps * self.spread(self.format.steps(params)), params)
        super().refresh(dtype)
