"""PackedLinear: the module that stands where a float linear stood. Format + activation rule + bias, one kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quant.kernels.activation import Activation, fields_of
from quant.kernels.activations.adaptive_token import AdaptiveToken, by_tag
from quant.kernels.activations.int_token import IntToken
from quant.kernels.dispatch import Kernel, MatmulSpec, Prepared, choose
from quant.kernels.format import Field, Fields, Format
from quant.kernels.rotation import by_matrix

if TYPE_CHECKING:
    from quant.serve.token_bits import Tags
    from quant.siblings import Siblings


class PackedLinear(nn.Module):
    """y = quantize(rotate(x)) @ dequantize(weight)^T + bias, the weight packed.

    The tensors of the format and of the activation rule are buffers under their own names until the first forward, which
    chooses a kernel and hands them over ("bind"): from then on only the kernel's layout is in memory. (Not parameters,
    because a model's dtype is that of its first float parameter.) The state dict always holds the canonical bytes. Integer
    codes and scales keep their dtype under `.to(dtype)`; the bias follows it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: Format,
        activation: Activation,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.activation = fmt, activation
        self.compute_dtype = dtype or torch.get_default_dtype()
        for name, (shape, kind) in self.stored().items():
            self._store(name, torch.empty(shape, dtype=kind, device=device))
        empty = torch.empty(out_features, dtype=self.compute_dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self.kernel: Kernel | None = None
        self.refusals: dict[str, str] = {}
        self._prepared: Prepared = ()
        self._spec: MatmulSpec | None = None
        self._placed = False  # whether `_prepared` is where the kernel reads it fastest
        self.siblings: Siblings | None = None  # layers that read the same tensor, see quant/siblings.py
        self.tags: Tags | None = None  # of adaptive_token, which of the tokens are important

    @classmethod
    def from_fields(
        cls, fields: Mapping[str, Tensor], fmt: Format, activation: Activation, n: int, k: int, bias: Tensor | None
    ) -> PackedLinear:
        """A packed layer [n, k] around existing tensors; raises ValueError when they do not fit."""
        check(fields, fmt, activation, n, k)
        layer = cls(k, n, fmt, activation, bias=bias is not None, device="meta", dtype=None if bias is None else bias.dtype)
        for name, value in fields.items():
            layer._store(name, value)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            self.bind()
        assert self.kernel is not None
        assert self._spec is not None
        if self.siblings is not None and (shared := self.siblings.output(self, x)) is not None:
            return shared.view(*x.shape[:-1], self.out_features)
        if not self._placed and self.siblings is None and not torch.compiler.is_compiling():
            join([self])
        flat = self.activation.rotated(x.reshape(-1, self.in_features)).contiguous()
        if self.tags is None:
            y = self.kernel.matmul(flat, self._prepared, self.bias, self._spec)
        else:
            assert isinstance(self.activation, AdaptiveToken)
            y = by_tag(self.activation, flat, self.tags.of(flat), self._multiply)
        return y.view(*x.shape[:-1], self.out_features)

    def _multiply(self, x: Tensor, rule: IntToken) -> Tensor:
        """Tokens [M, K] that are all read by one of the rules of an adaptive activation."""
        assert self.kernel is not None
        assert self._spec is not None
        return self.kernel.matmul(x, self._prepared, self.bias, replace(self._spec, activation=rule))

    def fields(self) -> Fields:
        """The canonical tensors, bound or not."""
        if self.kernel is not None:
            assert self._spec is not None
            return self.kernel.restore(self._prepared, self._spec)
        return {name: getattr(self, name).data for name in self.stored()}

    def stored(self) -> dict[str, Field]:
        """Name -> shape and dtype of the canonical tensors."""
        return fields_of(self.format, self.activation, self.out_features, self.in_features)

    def require_valid(self, name: str) -> None:
        """Raise ValueError, naming the tensor, if a value lies outside what the format allows. `name`: the layer's."""
        fields = self.fields()
        if fields["weight_packed"].device.type == "meta":
            return
        try:
            check(fields, self.format, self.activation, self.out_features, self.in_features)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None

    def bind(self) -> None:
        """Choose the kernel for the device the tensors are on and change to its layout. Checks ranges first."""
        fields = self.fields()
        check(fields, self.format, self.activation, self.out_features, self.in_features)
        device = fields["weight_packed"].device.type
        spec = MatmulSpec(
            n=self.out_features, k=self.in_features, format=self.format, activation=self.activation, device=device
        )
        kernel, self.refusals = choose(spec)
        self._prepared, self._spec, self.kernel = kernel.prepare(fields, spec), spec, kernel
        for name in fields:
            self._store(name, None)

    def bound(self) -> tuple[Kernel, Prepared, MatmulSpec]:
        """The kernel, its tensors and what it serves; chosen now if that has not happened."""
        if self.kernel is None:
            self.bind()
        assert self.kernel is not None
        assert self._spec is not None
        return self.kernel, self._prepared, self._spec

    def adopt(self, prepared: Prepared) -> None:
        """Go on with equal tensors in their final place."""
        self._prepared, self._placed = prepared, True

    def unpack(self) -> None:
        """Go on with a kernel that gives the same bits and may take a float weight's memory: for many runs in a short life."""
        kernel, prepared, spec = self.bound()
        self.kernel, prepared = kernel.unpacked(prepared, spec)
        self.adopt(prepared)

    def unbind(self) -> None:
        """Back to canonical tensors as buffers."""
        if self.kernel is None:
            return
        fields = self.fields()
        self.kernel, self._prepared, self._spec, self._placed = None, (), None, False
        if self.siblings is not None:
            self.siblings.unbound()
        for name, value in fields.items():
            self._store(name, value)

    @property
    def weight(self) -> Tensor:
        """The dequantized [N, K] weight in the compute dtype; made anew at each access."""
        fields = self.fields()
        codes = self.format.unpack(fields, self.out_features, self.in_features)
        return by_matrix(self.format.dequantize(codes), self.activation.rotate).to(self.compute_dtype)

    def extra_repr(self) -> str:
        kernel = self.kernel.name if self.kernel else "unbound"
        return f"{self.in_features}, {self.out_features}, {self.format}, activation={self.activation}, kernel={kernel}"

    def _store(self, name: str, value: Tensor | None) -> None:
        """Set one of the format's tensors; None: the kernel holds it now."""
        self.register_buffer(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self.unbind()
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        for name in self.stored():
            old = getattr(self, name).data
            new = fn(old)
            self._store(name, new if new.dtype == old.dtype else old.to(new.device))
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in self.fields().items():
            destination[prefix + name] = value
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unbind()
        super()._load_from_state_dict(*args)


def check(fields: Mapping[str, Tensor], fmt: Format, activation: Activation, n: int, k: int) -> None:
    """Raise ValueError, naming the first tensor of a packed layer [n, k] that does not fit its format or activation rule."""
    fmt.check(fields, n, k)
    activation.check(fields, n, k)


def join(layers: Sequence[PackedLinear]) -> Prepared | None:
    """Layers that read the same x as one weight, which they then hold views of; None where their kernel does not join them.

    One layer may be given, to move its weight to where it is read fastest.
    """
    bound = [layer.bound() for layer in layers]
    kernel, _, first = bound[0]
    if any(k is not kernel or (s.k, s.format, s.activation) != (first.k, first.format, first.activation) for k, _, s in bound):
        return None
    joined = kernel.join([prepared for _, prepared, _ in bound])
    if joined is None:
        for layer in layers:
            layer.adopt(layer.bound()[1])
        return None
    for layer, part in zip(layers, joined[1], strict=True):
        layer.adopt(part)
    return joined[0]
