"""The pipeline: plan -> calibration samples -> per block: capture, passes, pack, advance -> artifact.

At any time one block's weights, its inputs in both chains and its statistics are in memory. After each block the packed
tensors and the chains are on disk, so a run that was killed goes on at the next block and ends with the same bytes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.calibrate import Chain, Sample, advance, capture, catch, recapture
from quant.embedding import fill_table, pack_table
from quant.folds import BlockView, InputGroup
from quant.kernels.activation import Activation
from quant.kernels.format import Codes, Fields
from quant.kernels.formats.low_rank import LowRank
from quant.kernels.rotation import by_matrix
from quant.linear import PackedLinear
from quant.low_rank import decide_beside
from quant.models import Weights, require_finite
from quant.passes.base import BasePass, BlockTuner, Corrector, Quantizer, Transform
from quant.plan import Plan
from quant.resources import compute_dtype, return_freed_memory
from quant.search import output_error
from quant.stats import InputStats
from quant.targets import Target
from quant.train.block import PackedBlock
from quant.train.pace import Pace, block_seconds
from quant.workspace import Workspace


@dataclass(frozen=True)
class LayerReport:
    """error, rtn_error: relative output error sqrt(d^T H d / w^T H w) of the result and of round-to-nearest.

    zero_fraction: share of input values that round to 0 as served, and without folds and rotation (CrossQuant's "quantization
    kernel"); None where inputs stay in floats. Compare it within one model only.
    tokens: calibration tokens that the layer saw. data: False for an expert that saw too few, whose errors are of its weights.
    shares: what the format says of the codes, see `Format.shares`.
    outlier_ratio: greatest input channel over the median one, by absmax, after folds and rotation; None without data.
    """

    name: str
    format: dict[str, Any]
    activation: str | dict[str, Any]
    bits_per_weight: float
    error: float
    rtn_error: float
    tokens: int
    token_absmax_99: float
    zero_fraction: tuple[float, float] | None
    note: str
    data: bool = True
    shares: dict[str, float] = field(default_factory=dict)
    outlier_ratio: float | None = None


@dataclass(frozen=True)
class BlockReport:
    """One finished block. refused_folds: layer -> reason. trained: what BlockTuners say; errors are before them.

    folds: layer -> the norm or linear that its input channels were divided in.
    """

    name: str
    seconds: float
    layers: list[LayerReport]
    refused_folds: dict[str, str]
    trained: list[dict[str, Any]] = field(default_factory=list)
    folds: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, report: dict[str, Any]) -> BlockReport:
        """What `asdict` made of one."""
        return cls(**report | {"layers": [LayerReport(**layer) for layer in report["layers"]]})


Listener = Callable[[int, int, BlockReport], None]  # blocks done, blocks in all, the block just finished
Maker = Callable[[str, dict[str, Chain]], tuple[BlockReport, Fields]]  # a block's name and the chains, which it moves past it


@dataclass(frozen=True)
class TableReport:
    """The packed table of the head. error: of its weights, |W - dequantized| / |W|. tied: the input embedding reads it too."""

    name: str
    tied: bool
    format: dict[str, Any]
    weights: int
    bytes: int
    bits_per_weight: float
    error: float


def run_table(plan: Plan, work: Workspace) -> TableReport | None:
    """Pack the table of the output head, if the recipe asks for it, into `work`."""
    head, target = plan.selection.head, plan.selection.table
    if head is None or target is None:
        return None
    name, fmt = f"{target.name}.weight", target.format
    weight = plan.weights().read(plan.disk[name])
    require_finite(name, weight)
    fields, error = pack_table(weight, fmt)
    layer = plan.layer_on_disk(target.name)
    work.keep_table({f"{layer}.{key}": value for key, value in fields.items()})
    size = target.n * target.k
    bits = fmt.bits_per_weight(target.n, target.k)
    return TableReport(target.name, head.tied, fmt.config(), size, fmt.stored_bytes(target.n, target.k), bits, error)


@torch.no_grad()
def run_blocks(
    plan: Plan,
    samples: list[Sample],
    work: Workspace,
    device: torch.device,
    listen: Listener,
    passes: list[BasePass],
    make: Maker,
) -> list[BlockReport]:
    """Make every block that `work` does not hold yet, as `passes` ask; returns the reports of all blocks."""
    weights, total = plan.weights(), plan.blocks
    reports = [BlockReport.read(report) for report in work.reports]
    tuners = [step for step in passes if isinstance(step, BlockTuner)]
    compared = tuners or any(isinstance(step, Corrector) and step.needs_float for step in passes)
    kinds = ["quant", "float"] if compared else ["quant"]
    for tuner in tuners if len(reports) < total else []:
        tuner.prepare(plan, samples, work.folder, device)
    inside = tuple(f"{block}." for stack in plan.stacks for block in stack.blocks)
    outer = [n for n, _ in plan.model.named_parameters() if not n.startswith(inside)]
    first_block = 0
    for at, stack in enumerate(plan.stacks):
        last_block = first_block + len(stack.blocks)
        if len(reports) < last_block:
            materialize(plan.model, [n for n in outer if n in plan.disk], "", weights, plan.disk, compute_dtype(device), device)
            chains = {}
            for kind in sorted(kinds):  # float before quant, which alone sees the embedding as it will be read
                if kind == "quant":
                    round_embedding(plan, work)
                finals = [on(device, work.final(s, kind)) for s in range(at)]
                chains[kind] = catch(plan.model, plan.stacks, at, samples, finals)
            release(plan.model, outer)
            if len(reports) > first_block:
                for kind, chain in chains.items():
                    chain.hidden = on(device, work.chain(kind))
            for name in stack.blocks[len(reports) - first_block :]:
                torch.manual_seed(plan.recipe.seed + len(reports))
                report, fields = make(name, chains)
                reports.append(report)
                hidden = {kind: chain.hidden for kind, chain in chains.items()}
                work.commit(asdict(report), fields, hidden, name == stack.blocks[-1])
                listen(len(reports), total, report)
                del fields
                return_freed_memory()
        first_block = last_block
    return reports


def on(device: torch.device, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors there."""
    return [tensor.to(device) for tensor in tensors]


def run_block(
    plan: Plan,
    name: str,
    chains: dict[str, Chain],
    samples: list[Sample],
    passes: list[BasePass],
    weights: Weights,
    device: torch.device,
    folder: Path,
    since: float,
) -> tuple[BlockReport, Fields]:
    """Quantize one block; its chains are moved past it. Returns its report and its tensors by name on disk.

    folder: where a BlockTuner has put what it measured on the float model. since: when the run began, by time.monotonic.
    """
    began = time.monotonic()
    block = copy.deepcopy(plan.model.get_submodule(name))
    params = [n for n, _ in block.named_parameters()]
    materialize(block, params, f"{name}.", weights, plan.disk, torch.float32, device)
    targets = {n: t for n, t in plan.targets.items() if n.startswith(f"{name}.")}
    for target in targets.values():
        if target.new_bias:
            linear = block.get_submodule(target.name.removeprefix(f"{name}."))
            linear.bias = nn.Parameter(torch.zeros(target.n, device=device), requires_grad=False)

    running = copy.deepcopy(block).to(compute_dtype(device))
    kept = max(step.rows for step in passes)
    least = plan.recipe.calibration.expert_tokens
    groups = capture(name, running, list(targets), chains.get("float"), chains["quant"], samples, least, kept)
    del running

    view = BlockView(
        name,
        block,
        groups,
        run=lambda: chains["quant"].output(block, 0),
        stored_dtype=lambda param: weights.dtype(plan.disk[param]),
        schemes={n: (t.format, t.activation) for n, t in targets.items()},
    )
    refused: dict[str, str] = {}
    for step in passes:
        if isinstance(step, Transform):
            refused |= step.apply(view)
    layers: list[LayerReport] = []
    shares = [
        (group, members, group.stats.rotated(members[0].activation.rotate))
        for group in groups
        for members in same_scheme(group, targets)
    ]
    if any(step.rounded for step in passes):
        running = copy.deepcopy(block).to(compute_dtype(device))
        with_data = [(members, stats) for _, members, stats in shares if stats.data]
        readers = {m[0].name: (m[0].activation, stats.fitted(m[0].activation)) for m, stats in with_data}
        seen = recapture(name, running, readers, chains["quant"], samples)
        del running
        shares = [(group, members, seen.get(members[0].name, stats)) for group, members, stats in shares]
    packed = PackedBlock(name, block, chains["quant"], chains["float"].hidden if "float" in chains else [], samples)
    tuners = [step for step in passes if isinstance(step, BlockTuner)]
    for group, members, stats in shares:
        for target, codes, report in quantize_members(view, group, members, stats, passes):
            layers.append(report)
            if tuners:
                old = view.linear(target.name).weight.detach()
                packed.weights[target.name] = by_matrix(old, target.activation.rotate)
            packed.layers[target.name] = install(block, target, codes, name)
    pace = block_pace(plan, folder, since, began, bool(plan.recipe.tuners()))
    trained = packed.train(tuners, folder, pace)
    fields = finished(plan, packed, targets, view.changed, weights, device)
    return BlockReport(name, time.monotonic() - began, layers, refused, trained, view.folds), fields


def finished(
    plan: Plan, packed: PackedBlock, targets: dict[str, Target], changed: set[str], weights: Weights, device: torch.device
) -> Fields:
    """The tensors of a block that is done, by name on disk; the quantized chain moves past it. changed: what passes changed."""
    name, block = packed.name, packed.module
    fields: Fields = {}
    for layer_name, layer in packed.layers.items():
        disk = plan.layer_on_disk(layer_name)
        fields |= {f"{disk}.{key}": value.cpu() for key, value in layer.fields().items()}
    created = {f"{t.name}.bias": f"{plan.layer_on_disk(t.name)}.bias" for t in targets.values() if t.new_bias}
    for param in sorted((changed | packed.changed | created.keys()) - {f"{t}.weight" for t in targets}):
        value = block.get_parameter(param.removeprefix(f"{name}."))
        if param in created:
            fields[created[param]] = value.detach().to(weights.dtype(created[param].removesuffix("bias") + "weight")).cpu()
        else:
            fields[plan.disk[param]] = value.detach().to(weights.dtype(plan.disk[param])).cpu()
    block.to(compute_dtype(device))
    for layer in packed.layers.values():
        layer.unpack()  # for one pass over the data; not worth a copy in huge pages, whose chunks would outlive the block
    advance(block, packed.inputs)
    return fields


def block_pace(plan: Plan, folder: Path, since: float, began: float, more: bool) -> Pace | None:
    """The time for the training of a block, of a recipe with a budget; since, began: when the run and when the block did.

    more: whether training follows the blocks.
    """
    budget = plan.recipe.seconds()
    if budget is None:
        return None
    seconds = block_seconds(budget - (began - since), plan.blocks, time.monotonic() - began, more)
    return Pace(seconds, folder / "block-steps.json")  # which the first block writes, when nothing but it was done before


def quantize_members(
    view: BlockView, group: InputGroup, members: list[Target], stats: InputStats, passes: list[BasePass]
) -> list[tuple[Target, Fields, LayerReport]]:
    """Quantize the layers of one input group that share a scheme, as one tall matrix: rows do not depend on each other.

    stats: of the tokens after the rotation of the scheme's activation rule.
    """
    fmt, activation = members[0].format, members[0].activation
    weight = by_matrix(torch.cat([view.linear(t.name).weight for t in members]), activation.rotate)
    aim = weight
    for step in passes:
        if isinstance(step, Corrector):
            aim = step.correct(aim, stats)
    (quantizer,) = (step for step in passes if isinstance(step, Quantizer))
    if isinstance(fmt, LowRank):
        codes, inputs = decide_beside(quantizer, aim, stats, fmt, activation)
    else:
        codes, inputs = quantizer.decide(aim, stats, fmt, activation)
    if inputs.keys() != activation.fields(members[0].k).keys():
        raise ValueError(
            f"{members[0].name} saw {stats.tokens} calibration tokens, too few for activation {activation}; "
            "give more calibration.tokens or an activation rule that measures tokens as they come"
        )
    zeros = zero_fractions(group.stats, activation, inputs)
    outlier_ratio = float(stats.absmax.max() / stats.absmax.median().clamp_min(1e-12)) if stats.data else None
    lost, lost_rtn = aim - fmt.dequantize(codes), aim - fmt.dequantize(fmt.nearest(aim))
    out = []
    at = 0
    for target in members:
        rows = slice(at, at + target.n)
        at += target.n
        signal = output_error(weight[rows], stats.gram)
        error, rtn_error = ((max(output_error(d[rows], stats.gram), 0.0) / max(signal, 1e-30)) ** 0.5 for d in (lost, lost_rtn))
        mine = Codes(codes.codes[rows], fmt.rows(codes.params, rows))
        report = LayerReport(
            target.name,
            fmt.config(),
            target.activation.config(),
            fmt.bits_per_weight(target.n, target.k),
            error,
            rtn_error,
            stats.tokens,
            stats.token_quantile(0.99),
            zeros,
            target.note,
            stats.data,
            fmt.shares(mine),
            outlier_ratio,
        )
        out.append((target, fmt.pack(mine) | {name: t.clone() for name, t in inputs.items()}, report))
    return out


def zero_fractions(stats: InputStats, activation: Activation, inputs: Fields) -> tuple[float, float] | None:
    """LayerReport.zero_fraction on the kept tokens."""
    if activation.name == "none" or not stats.data:
        return None
    tokens = torch.cat(stats.rows)
    before = tokens if stats.divided is None else tokens * stats.divided + stats.offset
    plain = replace(activation, rotate=0)
    served = activation.quantize(by_matrix(tokens, activation.rotate), inputs)
    alone = plain.quantize(before, plain.fit(before, before.abs().amax(0)))
    return float((served == 0).float().mean()), float((alone == 0).float().mean())


def same_scheme(group: InputGroup, targets: dict[str, Target]) -> list[list[Target]]:
    """The group's targets, split where formats or activation rules differ, or where each has a side path of its own."""
    found: dict[Any, list[Target]] = {}
    for name in group.names:
        target = targets[name]
        alone = name if isinstance(target.format, LowRank) else ""
        found.setdefault((target.format, target.activation, alone), []).append(target)
    return list(found.values())


def install(block: nn.Module, target: Target, packed: Fields, name: str) -> PackedLinear:
    """Replace a float linear of the block by its packed form, which is returned."""
    parent, _, leaf = target.name.removeprefix(f"{name}.").rpartition(".")
    owner = block.get_submodule(parent)
    old = getattr(owner, leaf)
    bias = None if old.bias is None else old.bias.data
    try:
        layer = PackedLinear.from_fields(packed, target.format, target.activation, target.n, target.k, bias)
    except ValueError as error:  # the bytes were made just now, so it is the weights that the format cannot hold
        raise ValueError(
            f"{target.name} has weights up to {float(old.weight.abs().max()):.3g}, which {target.format.name} cannot hold; "
            f"leave it in float with the rule {{match: {target.name}, skip: true}}"
        ) from error
    setattr(owner, leaf, layer)
    return layer


def round_embedding(plan: Plan, work: Workspace) -> None:
    """Give the model's input embedding the values that its packed table stands for, if it has one."""
    head, target = plan.selection.head, plan.selection.table
    if head is None or target is None or not head.tied:
        return
    layer = plan.layer_on_disk(target.name)
    fields = {name.removeprefix(f"{layer}."): value for name, value in work.table().items()}
    fill_table(plan.model.get_parameter(f"{target.name}.weight").data, fields, target.format)


def materialize(
    module: nn.Module, params: list[str], prefix: str, weights: Weights, disk: dict[str, str], dtype: torch.dtype, device: Any
) -> None:
    """Read parameters from disk into a module on meta. Raises ValueError naming a tensor that is missing or not finite."""
    for name in params:
        full = f"{prefix}{name}"
        if full not in disk:
            raise ValueError(f"{weights.folder} has no tensor for {full}; the checkpoint does not fit its config.json")
        value = weights.read(disk[full])
        owner = module.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        old = owner._parameters[leaf]
        assert old is not None
        if value.shape != old.shape:
            raise ValueError(f"{full} is {list(value.shape)} on disk; config.json asks for {list(old.shape)}")
        require_finite(full, value)
        owner._parameters[leaf] = nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False)


def release(module: nn.Module, params: list[str]) -> None:
    """Send parameters back to the meta device."""
    for name in params:
        owner = module.get_submodule(name.rpartition(".")[0])
        old = owner._parameters[name.rpartition(".")[2]]
        assert old is not None
        owner._parameters[name.rpartition(".")[2]] = nn.Parameter(old.to("meta"), requires_grad=False)
