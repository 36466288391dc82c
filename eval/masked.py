"""What a masked-diffusion language model is measured by: a bound of its likelihood, and fidelity where tokens are masked.

There is no perplexity: the model gives no probability of a text, only a bound (LLaDA, Nie et al., 2025, eq. 6),

    -log p(x) / L  <=  E over l in 1 .. L, masks of l positions  [ mean over the masked positions of -log p(x_i | x_masked) ]

in nats per token, estimated from DRAWS masks of every window, one in each of DRAWS equal ranges of l. KL divergence and top-1
agreement are taken at the masked positions, for each share of masks in RATIOS. Both models see the same masks, so the
difference of two bounds varies far less than either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from quant.eval.divergence import Divergence, Fidelity, cross_entropy, standard_error
from quant.eval.journal import Journal
from quant.eval.paired import t_test
from quant.eval.perplexity import HEAD_TOKENS, PROBE_TOKENS, Progress, Scorer
from quant.masked import Masking, counts, positions

RATIOS = (0.25, 0.5, 0.75, 0.95)
DRAWS = 8


@dataclass(frozen=True, kw_only=True)
class MaskedResult:
    """Bounds in nats per token over `windows` windows of `length` tokens; errors are standard errors over windows.

    fidelity: at the masked positions, by the share of masks ("0.25"); empty without a reference.
    """

    windows: int
    length: int
    mask_token: int
    draws: int  # masks per window for the bound
    seed: int
    bound: float
    bound_error: float | None
    fidelity: dict[str, Fidelity]
    reference_bound: float | None = None
    difference: float | None = None  # bound - reference bound
    difference_error: float | None = None  # from the paired differences of each window
    p_value: float | None = None  # of a paired t test over windows: the two bounds are equal


def predictions(scorer: Scorer, row: Tensor, where: Tensor, how: Masking) -> Iterator[Tensor]:
    """Logits [at most HEAD_TOKENS, V] for the True positions of `where` [L], which are masked in the window `row` [L]."""
    inputs = row.masked_fill(where, how.token).unsqueeze(0).to(scorer.device)
    at = how.read_at(where).to(scorer.device)
    if scorer.split:
        yield from map(scorer.head, torch.split(scorer.hidden(inputs)[0][at], HEAD_TOKENS))
    else:
        yield from torch.split(scorer.model(input_ids=inputs, use_cache=False).logits[0][at], HEAD_TOKENS)


def masks(windows: int, length: int, seed: int) -> Iterator[tuple[list[Tensor], dict[str, Tensor]]]:
    """For each window the DRAWS masks [L] of the bound, and the mask of each of RATIOS. The same seed gives the same masks."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(windows):
        drawn = [positions(length, count, generator) for count in counts(DRAWS, length, generator)]
        yield drawn, {f"{t:g}": positions(length, max(1, round(t * length)), generator) for t in RATIOS}


@torch.inference_mode()
def evaluate(
    model: Module,
    windows: Tensor,
    how: Masking,
    reference: Module | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
    journal: Journal | None = None,
) -> MaskedResult:
    """Score windows [W, L] of token ids with `model`, and compare it with `reference` under the same masks.

    Windows that `journal` holds are not run again. Raises ValueError for differing vocabularies or NaN logits.
    """
    count, length = windows.shape
    sample = windows[:1, :PROBE_TOKENS]
    scorer = Scorer(model.eval(), sample)
    other = None if reference is None else Scorer(reference.eval(), sample)
    found = {f"{t:g}": Divergence() for t in RATIOS}
    bounds: list[float] = []
    reference_bounds: list[float] = []
    journal = journal or Journal()
    for at, (row, (drawn, fixed)) in enumerate(zip(windows, masks(count, length, seed), strict=True)):
        one = journal.once(f"window {at}", partial(score, scorer, other, row, drawn, fixed, how, at))
        bounds.append(one["bound"])
        reference_bounds += one["reference_bounds"]
        for name, columns in one["tokens"].items():
            found[name].extend(columns)
        progress(at + 1, count)
    mean = sum(bounds) / count
    if not mean < float("inf"):
        raise ValueError(f"the likelihood bound is {mean}: the model gives NaN or infinite logits, its weights are broken")
    differences = [a - b for a, b in zip(bounds, reference_bounds, strict=True)] if reference_bounds else []
    return MaskedResult(
        windows=count,
        length=length,
        mask_token=how.token,
        draws=DRAWS,
        seed=seed,
        bound=mean,
        bound_error=standard_error(bounds),
        fidelity={name: one.fidelity() for name, one in found.items()} if differences else {},
        reference_bound=sum(reference_bounds) / count if differences else None,
        difference=sum(differences) / count if differences else None,
        difference_error=standard_error(differences),
        p_value=t_test(differences),
    )


def score(
    scorer: Scorer,
    other: Scorer | None,
    row: Tensor,
    drawn: list[Tensor],
    fixed: dict[str, Tensor],
    how: Masking,
    at: int,
) -> dict[str, Any]:
    """The bounds on window number `at`, `row` [L], under the masks `drawn`, and the tokens of `Divergence` under `fixed`."""
    found = {name: Divergence() for name in fixed}
    bound = sum(loss(scorer, row, where, how) for where in drawn) / DRAWS
    if other is None:
        return {"bound": bound, "reference_bounds": [], "tokens": {}}
    for name, where in fixed.items():
        wanted = torch.split(row[where].to(scorer.device), HEAD_TOKENS)
        sides = (predictions(side, row, where, how) for side in (other, scorer))
        for ref, got, targets in zip(*sides, wanted, strict=True):
            found[name].add(ref.to(scorer.device), got, targets, group=at)
    theirs = sum(loss(other, row, where, how) for where in drawn) / DRAWS
    return {"bound": bound, "reference_bounds": [theirs], "tokens": {name: one.columns() for name, one in found.items()}}


def loss(scorer: Scorer, row: Tensor, where: Tensor, how: Masking) -> float:
    """Mean cross-entropy in nats at the True positions of `where` [L], which are masked in the window `row` [L]."""
    wanted = torch.split(row[where].to(scorer.device), HEAD_TOKENS)
    parts = [cross_entropy(got, want) for got, want in zip(predictions(scorer, row, where, how), wanted, strict=True)]
    return float(torch.cat(parts).double().mean())
