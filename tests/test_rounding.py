"""GPTQ rounding against the textbook form: one channel at a time on an explicit inverse, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.rounding import BLOCK, descend, gptq_codes, inverse_factor

N, K, GROUP = 9, BLOCK + 72, 20


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight [N, K], Gram [K, K] of correlated inputs, step and zero [N, K // GROUP] of a 3-bit grid."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator)
    x = torch.randn(600, K, generator=generator) @ (torch.eye(K) + torch.randn(K, K, generator=generator) / K**0.5)
    x = x * torch.rand(K, generator=generator).mul(2).exp()
    grouped = w.view(N, -1, GROUP)
    step = (grouped.amax(-1) - grouped.amin(-1)) / 7
    return w, x.T @ x, step, torch.round(-grouped.amin(-1) / step).clamp(0, 7)


def nearest(w: Tensor, step: Tensor, zero: Tensor, levels: int = 8) -> Tensor:
    s, z = step.repeat_interleave(K // step.shape[1], 1), zero.repeat_interleave(K // step.shape[1], 1)
    return (torch.round(w / s) + z).clamp(0, levels - 1).to(torch.uint8)


def textbook(w: Tensor, gram: Tensor, step: Tensor, zero: Tensor, act_order: bool, damp: float = 0.01) -> Tensor:
    """Optimal brain quantization in a fixed order: quantize a channel, move the rest, remove it from the inverse."""
    w, h = w.double().clone(), gram.double()
    inverse = torch.linalg.inv(h + damp * h.diagonal().mean() * torch.eye(K))
    order = sorted(range(K), key=lambda j: -float(gram[j, j])) if act_order else range(K)
    codes = torch.zeros(N, K)
    for j in order:
        s, z = step[:, j // GROUP].double(), zero[:, j // GROUP].double()
        codes[:, j] = (torch.round(w[:, j] / s) + z).clamp(0, 7)
        lost = (w[:, j] - (codes[:, j] - z) * s) / inverse[j, j]
        w -= lost.unsqueeze(1) * inverse[j]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
    return codes.to(torch.uint8)


def test_the_factor_is_of_the_damped_inverse() -> None:
    _, gram, _, _ = problem()
    factor = inverse_factor(gram, 0.02).double()
    assert torch.equal(factor, factor.triu())
    damped = gram.double() + 0.02 * gram.double().diagonal().mean() * torch.eye(K)
    assert ((factor.T @ factor @ damped) - torch.eye(K)).abs().max() < 1e-4


@pytest.mark.parametrize("act_order", [True, False])
def test_codes_are_those_of_the_textbook(act_order: bool) -> None:
    w, gram, step, zero = problem()
    codes = gptq_codes(w, gram, step, zero, 8, act_order=act_order)
    assert codes.dtype == torch.uint8
    wanted = textbook(w, gram, step, zero, act_order)
    assert (codes == wanted).float().mean() > 0.998  # float32 may break a tie the other way
    assert (codes == nearest(w, step, zero)).float().mean() < 0.9


def test_a_diagonal_gram_matrix_is_round_to_nearest() -> None:
    w, gram, step, zero = problem()
    for act_order in (True, False):
        codes = gptq_codes(w, torch.diag(gram.diagonal()), step, zero, 8, act_order=act_order)
        assert torch.equal(codes, nearest(w, step, zero))
    assert torch.equal(gptq_codes(w, torch.zeros(K, K), step, zero, 8), nearest(w, step, zero))


def test_singular_gram_matrices_are_damped() -> None:
    """Fewer tokens than channels, and channels that never fired."""
    w, _, step, zero = problem()
    x = torch.randn(K // 4, K)
    x[:, 3:9] = 0
    gram = x.T @ x
    codes = gptq_codes(w, gram, step, zero, 8)
    s, z = step.repeat_interleave(GROUP, 1), zero.repeat_interleave(GROUP, 1)
    lost, plain = (float((x @ (w - (c - z) * s).T).norm()) for c in (codes, nearest(w, step, zero)))
    assert lost < 0.7 * plain


def test_a_gram_matrix_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate on more tokens"):
        inverse_factor(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.01)  # eigenvalues 6 and -4


def row_loss(w: Tensor, gram: Tensor, codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    s, z = (t.repeat_interleave(GROUP, 1).double() for t in (step, zero))
    d = w.double() - (codes.double() - z) * s
    return ((d @ gram.double()) * d).sum(1)


def test_descent_never_loses_and_ends_where_no_single_code_can_gain() -> None:
    w, gram, step, zero = problem()
    start = gptq_codes(w, gram, step, zero, 8)
    losses = [row_loss(w, gram, start, step, zero)]
    for sweeps in (1, 3, 50):
        codes = descend(w, gram, start, step, zero, 8, sweeps)
        losses.append(row_loss(w, gram, codes, step, zero))
        assert (losses[-1] <= losses[-2] * (1 + 1e-6)).all()
    assert losses[2].sum() < 0.97 * losses[0].sum()
    for j in range(0, K, 7):
        for move in (-1, 1):
            moved = codes.clone().int()
            moved[:, j] = (moved[:, j] + move).clamp(0, 7)
            assert (row_loss(w, gram, moved, step, zero) >= losses[-1] * (1 - 1e-5)).all()


def test_no_sweeps_and_channels_without_energy_change_nothing() -> None:
    w, gram, step, zero = problem()
    gram[5], gram[:, 5] = 0, 0
    start = nearest(w, step, zero)
    assert torch.equal(descend(w, gram, start, step, zero, 8, 0), start)
    assert torch.equal(descend(w, gram, start, step, zero, 8, 3)[:, 5], start[:, 5])
