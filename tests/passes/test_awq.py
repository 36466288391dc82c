"""awq: the formula, and on a real block an unmoved float output with less error when it is served at 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from quant.folds import BlockView
from quant.kernels.activations.none import Unquantized
from quant.kernels.formats.int_group import IntGroup
from quant.passes.awq import RATIOS, Pass, scales
from quant.passes.smooth import served_error


def test_scales_follow_the_formula_and_are_balanced() -> None:
    size = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 10 + 0.01
    for ratio in RATIOS:
        r = scales(size, ratio)
        assert float(r.max() * r.min()) == pytest.approx(1, rel=1e-4)
        assert torch.allclose(r / r[0], (size / size[0]) ** ratio, rtol=1e-4)
    assert torch.equal(scales(size, 0), torch.ones(64))
    assert scales(torch.zeros(8), 0.5).isfinite().all()


def test_the_chosen_scale_serves_better_and_moves_no_output(view: Callable[[], BlockView]) -> None:
    block = view()
    block = replace(block, schemes=dict.fromkeys(block.schemes, (IntGroup(bits=4, group=32), Unquantized())))
    before = block.run()
    ones = [served_error(block, group)(torch.ones_like(group.stats.absmax)) for group in block.groups]
    refused = Pass().apply(block)
    moved = float((block.run() - before).norm() / before.norm())
    assert moved < 1e-4
    after = [served_error(block, group)(torch.ones_like(group.stats.absmax)) for group in block.groups]
    assert all(b <= a * 1.001 for a, b in zip(ones, after, strict=True))
    assert sum(after) < 0.9 * sum(ones)
    assert not refused
