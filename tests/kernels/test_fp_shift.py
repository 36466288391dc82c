"""fp_shift: shifting first is an exponent bias per channel, products stay exact, the C++ form is the same bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels.activations.fp_shift import FpShift
from quant.kernels.cpu import fp_channel, library
from quant.kernels.dispatch import MatmulSpec
from quant.kernels.format import Fields
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.minifloat import EXPONENTS, Minifloat

T, K = 40, 48
RULES = [(bits, e) for bits, exponents in EXPONENTS.items() for e in exponents]
rules = pytest.mark.parametrize(("bits", "e"), RULES)


def tokens(seed: int = 0) -> Tensor:
    """Channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, K, generator=generator) * torch.randn(K, generator=generator).mul(1.5).exp()


def stored(rule: FpShift, x: Tensor, e: int) -> Fields:
    kind = rule.kind(e)
    shift = torch.randint(0, kind.reach + 1, (x.shape[1],), generator=torch.Generator().manual_seed(e))
    top = torch.tensor(0.9) if rule.dynamic else x.abs().amax() * 0.7
    return rule.stored(top / kind.largest, shift, e)


@rules
def test_shifting_first_is_a_bias_per_channel(bits: int, e: int) -> None:
    """Bit for bit: the channel's own grid has the scale s 2^-n."""
    rule, x = FpShift(bits=bits), tokens()
    fields = stored(rule, x, e)
    given, kind = rule.quantize(x, fields), Minifloat(e, bits - 1 - e)
    for j in range(K):
        step = fields["input_scale"] * 2.0 ** -int(fields["input_shift"][j])
        assert torch.equal(given[:, j], kind.round(x[:, j] / step) * step), j


@rules
def test_products_with_codes_are_those_of_the_shifted_weight(bits: int, e: int) -> None:
    """sum_j xq w = s sum_j q (2^-n w), with q on the table and q 2^-n exact in bfloat16."""
    rule, x = FpShift(bits=bits), tokens()
    fields = stored(rule, x, e)
    left, scale = rule.codes(x, fields)
    assert torch.equal(left.bfloat16().float(), left)
    factor = torch.exp2(-fields["input_shift"].double())
    q = left.double() / factor
    table = torch.cat((rule.kind(e).magnitudes, -rule.kind(e).magnitudes)).double()
    assert (q.unsqueeze(-1) == table).any(-1).all()
    w = Minifloat(2, 1).decode(torch.randint(0, 16, (7, K))).double()
    wanted = scale.double() * (q @ (factor * w).T)
    assert torch.allclose(rule.quantize(x, fields).double() @ w.T, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def test_a_smaller_channel_takes_a_larger_shift_and_the_same_codes() -> None:
    rule, x = FpShift(bits=4), tokens()
    fields = rule.stored(x.abs().amax() / 6, torch.zeros(K), 2)
    moved, shift = x.clone(), fields["input_shift"].clone()
    for j, t in ((3, 1), (10, 3), (47, 2)):
        moved[:, j] *= 2.0**-t
        shift[j] += t
    factor = torch.exp2(shift.float())
    there = rule.codes(moved, fields | {"input_shift": shift})[0] * factor
    assert torch.equal(there, rule.codes(x, fields)[0])


def test_a_dynamic_scale_follows_its_token() -> None:
    rule, x = FpShift(bits=4, dynamic=True), tokens()
    fields = rule.fit(x, x.abs().amax(0))
    size = torch.exp2(torch.arange(T).float() - 20).unsqueeze(1)
    assert torch.equal(rule.quantize(x * size, fields), rule.quantize(x, fields) * size)
    assert torch.equal(rule.quantize(torch.zeros(1, K), fields), torch.zeros(1, K))


@rules
def test_groups_have_scales_of_their_own_and_stay_exact_in_bfloat16(bits: int, e: int) -> None:
    """Each group is what a token of that length would be, up to the shortened scale; the scale is in the numbers."""
    rule, x = FpShift(bits=bits, dynamic=True, group=16), tokens()
    fields, kind = stored(rule, x, e), Minifloat(e, bits - 1 - e)
    given, scale = rule.codes(x, fields)
    assert (scale == 1).all()
    assert torch.equal(given, given.bfloat16().float())
    for at in range(0, K, 16):
        part = slice(at, at + 16)
        factor = torch.exp2(fields["input_shift"][part].double())
        moved = x[:, part].double() * factor
        wanted = moved.abs().amax(-1, keepdim=True) * fields["input_scale"].double()
        back = given[:, part].double() * factor  # code * step
        table = kind.magnitudes.double()
        steps = []
        for row, step in zip(back, wanted, strict=True):
            exponent = torch.floor(step.log2()) - (6 - kind.mantissa)
            near = (step / 2**exponent).round() * 2**exponent  # 7 - m significant bits
            assert ((row.abs() / near).unsqueeze(-1) == table).any(-1).all()
            steps.append(near)
        plain = kind.round((moved / torch.stack(steps)).float()).double() * torch.stack(steps)
        assert (back - plain).norm() < 1e-6 * plain.norm()


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_full_range_keeps_the_largest_value(dynamic: bool) -> None:
    for bits in (4, 8):
        rule, x = FpShift(bits=bits, dynamic=dynamic), tokens()
        given = rule.quantize(x, rule.fit(x, x.abs().amax(0)))
        at = x.abs().argmax()
        assert float(given.flatten()[at]) == pytest.approx(float(x.flatten()[at]), rel=1e-6)


@pytest.mark.skipif(not library.available(), reason="the C++ kernels are not built")
@rules
@pytest.mark.parametrize(("dynamic", "group"), [(False, -1), (True, -1), (True, 16), (True, 12), (True, K)])
def test_the_compiled_form_is_the_same(bits: int, e: int, dynamic: bool, group: int) -> None:
    lib, rule, x = library.load(), FpShift(bits=bits, dynamic=dynamic, group=group), tokens()
    x[5] = 0
    available = [isa for number, isa in enumerate(library.ISAS) if lib.lowbit_select(number) == 0]
    try:
        for dtype in (torch.float32, torch.bfloat16):
            seen, fields = x.to(dtype), stored(rule, x, e)
            wanted, scale = rule.codes(seen, fields)
            for isa in available:
                library.select(lib, isa)
                given, scales = fp_channel.cpu_fp_shift(seen, *fields.values(), bits, dynamic, group)
                assert given.dtype == dtype
                assert torch.equal(given.float(), wanted), isa
                assert torch.equal(scales, scale.flatten().expand(T)), isa
    finally:
        library.select(lib, available[-1])


@pytest.mark.skipif(not library.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize(
    "rule", [FpShift(bits=b, dynamic=d, group=g) for b in (4, 8) for d, g in ((False, -1), (True, -1), (True, 16))], ids=str
)
@pytest.mark.parametrize("group", [16, -1])
def test_the_kernel_multiplies_what_the_rule_says(rule: FpShift, group: int) -> None:
    """Against float64, few and many tokens, every number format, ragged N; two layers joined give what each gives alone."""
    torch.manual_seed(0)
    kernel, fmt, tolerances = fp_channel.FpChannelKernel(), FpChannel(group=group), {torch.float32: 2e-6, torch.bfloat16: 4e-3}
    for e in EXPONENTS[4]:
        inputs = stored(rule, tokens(), e)
        layers, specs, weights = [], [], []
        for n in (40, 33):
            codes = fmt.encode(w := torch.randn(n, K), fmt.range_step(w, e), e)
            spec = MatmulSpec(n=n, k=K, format=fmt, activation=rule, device="cpu")
            fields = fmt.pack(codes) | inputs
            layers.append(kernel.prepare(fields, spec))
            restored = kernel.restore(layers[-1], spec)
            assert restored.keys() == fields.keys()
            assert all(torch.equal(restored[name], fields[name]) for name in fields)
            specs.append(spec)
            weights.append(fmt.dequantize(codes).double())
        joined = kernel.join(layers)
        assert joined is not None
        for m in (1, 3, T):
            for dtype, tolerance in {**tolerances, torch.float16: 5e-4}.items():
                x = tokens(1)[:m].to(dtype)
                together = kernel.matmul_joined(x, joined[0], [None, None], specs)
                for layer, spec, weight, shared in zip(joined[1], specs, weights, together, strict=True):
                    wanted, given = rule.quantize(x, inputs).double() @ weight.T, kernel.matmul(x, layer, None, spec)
                    assert given.dtype == dtype
                    assert (given.double() - wanted).norm() <= tolerance * wanted.norm(), (e, m, dtype)
                    assert torch.equal(shared, given)
    with pytest.raises(RuntimeError, match="no backward pass"):
        kernel.matmul(tokens().requires_grad_(), layers[0], None, specs[0]).sum().backward()
    other = kernel.prepare(fmt.pack(codes) | inputs | {"input_scale": inputs["input_scale"] * 2}, spec)
    assert kernel.join([layers[0], other]) is None  # tokens would be rounded differently


def test_damaged_fields_are_named() -> None:
    rule, x = FpShift(bits=4), tokens()
    good = rule.fit(x, x.abs().amax(0))
    rule.check(good, 8, K)
    for name, value, message in (
        ("input_exponents", 4, "input_exponents holds 4; 4 bits allow 1, 2, 3"),
        ("input_shift", 4, "input_shift holds 4; 2 exponent bits allow 0 to 3"),
        ("input_scale", 0, "input_scale is 0; it divides"),
        ("input_scale", float("nan"), "input_scale holds a NaN"),
    ):
        damaged = good[name].clone()
        damaged[-1] = value
        with pytest.raises(ValueError, match=message):
            rule.check(good | {name: damaged}, 8, K)
    assert "per 32 channels, which do not divide K = 48" in str(FpShift(dynamic=True, group=32).refuses(48))
    with pytest.raises(ValueError, match="group 32 is not allowed; give a positive length with dynamic: true"):
        FpShift(group=32)
    with pytest.raises(ValueError, match="no 6-bit codes; allowed: 4, 8"):
        FpShift(bits=6)
