"""The plan: everything that is known before the first block is quantized, down to the byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quant.checkpoint import Piece, predicted_bytes, quantization_config, scheme_of, sentinel
from quant.embedding import Head, UnpackableHead, packable
from quant.experts import stacks_of
from quant.kernels.activations.adaptive_token import AdaptiveToken
from quant.kernels.dispatch import MatmulSpec, choose
from quant.masked import Masking, masking_for
from quant.models import Entry, Weights, index, read_json, resolve
from quant.naming import experts_apart, match_names
from quant.recipe import Recipe
from quant.refine import refined
from quant.resources import compute_dtype
from quant.stacks import Stack, disk_names, empty_model, find_stacks, unfilled
from quant.targets import Selection, Target, select


@dataclass
class Plan:
    """given: the model as the user named it. disk: parameter name in memory -> tensor name on disk.

    tensors: the source's, experts that it stores together shown apart. note: in one line, what of the recipe this model does
    not take. masking: how calibration masks the text of a masked-diffusion model.
    """

    given: str
    source: Path
    recipe: Recipe
    model: Any
    stacks: list[Stack]
    selection: Selection
    disk: dict[str, str]
    tensors: dict[str, Entry] = field(repr=False)
    note: str = ""
    masking: Masking | None = None

    @property
    def targets(self) -> dict[str, Target]:
        """Layers to pack, by name in memory."""
        return self.selection.targets

    @property
    def packed(self) -> dict[str, Target]:
        """Everything that is packed, the head's table too, in the order in which a loader meets it."""
        table = self.selection.table
        found = self.targets if table is None else {**self.targets, table.name: table}
        return {name: found[name] for name in packable(self.model) if name in found}

    @property
    def blocks(self) -> int:
        """How many there are."""
        return sum(len(stack.blocks) for stack in self.stacks)

    @property
    def adaptive(self) -> bool:
        """Whether a layer reads some tokens with 8 bits and some with 4."""
        return any(isinstance(target.activation, AdaptiveToken) for target in self.targets.values())

    @property
    def speech(self) -> bool:
        """Calibrated on audio instead of text."""
        return str(self.model.main_input_name) == "input_features"

    def weights(self) -> Weights:
        """The source's tensors."""
        return Weights(self.source, self.tensors)

    def layer_on_disk(self, name: str) -> str:
        """A layer's name as the source checkpoint spells it."""
        return self.disk[f"{name}.weight"].removesuffix(".weight")

    def pieces(self, made: Mapping[str, Entry] | None = None) -> list[Piece]:
        """Every tensor of the result. made: tensors that exist already in finished blocks, by disk name."""
        made = made or {}
        packed = {f"{self.layer_on_disk(name)}.weight": target for name, target in self.packed.items()}
        out = [sentinel(list(self.packed.values()), self.disk)]
        for name, entry in self.tensors.items():
            target = packed.get(name)
            if target is None:
                out.append(Piece(name, entry.dtype, entry.shape, made.get(name, entry)))
                continue
            layer = name.removesuffix(".weight")
            for key, (shape, dtype) in target.fields().items():
                out.append(Piece(f"{layer}.{key}", dtype, shape, made.get(f"{layer}.{key}")))
            if target.new_bias:
                out.append(Piece(f"{layer}.bias", entry.dtype, (target.n,), made.get(f"{layer}.bias")))
        return out

    def bytes_on_disk(self) -> int:
        """Exact size of the weight files the run will write."""
        return predicted_bytes(self.pieces())

    def packed_bytes(self) -> int:
        """Bytes of the packed linears of the blocks, scales included."""
        return sum(t.format.stored_bytes(t.n, t.k) for t in self.targets.values())

    def packed_weights(self) -> int:
        """Number of weights in the packed linears of the blocks."""
        return sum(t.n * t.k for t in self.targets.values())

    def bits_per_weight(self) -> float:
        """Stored bits per weight of the packed linears of the blocks, scales included."""
        return 8 * self.packed_bytes() / self.packed_weights()

    def config_section(self) -> dict[str, Any]:
        """The quantization_config that goes into config.json."""
        packed = self.packed
        layers = {self.layer_on_disk(name): target for name, target in packed.items()}
        rest = [name for name in packable(self.model) if name not in packed]
        kept = [self.layer_on_disk(name) for name in rest if f"{name}.weight" in self.disk]
        section = quantization_config(layers, [])
        section["float"] = [name for name in kept if scheme_of(section, name)]
        if created := [name for name, target in layers.items() if target.new_bias]:
            section["bias"] = created
        if self.recipe.softmax is not None:
            section["softmax"] = self.recipe.softmax.model_dump()
        if self.adaptive:
            section["token_thresholds"] = [0.0] * self.blocks  # all tokens have 8 bits until a pass decides
        return section

    def kernels(self, device: str) -> dict[str, tuple[int, dict[str, str]]]:
        """Kernel name -> number of layers it will serve on `device`, and why others were refused for the first of them."""
        found: dict[str, tuple[int, dict[str, str]]] = {}
        for t in self.packed.values():
            spec = MatmulSpec(n=t.n, k=t.k, format=t.format, activation=t.activation, device=device)
            kernel, refusals = choose(spec)
            count, kept = found.get(kernel.name, (0, refusals))
            found[kernel.name] = (count + 1, kept)
        return found

    def identity(self, calibration: str) -> str:
        """A digest of all that decides the output bytes: recipe, source tensors, calibration data, versions, arithmetic."""
        import transformers

        from quant import __version__

        tensors = {n: [str(e.dtype), list(e.shape), e.start] for n, e in self.tensors.items()}
        files = {str(e.file): [e.file.stat().st_size, e.file.stat().st_mtime_ns] for e in self.tensors.values()}
        versions = [__version__, torch.__version__, transformers.__version__, str(compute_dtype(torch.device("cpu")))]
        facts = [self.recipe.model_dump(mode="json"), tensors, files, calibration, versions]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def make_plan(given: str, recipe: Recipe, say: Any = lambda line: None, device: torch.device | None = None) -> Plan:
    """Resolve a model and apply a recipe to it. Raises ValueError for whatever cannot be done.

    Reads headers only, unless a pass chooses formats from the weights or the recipe has a budget of bits, for which
    sensitivities are measured on `device` (a CPU by default); the choices are rules of the plan's recipe.
    """
    source = resolve(given, say)
    model = empty_model(source)
    stacks = find_stacks(model)
    tensors = experts_apart(model, index(source))
    disk = disk_names(model, tensors)
    rows = getattr(model.config.get_text_config(), "vocab_size", 0)
    masking, note = masking_for(read_json(source / "config.json"), recipe.calibration, rows)
    try:
        selection = select(model, stacks, recipe)
        if selection.head is not None:
            require_one_table(selection.head, disk, tensors)
            if selection.head.tied and masking is not None:
                raise UnpackableHead(f"the embedding of mask token {masking.token} must stay exact; leave it with head: null")
    except UnpackableHead as error:
        if not recipe.head_optional:
            raise
        note = "; ".join(filter(None, [note, f"the head stays in float: {error}"]))
        recipe = recipe.model_copy(update={"head": None})
        selection = select(model, stacks, recipe)
    require_apart(selection.targets, model)
    for name in selection.targets:
        if f"{name}.weight" not in disk:
            raise ValueError(
                f"{name}.weight is not in {source} under a name that can be matched; "
                f"leave it in float with the rule {{match: {name}, skip: true}}"
            )
    absent = unfilled(model, disk)
    if absent:
        raise ValueError(f"{source} has no tensor for {absent[0]}; the checkpoint does not fit its config.json")
    recipe, selection = refined(recipe, selection, Weights(source, tensors), disk)
    plan = Plan(str(given), source, recipe, model, stacks, selection, disk, tensors, note, masking)
    require_tags(plan)
    if recipe.bits is None:
        return plan
    from quant.budget import within  # it measures on a plan

    return within(plan, device or torch.device("cpu"), say)


def require_tags(plan: Plan) -> None:
    """Raise ValueError where adaptive layers would get no marks of important tokens, or marks would find no such layer."""
    from quant.passes import token_bits as marks
    from quant.serve import token_bits

    marked = any(isinstance(step, marks.Pass) for step in plan.recipe.build_passes())
    if not plan.adaptive:
        if marked:
            raise ValueError("pass token_bits finds no layer with activation adaptive_token; drop the pass")
        return
    reason = token_bits.refuses(plan.model, plan.blocks)
    if reason is None and stacks_of(plan.model):
        reason = "it has experts, which read tokens out of order"
    if reason:
        raise ValueError(f"activation adaptive_token does not fit this model: {reason}; use int8_token")
    if not marked:
        raise ValueError("activation adaptive_token needs the pass token_bits, which chooses the important tokens; add it")
    if plan.recipe.softmax is not None:
        raise ValueError("softmax and activation adaptive_token both replace the attention; keep one of them")


def require_apart(targets: Mapping[str, Target], model: Any) -> None:
    """Raise ValueError for two layers of one weight: blocks are calibrated one after another, each with its own inputs."""
    shared = {copy: source for copy, source in model.all_tied_weights_keys.items() if copy.removesuffix(".weight") in targets}
    if shared:
        copy, source = next(iter(shared.items()))
        raise ValueError(
            f"{type(model).__name__} runs blocks twice with one set of weights ({copy} is {source}); a block is calibrated and "
            "packed where it stands, so this model cannot be quantized yet"
        )


def require_one_table(head: Head, disk: Mapping[str, str], tensors: Mapping[str, Entry]) -> None:
    """Raise UnpackableHead unless the head's table is stored once, under the name that the model class gives it."""
    wanted = f"{head.table}.weight"
    stored = match_names({wanted, f"{head.linear}.weight"}, tensors, least=2)
    if wanted not in disk or len(stored) > 1:
        where = ", ".join(sorted(stored.values())) or "no name that can be matched"
        raise UnpackableHead(f"the head's table {wanted} is stored under {where}; leave the head in float with head: null")
