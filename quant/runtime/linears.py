"""The linears of a model as a graph sees them: weights as buffers, one operator for all layers that read the same tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from quant.kernels.dispatch import Prepared
from quant.linear import PackedLinear, join


class Linears(nn.Module):
    """x [..., K] -> [..., N] of each layer, around the layers' own memory.

    Packed layers are moved to where they are read fastest; several of one kernel and format become one weight and one call,
    where the kernel joins them.
    """

    def __init__(self, *given: nn.Module) -> None:
        super().__init__()
        layers = tuple(untied(layer) for layer in given)
        self.sizes = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
        packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
        whole = together(packed) if len(packed) == len(layers) else None
        if whole is None and len(layers) > 1:
            self.each: nn.ModuleList | None = nn.ModuleList(Linears(layer) for layer in layers)
            return
        self.each = None
        bound = [layer.bound() for layer in packed]
        self.kernel = bound[0][0] if bound else None
        self.specs = [spec for _, _, spec in bound]
        if not packed and not isinstance(layers[0], nn.Linear):
            raise ValueError(f"a {type(layers[0]).__name__} stands where a linear is expected; only linears are compiled")
        weights = whole or (bound[0][1] if bound else (layers[0].weight.detach(),))  # type: ignore[operator]
        for name, tensor in self._buffers_of(weights, layers):
            self.register_buffer(name, tensor)
        self.weights, self.together = len(weights), whole is not None and len(layers) > 1

    @staticmethod
    def _buffers_of(weights: tuple[Tensor, ...], layers: tuple[nn.Module, ...]) -> Iterator[tuple[str, Tensor | None]]:
        for position, weight in enumerate(weights):
            yield f"w{position}", weight
        for position, layer in enumerate(layers):
            yield f"b{position}", layer.bias.detach() if isinstance(layer.bias, Tensor) else None

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.each is not None:
            return [layer(x)[0] for layer in self.each]
        biases = [getattr(self, f"b{position}") for position in range(len(self.sizes))]
        weights = tuple(getattr(self, f"w{position}") for position in range(self.weights))
        if self.kernel is None:
            return [nn.functional.linear(x, weights[0], biases[0])]
        flat = self.specs[0].activation.rotated(x.reshape(-1, x.shape[-1]))
        if self.together:
            ys = self.kernel.matmul_joined(flat, weights, biases, self.specs)
        else:
            ys = [self.kernel.matmul(flat, weights, biases[0], self.specs[0])]
        return [y.view(*x.shape[:-1], n) for y, n in zip(ys, self.sizes, strict=True)]

    def extra_repr(self) -> str:
        """What of these layers is fixed in compiled code; part of the artifact's key."""
        return f"{self.sizes}, " + ("" if self.each is not None else f"{self.kernel and self.kernel.name}, {self.specs}")


class Embedding(nn.Module):
    """ids [...] -> rows [..., K] of an embedding, packed or not, around its own memory."""

    def __init__(self, table: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = None if isinstance(table, PackedLinear) else table
        self.dtype = dtype
        if isinstance(table, PackedLinear):
            self.kernel, weights, self.spec = table.bound()
            self.count = len(weights)
            for position, weight in enumerate(weights):
                self.register_buffer(f"w{position}", weight)

    def forward(self, ids: Tensor) -> Tensor:
        if self.table is not None:
            rows: Tensor = self.table(ids)
            return rows
        weights = tuple(getattr(self, f"w{position}") for position in range(self.count))
        found: Tensor = self.spec.format.dequantize(self.kernel.rows(weights, ids.flatten(), self.spec))
        return found.to(self.dtype).view(*ids.shape, found.shape[-1])

    def extra_repr(self) -> str:
        """As of Linears."""
        return "" if self.table is not None else f"{self.kernel.name}, {self.spec}, {self.dtype}"


def untied(layer: nn.Module) -> nn.Module:
    """The layer itself, or the packed embedding whose table a tied head multiplies by."""
    table = getattr(layer, "embedding", None)
    return table if isinstance(table, PackedLinear) else layer


def together(layers: list[PackedLinear]) -> Prepared | None:
    """As quant.linear.join; a weight that eager siblings share is theirs too, so that it is in memory once."""
    family = layers[0].siblings
    if family is None or list(family.layers) != layers:
        return join(layers)
    family.joined = family.joined or join(layers)
    family.agreed = family.joined is not None
    return family.joined


def weight_of(layer: nn.Module) -> Tensor:
    """The [N, K] weight of a linear in floats."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def constants(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of `module` under each of its names, so that a graph finds tied tensors as well."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of what is not packed; the scales of packed layers have dtypes of their own."""
    plain = (module for module in model.modules() if not isinstance(module, PackedLinear))
    return next(p.dtype for module in plain for p in module.parameters(recurse=False) if p.is_floating_point())
