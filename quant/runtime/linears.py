"""The linears of a model as a graph sees them: weights as buffers, one operator for all layers that read the same tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from quant.linear import PackedLinear, join


class Linears(nn.Module):
    """x [..., K] -> [..., N] of each layer, around the layers' own memory.

    Packed layers are moved to where they are read fastest; several of one kernel and format become one weight and one call,
    where the kernel joins them.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.sizes = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
        packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
        whole = join(packed) if len(packed) == len(layers) else None
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
        if self.kernel is None:
            return [nn.functional.linear(x, self.w0, biases[0])]
        weights = tuple(getattr(self, f"w{position}") for position in range(self.weights))
        flat = x.reshape(-1, x.shape[-1])
        if self.together:
            ys = self.kernel.matmul_joined(flat, weights, biases, self.specs)
        else:
            ys = [self.kernel.matmul(flat, weights, biases[0], self.specs[0])]
        return [y.view(*x.shape[:-1], n) for y, n in zip(ys, self.sizes, strict=True)]

    def extra_repr(self) -> str:
        """What of these layers is fixed in compiled code; part of the artifact's key."""
        return f"{self.sizes}, " + ("" if self.each is not None else f"{self.kernel and self.kernel.name}, {self.specs}")


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
    """The dtype of what is not packed."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
