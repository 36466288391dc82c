"""Layers and conditions that kernel tests share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from quant.kernels.cpu import library
from quant.kernels.format import Codes
from quant.kernels.formats.int4_dual import Int4Dual


@pytest.fixture
def dual_layer() -> Callable[[int, int, int], tuple[Int4Dual, Codes]]:
    """(n, k, group) -> an int4_dual layer drawn from all legal groups: s in 0..17, o in -128..127 - 15 s."""

    def make(n: int, k: int, group: int) -> tuple[Int4Dual, Codes]:
        generator = torch.Generator().manual_seed(n + k + group)
        scale = torch.randint(0, 18, (n, k // group), generator=generator)
        offset = (torch.rand(scale.shape, generator=generator) * (256 - 15 * scale)).long() - 128
        codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        params = {"group_scale": scale.to(torch.uint8), "group_offset": offset.to(torch.int8)}
        return Int4Dual(group=group), Codes(codes, params | {"row_scale": torch.rand(n, generator=generator) / 100})

    return make


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_every_isa() -> Iterator[Callable[[Callable[[], Any]], list[Any]]]:
    """What a call gives on each instruction set of this processor."""
    loaded = library.load()

    def run(call: Callable[[], Any]) -> list[Any]:
        return [(library.select(loaded, isa), call())[1] for isa in library.supported(loaded)]

    yield run
    library.select_best(loaded)
