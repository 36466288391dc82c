"""What is known about the inputs of a group of linears that read the same tensor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quant.kernels.activation import Activation
from quant.kernels.format import Fields
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
    rows: a few whole tokens of each sequence, evenly spread: a list of [up to `kept`, K].
    tokens: tokens seen, those without weight excluded. mass: the sum of their weights.
    divided, offset: what folds have done to the channels since: they were X divided + offset, [K]; None before the first.
    data: False where these were too few to go by: then gram is the identity, and errors of outputs are errors of weights.
    total, drift_total: sums over tokens of w X and of w (X_float - X), [K].
    inputs: the tensors that the activation rule stores, where a pass has chosen them; None leaves that to the rule.
    """

    gram: Tensor
    drift: Tensor | None = None
    sample_absmax: list[Tensor] = field(default_factory=list)
    token_absmax: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    mass: float = 0.0
    divided: Tensor | None = None
    data: bool = True
    offset: Tensor | float = 0.0
    kept: int = ROWS_KEPT
    total: Tensor | None = None
    drift_total: Tensor | None = None
    inputs: Fields | None = None

    @classmethod
    def without_data(cls, k: int, device: torch.device, tokens: int) -> InputStats:
        """Of a layer that saw `tokens` tokens, too few to learn from."""
        return cls(torch.eye(k, device=device), tokens=tokens, data=False)

    @classmethod
    def empty(cls, k: int, device: torch.device, drift: bool, kept: int = ROWS_KEPT) -> InputStats:
        """Before the first token. drift: whether `add` will be given the float chain."""
        total = torch.zeros(k, device=device)
        stats = cls(torch.zeros(k, k, device=device), kept=kept, total=total)
        return replace(stats, drift=torch.zeros_like(stats.gram), drift_total=total.clone()) if drift else stats

    def add(self, x: Tensor, x_float: Tensor | None, mask: Tensor | None) -> None:
        """Account for x and x_float [B, L, K] of the two chains; mask [B, L] is False on padding, or weighs the tokens."""
        for row in range(x.shape[0]):
            keep = slice(None) if mask is None else mask[row] > 0
            here = x[row][keep].float()
            if not len(here):
                continue
            assert self.total is not None
            size = here.abs()
            self.sample_absmax.append(size.amax(0))
            self.token_absmax.append(size.amax(1))
            self.rows.append(here[:: -(-len(here) // self.kept)].clone())  # a view would keep all of `here`
            self.tokens += len(here)
            weights = here.new_ones(len(here), 1) if mask is None else mask[row][keep].unsqueeze(1).float()
            self.mass += float(weights.sum())
            weighed = here * weights
            self.total += weighed.sum(0)
            for start in range(0, here.shape[1], GRAM_BLOCK):  # above the diagonal only: the Gram matrix is symmetric
                columns = slice(start, start + GRAM_BLOCK)
                self.gram[columns, start:].addmm_(weighed[:, columns].T, here[:, start:])
            if self.drift is not None:
                assert x_float is not None
                assert self.drift_total is not None
                difference = x_float[row][keep].float() - here
                self.drift_total += (difference * weights).sum(0)
                # a small difference needs no float32: its own rounding is what a bfloat16 product loses
                self.drift += difference.to(x_float.dtype).T @ weighed.to(x_float.dtype)

    def finish(self) -> None:
        """Complete the Gram matrix after the last `add`."""
        self.gram = self.gram.triu() + self.gram.triu(1).T

    @property
    def absmax(self) -> Tensor:
        """Per channel, over all samples: [K]."""
        return torch.stack(self.sample_absmax).amax(0)

    def sample(self) -> tuple[Tensor, Tensor]:
        """The kept tokens [T, K] and how many tokens each stands for [T].

        The first token of a sequence stands for itself alone: in most language models it is hundreds of times larger than
        all others.
        """
        length = self.tokens / len(self.rows)
        counts = [[1.0] + [max(length - 1, 1.0) / max(len(x) - 1, 1)] * (len(x) - 1) for x in self.rows]
        rows = torch.cat(self.rows)
        return rows, torch.tensor([c for count in counts for c in count], device=rows.device)

    def fitted(self, activation: Activation) -> Fields:
        """The tensors that `activation` stores: those a pass has chosen, else those it fits; none without data."""
        if self.inputs is not None:
            return self.inputs
        return activation.fit(torch.cat(self.rows), self.absmax) if self.data else {}

    def channel_quantile(self, q: float) -> Tensor:
        """Per channel, the q-quantile over samples of the sample's absmax: [K]. q = 0 is DGQ's minimum over samples."""
        return torch.stack(self.sample_absmax).quantile(q, dim=0)

    def token_quantile(self, q: float) -> float:
        """The q-quantile over tokens of the token's absmax; 0 without data."""
        if not self.data:
            return 0.0
        return float(torch.cat(self.token_absmax).quantile(q))

    def follow(self, r: Tensor, shift: Tensor | None = None) -> None:
        """Follow a fold that makes X / r - shift, [K] each, of X. After a shift channel maxima are those of the kept rows."""
        self.inputs = None  # they were of X
        both = r.outer(r)
        self.gram /= both
        if self.drift is not None:
            self.drift /= both
        self.total, self.drift_total = (None if t is None else t / r for t in (self.total, self.drift_total))
        self.sample_absmax = [a / r for a in self.sample_absmax]
        self.rows = [x / r for x in self.rows]
        self.divided = r if self.divided is None else self.divided * r
        if shift is None:
            return
        self.offset = self.offset + shift * self.divided
        assert self.total is not None
        cross = self.total.outer(shift)
        self.gram += self.mass * shift.outer(shift) - cross - cross.T
        self.total = self.total - self.mass * shift
        if self.drift is not None:
            assert self.drift_total is not None
            self.drift -= self.drift_total.outer(shift)
        self.rows = [x - shift for x in self.rows]
        self.sample_absmax = [x.abs().amax(0) for x in self.rows]

    def rotated(self, size: int) -> InputStats:
        """What would have been seen of tokens rotated in blocks of `size`; channel maxima are those of the kept rows."""
        if not size or not self.data:
            return self
        rows = [by_matrix(x, size) for x in self.rows]
        return replace(
            self,
            gram=rotate_gram(self.gram, size),
            total=None if self.total is None else by_matrix(self.total, size),
            drift=None if self.drift is None else rotate_gram(self.drift, size),
            drift_total=None if self.drift_total is None else by_matrix(self.drift_total, size),
            sample_absmax=[x.abs().amax(0) for x in rows],
            rows=rows,
        )

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
