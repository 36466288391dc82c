"""Blocks of a packed folder trained again: each is read from the folder, behind those that were trained before it."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path

import torch

from quant.calibrate import Chain, Sample, advance
from quant.compile import BlockReport, block_pace, finished, install, materialize
from quant.kernels.format import Fields
from quant.kernels.rotation import by_matrix
from quant.models import Weights
from quant.passes.base import BlockTuner
from quant.plan import Plan
from quant.resources import compute_dtype
from quant.train.block import PackedBlock


def train_block(
    name: str,
    chains: dict[str, Chain],
    before: BlockReport,
    plan: Plan,
    stored: Weights,
    samples: list[Sample],
    tuners: list[BlockTuner],
    device: torch.device,
    folder: Path,
    since: float,
    more: bool,
) -> tuple[BlockReport, Fields]:
    """Train one block by `tuners`; the chains are moved past it. Returns its report and its tensors by name on disk.

    before: what the packed folder reports of the block; stored: its tensors. folder: where tuners keep what they measured.
    since: when the run began, by time.monotonic. more: whether training follows the blocks.
    """
    began = time.monotonic()
    block, weights = copy.deepcopy(plan.model.get_submodule(name)), plan.weights()
    params = [n for n, _ in block.named_parameters()]
    materialize(block, params, f"{name}.", weights, plan.disk, torch.float32, device)
    advance(copy.deepcopy(block).to(compute_dtype(device)), chains["float"])
    targets = {n: t for n, t in plan.targets.items() if n.startswith(f"{name}.")}
    packed = PackedBlock(name, block, chains["quant"], chains["float"].hidden, samples)
    rest = [n for n in params if f"{name}.{n}".removesuffix(".weight") not in targets]
    materialize(block, rest, f"{name}.", stored, plan.disk, torch.float32, device)
    for target in targets.values():
        old, disk = block.get_submodule(target.name.removeprefix(f"{name}.")).weight.detach(), plan.layer_on_disk(target.name)
        fields = {key: stored.read(f"{disk}.{key}").to(device) for key in target.fields()}
        packed.weights[target.name] = by_matrix(old, target.activation.rotate)
        packed.layers[target.name] = install(block, target, fields, name)
    pace = block_pace(plan, folder, since, began, more)
    trained = packed.train(tuners, folder, pace)
    fields = finished(plan, packed, targets, set(), weights, device)
    seconds = before.seconds + time.monotonic() - began
    return replace(before, seconds=seconds, trained=[*before.trained, *trained]), fields
