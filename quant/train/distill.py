"""End-to-end distillation: the packed model learns the float model's next-token distribution, over all blocks at once.

    loss = mean over tokens of omega KL(p_teacher || p_student)        omega = 1 - lam + lam H^gamma / mean of H^gamma

H is the entropy of the teacher's distribution: with lam above 0, tokens that the teacher itself is unsure of count more, as in
the deviation-aware distillation of DB-LLM (Chen et al., 2024; their weight was not to be had, this one is ours).
No label of the text is used. Layer-wise methods cannot see how errors of different layers add up in the logits; here they are
traded against each other. Steps, norms and latents (`latent.py`) move by Adam. A step reads `windows` samples, one at a time:
memory holds the two models, gradients of the dense weights, and one sample's activations.

Under `accelerate launch` each process takes its part of a step's samples and gradients are summed (`processes.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.calibrate import Sample, as_float32
from quant.passes.base import Tell
from quant.resources import compute_dtype
from quant.train.folder import Student
from quant.train.processes import Processes
from quant.train.schedule import BETAS, EPSILON, share_of_rate, vector_rate
from quant.train.state import Progress, keep, restore, save, take

Objective = Callable[[Any, Any, Sample], Tensor]  # teacher, student, sample -> the loss to minimize
ENTROPY_FLOOR = 1e-6  # nats: no power of an entropy of 0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """scales: of stored scales, relative. vectors: of norms and biases, relative to their mean size. codes: of latents, in
    steps of their grid.
    """

    scales: float
    vectors: float
    codes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Course:
    """steps of `windows` samples each. lam, gamma: see above.

    looks: how often the loss on held-out samples is taken. patience: looks without a new best after which training stops.
    save_every: steps. objective: what is minimized instead of `divergence`, without lam and gamma.
    """

    steps: int
    windows: int
    looks: int = 1
    patience: int = 2
    save_every: int = 20
    lam: float = 0.0
    gamma: float = 1.0
    objective: Objective | None = None


def deviation_weights(wanted: Tensor, weights: Tensor, lam: float, gamma: float) -> Tensor:
    """omega [..., T] of teacher's log probabilities [..., T, V], its mean under `weights` [..., T] being 1."""
    size = (-(wanted.exp() * wanted).sum(-1)).clamp_min(0).add(ENTROPY_FLOOR) ** gamma
    return 1 - lam + lam * size / ((size * weights).sum() / weights.sum())


def divergence(teacher: Any, student: Any, sample: Sample, lam: float = 0.0, gamma: float = 1.0) -> Tensor:
    """Mean KL over the tokens of a sample, nats, weighted as the sample says; differentiable in the student.

    lam, gamma: as at the head of this file.
    """
    device = next(student.parameters()).device
    with torch.no_grad():
        wanted = torch.log_softmax(teacher(**sample.inputs, use_cache=False).logits.float(), -1)
    with torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(device) == torch.bfloat16):
        logits = student(**as_float32(sample.inputs), use_cache=False).logits
    found = torch.nn.functional.kl_div(torch.log_softmax(logits.float(), -1), wanted, reduction="none", log_target=True).sum(-1)
    weights = sample.masks.get(found.shape[1], torch.ones_like(found))
    if lam and gamma:
        found = found * deviation_weights(wanted, weights, lam, gamma)
    return (found * weights).sum() / weights.sum()


@torch.no_grad()
def held_out(teacher: Any, student: Student, samples: Sequence[Sample], crew: Processes) -> float:
    """Mean KL over held-out samples, nats per token."""
    student.refresh()
    total = sum(float(divergence(teacher, student.model, sample)) for sample in crew.part(samples))
    return crew.total(total) / len(samples)


def optimizer_of(student: Student, rates: Rates) -> torch.optim.Adam:
    """Adam over theta and latents, and over vectors at a rate relative to each one's mean size."""
    groups: list[dict[str, Any]] = [
        {"params": [theta for layer in student.layers.values() for theta in layer.theta.values()], "lr": rates.scales},
        {"params": [layer.steps for layer in student.latents.values()], "lr": rates.codes},
    ]
    groups += [{"params": [v], "lr": vector_rate(v, rates.vectors)} for v in student.vectors.values()]
    kept = [group | {"top": group["lr"]} for group in groups if group["params"] and group["lr"]]
    if not kept:
        raise ValueError("every rate is 0, so nothing would be trained; give scales, vectors or codes a rate above 0")
    return torch.optim.Adam(kept, betas=BETAS, eps=EPSILON, fused=True)


def train(
    teacher: Any,
    student: Student,
    samples: Sequence[Sample],
    held: Sequence[Sample],
    course: Course,
    rates: Rates,
    state: Path,
    tell: Tell = lambda done, total, loss: None,
    crew: Processes | None = None,
) -> Progress:
    """Train, each step on the next `windows` of `samples`, from where `state` (a folder) says an earlier run got to.

    The student is left as it was at the least loss on `held` of all looks; the first is before training.
    """
    crew = crew or Processes()
    optimizer = optimizer_of(student, rates)
    progress = restore(student, optimizer, state)
    if not progress.held:
        progress.held.append(held_out(teacher, student, held, crew))
        keep(student, state, crew)
    for step in range(len(progress.losses), course.steps):
        if progress.waited == course.patience:
            break
        total = gradient(teacher, student, samples, course, step, crew)
        moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if math.isfinite(total) and all(bool(p.grad.isfinite().all()) for p in moved):
            share = share_of_rate(step, course.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["top"] * share
            optimizer.step()
            for layer in student.latents.values():
                layer.hold()
                progress.codes += layer.settle()
        else:
            progress.skipped += 1
        progress.losses.append(total)
        tell(step + 1, course.steps, total)
        if (step + 1) * course.looks // course.steps > step * course.looks // course.steps:
            progress.held.append(held_out(teacher, student, held, crew))
            if progress.waited == 0:
                keep(student, state, crew)
        if (step + 1) % course.save_every == 0 and step + 1 < course.steps:
            save(student, optimizer, progress, state, crew)
    if progress.waited:
        take(student, state)
    return progress


def gradient(teacher: Any, student: Student, samples: Sequence[Sample], course: Course, step: int, crew: Processes) -> float:
    """Set all .grad for the mean loss over a step's samples, which is returned."""
    student.refresh()
    for value in student.parameters().values():
        value.grad = None
    loss_of = course.objective or partial(divergence, lam=course.lam, gamma=course.gamma)
    total = 0.0
    for index in crew.part(range(step * course.windows, (step + 1) * course.windows)):
        loss = loss_of(teacher, student.model, samples[index % len(samples)]) / course.windows
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    for layer in student.layers.values():
        layer.collect()
    crew.sum_gradients(student.parameters().values())
    return crew.total(total)
