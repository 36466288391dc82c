"""vLLM's linear and embedding methods for packed weights: what it calls to make, load and use a layer's tensors.

Every parameter has a loader of its own here, so vLLM's two generations of loaders give the same result, and every tensor that
arrives is checked and counted: vLLM itself does not notice when one is missing from a quantized checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from quant.checkpoint import SENTINEL_SHAPE
from quant.embedding import fill_table
from quant.kernels.format import Fields
from quant.serve.vllm.names import Scheme
from quant.serve.vllm.shards import Bound, PackedShards, Shard, fused_shards, multiply

BIAS, SENTINEL = "bias", "weight"
logger = init_logger("vllm.lowbit")


class PackedMethod(QuantizeMethodBase):  # type: ignore[misc]
    """What linears and tables share: parameters that are filled, then a kernel. One object serves one layer."""

    def __init__(self, scheme: Scheme) -> None:
        self.format, self.activation = scheme
        self.shards: PackedShards | None = None
        self.weights: list[Bound] = []

    def describe(self, shards: Sequence[Shard], ranks: int) -> PackedShards:
        """The shards with this method's scheme, on the device that vLLM builds layers under."""
        return PackedShards(shards, self.format, self.activation, ranks, torch.empty(0).device.type, logger.warning_once)

    def make(self, layer: nn.Module, shards: Sequence[Shard], ranks: int) -> PackedShards:
        """Register on `layer` the empty parameters of `shards`, and one for the checkpoint's sentinel."""
        self.shards = made = self.describe(shards, ranks)
        for field, value in made.empty().items():
            add_parameter(layer, field, value, partial(load_field, made, field))
        if not hasattr(layer, SENTINEL):
            layer.register_parameter(SENTINEL, nn.Parameter(torch.empty(SENTINEL_SHAPE), requires_grad=False))
        loader = partial(load_sentinel, [shard.name for shard in shards])
        set_weight_attrs(layer.get_parameter(SENTINEL), {"weight_loader": loader})
        return made

    def take(self, layer: nn.Module) -> Fields | None:
        """The tensors that were loaded into `layer`, which loses them; None where it has none (any more)."""
        if self.shards is None or not hasattr(layer, "weight_packed"):
            return None
        tensors = {name: layer.get_parameter(name).data for name in self.shards.names}
        for name in tensors:
            delattr(layer, name)
        if layer.get_parameter(SENTINEL).shape == SENTINEL_SHAPE:
            delattr(layer, SENTINEL)
        return tensors

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all tensors came, and change to the kernel's layout."""
        if (tensors := self.take(layer)) is not None:
            assert self.shards is not None
            self.weights = self.shards.bind(tensors)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]. Under row parallelism vLLM gives the bias to the first rank only."""
        return multiply(x, self.weights, bias)


class PackedLinearMethod(PackedMethod, LinearMethodBase):  # type: ignore[misc]
    """A linear, or several that vLLM has fused. new_bias: those with a bias on disk that their model's class lacks."""

    def __init__(self, names: Sequence[str], scheme: Scheme, new_bias: Sequence[str]) -> None:
        super().__init__(scheme)
        self.names, self.new_bias = tuple(names), tuple(new_bias)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Parameters for this rank's part."""
        if len(output_partition_sizes) != len(self.names):
            count = len(output_partition_sizes)
            raise ValueError(f"vLLM's layer {layer.prefix} has {count} parts, but it is {', '.join(self.names)} on disk")
        whole = (output_size, input_size)
        copies = getattr(layer, "num_kv_head_replicas", 1)
        ranks = (layer.tp_rank, layer.tp_size)
        shards = fused_shards(self.names, output_partition_sizes, whole, input_size_per_partition, *ranks, copies)
        made = self.make(layer, shards, layer.tp_size)
        layer.weight_loader = partial(load_bias, made, layer.weight_loader)  # vLLM makes the bias next, and loads it with this

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the bias, too."""
        if self.shards is not None and hasattr(layer, SENTINEL):
            if layer.bias is not None:
                self.shards.require_loaded([BIAS])
            elif self.new_bias:
                raise ValueError(f"{self.new_bias[0]} has a bias on disk, for which vLLM's {layer.prefix} has no place")
        super().process_weights_after_loading(layer)


class PackedTableMethod(PackedMethod):
    """An input embedding or an output head that is packed; a tied model's embedding is both."""

    def __init__(self, name: str, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.name = name
        self.dtype = torch.float32

    def create_weights(
        self, layer: Any, k: int, ns: list[int], input_size: int, output_size: int, params_dtype: torch.dtype, **extra: Any
    ) -> None:
        """Rows as vLLM deals them to ranks."""
        self.dtype = params_dtype
        self.make(layer, [dealt(self.name, layer)], layer.tp_size)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., K]."""
        kernel, prepared, spec = self.weights[0]
        found = spec.format.dequantize(kernel.rows(prepared, ids.flatten(), spec))
        return found.to(self.dtype).view(*ids.shape, spec.k)


class TiedHeadMethod(PackedTableMethod):
    """The head of a model whose table is stored under the input embedding's name."""

    lender: nn.Module | None = None  # an embedding that vLLM computes in float

    def create_weights(self, layer: Any, *sizes: Any, **extra: Any) -> None:
        """Nothing: `tie_weights` follows."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """The module to use as head: the embedding itself where it is packed, else `layer`, which takes its packed table."""
        packed = isinstance(embed_tokens, VocabParallelEmbedding)
        if packed:
            return embed_tokens
        self.lender = embed_tokens
        n, k = embed_tokens.get_parameter("weight").shape
        self.make(embed_tokens, [Shard(self.name, (n, k), (n, k))], 1)
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """The head gets its rows of the table, a float embedding what they stand for."""
        if self.lender is None or self.shards is None or (whole := self.take(self.lender)) is None:
            return
        self.shards.checked(whole)
        fill_table(self.lender.get_parameter("weight").data, whole, self.format)
        with whole["weight_packed"].device:
            ours = self.describe([dealt(self.name, layer)], layer.tp_size)
        tensors = ours.empty()
        for field, value in whole.items():
            ours.load(field, tensors[field], value, None)
        self.weights = ours.bind(tensors)


def dealt(name: str, layer: Any) -> Shard:
    """The rows of table `name` that vLLM deals to this rank; those after the vocabulary's end are padding."""
    k, n = layer.embedding_dim, layer.num_embeddings_per_partition
    return Shard(name, (layer.org_vocab_size, k), (n, k), layer.shard_indices.org_vocab_start_index)


def add_parameter(layer: nn.Module, name: str, value: Tensor, loader: Callable[..., None]) -> None:
    """A parameter that vLLM fills by calling loader(parameter, tensor on disk, shard id in a fused layer)."""
    parameter = nn.Parameter(value, requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": loader})
    layer.register_parameter(name, parameter)


def load_field(shards: PackedShards, field: str, into: Tensor, value: Tensor, shard_id: str | int | None = None) -> None:
    """A packed weight's tensor."""
    shards.load(field, into.data, value, shard_id)


def load_sentinel(names: Sequence[str], into: Tensor, value: Tensor, shard_id: str | int | None = None) -> None:
    """The empty tensor at which loaders that do not know us stop, under the name of a float weight."""
    if tuple(value.shape) != SENTINEL_SHAPE:
        raise ValueError(f"{', '.join(names)}: config.json says packed, but a float weight {list(value.shape)} is on disk, too")


def load_bias(shards: PackedShards, loader: Callable[..., None], into: Any, value: Tensor, *shard_id: str | int | None) -> None:
    """vLLM's own loader, its calls counted. `into` is the layer itself for a tensor that it has no parameter for."""
    if not isinstance(into, Tensor):
        names = ", ".join(shard.name for shard in shards.shards)
        raise ValueError(f"{names}: a tensor {list(value.shape)} is on disk that {shards.format.name} does not store")
    loader(into, value, *shard_id)
    shards.loaded.add((BIAS, shards.index(*shard_id or (None,))))
