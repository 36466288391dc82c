// codebook: vectors of `length` neighbouring weights out of codebooks of 256, one byte per vector and book.
//
//     y[m, n] = s[n] * sum_j <x[m, tile j], sum_b C[b, code[n, j, b]]>
//
// Codes are [N/32, tiles, books, 32]: a tile's bytes of 32 rows side by side. The codebooks, float32 [books, 256, length], stay in
// the L1 cache (4 KiB for one of length 4); a byte then costs a load of four weights and a multiplication of four.
#pragma once
#include "driver.h"
#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

inline Four fused(Four a, Four b, Four c) {
#if defined(__FMA__)
    return (Four)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#else
    return a * b + c;
#endif
}

// BOOKS, QUARTERS: number of books and length / 4, 0 where they are known at run time only.
template <int BOOKS, int QUARTERS>
struct Codebook {
    using Acc = float;
    static constexpr bool kInteger = false, kPairs = false;
    static constexpr int kWidth = 0;
#if defined(__AVX512VL__)
    static constexpr int kSums = 16;  // of 32 registers
#else
    static constexpr int kSums = 8;
#endif

    static int64_t panel_bytes(const Problem& p, bool) { return 4 * p.k; }

    // Four values of each token side by side, [K / 4, tokens, 4].
    static void gather(const Problem& p, const char* row, int t, const Panel<float>& panel) {
        static thread_local Scratch buffer;
        float* values = (float*)buffer.at_least(p.k * 4);
        to_float(values, row, p.k, p.dtype);
        float* out = (float*)panel.data + 4 * t;
        for (int64_t i = 0; i < p.k; i += 4) memcpy(out + i * panel.tokens, values + i, 16);
    }

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        constexpr int R = MT == 1 ? kSums : MT == 2 ? kSums / 2 : kSums / 4;  // rows at a time
        const int books = BOOKS ? BOOKS : p.books, quarters = QUARTERS ? QUARTERS : p.length / 4, length = 4 * quarters;
        const int64_t tiles = p.k / length;
        const float* book = (const float*)p.scale;
        for (int row = 0; row < kRows; row += R) {
            const uint8_t* codes = p.codes + block * tiles * books * kRows + row;
            const float* x = (const float*)panel.data;
            Four sum[R][MT] = {};
            for (int64_t tile = 0; tile < tiles; tile++, codes += books * kRows) {
                __builtin_prefetch(codes + kAhead);
                for (int q = 0; q < quarters; q++, x += 4 * MT) {
                    Four token[MT];
                    for (int t = 0; t < MT; t++) token[t] = *(const Four*)(x + 4 * t);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) {
                        Four weight = *(const Four*)(book + codes[r] * length + 4 * q);
                        for (int b = 1; b < books; b++)
                            weight += *(const Four*)(book + (b * 256 + codes[b * kRows + r]) * length + 4 * q);
#pragma GCC unroll 4
                        for (int t = 0; t < MT; t++) sum[r][t] = fused(weight, token[t], sum[r][t]);
                    }
                }
            }
            for (int t = 0; t < MT; t++)
                for (int r = 0; r < R; r++) out[t * kRows + row + r] = (sum[r][t][0] + sum[r][t][1]) + (sum[r][t][2] + sum[r][t][3]);
        }
    }
};

inline void run_codebook(const Problem& p) {
    if (p.books == 1 && p.length == 4) return run<Codebook<1, 1>>(p);
    if (p.books == 2 && p.length == 8) return run<Codebook<2, 2>>(p);
    run<Codebook<0, 0>>(p);
}

}  // namespace
