// Few bfloat16 tokens on AVX-512 with BF16, codes of 2, 3 and 4 bits: vdpbf16ps on codes looked up in registers.
//
// vpermw reads five bits of each half word as its index and vpermt2w six, so one shift serves a 4-bit code, two 2-bit codes
// or, with their top bits above, two 3-bit codes, whose tables look at other bits of the same index. A look-up gives
// bfloat16 of code - center, exact, for two neighbouring k of 16 rows, and one vdpbf16ps multiplies and adds both: per 32
// weights 2.4 (2 bits) to 4 (3 bits) vector instructions, where float32 products take 3 or more for 16 or 32. A token is
// 2 bytes per k and stays in the L1 cache, which tables of float32 partial sums do not.
#pragma once
#include "avx512unpack.h"

namespace {

// bfloat16 of what a code stands for by the bits of an index: field f of a step of 4 bits, and for three bits its top bit, 4 + f.
template <int BITS>
struct PairTable {
    using S = Stored<BITS>;
    __m512i entries[BITS == 3 ? 2 : 1];

    PairTable(const Problem& p, int64_t block, int field) {
        if constexpr (BITS == 4) {
            entries[0] = bf16_table<4>(p, block);
            return;
        }
        alignas(64) uint16_t entry[64];
        for (int i = 0; i < 64; i++) {
            int code = i >> S::kLow * field & ((1 << S::kLow) - 1);
            if (BITS == 3) code |= (i >> (4 + field) & 1) << 2;
            entry[i] = bf16_of((float)(code - S::kCenter));
        }
        entries[0] = _mm512_load_si512(entry);
        if constexpr (BITS == 3) entries[1] = _mm512_load_si512(entry + 32);
    }
    __m512i look_up(__m512i index) const {
        if constexpr (BITS == 3) return _mm512_permutex2var_epi16(entries[0], index, entries[1]);
        return _mm512_permutexvar_epi16(index, entries[0]);
    }
};

constexpr int64_t kPairsAhead = 4096;  // bytes: these loops wait for memory, whose latency 2048 do not cover
constexpr int64_t kScalesAhead = 8;    // groups

inline void prefetch_scale(const Problem& p, int64_t row) {
    _mm_prefetch((const char*)p.scale + row * kRows * (p.scale_is_f32 ? 4 : 2), _MM_HINT_T0);
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
        if (panel.tokens == 1 && !p.zero) {  // as it is; only zero points need the sums
            memcpy(panel.data, row, 2 * p.k);
            memset(panel.data + 2 * p.k, 0, 2 * (S::padded(p) - p.k));
            return;
        }
        put_pairs(FloatPanels<BITS>::values_of(p, row, t, panel), S::padded(p), t, panel);
    }

    // The codes of one unit of 16 rows: the index of a step holds those of two or, at 4 bits, one pair of k.
    struct Codes {
        __m512i word, tops;
        Codes(const uint8_t* unit, int h) {
            word = _mm512_loadu_si512(unit + 64 * h);
            if constexpr (BITS == 3)  // a byte of top bits beside each half word of codes
                tops = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(unit + 128 + 32 * h)));
        }
        __m512i index(int step) const {
            const __m512i low = _mm512_srli_epi16(word, 4 * step);
            if constexpr (BITS != 3) return low;
            const __m512i top = step < 2 ? _mm512_slli_epi16(tops, 4 - 2 * step) : _mm512_srli_epi16(tops, 2 * step - 4);
            return _mm512_ternarylogic_epi32(top, low, _mm512_set1_epi16(15), 0xD8);  // the mask chooses bit by bit
        }
    };

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<Acc>& panel, float* out) {
        constexpr int kChains = MT == 1 ? 4 : 1;  // sums that do not wait for each other
        const int64_t groups = p.k / p.group, units = S::length(p) / S::kUnit, stride = S::padded(p) * 4 * BITS;
        const uint8_t* w = S::at(p, block, 0);
        const char* x = panel.data;
        // two fields under one index, or one whose meaning each of two neighbouring blocks may have to itself
        const PairTable<BITS> tables[2] = {{p, block, 0}, {p, block + (BITS == 4 ? B - 1 : 0), kFields - 1}};
        for (int64_t g = 0; g < groups; g++) {
            // past the end of a block lies its neighbour, which is read already: go on with the next pair of blocks
            const int64_t ahead = kPairsAhead + (p.k - g * p.group < kPairsAhead / (4 * BITS) ? stride * (B - 1) : 0);
#pragma GCC unroll 2
            for (int b = 0; b < B; b++) prefetch_scale(p, (block + b) * groups + g + kScalesAhead);
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
                    for (int line = 0; line < S::kUnitBytes; line += 64) _mm_prefetch((const char*)at + ahead + line, _MM_HINT_T0);
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        const Codes codes(at, h);
#pragma GCC unroll 4
                        for (int step = 0; step < 4; step++) {
                            const __m512i index = codes.index(step);
#pragma GCC unroll 2
                            for (int field = 0; field < kFields; field++) {
                                const __m512i weight = tables[BITS == 4 ? b : field].look_up(index);
                                const int pair = kFields * step + field;
#pragma GCC unroll 4
                                for (int t = 0; t < MT; t++) {
                                    __m512& sum = part[b][h][t][pair % kChains];
                                    sum = _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)broadcast_pair(x + 4 * (pair * MT + t)));
                                }
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
