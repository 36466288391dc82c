"""Layers that read the same tensor run as one: q, k, v and gate, up of a block share one launch and one quantized x.

The first sibling that is called computes all; the others hand out what is theirs when they are called with the very
same tensor, unchanged. Whether a family does read one tensor is seen, not assumed: in cross-attention it does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant.kernels.dispatch import MatmulSpec, Prepared
from quant.linear import PackedLinear, join
from quant.targets import FUSED


class Siblings:
    """A family of layers with one K, format and activation. Joined after the first time that all read one tensor.

    A tensor counts as the same while it is the same object with the same version counter, address and shape. Writing
    through `.data` or numpy leaves that counter as it is, so nobody should do that between two siblings.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self.layers = tuple(layers)
        self.seen = 0  # layers that have read the current tensor before they are joined
        self.agreed = False
        self.joined: Prepared | None = None
        self.specs: list[MatmulSpec] = []  # of the layers, and their biases, once joined
        self.biases: list[Tensor | None] = []
        self.source: weakref.ref[Tensor] | None = None
        self.key: tuple[object, ...] = ()
        self.outputs: list[Tensor | None] = [None] * len(self.layers)

    def output(self, layer: PackedLinear, x: Tensor) -> Tensor | None:
        """`layer`'s output [M, N] for x [..., K], or None where the layer must compute it alone."""
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return None
        if x.is_inference():  # such tensors do not count their changes
            self.part()
            return None
        index = next(i for i, member in enumerate(self.layers) if member is layer)
        same = self.source is not None and self.source() is x and self.key == self.key_of(x)
        if not self.agreed:
            self.observe(index, x, same)
            return None
        if not same:
            if any(y is not None for y in self.outputs):  # some sibling did not want its share
                self.part()
                return None
            self.compute(x)
        if self.joined is None:
            self.part()
            return None
        y, self.outputs[index] = self.outputs[index], None
        if y is None:  # asked twice for the same x
            self.part()
        elif all(rest is None for rest in self.outputs):
            self.forget()
        return y

    def observe(self, index: int, x: Tensor, same: bool) -> None:
        """Watch one round: siblings in order, each with the same tensor, or they are no siblings."""
        if index == 0:
            self.remember(x)
        elif not same or index != self.seen:
            return self.part()
        self.seen = index + 1
        if self.seen == len(self.layers):
            self.joined = join(self.layers)
            self.agreed = self.joined is not None
            self.forget() if self.agreed else self.part()

    def compute(self, x: Tensor) -> None:
        """All outputs for x, kept until they are asked for or x is gone."""
        self.joined = self.joined or join(self.layers)
        if self.joined is None:
            return
        kernel = self.layers[0].bound()[0]
        if not self.specs:
            self.specs = [layer.bound()[2] for layer in self.layers]
            self.biases = [layer.bias for layer in self.layers]
        self.remember(x)
        flat = self.specs[0].activation.rotated(x.reshape(-1, self.specs[0].k)).contiguous()
        self.outputs = list(kernel.matmul_joined(flat, self.joined, self.biases, self.specs))

    def part(self) -> None:
        """Every layer goes its own way from now on."""
        for layer in self.layers:
            layer.siblings = None
        self.forget()
        self.joined = None

    def unbound(self) -> None:
        """A layer went back to its canonical tensors; join anew when asked again."""
        self.joined = None
        self.specs, self.biases = [], []
        self.forget()

    def key_of(self, x: Tensor) -> tuple[object, ...]:
        """What changes when x or a bias is written to."""
        counted = (bias._version for bias in self.biases if bias is not None and not bias.is_inference())
        return x._version, x.data_ptr(), x.shape, *counted

    def remember(self, x: Tensor) -> None:
        owner = weakref.ref(self)

        def gone(_: object) -> None:
            if (siblings := owner()) is not None:
                siblings.forget()

        self.source = weakref.ref(x, gone)
        self.key = self.key_of(x)

    def forget(self) -> None:
        self.source, self.key = None, ()
        self.outputs = [None] * len(self.layers)

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "seen": 0, "agreed": self.agreed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.unbound()


def link(model: nn.Module) -> list[Siblings]:
    """Make siblings of every family of packed layers under one parent that has one K, format and activation."""
    families = []
    for parent in model.modules():
        children = dict(parent.named_children())
        for family in FUSED:
            layers = [child for name in family if isinstance(child := children.get(name), PackedLinear)]
            schemes = {(layer.in_features, layer.format, layer.activation) for layer in layers}
            if len(layers) == len(family) and len(schemes) == 1:
                siblings = Siblings(layers)
                for layer in layers:
                    layer.siblings = siblings
                families.append(siblings)
    return families
