"""How far one model's next-token distributions lie from another's, token by token, in bounded memory.

    kl(t)      = sum_v p_ref(v) * (ln p_ref(v) - ln p(v))          nats, >= 0
    top-1      = share of tokens whose most likely next token is the same; the lowest id wins a tie on both sides; the
                 others are flips, which lose a correct prediction, gain one, or change a wrong one
    delta_p(t) = p(correct token) - p_ref(correct token)

Logits may be half precision; log-softmax is taken in fp32 over slices of tokens, so a 2048 x 49152 window costs a few
slices of memory rather than several copies of itself. Standard errors are over *groups* (windows, clips): tokens of
one group are correlated and their KL is heavy tailed, so an error over tokens would be too small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SLICE_TOKENS = 128
KL_EDGES = np.logspace(-8, 2, 41)  # of Fidelity.kl_counts, nats


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Agreement of a model with its reference over `tokens` predictions. KL in nats; shares and probabilities in [0, 1]."""

    tokens: int
    kl_mean: float
    kl_error: float | None  # standard error of kl_mean over groups; None with a single group
    kl_median: float
    kl_p90: float
    kl_p95: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    kl_counts: list[int]  # tokens between KL_EDGES; the first and the last count those beyond as well
    top1: float
    top1_error: float | None
    flips_lost: float  # share of tokens that only the reference's most likely token predicts
    flips_gained: float  # and only the model's
    rms_delta_p: float


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """fp32 negative log-likelihood [T] of `targets` [T] under `logits` [T, V], in nats."""
    parts = [
        -picked_log_prob(torch.log_softmax(rows.float(), dim=-1), wanted)
        for rows, wanted in zip(torch.split(logits, SLICE_TOKENS), torch.split(targets, SLICE_TOKENS), strict=True)
    ]
    return torch.cat(parts)


def picked_log_prob(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Entries [T] of `log_probs` [T, V] at `targets` [T]."""
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent `values`; None where one value gives no spread."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


COLUMNS = ("kl", "same", "lost", "gained", "delta", "group")  # one value per token


class Divergence:
    """Collects KL, agreement and delta-p; `add` any number of slices per group, then read `fidelity()`."""

    def __init__(self) -> None:
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Compare logits [T, V] of both models at the same positions; `targets` [T] are the tokens that came next.

        Returns the fp32 negative log-likelihoods [T] of reference and model, since both are known here.
        Raises ValueError when the vocabularies differ or a logit is NaN.
        """
        if reference.shape != logits.shape:
            raise ValueError(
                f"the models give logits of shapes {tuple(reference.shape)} and {tuple(logits.shape)}; "
                "a comparison needs one vocabulary: give --against the float model this one was made from"
            )
        losses: list[tuple[Tensor, Tensor]] = []
        for ref, got, wanted in zip(*(torch.split(x, SLICE_TOKENS) for x in (reference, logits, targets)), strict=True):
            lp, lq = torch.log_softmax(ref.float(), dim=-1), torch.log_softmax(got.float(), dim=-1)
            p = lp.exp()
            # A token the reference excludes (p = 0, ln p = -inf) contributes nothing, whatever the model says.
            kl = torch.where(p > 0, p * (lp - lq), 0.0).sum(-1)
            if bool(kl.isnan().any()):
                raise ValueError(
                    f"NaN among the logits of {'the model' if got.isnan().any() else 'the reference'}: its weights are broken"
                )
            ref_p, got_p = picked_log_prob(lp, wanted), picked_log_prob(lq, wanted)
            ref_top, got_top = ref.argmax(-1), got.argmax(-1)  # the first maximum
            tokens = {
                "kl": kl.clamp_min(0).double(),  # rounding may leave -1e-8
                "same": ref_top == got_top,
                "lost": (ref_top == wanted) & (got_top != wanted),
                "gained": (ref_top != wanted) & (got_top == wanted),
                "delta": (got_p.exp() - ref_p.exp()).double(),
                "group": torch.full_like(wanted, group),
            }
            for name, values in tokens.items():
                self._columns[name].append(values.cpu().numpy())
            losses.append((-ref_p, -got_p))
        return torch.cat([a for a, _ in losses]), torch.cat([b for _, b in losses])

    def columns(self) -> dict[str, list[float]]:
        """Everything added so far, in JSON's types: one value per token and name in COLUMNS."""
        return {name: np.concatenate(parts).tolist() for name, parts in self._columns.items() if parts}

    def extend(self, columns: Mapping[str, Sequence[float]]) -> None:
        """Add what `columns` of another gave."""
        for name, values in columns.items():
            self._columns[name].append(np.asarray(values))

    def fidelity(self) -> Fidelity:
        """Summary over everything added; ValueError when nothing was."""
        if not self._columns["kl"]:
            raise ValueError("nothing was compared: no token had a prediction in both models")
        kl, same, lost, gained, delta, group = (np.concatenate(self._columns[name]) for name in COLUMNS)
        median, p90, p95, p99, p999 = np.quantile(kl, [0.5, 0.9, 0.95, 0.99, 0.999])
        return Fidelity(
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_error=_grouped_error(kl, group),
            kl_median=float(median),
            kl_p90=float(p90),
            kl_p95=float(p95),
            kl_p99=float(p99),
            kl_p999=float(p999),
            kl_max=float(kl.max()),
            kl_counts=np.histogram(np.clip(kl, KL_EDGES[0], KL_EDGES[-1]), KL_EDGES)[0].tolist(),
            top1=float(same.mean()),
            top1_error=_grouped_error(same, group),
            flips_lost=float(lost.mean()),
            flips_gained=float(gained.mean()),
            rms_delta_p=float(np.sqrt(np.mean(delta**2))),
        )


def _grouped_error(values: np.ndarray, group: np.ndarray) -> float | None:
    """Standard error of the mean of `values` [T] when whole groups, not single values, are independent."""
    _, index = np.unique(group, return_inverse=True)
    return ratio_error(np.bincount(index, weights=values.astype(np.float64)), np.bincount(index))


def ratio_error(numerator: np.ndarray, denominator: np.ndarray) -> float | None:
    """First-order standard error of sum(numerator) / sum(denominator) over independent units (clips, windows)."""
    units, total = len(numerator), float(np.sum(denominator))
    if units < 2 or total == 0:
        return None
    residual = numerator - denominator * (float(np.sum(numerator)) / total)
    return float(np.sqrt(np.sum(residual**2) * units / (units - 1)) / total)
