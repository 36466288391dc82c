"""`lowbit::rotate` on the CPU: butterflies in C++ where the library is there, else the product that serves everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.kernels.cpu import library
from quant.kernels.rotation import by_matrix


def cpu_rotate(x: Tensor, size: int) -> Tensor:
    """As kernels.rotation.rotate, size > 0."""
    k = x.shape[-1]
    if size < 2 or size & (size - 1) or k % size:
        raise ValueError(f"rotate {size} is no power of two above 1 that divides K = {k}")
    if x.dtype not in library.DTYPES:
        return by_matrix(x, size)
    x = x.contiguous()
    y = torch.empty_like(x)
    library.load().lowbit_rotate(x.data_ptr(), library.dtype_code(x), y.data_ptr(), x.numel() // k, k, size, size**-0.5)
    return y


if library.available():
    torch.library.impl("lowbit::rotate", "cpu", cpu_rotate)
