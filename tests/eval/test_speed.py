"""What a speed comparison runs, counted rather than timed; one real comparison of two processes."""

from dataclasses import replace

import pytest
import torch

from quant.eval import loading, speed, speed_worker
from quant.eval.speed_worker import Workload

WORK = Workload(prompt=8, new=3)


def test_a_repeat_is_one_prefill_and_cached_steps(folder):
    model = loading.load(folder, torch.float32, "cpu")
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    metrics = speed_worker.text_repeat(model, torch.arange(8)[None], 3)
    assert seen == [(1, 8), (1, 1), (1, 1), (1, 1)]
    assert metrics["prefill_tokens_per_s"] == pytest.approx(8 / metrics["first_token_ms"] * 1e3)


def test_turns_alternate_and_warm_up_is_dropped(folder, monkeypatch):
    turns = []

    class Counted:
        def __init__(self, side, *rest):
            self.folder, self.repeats = side, []
            self.loaded = {"load_s": 0.0, "bare_rss_bytes": 1, "loaded_rss_bytes": 2}
            self.last = {"peak_rss_bytes": 3, "device_bytes": None}

        def repeat(self, *, keep):
            turns.append((self.folder.name, keep))
            if keep:
                self.repeats.append({"x": float(len(turns))})

        def close(self):
            turns.append((self.folder.name, "closed"))

    monkeypatch.setattr(speed, "Worker", Counted)
    other = folder.parent / "other"
    result = speed.compare(folder, other, WORK, threads=1, repeats=2, warmup=1)
    names = [name for name, _ in turns]
    a, b = folder.name, "other"
    assert names == [a, b, b, a, a, b, a, b]
    assert [keep for _, keep in turns] == [False, False, True, True, True, True, "closed", "closed"]
    # x is the turn number: pairs (4, 3) and (5, 6)
    assert result.ratios["x"].median == pytest.approx((4 / 3 + 5 / 6) / 2)


def test_two_processes(folder):
    result = speed.compare(folder, folder, WORK, threads=1, dtype="float32", repeats=2, warmup=0)
    for side in (result.model, result.against):
        assert 0 < side.bare_rss_bytes < side.loaded_rss_bytes <= side.peak_rss_bytes
        assert side.metrics["decode_tokens_per_s"].median > 0
    assert set(result.ratios) == {"prefill_tokens_per_s", "first_token_ms", "decode_tokens_per_s"}


def test_refusals(folder):
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        speed_worker._measure(folder, "float32", "cpu", replace(WORK, prompt=62))
    with pytest.raises(ValueError, match="at least 1"):
        speed.compare(folder, None, WORK, threads=0)
