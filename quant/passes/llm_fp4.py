"""LLM-FP4: joint search of number format and range for weights and tokens, channels pre-shifted by powers of two.

Coordinate rounds (Liu et al., 2023, algorithm 1): tokens against the packed weight, then the weight behind rounded tokens,
in closed form (`minifloat_search.py`). What differs from the paper: ranges are searched in steps of the largest magnitude
instead of steps of the exponent bias, c = 1 included; the weight aims at what rounded tokens need; it is then rounded by
GPTQ and coordinate descent on the same uneven grid. The paper is `space: paper, round: nearest, window: -1, rounds: 3,
compensate: false` with one scale per weight row and a static one for all tokens.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from quant.grid import FloatGrid
from quant.kernels.activation import Activation
from quant.kernels.activations.fp_shift import FpShift
from quant.kernels.format import Codes, Fields, Format, fit_group
from quant.kernels.formats.fp_channel import FpChannel
from quant.kernels.minifloat import EXPONENTS
from quant.minifloat_search import Space, channel_sizes, compensated, noisy_gram, search_input, search_weight
from quant.passes.base import GridRounder
from quant.refit import refit
from quant.rounding import coordinate_descent, gptq
from quant.search import gram_blocks
from quant.stats import InputStats


class Pass(GridRounder):
    """rounds: of the joint search; 0 keeps the full ranges of E2M1 and E4M3, the naive form.

    weight_exponents, input_exponents: exponent bits to choose among, all by default. space: see `minifloat_search.ratios`.
    window: how many neighbouring channels a row's range is searched with; -1 all of them. shifted: pre-shift channels.
    compensate: aim at the weight that rounded tokens need. round: nearest or gptq. refits: rounds of fitted scales and new
    codes after gptq.
    """

    rounds: int = Field(1, ge=0, le=10)
    weight_exponents: tuple[int, ...] = ()
    input_exponents: tuple[int, ...] = ()
    space: Space = "clip"
    window: int = 64
    shifted: bool = True
    compensate: bool = True
    refits: int = Field(0, ge=0, le=100)

    def refuses(self, fmt: Format) -> str | None:
        return None if isinstance(fmt, FpChannel) else f"llm_fp4 writes fp_channel, not {fmt.name}; use gptq or rtn"

    def quantize(self, weight: Tensor, stats: InputStats, fmt: Format) -> Codes:
        """Behind float tokens."""
        assert isinstance(fmt, FpChannel)
        gram = self.gram(stats)
        return self.round_to_grid(weight, gram, fmt, *self.search(weight, gram, fmt))

    def decide(self, weight: Tensor, stats: InputStats, fmt: Format, activation: Activation) -> tuple[Codes, Fields]:
        if not isinstance(activation, FpShift) or not stats.data:
            return super().decide(weight, stats, fmt, activation)
        assert isinstance(fmt, FpChannel)
        tokens, gram = stats.sample(), self.gram(stats)
        sizes = channel_sizes(activation, tokens, stats.absmax)
        codes, inputs = fmt.nearest(weight), activation.fit(tokens[0], stats.absmax)
        aim, seen = weight, gram
        for _ in range(self.rounds):
            exponents = self.input_exponents or EXPONENTS[activation.bits]
            rounded = fmt.dequantize(codes)
            inputs = search_input(activation, tokens, sizes, weight, rounded, exponents, self.space, self.shifted)
            if self.compensate:
                seen, cross = noisy_gram(gram, tokens, activation.quantize(tokens[0], inputs))
                aim = compensated(weight, seen, cross, self.damp)
            step, e = self.search(aim, seen, fmt)
            codes = fmt.encode(aim, step, e)
        step, e = codes.params["weight_scale"].float(), int(codes.params["weight_exponents"])
        return self.round_to_grid(aim, seen, fmt, step, e), inputs

    def search(self, weight: Tensor, gram: Tensor, fmt: FpChannel) -> tuple[Tensor, int]:
        """Scales [N, K // G] and exponent bits for a weight behind tokens of that Gram matrix."""
        k = weight.shape[1]
        window = fit_group(self.window, k) or k if fmt.group == -1 else fmt.group
        blocks = gram_blocks(gram, k if window == -1 else window)
        return search_weight(weight, blocks, fmt, self.weight_exponents or EXPONENTS[fmt.bits], self.space)

    def round_to_grid(self, weight: Tensor, gram: Tensor, fmt: FpChannel, step: Tensor, exponents: int) -> Codes:
        """Codes under given scales."""
        plain = fmt.encode(weight, step, exponents)
        if self.round == "nearest":
            return plain
        grid = FloatGrid(step, fmt.kind(exponents))
        codes = gptq(weight, gram, grid, act_order=self.act_order, damp=self.damp)
        codes = coordinate_descent(weight, gram, codes, grid, self.sweeps)
        codes, grid = refit(weight, gram, codes, grid, fmt.storable, self.refits)
        return Codes(codes, fmt.params(grid.step, exponents))
