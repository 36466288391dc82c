"""What a speed comparison runs, counted rather than timed; one real comparison of two processes."""

from dataclasses import replace

import pytest
import torch

from quant.eval import loading, speed, speed_worker
from quant.eval.speed_worker import Repeat, Workload

WORK = Workload(prompt=8, new=3)


def test_a_repeat_is_one_prefill_and_cached_steps(folder):
    model = loading.load(folder, torch.float32, "cpu")
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    done = speed_worker.text_repeat(model, torch.arange(8)[None], 3)
    assert seen == [(1, 8), (1, 1), (1, 1), (1, 1)]
    expected = model.generate(torch.arange(8)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert list(done.ids) == expected[0, 8:].tolist()
    metrics = done.metrics
    assert metrics["prefill_tokens_per_s"] == pytest.approx(8 / metrics["first_token_ms"] * 1e3)


def test_turns_alternate_and_warm_up_is_dropped(folder, monkeypatch):
    turns = []

    class Counted:
        def __init__(self, name, *rest):
            self.name, self.repeats = name, []
            self.loaded = {"load_s": 0.0, "bare_rss_bytes": 1, "loaded_rss_bytes": 2}
            self.coldest = {}
            self.last = {"peak_rss_bytes": 3, "device_bytes": None, "repeat": Repeat(metrics={})}

        def repeat(self, *, keep):
            turns.append((self.name, keep))
            if keep:
                self.repeats.append({"x": float(len(turns))})

        def close(self):
            turns.append((self.name, "closed"))

    monkeypatch.setattr(speed, "Worker", Counted)
    result = speed.compare(folder, folder, WORK, threads=1, repeats=2, warmup=1)
    names = [name for name, _ in turns]
    a, b = "model", "against"
    assert names == [a, b, b, a, a, b, a, b]
    assert [keep for _, keep in turns] == [False, False, True, True, True, True, "closed", "closed"]
    # x is the turn number: pairs (4, 3) and (5, 6)
    assert result.others[0].ratios["x"].median == pytest.approx((4 / 3 + 5 / 6) / 2)


def test_two_processes(folder):
    result = speed.compare(folder, folder, WORK, threads=1, dtype="float32", repeats=2, warmup=0)
    for side in (result.model, *result.others):
        assert 0 < side.bare_rss_bytes < side.loaded_rss_bytes <= side.peak_rss_bytes
        assert side.metrics["decode_tokens_per_s"].median > 0
        assert side.load_s < side.cold_s < side.load_s + 60
    assert set(result.others[0].ratios) == {"prefill_tokens_per_s", "first_token_ms", "decode_tokens_per_s"}


def test_refusals(folder):
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        speed_worker.open_model(folder, "float32", "cpu", replace(WORK, prompt=62))
    with pytest.raises(ValueError, match="at least 1"):
        speed.compare(folder, None, WORK, threads=0)
