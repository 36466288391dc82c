// FP4 blocks times a few bfloat16 tokens: one 16-bit look-up gives the weights of 16 rows and two k, which vdpbf16ps
// multiplies by a pair of a token's values, exactly, and adds in float32. Half the instructions of the float32 way; as
// avx512pairs.h, whose distances of prefetching it shares.
#pragma once
#include "avx512fp4.h"
#include "avx512pairs.h"

namespace {

template <class Engine>
struct Fp4Pairs : Fp4<Engine> {
    using Base = Fp4<Engine>;
    static int64_t panel_bytes(const Problem& p, bool many) { return many ? Base::panel_bytes(p, many) : 2 * p.k; }

    // Few tokens: [K / 2, tokens, 2]
    static void gather(const Problem& p, const char* row, int t, const Panel<float>& panel) {
        if (panel.many) return Base::gather(p, row, t, panel);
        char* out = panel.data + 4 * t;
        for (int64_t i = 0; i < p.k / 2; i++) memcpy(out + 4 * i * panel.tokens, row + 4 * i, 4);
    }

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        constexpr int kChains = MT == 1 ? 2 : 1;  // sums that do not wait for each other
        const int64_t groups = p.k / p.group, stride = p.k * 16;
        const uint8_t* w = p.codes + block * stride;
        const uint8_t* scales = (const uint8_t*)p.scale + block * groups * kRows;
        const char* x = panel.data;
        const __m512i table = bf16_twice(float_values(kE2M1));
        __m512 acc[B][2][MT];
#pragma GCC unroll 2
        for (int b = 0; b < B; b++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
#pragma GCC unroll 4
                for (int t = 0; t < MT; t++) acc[b][h][t] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; g++, scales += kRows) {
            // past the end of a block lies its neighbour, which is read already: go on with the next pair of blocks
            const int64_t ahead = kPairsAhead + (p.k - g * p.group < kPairsAhead / 16 ? stride * (B - 1) : 0);
            __m512 part[B][2][MT][kChains];
#pragma GCC unroll 2
            for (int b = 0; b < B; b++) {
                _mm_prefetch((const char*)scales + (b * groups + 4 * kScalesAhead) * kRows, _MM_HINT_T0);
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++)
#pragma GCC unroll 4
                    for (int t = 0; t < MT; t++)
#pragma GCC unroll 2
                        for (int c = 0; c < kChains; c++) part[b][h][t][c] = _mm512_setzero_ps();
            }
            for (int64_t i = 0; i < p.group / 8; i++, w += 128, x += 16 * MT)
#pragma GCC unroll 2
                for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        const uint8_t* at = w + b * stride + 64 * h;
                        _mm_prefetch((const char*)at + ahead, _MM_HINT_T0);
                        const __m512i word = _mm512_loadu_si512(at);
#pragma GCC unroll 4
                        for (int k = 0; k < 4; k++) {
                            const __m512i index = _mm512_srli_epi16(word, Stored<4>::shift(2 * k));
                            const __m512bh weight = (__m512bh)_mm512_permutexvar_epi16(index, table);
#pragma GCC unroll 4
                            for (int t = 0; t < MT; t++) {
                                __m512& sum = part[b][h][t][k % kChains];
                                sum = _mm512_dpbf16_ps(sum, weight, (__m512bh)broadcast_pair(x + 4 * (k * MT + t)));
                            }
                        }
                    }
#pragma GCC unroll 2
            for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const __m512 scale = load_block_scale(p, ((block + b) * groups + g) * kRows + 16 * h);
#pragma GCC unroll 4
                    for (int t = 0; t < MT; t++)
#pragma GCC unroll 2
                        for (int c = 0; c < kChains; c++) acc[b][h][t] = _mm512_fmadd_ps(scale, part[b][h][t][c], acc[b][h][t]);
                }
        }
#pragma GCC unroll 2
        for (int b = 0; b < B; b++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
#pragma GCC unroll 4
                for (int t = 0; t < MT; t++) _mm512_store_ps(out + (b * MT + t) * kRows + 16 * h, acc[b][h][t]);
    }
};

}  // namespace
