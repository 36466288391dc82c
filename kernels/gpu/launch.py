"""What the operators share: the device's facts, the refusals that concern the device, and running a plan."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from quant.kernels.dispatch import MatmulSpec
from quant.kernels.gpu import deployed
from quant.kernels.gpu.layout import POLICIES, Policy
from quant.kernels.gpu.plan import Layer, plan
from quant.kernels.gpu.program import Launch, Plan, jit, run
from quant.kernels.gpu.tiles import table_arch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_K = (2**31 - 1) // (127 * 128)  # |code| <= 127 times |weight| <= 128 must add up inside int32


@functools.cache
def device_facts(index: int) -> tuple[int, int]:
    """(architecture of the table, number of multiprocessors) of CUDA device `index`."""
    facts = torch.cuda.get_device_properties(index)
    return table_arch(10 * facts.major + facts.minor), facts.multi_processor_count


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def grouped_layer(
    policy: Policy, n: int, k: int, group: int, x: torch.dtype, bias: Tensor | None, token_scale: bool = False
) -> Layer:
    """The layer of weights in groups of `group` along K (-1: one a row) times float tokens of dtype x."""
    blocking = policy.blocking(group)
    assert blocking is not None, f"{policy.name} has no blocking for groups of {group}"
    return Layer(
        policy=policy.name,
        n=n,
        k=k,
        slice=blocking[0],
        groups=blocking[1],
        per_row=group == -1,
        x=dtype_name(x),
        bias=None if bias is None else dtype_name(bias.dtype),
        token_scale=token_scale,
    )


def matmul(
    layer: Layer,
    x: Tensor,
    bias: Tensor | None,
    tensors: Mapping[str, Tensor],
    facts: tuple[int, int] | None = None,
    steps: Plan | None = None,
) -> Tensor:
    """x [M, K] -> [M, N] in x's dtype: the launches of the plan, no synchronization. Float tokens whose K is no multiple of 16
    are copied into padded rows first. `facts`: see `device_facts`; those of
    x's device when None. `steps`: these launches instead of those that the tables choose. On CPU tensors the programs must be
    interpreted."""
    assert x.dtype in DTYPES, f"x is {x.dtype}"
    m = x.shape[0]
    y = x.new_empty(m, layer.n)
    if m == 0:
        return y
    start: Launch = jit
    if steps is None and x.is_cuda and (bundles := deployed.on(x.get_device())) is not None:
        steps, start = bundles.plan(layer, m), bundles.launch
    if steps is None:
        arch, processors = facts or device_facts(x.get_device())
        start = jit
        steps = plan(layer, m, arch, processors, "cuda" if x.is_cuda else "interpreter")
    if not POLICIES[layer.policy].integer and layer.width > layer.k:
        x = torch.nn.functional.pad(x, (0, layer.width - layer.k))
    return compute(steps, x, bias, tensors, y, start)


def compute(
    steps: Plan, x: Tensor, bias: Tensor | None, tensors: Mapping[str, Tensor], y: Tensor, start: Launch = jit
) -> Tensor:
    """y, written by the launches of a plan for the tokens x; tensors: what else they are given, by name."""
    known = {**tensors, "x": x, "y": y.view(torch.int16) if y.dtype == torch.bfloat16 else y}
    if bias is not None:
        known["bias"] = bias
    if x.is_cuda:
        with torch.cuda.device(x.device):  # Triton launches on the current device
            run(steps, known, len(x), start)
    else:
        run(steps, known, len(x))
    return y


def device_refuses(spec: MatmulSpec) -> str | None:
    """Why no Triton program of ours can run here, or None."""
    if spec.device != "cuda":
        return f"runs on cuda, not on {spec.device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip:
        return "its tables have no AMD architecture"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0 or later"
    if deployed.on(torch.cuda.current_device()) is None and not deployed.has_triton():
        return "triton is not installed and no deployment bundle fits this GPU"
    return None
