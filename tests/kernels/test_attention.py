"""CPU attention against float64: every instruction set, ragged sizes, grouped heads, padding on the left, garbage beyond the
valid keys, the int8 cache, the operators as torch sees them, and generation in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant.kernels.cpu import attention, library
from quant.serve import attention as serve

OPS = torch.ops.lowbit


ISAS = library.supported(library.load()) if library.available() else []
pytestmark = pytest.mark.skipif(not ISAS, reason="the C++ kernels are not built")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    library.select(library.load(), request.param)
    yield request.param
    library.load.cache_clear()
    library.load()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def truth(q: Tensor, k: Tensor, v: Tensor, start: int | None, first: Tensor | None, scale: float) -> Tensor:
    """[B, T, H, D] in float64; zero where no key is seen."""
    tokens, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    seen = torch.ones(q.shape[0], 1, tokens, keys, dtype=torch.bool)
    if start is not None:
        seen &= torch.arange(keys) <= start + torch.arange(tokens)[:, None]
    if first is not None:
        seen &= torch.arange(keys) >= first[:, None, None, None]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def problem(
    b: int, h: int, hkv: int, t: int, s: int, d: int, start: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q as transformers hands it over (a transposed view), k, v, and padding on the left when there are several sequences."""
    torch.manual_seed(t + s)
    q = torch.randn(b, t, h, d).to(dtype).transpose(1, 2)
    k, v = torch.randn(b, hkv, s, d).to(dtype), torch.randn(b, hkv, s, d).to(dtype)
    return q, k, v, torch.tensor([0, 5, 29])[:b] if b > 1 and start is not None else None


SHAPES = [  # B, H, Hkv, T, S, D, start
    (1, 9, 3, 1, 70, 64, 69),
    (1, 4, 4, 1, 1, 64, 0),
    (2, 9, 3, 1, 700, 64, 650),
    (1, 9, 3, 17, 100, 64, 30),
    (3, 6, 6, 64, 64, 64, 0),
    (3, 6, 2, 64, 129, 32, 40),
    (1, 6, 6, 37, 150, 64, None),
    (1, 6, 6, 1, 150, 64, None),
    (2, 4, 1, 3, 90, 80, 60),
    (1, 2, 2, 65, 300, 128, 7),
    (3, 4, 2, 20, 50, 40, 10),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_close_to_float64_and_blind_to_what_lies_beyond(isa: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        *_, tokens, _, dim, start = shape
        q, k, v, first = problem(*shape, dtype)
        want = truth(q, k, v, start, first, dim**-0.5)
        if start is not None:
            k[:, :, start + tokens :] = torch.nan
            v[:, :, start + tokens :] = torch.nan
        for b in range(0 if first is None else len(first)):
            k[b, :, : first[b]] = torch.nan
            v[b, :, : first[b]] = torch.nan
        got = OPS.cpu_attention(q, k, v, None if start is None else torch.tensor([start]), first, dim**-0.5)
        assert got.shape == want.shape
        assert got.is_contiguous()
        assert error(got, want) < TOLERANCE[dtype], shape


def test_threads_share_the_work_without_changing_it(threads: int) -> None:
    for shape in ((1, 9, 3, 1, 2000, 64, 1999), (1, 2, 1, 4, 1500, 64, 1400), (2, 6, 6, 200, 200, 64, 0)):
        q, k, v, first = problem(*shape, torch.float32)
        got = OPS.cpu_attention(q, k, v, torch.tensor(shape[-1]), first, 0.125)
        assert error(got, truth(q, k, v, shape[-1], first, 0.125)) < 2e-6


@pytest.mark.parametrize("tokens", [1, 40])
def test_weights_are_right_over_the_whole_range_of_exp(isa: str, tokens: int) -> None:
    """One-hot values read the weights back: each is within 1e-6 of softmax, down to where float32 ends."""
    keys, dim = 48, 64
    scores = torch.linspace(0, -86, keys)
    q, k = torch.zeros(1, 1, tokens, dim), torch.zeros(1, 1, keys, dim)
    q[..., 0], k[..., 0] = 1, scores
    v = torch.eye(keys, dim).expand(1, 1, keys, dim)
    want = scores.double().softmax(0)
    got = OPS.cpu_attention(q, k, v, None, None, 1.0)[0, :, 0, :keys].double()
    assert ((got - want) / want).abs().max() < 1e-5  # a score of -86 is itself rounded: 4e-6 in the exponent
    assert ((got - want) / want).abs()[:, :8].max() < 2e-6


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_nan_is_not_swallowed(isa: str, tokens: int) -> None:
    q, k, v, _ = problem(1, 3, 1, tokens, 64, 64, None, torch.float32)
    k[0, 0, 5, 3] = torch.nan
    assert OPS.cpu_attention(q, k, v, None, None, 0.125).isnan().all()


def int8_cache(k: Tensor, v: Tensor, room: int, channel: Tensor) -> tuple[Tensor, ...]:
    """Caches of `room` places, poisoned, with k and v [B, Hkv, T, D] appended in two goes."""
    b, hkv, t, d = k.shape
    codes = [torch.full((b, hkv, room, d), 0x5A, dtype=torch.int8) for _ in "kv"]
    scales = [torch.full((b, hkv, room), torch.nan) for _ in "kv"]
    for begin, end in ((0, t - 3), (t - 3, t)):
        start = torch.tensor([begin])
        OPS.cpu_append_kv_int8(k[:, :, begin:end], v[:, :, begin:end], *codes, *scales, channel, start)
    return (*codes, *scales, channel)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_cache_stays_near_one_percent_with_outlier_channels(isa: str, dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    keys, size = 300, torch.ones(64)
    size[[7, 40]] = torch.tensor([20.0, 10.0])
    k, v = torch.randn(2, 3, keys, 64) * size, torch.randn(2, 3, keys, 64)
    q = torch.randn(2, 9, tokens, 64) / size
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    want = truth(q, k, v, keys - tokens, None, 0.125)
    start, first = torch.tensor(keys - tokens), None
    smooth = int8_cache(k, v, keys + 20, k.float().abs().amax((0, 2)))
    plain = int8_cache(k, v, keys + 20, torch.ones(3, 64))
    good = error(OPS.cpu_attention_int8(q, *smooth, start, first, 0.125), want)
    poor = error(OPS.cpu_attention_int8(q, *plain, start, first, 0.125), want)
    assert good < 0.0115
    assert poor > 3 * good  # what the factor per channel is for


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_append_writes_its_places_and_no_others(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(2, 5, 3, 24).to(dtype).transpose(1, 2) for _ in "kv")
    caches = [torch.full((2, 3, 11, 24), torch.nan, dtype=dtype) for _ in "kv"]
    OPS.cpu_append_kv(k, v, *caches, torch.tensor([4]))
    for given, cache in zip((k, v), caches, strict=True):
        assert torch.equal(cache[:, :, 4:9], given)
        assert cache[:, :, :4].isnan().all()
        assert cache[:, :, 9:].isnan().all()


def test_operators_are_sound() -> None:
    q, k, v, first = problem(2, 6, 2, 5, 20, 16, 3, torch.float32)
    start, fresh = torch.tensor([3]), (k[:, :, :5].clone(), v[:, :, :5].clone())
    cache = int8_cache(k, v, 24, torch.ones(2, 16))
    calls: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (OPS.cpu_attention.default, (q, k, v, start, first, 0.25)),
        (OPS.cpu_attention_int8.default, (q, *cache, torch.tensor([3]), None, 0.25)),
        (OPS.cpu_append_kv.default, (*fresh, k, v, start)),
        (OPS.cpu_append_kv_int8.default, (*fresh, *cache, start)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.randn(1, 4, 9, 16)}, "needs"),
        ({"q": torch.randn(1, 4, 2, 12), "k": torch.randn(1, 2, 9, 12), "v": torch.randn(1, 2, 9, 12)}, "multiple of 8"),
        ({"start": torch.tensor([8])}, "do not fit into a cache of 9"),
        ({"start": torch.tensor([-1])}, "do not fit"),
        ({"first": torch.tensor([0, 0])}, "int64"),
        ({"scale": -1.0}, "positive"),
        ({"v": torch.randn(1, 2, 9, 16).bfloat16()}, "one dtype"),
        ({"v": torch.randn(1, 2, 16, 9).transpose(2, 3)}, "contiguous"),
    ],
)
def test_what_cannot_be_read_safely_is_refused(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"q": torch.randn(1, 4, 2, 16), "k": torch.randn(1, 2, 9, 16), "v": torch.randn(1, 2, 9, 16)}
    given |= {"start": torch.tensor([7]), "first": None, "scale": 0.25} | change
    with pytest.raises(ValueError, match=message):
        attention.cpu_attention(**given)  # type: ignore[arg-type]


def test_generation_in_transformers_equals_torch_attention(llama: Path) -> None:
    """Padded prompts and a second turn on a filled cache; float32, so the texts must be the same."""
    from transformers import AutoModelForCausalLM

    serve.register()
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    torch.manual_seed(0)
    ids, mask = torch.randint(1, 50, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, :4] = mask[2, :9] = 0
    outputs = {}
    with torch.inference_mode():
        for name in ("sdpa", "lowbit"):
            model.set_attn_implementation(name)
            text = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0)
            turn = model(ids[:1], use_cache=True)
            later = model(ids[1:2], past_key_values=turn.past_key_values).logits
            outputs[name] = text, model(ids, attention_mask=mask).logits[mask.bool()], later
    assert torch.equal(outputs["sdpa"][0], outputs["lowbit"][0])
    for ours, theirs in zip(outputs["lowbit"][1:], outputs["sdpa"][1:], strict=True):
        assert error(ours, theirs) < 1e-5


def test_masks_that_are_not_padding_on_the_left_go_to_torch(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    serve.register()
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    torch.manual_seed(0)
    ids, mask = torch.randint(1, 50, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, 3:6] = mask[1, 9:] = 0
    logits = {}
    with torch.inference_mode():
        for name in ("sdpa", "lowbit"):
            model.set_attn_implementation(name)
            logits[name] = model(ids, attention_mask=mask).logits[mask.bool()]
    assert error(logits["lowbit"], logits["sdpa"]) < 1e-5
    hidden = torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match="softcap"):
        serve.forward(model, hidden, hidden, hidden, None, softcap=30.0)
