// binary_dual for AVX-512, shared by the float, BF16 and AMX units.
//
// Few tokens: vpermps reads four bits of each lane as its index, so a nibble of a plane picks one of the 16 subset sums of four
// tokens' values for 16 rows: a shift, a look-up and an addition for 64 bits, in float32 and without a rounded weight. Many
// tokens: slices are unpacked with the scales in them, rounded to bfloat16 where the Engine multiplies bfloat16.
#pragma once
#include "avx512slices.h"
#include "dual.h"

namespace {

// What codes 1, 2 and 3 of 16 rows stand for.
struct Levels {
    __m512 one, two, three;
    template <class Element>
    static Levels of(__m512 a1, __m512 a2) {
        const Levels exact = {a1, a2, _mm512_add_ps(a1, a2)};
        if constexpr (sizeof(Element) == 4) return exact;
        const auto round = [](__m512 v) { return _mm512_castsi512_ps(rounded_bf16(v)); };
        return {round(exact.one), round(exact.two), round(exact.three)};
    }
    __m512 weight(__m512i word, int k) const {
        const __mmask16 first = _mm512_test_epi32_mask(word, _mm512_set1_epi32(1 << k));
        const __mmask16 second = _mm512_test_epi32_mask(word, _mm512_set1_epi32((int)(0x10000u << k)));
        return _mm512_mask_mov_ps(_mm512_maskz_mov_ps(first, one), second, _mm512_mask_mov_ps(two, first, three));
    }
};

// One unit of 16 rows -> [16, 32] float32, or [8, 32, 2] bfloat16.
inline void put_levels(__m512i word, int h, const Levels& levels, float* to) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) _mm512_store_ps(to + k * kRows + 16 * h, levels.weight(word, k));
}
inline void put_levels(__m512i word, int h, const Levels& levels, uint16_t* to) {
#pragma GCC unroll 8
    for (int k = 0; k < 16; k += 2) {
        const __m512i even = _mm512_castps_si512(levels.weight(word, k)), odd = _mm512_castps_si512(levels.weight(word, k + 1));
        _mm512_store_si512(to + k * kRows + 32 * h, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
    }
}

template <class Engine>
struct Dual : SubsetSums<4> {
    using Element = typename Engine::Element;
    using Slices = ScaledSlices<Engine, Planes::kUnit>;
    static constexpr int kWidth = Engine::kWidth;
    static constexpr bool kPairs = true;

    static int64_t panel_bytes(const Problem& p, bool many) {
        return many ? Engine::panel_bytes(Slices::columns(p)) : SubsetSums<4>::panel_bytes(p, many);
    }

    static void gather(const Problem& p, const char* row, int t, const Panel<float>& panel) {
        panel.many ? Slices::gather(p, row, t, panel) : SubsetSums<4>::gather(p, row, t, panel);
    }

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        constexpr int64_t kDistance = 4096;  // bytes asked for ahead
        const int64_t groups = p.k / p.group, units = Planes::units(p), stride = Planes::padded(p) * 8;
        const uint8_t* w = Planes::at(p, block, 0);
        const float* x = (const float*)panel.data;
        __m512 acc[B][2][MT];
#pragma GCC unroll 2
        for (int b = 0; b < B; b++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
#pragma GCC unroll 4
                for (int t = 0; t < MT; t++) acc[b][h][t] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; g++) {
            // past the end of a block lies its neighbour, which is read already: go on with the next pair of blocks
            const int64_t ahead = kDistance + (p.k - g * p.group < kDistance / 8 ? stride * (B - 1) : 0);
            __m512 part[B][2][2][MT];  // block, half of its rows, plane, token
#pragma GCC unroll 2
            for (int b = 0; b < B; b++) {
                for (int plane = 0; plane < 2; plane++)
                    _mm_prefetch((const char*)p.scale + (Planes::scale_at(p, block + b, g + 4, plane) << (p.scale_is_f32 ? 2 : 1)),
                                 _MM_HINT_T0);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
#pragma GCC unroll 4
                    for (int t = 0; t < MT; t++) part[b][i / 2][i % 2][t] = _mm512_setzero_ps();
            }
            for (int64_t i = 0; i < units; i++, w += Planes::kUnitBytes) {
                __m512i word[B][2];
#pragma GCC unroll 2
                for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        word[b][h] = _mm512_loadu_si512(w + b * stride + 64 * h);
                        _mm_prefetch((const char*)w + b * stride + 64 * h + ahead, _MM_HINT_T0);
                    }
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
                    for (int t = 0; t < MT; t++, x += 16) {
                        const __m512 table = _mm512_load_ps(x);
#pragma GCC unroll 2
                        for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                            for (int h = 0; h < 2; h++)
#pragma GCC unroll 2
                                for (int plane = 0; plane < 2; plane++) {
                                    const __m512i index = _mm512_srli_epi32(word[b][h], 16 * plane + 4 * j);
                                    __m512& sum = part[b][h][plane][t];
                                    sum = _mm512_add_ps(sum, _mm512_permutexvar_ps(index, table));
                                }
                    }
            }
#pragma GCC unroll 2
            for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++)
#pragma GCC unroll 2
                    for (int plane = 0; plane < 2; plane++) {
                        const __m512 scale = load_scale(p, Planes::scale_at(p, block + b, g, plane) + 16 * h);
#pragma GCC unroll 4
                        for (int t = 0; t < MT; t++) acc[b][h][t] = _mm512_fmadd_ps(scale, part[b][h][plane][t], acc[b][h][t]);
                    }
        }
#pragma GCC unroll 2
        for (int b = 0; b < B; b++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++)
#pragma GCC unroll 4
                for (int t = 0; t < MT; t++) _mm512_store_ps(out + (b * MT + t) * kRows + 16 * h, acc[b][h][t]);
    }

    static void many(const Problem& p, int64_t block, const Panel<float>* panels, int count, float* out) {
        const int64_t length = Planes::units(p) * Planes::kUnit;
        Slices::many(p, block, panels, count, out, [&](int64_t k0, int64_t size, Element* to) {
            for (int h = 0; h < 2; h++) {
                Levels levels = {};
                for (int64_t k = k0; k < k0 + size; k += Planes::kUnit) {
                    if (k == k0 || k % length == 0) {
                        const int64_t g = k / length;
                        levels = Levels::of<Element>(load_scale(p, Planes::scale_at(p, block, g, 0) + 16 * h),
                                                     load_scale(p, Planes::scale_at(p, block, g, 1) + 16 * h));
                    }
                    put_levels(_mm512_loadu_si512(Planes::at(p, block, k) + 64 * h), h, levels, to + (k - k0) * kRows);
                }
            }
        });
    }
};

}  // namespace
