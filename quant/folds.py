"""Channel folds: divide channel j where it is made by r[j] and shift it, undo both where it is read. The block's output must
not move.

Who made a tensor is found while the block runs (a norm's output is the very tensor a linear reads) or by name for
linear -> linear pairs. Whether the fold is legal is not assumed: the block runs before and after, and a fold that changes
the output is undone and reported. So an architecture that reads a norm's output elsewhere is refused, not broken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quant.kernels.activation import Activation
from quant.kernels.format import Format
from quant.stats import InputStats

FEEDS = {"down_proj": "up_proj", "o_proj": "v_proj", "out_proj": "v_proj"}  # reader <- maker; linear in the maker's rows
TOLERANCE = 1e-3  # relative; float32 rounding of a whole block stays far below, a wrong fold far above


@dataclass
class InputGroup:
    """Linears that read one tensor. maker: the norm in the block whose output that tensor is, if any."""

    names: list[str]
    stats: InputStats
    maker: str | None


@dataclass
class BlockView:
    """A float32 block, its input groups, and `run`, which gives its output on a sample in float32.

    schemes: format and activation rule that each linear will get. stored_dtype: of a parameter on disk. folds: linear -> the
    norm or linear in which `fold` divided its input.
    """

    name: str
    block: nn.Module
    groups: list[InputGroup]
    run: Callable[[], Tensor]
    stored_dtype: Callable[[str], torch.dtype]
    schemes: Mapping[str, tuple[Format, Activation]]
    changed: set[str] = field(default_factory=set)
    folds: dict[str, str] = field(default_factory=dict)

    @cached_property
    def reference(self) -> Tensor:
        """The block's output before any fold."""
        return self.run()

    def module(self, name: str) -> nn.Module:
        """The block or a submodule of it, by full name."""
        return self.block.get_submodule(name.removeprefix(self.name).removeprefix("."))

    def linear(self, name: str) -> nn.Linear:
        module = self.module(name)
        assert isinstance(module, nn.Linear)
        return module

    def maker_of(self, group: InputGroup) -> str | None:
        """Name of the norm or linear whose output channels are this group's input channels."""
        if group.maker is not None:
            return group.maker
        parent, _, leaf = group.names[0].rpartition(".")
        name = f"{parent}.{FEEDS.get(leaf, '')}"
        try:
            return name if isinstance(self.module(name), nn.Linear) else None
        except AttributeError:
            return None

    def fold(self, group: InputGroup, r: Tensor, shift: Tensor | None = None) -> str | None:
        """Make the group's input X / r - shift, [K] each, where it is made; returns why it was refused, or None.

        W r then reads it, and adds W r shift to its bias. A shift needs a bias at the maker and at every reader.
        """
        maker_name = self.maker_of(group)
        if maker_name is None:
            return "no norm or linear in the block makes its input"
        maker = self.module(maker_name)
        weight, bias = maker.weight, getattr(maker, "bias", None)
        assert isinstance(weight, Tensor)
        shared = share_over_heads(r, len(weight), self.module(maker_name.rpartition(".")[0]))
        if shared is None:
            return f"{maker_name} makes {len(weight)} channels, {len(r)} are read"
        at_maker, r = shared
        if shift is not None and (reason := self.refuses_shift(group, maker_name, len(r))):
            return reason
        if not isinstance(maker, nn.Linear):  # a norm takes its rounding on disk now, and the readers undo just that
            stored = (weight / r).to(self.stored_dtype(f"{maker_name}.weight")).float()
            at_maker = r = torch.where(stored != 0, weight / stored, r)
            if shift is not None:
                assert isinstance(bias, Tensor)
                shift = bias / r - (bias / r - shift).to(self.stored_dtype(f"{maker_name}.bias")).float()
        assert self.reference.isfinite().all(), self.name  # also runs the block before the first fold touches it
        touched: dict[str, Any] = {f"{maker_name}.weight": weight, f"{maker_name}.bias": bias}
        touched |= {f"{name}.weight": self.linear(name).weight for name in group.names}
        if shift is not None:
            touched |= {f"{name}.bias": self.linear(name).bias for name in group.names}
        saved: dict[str, tuple[Tensor, Tensor]] = {
            name: (p, p.detach().clone()) for name, p in touched.items() if p is not None
        }
        for name, (param, _) in saved.items():
            if name.startswith(f"{maker_name}."):
                param.data /= at_maker.view(-1, *[1] * (param.dim() - 1))
                if shift is not None and param is bias:
                    param.data -= shift
                if not isinstance(maker, nn.Linear):
                    param.data = param.data.to(self.stored_dtype(name)).float()
            elif name.endswith(".weight"):
                param.data *= r
        if shift is not None:
            for name in group.names:
                self.linear(name).bias.data += self.linear(name).weight @ shift
        moved = float((self.run() - self.reference).norm() / self.reference.norm().clamp_min(1e-12))
        if not moved < TOLERANCE:
            for param, old in saved.values():
                param.data = old
            return f"it changes the block's output by {moved:.1e} of its norm"
        group.stats.follow(r, shift)
        self.changed |= saved.keys()
        if bool((r != 1).any()):
            self.folds |= dict.fromkeys(group.names, maker_name)
        return None

    def refuses_shift(self, group: InputGroup, maker: str, width: int) -> str | None:
        """Why the maker's channels, `width` as they are read, cannot be shifted, or None."""
        bias = getattr(self.module(maker), "bias", None)
        if bias is None or len(bias) != width:
            return f"{maker} has no bias of {width} channels to shift them by"
        bare = next((name for name in group.names if self.linear(name).bias is None), None)
        return None if bare is None else f"{bare} has no bias to undo a shift in"


def share_over_heads(r: Tensor, width: int, parent: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(r at the maker, r at the reader). With grouped-query attention several reader channels share one maker channel,
    so they share the largest factor. None when the widths do not divide.
    """
    if width == len(r):
        return r, r
    head = getattr(parent, "head_dim", None)
    if not isinstance(head, int) or len(r) % width or width % head:
        return None
    by_head = r.view(width // head, len(r) // width, head)
    shared = by_head.amax(1, keepdim=True)
    return shared.reshape(-1), shared.expand_as(by_head).reshape(-1)
