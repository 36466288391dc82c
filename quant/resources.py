"""Memory: what this process used at most, and what a plan will use."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil


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
