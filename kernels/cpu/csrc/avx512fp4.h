// FP4 blocks (E2M1 codes, one byte of scale per 16 or 32 k) for AVX-512, shared by the float, BF16 and AMX units.
//
// Few tokens: codes are looked up in registers as float32 and the scale multiplies a block's float32 sum (bfloat16 tokens on
// processors that multiply them go through avx512fp4pairs.h). Many tokens: a weight times its scale has at most six
// significant bits, which bfloat16 holds exactly, so a slice is unpacked with the scales in it and no block is seen again
// (avx512slices.h).
#pragma once
#include "avx512slices.h"
#include "fp4.h"

namespace {

// `block_scale` of 16 rows.
inline __m512 load_block_scale(const Problem& p, int64_t index) {
    const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)((const uint8_t*)p.scale + index)));
    if (p.scale_is_e8m0)
        return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(byte, 23), _mm512_set1_epi32(1 << 22)));
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(byte, 20)), _mm512_set1_ps(0x1p120f));
}

// One unit of 16 rows times the scale -> [8, 32] float32, or [4, 32, 2] bfloat16.
inline void put_scaled(const Words<4>& words, int h, __m512 table, __m512 scale, float* to) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) _mm512_store_ps(to + k * kRows + 16 * h, _mm512_mul_ps(words.weight(k, table), scale));
}
inline void put_scaled(const Words<4>& words, int h, __m512 table, __m512 scale, uint16_t* to) {
#pragma GCC unroll 4
    for (int k = 0; k < 8; k += 2) {
        const __m512i even = _mm512_castps_si512(_mm512_mul_ps(words.weight(k, table), scale));
        const __m512i odd = _mm512_castps_si512(_mm512_mul_ps(words.weight(k + 1, table), scale));
        _mm512_store_si512(to + k * kRows + 32 * h, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
    }
}

template <class Engine>
struct Fp4 : FloatPanels<4> {
    using S = Stored<4>;
    using Element = typename Engine::Element;
    static constexpr int kWidth = Engine::kWidth;
    static constexpr bool kPairs = true;

    using Slices = ScaledSlices<Engine, 8>;

    static int64_t panel_bytes(const Problem& p, bool many) {
        return many ? Engine::panel_bytes(Slices::columns(p)) : FloatPanels<4>::panel_bytes(p, many);
    }

    static void gather(const Problem& p, const char* row, int t, const Panel<float>& panel) {
        panel.many ? Slices::gather(p, row, t, panel) : FloatPanels<4>::gather(p, row, t, panel);
    }

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        const int64_t groups = p.k / p.group, stride = p.k * 16;
        const uint8_t* w = p.codes + block * stride;
        const float* x = (const float*)panel.data;
        const __m512 table = float_values(kE2M1);
        __m512 acc[B][MT][2];
        for (int b = 0; b < B; b++)
            for (int t = 0; t < MT; t++) acc[b][t][0] = acc[b][t][1] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; g++) {
            __m512 part[B][MT][2];
            for (int b = 0; b < B; b++)
                for (int t = 0; t < MT; t++) part[b][t][0] = part[b][t][1] = _mm512_setzero_ps();
            for (int64_t i = 0; i < p.group / 8; i++, w += 128, x += 8 * MT)
#pragma GCC unroll 2
                for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        const uint8_t* at = w + b * stride;
                        _mm_prefetch((const char*)at + kAhead + 64 * h, _MM_HINT_T0);
                        const Words<4> words(at, h);
#pragma GCC unroll 8
                        for (int k = 0; k < 8; k++) {
                            const __m512 weight = words.weight(k, table);
#pragma GCC unroll 4
                            for (int t = 0; t < MT; t++)
                                part[b][t][h] = _mm512_fmadd_ps(weight, _mm512_set1_ps(x[k * MT + t]), part[b][t][h]);
                        }
                    }
#pragma GCC unroll 2
            for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const __m512 scale = load_block_scale(p, ((block + b) * groups + g) * kRows + 16 * h);
#pragma GCC unroll 4
                    for (int t = 0; t < MT; t++) acc[b][t][h] = _mm512_fmadd_ps(scale, part[b][t][h], acc[b][t][h]);
                }
        }
        for (int b = 0; b < B; b++)
            for (int t = 0; t < MT; t++)
                for (int h = 0; h < 2; h++) _mm512_store_ps(out + (b * MT + t) * kRows + 16 * h, acc[b][t][h]);
    }

    static void many(const Problem& p, int64_t block, const Panel<float>* panels, int count, float* out) {
        const int64_t groups = p.k / p.group;
        const __m512 table = float_values(kE2M1);
        Slices::many(p, block, panels, count, out, [&](int64_t k0, int64_t size, Element* to) {
            const uint8_t* w = p.codes + (block * p.k + k0) * 16;
            for (int64_t k = 0; k < size; k += p.group)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const __m512 scale = load_block_scale(p, (block * groups + (k0 + k) / p.group) * kRows + 16 * h);
                    for (int64_t i = 0; i < p.group / 8; i++)
                        put_scaled(Words<4>(w + k * 16 + 128 * i, h), h, table, scale, to + (k + 8 * i) * kRows);
                }
        });
    }
};

}  // namespace
