"""Time on the GPU present: a burst of calls is captured in a CUDA graph, so that no launch waits for Python."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Call = Callable[[], object]
ROUNDS, WARM = 20, 3


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """One graph that runs the calls in order. They must not synchronize; each runs once before, so that it may compile.

    The caller keeps what the calls read for as long as the graph. (`torch.cuda.graph` would collect garbage first, which takes
    longer than what is measured here.)
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph


def elapsed_us(call: Call) -> float:
    """Microseconds between two events around the call."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


def taking_turns(clocks: Mapping[Any, Callable[[], float]], rounds: int = ROUNDS) -> dict[Any, float]:
    """Median of what each clock returns; all take turns, the first rounds do not count."""
    times: dict[Any, list[float]] = {name: [] for name in clocks}
    for turn in range(rounds + WARM):
        for name, clock in clocks.items():
            taken = clock()
            if turn >= WARM:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}
