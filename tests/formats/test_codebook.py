"""codebook: golden bytes, bits, a weight is a sum of entries, nearest entries by brute force, beams that never lose."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.format import Codes
from quant.kernels.formats.codebook import Codebook, beam_search, k_means, nearest_entries


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(fmt: Codebook, n: int, k: int) -> Codes:
    codes = torch.randint(0, 256, (n, k // fmt.group, fmt.books), dtype=torch.uint8, generator=draw(1))
    books = torch.randn(fmt.books, 256, fmt.group, generator=draw(2)).half()
    return Codes(codes, {"codebook": books, "weight_scale": torch.rand(n, 1, generator=draw(3)) + 0.1})


def test_golden_bytes() -> None:
    """A row's tiles in order, each tile's books side by side."""
    fmt = Codebook(books=2, group=2)
    codes = torch.tensor([[[1, 255], [7, 0]]], dtype=torch.uint8)
    books = torch.zeros(2, 256, 2)
    books[0, 1], books[1, 255], books[0, 7], books[1, 0] = (
        torch.tensor(pair) for pair in ((1.0, 2), (10, 20), (3, 4), (30, 40))
    )
    packed = fmt.pack(Codes(codes, {"codebook": books.half(), "weight_scale": torch.tensor([[0.5]])}))
    assert packed["weight_packed"].tolist() == [[1, 255, 7, 0]]
    assert fmt.dequantize(fmt.unpack(packed, 1, 4)).tolist() == [[5.5, 11.0, 16.5, 22.0]]


@pytest.mark.parametrize(("books", "group", "bits"), [(1, 4, 2.0), (2, 8, 2.0), (1, 8, 1.0), (3, 8, 3.0)])
def test_bits_per_weight_count_codebooks_and_scales(books: int, group: int, bits: float) -> None:
    n, k = 100, 640
    size = bits + (books * 256 * group * 16 + n * 32) / (n * k)
    assert Codebook(books=books, group=group).bits_per_weight(n, k) == pytest.approx(size)


def test_the_entry_is_the_nearest_one() -> None:
    points, book = torch.randn(300, 4, generator=draw()), torch.randn(256, 4, generator=draw(1))
    distance = (points.unsqueeze(1) - book).square().sum(-1)
    assert torch.equal(nearest_entries(points, book).long(), distance.argmin(1))


def test_a_beam_never_loses_and_a_full_one_is_exhaustive() -> None:
    target, books = torch.randn(20, 4, generator=draw()), torch.randn(2, 256, 4, generator=draw(1))
    codes = torch.randint(0, 256, (20, 2), dtype=torch.uint8, generator=draw(2))

    def lost(found: torch.Tensor) -> torch.Tensor:
        return (target - books[0][found[:, 0].long()] - books[1][found[:, 1].long()]).square().sum(1)

    every = (target.view(-1, 1, 1, 4) - books[0].unsqueeze(1) - books[1]).square().sum(-1).flatten(1).amin(1)
    last = lost(codes)
    for width in (1, 4, 256):
        now = lost(beam_search(target, books, codes, width))
        assert bool((now <= last + 1e-5).all())
        last = now
    assert torch.allclose(last, every, atol=1e-5)
    again = beam_search(target, books, beam_search(target, books, codes, 256), 2)
    assert torch.allclose(lost(again), every, atol=1e-5)


@pytest.mark.parametrize("fmt", [Codebook(books=1, group=4), Codebook(books=2, group=8)])
def test_what_is_on_the_grid_stays_and_nearer_is_no_further(fmt: Codebook) -> None:
    codes = random(fmt, 6, 64)
    weight = fmt.dequantize(codes)
    assert torch.equal(fmt.nearer(weight, codes), codes.codes)
    other = random(fmt, 6, 64)
    wanted = weight + 0.3 * torch.randn(6, 64, generator=draw(5))
    found = Codes(fmt.nearer(wanted, Codes(other.codes.flip(1), codes.params)), codes.params)
    assert float((fmt.dequantize(found) - wanted).norm()) < float((weight.flip(1) - wanted).norm())


def test_vectors_lose_less_than_two_bit_integers() -> None:
    """A Gaussian at two bits: 0.119 of its variance with the best scalar levels, 0.0625 with the best code of any length."""
    weight = torch.randn(128, 512, generator=draw()) * 0.05
    fmt = Codebook(books=1, group=4)
    lost = float((weight - fmt.dequantize(fmt.nearest(weight))).square().mean() / weight.square().mean())
    assert 0.0625 < lost < 0.11


def test_no_entry_stays_empty() -> None:
    points = torch.cat((torch.zeros(5000, 4), torch.randn(400, 4, generator=draw())))
    book = k_means(points, 256, 8, 0)
    assert len(torch.bincount(nearest_entries(points, book).long()).nonzero()) > 200


def test_what_is_refused() -> None:
    assert "does not divide K = 30" in str(Codebook(group=4).refuses(8, 30))
    for values in ({"books": 0}, {"group": 65}):
        with pytest.raises(ValueError, match="books is 1 to 8, group 1 to 64"):
            Codebook(**values)
