"""Searches over codebooks: C++ on every instruction set is the torch form, bit for bit where sums are exact, ties included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.kernels.cpu import library
from quant.kernels.cpu.nearest import cpu_nearest, cpu_sweep
from quant.kernels.nearest import by_scores, by_tiles, entry_sizes

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_library = pytest.mark.skipif(not library.available(), reason="the C++ kernels are not built")
OnEveryIsa = Callable[[Callable[[], Any]], list[Any]]


def whole(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """float32 integers, of which sums of products are exact in any order."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def sweep_problem(group: int, books: int, n: int = 37, tiles: int = 5) -> tuple[Tensor, ...]:
    """slope, codes, books, size, block."""
    codes = torch.randint(0, 256, (n, tiles, books), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    entries, root = whole(-4, 5, books, 256, group, seed=2), whole(-1, 2, tiles * group, tiles * group, seed=3)
    block = root @ root.T
    return whole(-300, 300, n, tiles * group, seed=4), codes, entries, entry_sizes(entries, block), block


@needs_library
@pytest.mark.parametrize("entries", [256, 7])
@pytest.mark.parametrize("length", [4, 8, 3])
@pytest.mark.parametrize("count", [1, 32, 1001])
def test_the_first_of_the_nearest_entries(count: int, length: int, entries: int, on_every_isa: OnEveryIsa) -> None:
    target, book = whole(-3, 4, count, length), whole(-2, 3, entries, length, seed=1)
    size = book.square().sum(1) / 2
    wanted = torch.stack([(size - t * 1.0 @ book.T).argmin() for t in target]).to(torch.uint8)
    assert torch.equal(by_scores(target, book, size), wanted)
    for found in on_every_isa(lambda: cpu_nearest(target, book, size)):
        assert torch.equal(found, wanted)


@needs_library
def test_rounding_decides_alike_on_every_instruction_set(on_every_isa: OnEveryIsa) -> None:
    target, book = torch.randn(5000, 8), torch.randn(256, 8)
    book[1::2] = book[::2] + 1e-7  # near ties
    size = book.square().sum(1) / 2
    found = on_every_isa(lambda: cpu_nearest(target, book, size))
    assert all(torch.equal(codes, found[0]) for codes in found)
    lost = (target.unsqueeze(1) - book).double().square().sum(-1)
    chosen = lost.gather(1, found[0].long().unsqueeze(1)).squeeze(1)
    assert bool((chosen <= lost.amin(1) + 1e-5).all())


@needs_library
@pytest.mark.parametrize(("group", "books"), [(4, 1), (8, 2), (3, 3)])
def test_a_sweep_changes_the_same_codes(group: int, books: int, on_every_isa: OnEveryIsa) -> None:
    problem = sweep_problem(group, books)
    given = [t.clone() for t in problem]
    codes, moved = by_tiles(*problem)
    assert float((codes != problem[1]).float().mean()) > 0.5
    for found in on_every_isa(lambda: cpu_sweep(*problem)):
        assert torch.equal(found[0], codes)
        assert torch.equal(found[1], moved)
    assert all(torch.equal(a, b) for a, b in zip(problem, given, strict=True)), "what was given is not changed"


@pytest.mark.parametrize(("group", "books"), [(4, 1), (8, 2)])
def test_a_sweep_lowers_what_it_says_and_knows_what_it_added(group: int, books: int) -> None:
    slope, codes, entries, size, block = sweep_problem(group, books)
    found, moved = by_tiles(slope, codes, entries, size, block)
    vectors = [sum(entries[m][c[..., m].long()] for m in range(books)).flatten(1) for c in (codes, found)]
    assert torch.equal(moved, vectors[1] - vectors[0])
    gain = (moved @ block * moved - 2 * slope * moved).sum(1)
    assert bool((gain <= 0).all())
    assert float(gain.max()) < 0


@needs_library
def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="target, book, size do not fit each other"):
        cpu_nearest(torch.zeros(5, 4), torch.zeros(300, 4), torch.zeros(300))
    slope, codes, entries, size, block = sweep_problem(4, 1)
    with pytest.raises(ValueError, match="do not fit each other"):
        cpu_sweep(slope[:, :-4], codes, entries, size, block)
