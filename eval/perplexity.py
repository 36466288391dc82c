"""Perplexity by the convention of the quantization papers, and fidelity to a reference in the same pass.

GPTQ convention: the corpus is tokenized once and cut into non-overlapping windows of L tokens, the remainder dropped;
each window is scored alone on its L - 1 next-token targets, and

    perplexity = exp(mean over windows of the mean cross-entropy of a window)

It is not lm-eval's word perplexity, nor llama.cpp's (512-token windows, second half scored): the numbers do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from quant.eval.divergence import Divergence, Fidelity, cross_entropy, standard_error
from quant.eval.journal import Journal
from quant.eval.paired import t_test

HEAD_TOKENS = 256  # positions whose logits exist at once: 256 x 128k vocabulary in fp32 is 131 MB a model
PROBE_TOKENS = 16

Progress = Callable[[int, int], None]  # (windows or clips done, of how many)


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """Perplexity over `windows` windows of `length` tokens; errors are standard errors over windows, None with one window."""

    windows: int
    length: int
    tokens: int  # scored predictions: windows * (length - 1)
    perplexity: float
    perplexity_error: float | None
    reference_perplexity: float | None = None
    ratio: float | None = None  # perplexity / reference perplexity
    ratio_error: float | None = None  # from the paired differences of each window
    p_value: float | None = None  # of a paired t test over windows: the two models have equal cross-entropy
    fidelity: Fidelity | None = None


class Logits(Protocol):
    """Whatever gives a model's logits on windows: a Scorer runs the model, `kept.Kept` has run it before."""

    def slices(self, ids: Tensor, start: int) -> Iterator[Tensor]:
        """Logits [B, at most HEAD_TOKENS, V] of positions 0 .. L-2 in order. `ids` [B, L] are windows start .. start+B-1."""
        ...


class Scorer:
    """Logits of a causal model in slices of positions, so that [B, L, V] never exists when the head is a plain linear.

    Whether it is plain (no softcap, no logit scale) is not guessed from the architecture but measured once: on a few
    tokens, head(base(ids)) must equal model(ids). Otherwise every window goes through the model's own forward.
    """

    def __init__(self, model: Module, sample: Tensor) -> None:
        """`sample` [1, T]: a few token ids of the corpus for the measurement."""
        self.model = model
        self.device = next(model.parameters()).device
        transformer: Any = model
        head, base = transformer.get_output_embeddings(), transformer.base_model
        self.split = head is not None and base is not model and self._is_plain(base, head, sample.to(self.device))
        self._base, self.head = base, head

    def _is_plain(self, base: Module, head: Module, ids: Tensor) -> bool:
        whole = self.model(input_ids=ids, use_cache=False).logits.float()
        hidden = base(input_ids=ids, use_cache=False).last_hidden_state
        if hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
            return False
        parts = head(hidden).float()
        return parts.shape == whole.shape and bool((parts - whole).abs().max() <= 1e-4 * whole.abs().max())

    def hidden(self, ids: Tensor) -> Tensor:
        """What the plain head reads at every position of `ids` [B, L]: [B, L, H]. Only where `split`."""
        out: Tensor = self._base(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return out

    def slices(self, ids: Tensor, start: int = 0) -> Iterator[Tensor]:
        """As `Logits.slices`, in the model's dtype."""
        ids = ids.to(self.device)
        if self.split:
            yield from map(self.head, torch.split(self.hidden(ids)[:, :-1], HEAD_TOKENS, dim=1))
        else:
            yield from self.model(input_ids=ids, use_cache=False).logits[:, :-1].split(HEAD_TOKENS, dim=1)


@torch.inference_mode()
def evaluate(
    model: Module,
    windows: Tensor,
    reference: Module | Logits | None = None,
    *,
    batch: int = 1,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> TextResult:
    """Score `windows`, int64 token ids [W, L], with a causal language model; with `reference`, also compare the two.

    Both models must share a tokenizer; each may live on its own device. Models are used as they are (dtype, device) and
    left in eval mode. Windows that `journal` holds are not run again. Raises ValueError for windows of the wrong shape,
    differing vocabularies, or NaN logits.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(
            f"windows has shape {tuple(windows.shape)}; needed is [W >= 1, L >= 2]: give a longer text or a smaller --length"
        )
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    count, length = windows.shape
    sample = windows[:1, :PROBE_TOKENS]
    scorer = Scorer(model.eval(), sample)
    ref_scorer = Scorer(reference.eval(), sample) if isinstance(reference, Module) else reference
    divergence = Divergence()
    losses: list[float] = []  # mean cross-entropy of each window, nats
    ref_losses: list[float] = []

    journal = journal or Journal()
    for start in range(0, count, batch):
        ids = windows[start : start + batch]
        found = journal.once(f"window {start}", partial(score, scorer, ref_scorer, ids, start))
        losses += found["losses"]
        ref_losses += found["ref_losses"]
        divergence.extend(found["tokens"])
        if progress is not None:
            progress(min(start + batch, count), count)

    perplexity, perplexity_error = _exp_mean(losses)
    if not math.isfinite(perplexity):
        raise ValueError(f"perplexity is {perplexity}: the model gives NaN or infinite logits, its weights are broken")
    result = TextResult(
        windows=count, length=length, tokens=count * (length - 1), perplexity=perplexity, perplexity_error=perplexity_error
    )
    if reference is None:
        return result
    differences = [q - r for q, r in zip(losses, ref_losses, strict=True)]
    ratio, ratio_error = _exp_mean(differences)
    return replace(
        result,
        reference_perplexity=_exp_mean(ref_losses)[0],
        ratio=ratio,
        ratio_error=ratio_error,
        p_value=t_test(differences),
        fidelity=divergence.fidelity(),
    )


def score(scorer: Scorer, ref_scorer: Logits | None, ids: Tensor, start: int) -> dict[str, Any]:
    """Mean cross-entropies of `ids` [B, L], windows start .. start+B-1, and what `Divergence` has of each token."""
    divergence = Divergence()
    total = torch.zeros(len(ids), dtype=torch.float64)
    ref_total = torch.zeros(len(ids), dtype=torch.float64)
    at = 1
    pairs: Iterator[tuple[Tensor, Tensor | None]]
    if ref_scorer is None:
        pairs = ((got, None) for got in scorer.slices(ids, start))
    else:
        pairs = zip(scorer.slices(ids, start), ref_scorer.slices(ids, start), strict=True)
    for got, ref in pairs:
        targets = ids[:, at : at + got.shape[1]].to(scorer.device)
        at += got.shape[1]
        for row in range(len(ids)):
            if ref is None:
                total[row] += cross_entropy(got[row], targets[row]).double().sum().cpu()
            else:
                a, b = divergence.add(ref[row].to(scorer.device), got[row], targets[row], group=start + row)
                ref_total[row] += a.double().sum().cpu()
                total[row] += b.double().sum().cpu()
    means = {"losses": total, "ref_losses": ref_total}
    return {name: (sums / (ids.shape[1] - 1)).tolist() for name, sums in means.items()} | {"tokens": divergence.columns()}


def _exp_mean(values: list[float]) -> tuple[float, float | None]:
    """exp of the mean of `values`, and its standard error to first order (None with one value)."""
    mean = sum(values) / len(values)
    result = math.exp(mean) if mean < 700 else math.inf
    error = standard_error(values)
    return result, None if error is None else result * error
