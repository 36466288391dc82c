"""rtn is the format's own rounding, whatever the inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from quant.kernels.formats.int4_dual import Int4Dual
from quant.kernels.formats.int_group import IntGroup
from quant.passes.rtn import Pass


def test_rtn_is_the_formats_nearest_and_ignores_the_inputs(make_layer: Callable) -> None:
    layer, louder = make_layer(), make_layer(skew=2.0)
    for fmt in (IntGroup(bits=3, group=32), Int4Dual(group=32)):
        wanted = fmt.nearest(layer.weight)
        for stats in (layer.stats, louder.stats):
            codes = Pass().quantize(layer.weight, stats, fmt)
            assert torch.equal(codes.codes, wanted.codes)
            assert all(torch.equal(codes.params[name], wanted.params[name]) for name in wanted.params)


def test_more_bits_lose_less(make_layer: Callable) -> None:
    layer = make_layer()
    errors = []
    for bits in (2, 3, 4, 8):
        fmt = IntGroup(bits=bits, group=32)
        errors.append(layer.output_error(fmt.dequantize(Pass().quantize(layer.weight, layer.stats, fmt))))
    for wide, narrow in itertools.pairwise(errors):
        assert narrow < 0.7 * wide
