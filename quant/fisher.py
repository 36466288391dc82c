"""The diagonal of the Fisher information of every packed weight: which weights the model's loss feels most.

    F = mean over samples of (d(-log p(s | sample)) / dW)^2,    element by element, s drawn from the float model's own p

Squares are taken sample by sample, then added: the square of the sum would measure something else. Drawn tokens need no label
and make F the Fisher information itself; squared gradients of the text's own tokens ("empirical Fisher") come close to it.
One block is in memory (`sensitivity.steps_back`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.calibrate import Sample
from quant.kernels.rotation import by_matrix
from quant.plan import Plan
from quant.sensitivity import StepBack, steps_back


def fisher_diagonals(plan: Plan, samples: list[Sample], device: torch.device) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(block, F float32 [N, K] by target), last block first. F belongs to the weight rotated as the target's codes are."""
    for step in steps_back(plan, samples, device):
        rotate = {n: t.activation.rotate for n, t in plan.targets.items() if n.startswith(f"{step.name}.")}
        yield step.name, squares(step, rotate, len(samples))


def squares(step: StepBack, rotate: dict[str, int], samples: int) -> dict[str, Tensor]:
    """F of the targets of one block; rotate: target -> block size of its rotation, 0 for none."""
    weights = {target: step.block.get_parameter(f"{target.removeprefix(f'{step.name}.')}.weight") for target in rotate}
    found = {target: torch.zeros_like(weight, dtype=torch.float32) for target, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_()
    for index in range(samples):
        step.propagate(index)
        for target, weight in weights.items():
            if weight.grad is not None:  # an expert may see no token of a sample
                found[target] += by_matrix(weight.grad.float(), rotate[target]).square_() / samples
            weight.grad = None
    return found
