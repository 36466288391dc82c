// Few bfloat16 tokens on AVX-512 with BF16, codes of 2, 3 and 4 bits: vdpbf16ps on codes looked up in registers.
//
// vpermw reads five bits of each half word as its index, so one shift serves a 4-bit code or two 2-bit codes, whose
// tables look at other bits of the same index. A look-up gives bfloat16 of code - center, exact, for two neighbouring k
// of 16 rows, and one vdpbf16ps multiplies and adds both: 32 weights in two and a half instructions, against
// twice 16 in five or six where products are float32. The token is 2 bytes per k and stays in the L1 cache.
#pragma once
#include "avx512unpack.h"

namespace {

// bfloat16 of code - center by five bits of an index: the low bits of the code at bit `at`, a third bit at bit 4.
template <int BITS>
inline __m512i pair_table(int at) {
    using S = Stored<BITS>;
    alignas(64) uint16_t entry[32];
    for (int i = 0; i < 32; i++) {
        int code = i >> at & ((1 << S::kLow) - 1);
        if (BITS == 3) code |= i >> 4 << 2;
        entry[i] = bf16_of((float)(code - S::kCenter));
    }
    return _mm512_load_si512(entry);
}

template <int BITS>
struct FewPairs {
    using Acc = float;
    using S = Stored<BITS>;
    static constexpr bool kInteger = false, kPairs = true;
    static constexpr int kFields = 4 / S::kLow;  // codes under one index

    static int64_t panel_bytes(const Problem& p, bool) { return 2 * S::padded(p); }

    // [K / 2, tokens, 2]
    static void gather(const Problem& p, const char* row, int t, const Panel<Acc>& panel) {
        put_pairs(FloatPanels<BITS>::values_of(p, row, t, panel), S::padded(p), t, panel);
    }

    // The indices of field f of all steps: codes of one word of 16 rows, shifted by 4 bits from step to step.
    struct Indices {
        __m512i word, tops;
        Indices(const uint8_t* unit, int h) {
            word = _mm512_loadu_si512(unit + 64 * h);
            if constexpr (BITS == 3)  // a byte of top bits beside each half word of codes
                tops = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(unit + 128 + 32 * h)));
        }
        __m512i at(int step, int field) const {
            const __m512i index = _mm512_srli_epi16(word, 4 * step);
            if constexpr (BITS != 3) return index;
            const int bit = 2 * step + field;
            const __m512i top = bit < 4 ? _mm512_slli_epi16(tops, 4 - bit) : _mm512_srli_epi16(tops, bit - 4);
            return _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), index, top, 0xCA);  // the mask chooses bit by bit
        }
    };

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<Acc>& panel, float* out) {
        constexpr int kChains = MT == 1 ? 2 : 1;  // sums that do not wait for each other
        const int64_t groups = p.k / p.group, units = S::length(p) / S::kUnit, stride = S::padded(p) * 4 * BITS;
        const uint8_t* w = S::at(p, block, 0);
        const char* x = panel.data;
        const __m512i table[2] = {pair_table<BITS>(0), pair_table<BITS>(kFields == 2 ? 2 : 0)};
        for (int64_t g = 0; g < groups; g++) {
            __m512 part[B][2][MT][kChains];
#pragma GCC unroll 2
            for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++)
#pragma GCC unroll 4
                    for (int t = 0; t < MT; t++)
#pragma GCC unroll 4
                        for (int c = 0; c < kChains; c++) part[b][h][t][c] = _mm512_setzero_ps();
            for (int64_t i = 0; i < units; i++, w += S::kUnitBytes, x += S::kUnit * 2 * MT)
#pragma GCC unroll 2
                for (int b = 0; b < B; b++) {
                    const uint8_t* at = w + b * stride;
#pragma GCC unroll 3
                    for (int line = 0; line < S::kUnitBytes; line += 64) _mm_prefetch((const char*)at + kAhead + line, _MM_HINT_T0);
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        const Indices indices(at, h);
#pragma GCC unroll 4
                        for (int step = 0; step < 4; step++)
#pragma GCC unroll 2
                            for (int field = 0; field < kFields; field++) {
                                const __m512i weight = _mm512_permutexvar_epi16(indices.at(step, field), table[field]);
                                const int pair = kFields * step + field;
#pragma GCC unroll 4
                                for (int t = 0; t < MT; t++) {
                                    __m512& sum = part[b][h][t][pair % kChains];
                                    sum = _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)broadcast_pair(x + 4 * (pair * MT + t)));
                                }
                            }
                    }
                }
            __m512 sums[B][2][MT];  // a copy: if apply took the address of the sums above, they would live in memory
#pragma GCC unroll 2
            for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++)
#pragma GCC unroll 4
                    for (int t = 0; t < MT; t++) {
                        sums[b][h][t] = part[b][h][t][0];
#pragma GCC unroll 4
                        for (int c = 1; c < kChains; c++) sums[b][h][t] = _mm512_add_ps(sums[b][h][t], part[b][h][t][c]);
                    }
#pragma GCC unroll 2
            for (int b = 0; b < B; b++)
                apply<MT>(p, S::kCenter, block + b, panel, g, true, g > 0, [&](int t, int h) { return sums[b][h][t]; },
                          out + b * MT * kRows);
        }
    }
};

template <>
struct FewPairs<8> : Few<8> {};  // eight bits have no table; their memory is slower than float32 arithmetic

}  // namespace
