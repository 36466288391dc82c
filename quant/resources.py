"""Memory and devices: what this process uses, and whether a device is there."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import psutil
import torch


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss survives exec on Linux, so a child would report its parent
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def return_freed_memory() -> None:
    """Give what the C library holds of freed memory back to the system, where it can (glibc).

    The pieces that a block leaves behind do not fit the next block's needs exactly; kept, they add up with the depth.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def compute_dtype(device: torch.device) -> torch.dtype:
    """In which float blocks run during calibration: bfloat16 where the device multiplies it, on other CPUs float32.

    oneDNN emulates bfloat16 on a CPU without it, at a third of float32's speed (measured on a Cascade Lake Xeon).
    """
    if device.type != "cpu":
        return torch.bfloat16
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(on is True for name, on in found.items() if "bf16" in name) else torch.float32


def usable_device(name: str, here: bool = True) -> torch.device:
    """The torch device called `name`. Raises ValueError when torch knows no such device, or (`here`) this machine has none."""
    try:
        device = torch.device(name)
        if here:
            torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch uses all three, by backend
        reason = " ".join(str(error).split("\n")[0].split())
        raise ValueError(f"device {name!r} cannot be used here ({reason}); give cpu, cuda or cuda:N") from error
    return device
