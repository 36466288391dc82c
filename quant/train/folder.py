"""The packed folder of a plan as a student that can be trained, and back: the same tensors, overwritten in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.models import index
from quant.plan import Plan
from quant.resources import compute_dtype
from quant.train.latent import Discrete, Latent
from quant.train.layer import Trained


@dataclass
class Student:
    """model: a transformers model. layers: its packed linears in training; others: trained vectors. By name in memory."""

    model: Any
    layers: dict[str, Trained]
    others: dict[str, nn.Parameter]

    @property
    def latents(self) -> dict[str, Latent]:
        """The layers whose codes move."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, Latent)}

    @property
    def vectors(self) -> dict[str, nn.Parameter]:
        """Norms and biases."""
        return self.others | {f"{n}.bias": layer.bias for n, layer in self.layers.items() if layer.bias is not None}

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that has a gradient, in a fixed order."""
        theta = {f"{n}.{key}": value for n, layer in self.layers.items() for key, value in layer.theta.items()}
        return theta | {f"{n}.steps": layer.steps for n, layer in self.latents.items()} | self.vectors

    def refresh(self) -> None:
        """Dense weights for the next forward passes, in the dtype that the device multiplies fast."""
        for layer in self.layers.values():
            layer.refresh(compute_dtype(layer.codes.device))


def open_student(folder: Path, plan: Plan, device: torch.device, codes: Discrete | None) -> Student:
    """The packed model in float32. Trained are the plan's targets and the vectors (norms, biases) of their blocks.

    codes: how codes may move, None where they stay. The head and the embeddings stay as they are.
    """
    from quant.loading import load
    from quant.serve import token_bits

    model = load(folder, dtype=torch.float32, device=device, compile=False).requires_grad_(False)
    if model.config._attn_implementation != token_bits.NAME:  # which leaves gradients to torch, once it has left its marks
        model.set_attn_implementation("sdpa")  # ours has no backward pass
    packed = {name: model.get_submodule(name) for name in plan.targets}
    layers = {name: Trained(layer) if codes is None else Latent(layer, codes) for name, layer in packed.items()}
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        model.set_output_embeddings(dense_head(head))
    blocks = tuple(f"{block}." for stack in plan.stacks for block in stack.blocks)
    trained = tuple(f"{name}." for name in layers)
    others = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and name.startswith(blocks) and not name.startswith(trained)
    }
    for parameter in others.values():
        parameter.requires_grad_()
    return Student(model.eval(), layers, others)


def dense_head(head: Any) -> nn.Linear:
    """A packed head as one through which gradients flow."""
    weight = getattr(head, "embedding", head).weight.detach()
    weight = weight.to(compute_dtype(weight.device))
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return dense


def write_back(student: Student, folder: Path, plan: Plan) -> None:
    """Overwrite the student's tensors in the folder's files; shapes, dtypes and places stay."""
    changed: dict[str, Tensor] = {}
    for name, layer in student.layers.items():
        disk = plan.layer_on_disk(name)
        changed |= {f"{disk}.{key}": value for key, value in layer.fields().items()}
        if layer.bias is not None:
            changed[f"{disk}.bias"] = layer.bias
    changed |= {plan.disk[name]: parameter for name, parameter in student.others.items()}
    overwrite(folder, changed.items())


def overwrite(folder: Path, changed: Iterable[tuple[str, Tensor]]) -> None:
    """Put tensors, by name on disk, in the place of those that the folder's files hold, in their dtypes."""
    stored = index(folder)
    for name, value in changed:
        entry = stored[name]
        data = value.detach().to(entry.dtype).cpu().contiguous()
        assert tuple(data.shape) == entry.shape, (name, data.shape, entry.shape)
        with entry.file.open("r+b") as file:
            file.seek(entry.start)
            file.write(data.view(torch.uint8).numpy().tobytes())
