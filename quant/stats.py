"""What is known about the inputs of a group of linears that read the same tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.kernels.rotation import by_matrix, rotate_gram

GRAM_BLOCK = 384
ROWS_KEPT = 8  # tokens per sequence that are kept as they are


@dataclass
class InputStats:
    """Sums over calibration tokens, float32 on the device the block ran on.

    gram: X^T diag(w) X of the quantized chain, [K, K], w the weights of the tokens; filled by `finish`.
    drift: (X_float - X)^T diag(w) X, what quantizing the blocks before has changed, [K, K]; None where no pass asks for it.
    sample_absmax: per calibration sequence, the absmax of each channel: a list of [K].
    token_absmax: the absmax of each token: a list of [tokens].
    rows: a few whole tokens of each sequence, evenly spread: a list of [up to 8, K].
    tokens: tokens seen, padding excluded.
    divided: what folds have divided the channels by since, [K]; None before the first.
    data: False where these were too few to go by: then gram is the identity, and errors of outputs are errors of weights.
    """

    gram: Tensor
    drift: Tensor | None = None
    sample_absmax: list[Tensor] = field(default_factory=list)
    token_absmax: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    divided: Tensor | None = None
    data: bool = True

    @classmethod
    def without_data(cls, k: int, device: torch.device, tokens: int) -> InputStats:
        """Of a layer that saw `tokens` tokens, too few to learn from."""
        return cls(torch.eye(k, device=device), tokens=tokens, data=False)

    @classmethod
    def empty(cls, k: int, device: torch.device, drift: bool) -> InputStats:
        """Before the first token. drift: whether `add` will be given the float chain."""
        return cls(torch.zeros(k, k, device=device), torch.zeros(k, k, device=device) if drift else None)

    def add(self, x: Tensor, x_float: Tensor | None, mask: Tensor | None) -> None:
        """Account for x and x_float [B, L, K] of the two chains; mask [B, L] is False on padding, or weighs the tokens."""
        for row in range(x.shape[0]):
            keep = slice(None) if mask is None else mask[row] > 0
            here = x[row][keep].float()
            if not len(here):
                continue
            size = here.abs()
            self.sample_absmax.append(size.amax(0))
            self.token_absmax.append(size.amax(1))
            self.rows.append(here[:: -(-len(here) // ROWS_KEPT)].clone())  # a view would keep all of `here`
            self.tokens += len(here)
            weighed = here
            if mask is not None and mask.is_floating_point():
                weighed = here * mask[row][keep].unsqueeze(1)
            for start in range(0, here.shape[1], GRAM_BLOCK):  # above the diagonal only: the Gram matrix is symmetric
                columns = slice(start, start + GRAM_BLOCK)
                self.gram[columns, start:].addmm_(weighed[:, columns].T, here[:, start:])
            if self.drift is not None:
                assert x_float is not None
                # a small difference needs no float32: its own rounding is what a bfloat16 product loses
                self.drift += (x_float[row][keep].float() - here).to(x.dtype).T @ weighed.to(x.dtype)

    def finish(self) -> None:
        """Complete the Gram matrix after the last `add`."""
        self.gram = self.gram.triu() + self.gram.triu(1).T

    @property
    def absmax(self) -> Tensor:
        """Per channel, over all samples: [K]."""
        return torch.stack(self.sample_absmax).amax(0)

    def channel_quantile(self, q: float) -> Tensor:
        """Per channel, the q-quantile over samples of the sample's absmax: [K]. q = 0 is DGQ's minimum over samples."""
        return torch.stack(self.sample_absmax).quantile(q, dim=0)

    def token_quantile(self, q: float) -> float:
        """The q-quantile over tokens of the token's absmax; 0 without data."""
        if not self.data:
            return 0.0
        return float(torch.cat(self.token_absmax).quantile(q))

    def divide_channels(self, r: Tensor) -> None:
        """Follow a fold that divides channel j of X by r[j]."""
        self.gram /= r.unsqueeze(0) * r.unsqueeze(1)
        if self.drift is not None:
            self.drift /= r.unsqueeze(0) * r.unsqueeze(1)
        self.sample_absmax = [a / r for a in self.sample_absmax]
        self.rows = [x / r for x in self.rows]
        self.divided = r if self.divided is None else self.divided * r

    def rotated(self, size: int) -> InputStats:
        """What would have been seen of tokens rotated in blocks of `size`; channel maxima are those of the kept rows."""
        if not size or not self.data:
            return self
        rows = [by_matrix(x, size) for x in self.rows]
        drift = None if self.drift is None else rotate_gram(self.drift, size)
        maxima = [x.abs().amax(0) for x in rows]
        return InputStats(rotate_gram(self.gram, size), drift, maxima, self.token_absmax, rows, self.tokens)

    def require_finite(self, names: list[str]) -> None:
        """Raise ValueError naming the layers whose inputs held a NaN or an infinity, or that saw no token at all."""
        if not self.tokens:
            raise ValueError(
                f"{names[0]} received no calibration data; leave it in float with a rule {{match: {names[0]}, skip: true}}"
            )
        if not all(t.isfinite().all() for t in (self.gram, self.drift) if t is not None):
            raise ValueError(
                f"the calibration inputs of {names[0]} hold a NaN or an infinity; check the model and the calibration data"
            )
