"""Greedy continuations of the same prompts by a model and its reference: what a loss in numbers means in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.eval.journal import Journal

PROMPT = 32  # tokens at the beginning of a window, or half of a shorter one
NEW = 64  # tokens at most


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and how each model goes on, without special tokens.

    same: new tokens before the first that differs; None where the two wrote the same.
    """

    prompt: str
    model: str
    reference: str
    same: int | None


def common(a: Tensor, b: Tensor) -> int:
    """How many leading ids of a [S] and b [T] are equal."""
    size = min(len(a), len(b))
    return int((a[:size] == b[:size]).long().cumprod(0).sum())


def prompt_of(window: Tensor) -> Tensor:
    """The opening of a window [L] of ids: [P]."""
    return window[: min(PROMPT, len(window) // 2)]


@torch.inference_mode()
def continuation(model: Any, prompt: Tensor) -> Tensor:
    """Greedy ids [T] after `prompt` [P]: NEW, or fewer where the model ends or has no more positions."""
    room = getattr(model.config, "max_position_embeddings", None)
    new = NEW if room is None else min(NEW, room - len(prompt))
    ids = prompt.unsqueeze(0).to(model.device)
    out: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=new, pad_token_id=0
    )
    return out[0, len(prompt) :].cpu()


def write(model: Any, reference: Any, tokenizer: Any, windows: Tensor, journal: Journal) -> list[Sample]:
    """The sample of each of `windows` [W, L]."""

    def fields(window: Tensor) -> dict[str, Any]:
        return asdict(sample(model, reference, tokenizer, window))

    return [Sample(**journal.once(f"sample {at}", partial(fields, window))) for at, window in enumerate(windows)]


def sample(model: Any, reference: Any, tokenizer: Any, window: Tensor) -> Sample:
    """How both models go on after the opening of `window` [L]."""
    prompt = prompt_of(window)
    a, b = continuation(model, prompt), continuation(reference, prompt)
    same = None if torch.equal(a, b) else common(a, b)
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, a, b))
    return Sample(prompt=next(texts), model=next(texts), reference=next(texts), same=same)
