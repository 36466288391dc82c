"""End-to-end distillation: the packed model learns the float model's next-token distribution, over all blocks at once.

    loss = mean over tokens of omega KL(p_teacher || p_student)        omega = 1 - lam + lam H^gamma / mean of H^gamma

H is the entropy of the teacher's distribution: with lam above 0, tokens that the teacher itself is unsure of count more, as in
the deviation-aware distillation of DB-LLM (Chen et al., 2024; their weight was not to be had, this one is ours).
No label of the text is used. Layer-wise methods cannot see how errors of different layers add up in the logits; here they are
traded against each other. Steps and norms move by Adam, codes as in `layer.py`. A step reads `windows` samples, one at a time:
memory holds the two models, gradients of the dense weights, and one sample's activations.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.calibrate import Sample, as_float32
from quant.passes.base import Tell
from quant.resources import compute_dtype
from quant.train.folder import Student
from quant.train.schedule import BETAS, EPSILON, share_of_rate, vector_rate

ENTROPY_FLOOR = 1e-6  # nats: no power of an entropy of 0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """steps: of stored scales, relative. vectors: of norms and biases, relative to their mean size. codes: see `layer.py`."""

    scales: float
    vectors: float
    codes: float
    tau: float


@dataclass
class Progress:
    """Loss of each step, nats per token. codes: how many changed. skipped: steps whose gradient was not finite."""

    losses: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)  # mean KL on held-out samples before the first step and after the last
    codes: int = 0
    skipped: int = 0


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
def held_out(teacher: Any, student: Student, samples: Sequence[Sample]) -> float:
    """Mean KL over held-out samples, nats per token."""
    student.refresh()
    return sum(float(divergence(teacher, student.model, sample)) for sample in samples) / len(samples)


def optimizer_of(student: Student, rates: Rates) -> torch.optim.Adam:
    """Adam over theta, and over vectors at a rate relative to each one's mean size."""
    groups: list[dict[str, Any]] = [
        {"params": [theta for layer in student.layers.values() for theta in layer.theta.values()], "lr": rates.scales}
    ]
    vectors = [*student.others.values(), *(layer.bias for layer in student.layers.values() if layer.bias is not None)]
    if rates.vectors:
        groups += [{"params": [v], "lr": vector_rate(v, rates.vectors)} for v in vectors]
    for group in groups:
        group["top"] = group["lr"]
    return torch.optim.Adam(groups, betas=BETAS, eps=EPSILON)


def train(
    teacher: Any,
    student: Student,
    samples: Sequence[Sample],
    held: Sequence[Sample],
    *,
    steps: int,
    windows: int,
    rates: Rates,
    state: Path,
    save_every: int,
    lam: float = 0.0,
    gamma: float = 1.0,
    tell: Tell = lambda done, total, loss: None,
) -> Progress:
    """Run to `steps`, each on the next `windows` of `samples`, from where `state` (a folder) says an earlier run got to.

    The student is left as it was after the last step. Held-out KL is taken before the first step and after the last.
    """
    optimizer = optimizer_of(student, rates)
    progress, first = restore(student, optimizer, state)
    if first == 0:
        progress.held.append(held_out(teacher, student, held))
    for step in range(first, steps):
        student.refresh()
        total = 0.0
        for index in range(step * windows, (step + 1) * windows):
            loss = divergence(teacher, student.model, samples[index % len(samples)], lam, gamma) / windows
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        share = share_of_rate(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * share
        for layer in student.layers.values():
            layer.collect()
        moved = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if math.isfinite(total) and all(bool(p.grad.isfinite().all()) for p in moved):
            optimizer.step()
            if rates.codes:
                for layer in student.layers.values():
                    if layer.dense.grad is not None:
                        progress.codes += layer.move_codes(layer.dense.grad.float(), rates.codes * share, rates.tau)
        else:
            progress.skipped += 1
        optimizer.zero_grad()
        progress.losses.append(total)
        tell(step + 1, steps, total)
        if (step + 1) % save_every == 0 and step + 1 < steps:
            save(student, optimizer, progress, state)
    progress.held.append(held_out(teacher, student, held))
    return progress


def save(student: Student, optimizer: torch.optim.Adam, progress: Progress, state: Path) -> None:
    """Make all of the run so far permanent, in one step."""
    tensors: dict[str, Tensor] = {}
    for name, layer in student.layers.items():
        tensors[f"layer.{name}.codes"] = layer.codes
        if layer.latent is not None:
            tensors[f"layer.{name}.latent"] = layer.latent
    for at, (value, memory) in enumerate(moments(optimizer)):
        tensors[f"value.{at}"] = value.detach()
        tensors |= {f"memory.{at}.{key}": held for key, held in memory.items()}
    state.mkdir(parents=True, exist_ok=True)
    done = len(progress.losses)
    save_file({name: value.contiguous() for name, value in tensors.items()}, state / f"step-{done}.safetensors")
    temporary = state / "progress.tmp"
    temporary.write_text(json.dumps(asdict(progress)), encoding="utf-8")
    os.replace(temporary, state / "progress.json")
    for old in state.glob("step-*.safetensors"):
        if old.name != f"step-{done}.safetensors":
            old.unlink()


def restore(student: Student, optimizer: torch.optim.Adam, state: Path) -> tuple[Progress, int]:
    """What `save` wrote, put back; (new progress, 0) where there is nothing."""
    file = state / "progress.json"
    if not file.is_file():
        return Progress(), 0
    progress = Progress(**json.loads(file.read_text(encoding="utf-8")))
    done = len(progress.losses)
    tensors = load_file(state / f"step-{done}.safetensors")
    for name, layer in student.layers.items():
        layer.codes = tensors[f"layer.{name}.codes"].to(layer.codes.device)
        if layer.latent is not None:
            layer.latent = tensors[f"layer.{name}.latent"].to(layer.latent.device)
    for at, (value, _) in enumerate(moments(optimizer)):
        value.data.copy_(tensors[f"value.{at}"])
        memory = {key.rpartition(".")[2]: held for key, held in tensors.items() if key.startswith(f"memory.{at}.")}
        if memory:
            optimizer.state[value] = memory
    return progress, done


def moments(optimizer: torch.optim.Adam) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Each parameter with what Adam remembers of it, in a fixed order."""
    return [(p, dict(optimizer.state.get(p, {}))) for group in optimizer.param_groups for p in group["params"]]
