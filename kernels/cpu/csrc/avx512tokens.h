// Tokens to int8 for the AVX-512 and AMX integer kernels: what quantize_token in numeric.h does, bit for bit, without a copy
// of the token in float32. Short matrices spend as long on this as on their products.
#pragma once
#include <immintrin.h>

#include "driver.h"

namespace {

// 16 values as float32; those outside the mask are zero and not read.
template <DType D>
inline __m512 load_values(const void* row, int64_t i, __mmask16 mask) {
    if constexpr (D == kF32) return _mm512_maskz_loadu_ps(mask, (const float*)row + i);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)row + i);
    if constexpr (D == kF16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <DType D>
inline void to_codes(const void* row, int64_t k, float inverse, int top, int8_t* codes) {
    const __m128i most = _mm_set1_epi8((int8_t)top), least = _mm_set1_epi8((int8_t)-top);
    const auto convert = [&](int64_t i, __mmask16 mask) {
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load_values<D>(row, i, mask), _mm512_set1_ps(inverse)));
        return _mm_min_epi8(_mm_max_epi8(_mm512_cvtsepi32_epi8(q), least), most);
    };
    int64_t i = 0;
#pragma GCC unroll 4
    for (; i + 16 <= k; i += 16) _mm_storeu_si128((__m128i*)(codes + i), convert(i, 0xFFFF));
    if (i < k) _mm_mask_storeu_epi8(codes + i, (1u << (k - i)) - 1, convert(i, (1u << (k - i)) - 1));
}

// max |v|, or a NaN if there is one: ordered as integers, every NaN is above every number, in 16 bits as in 32.
inline float absmax_of(const void* row, int64_t k, DType dtype) {
    __m512i top = _mm512_setzero_si512();
    if (dtype == kF32) {
        for (int64_t i = 0; i < k; i += 16) {
            const __mmask16 mask = i + 16 <= k ? 0xFFFF : (1u << (k - i)) - 1;
            const __m512i v = _mm512_maskz_loadu_epi32(mask, (const float*)row + i);
            top = _mm512_max_epi32(top, _mm512_and_si512(v, _mm512_set1_epi32(0x7FFFFFFF)));
        }
        return float_of((uint32_t)_mm512_reduce_max_epi32(top));
    }
    for (int64_t i = 0; i < k; i += 32) {
        const __mmask32 mask = i + 32 <= k ? 0xFFFFFFFF : (1u << (k - i)) - 1;
        const __m512i v = _mm512_maskz_loadu_epi16(mask, (const uint16_t*)row + i);
        top = _mm512_max_epu16(top, _mm512_and_si512(v, _mm512_set1_epi16(0x7FFF)));
    }
    top = _mm512_max_epi32(_mm512_and_si512(top, _mm512_set1_epi32(0xFFFF)), _mm512_srli_epi32(top, 16));
    const uint16_t bits = (uint16_t)_mm512_reduce_max_epi32(top);
    return dtype == kF16 ? float_of_half(bits) : float_of((uint32_t)bits << 16);
}

inline int32_t sum_codes(const int8_t* codes, int64_t n) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 64) {
        const __mmask64 mask = i + 64 <= n ? ~(__mmask64)0 : ((__mmask64)1 << (n - i)) - 1;
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(mask, codes + i));
    }
    return _mm512_reduce_add_epi32(sum);
}

struct Avx512Panels : IntegerPanels {
    // One token: codes [K], zeros up to `to`, with its scale and the sum of each group.
    static void quantize(const Problem& p, const char* row, int8_t* codes, int64_t to, int t, const Panel<Acc>& panel) {
        const int64_t k = p.k, groups = k / p.group;
        const float most = absmax_of(row, k, p.dtype), scale = (most < 1e-5f ? 1e-5f : most) / p.reach;
        panel.scale[t] = scale;
        if (p.dtype == kF32) to_codes<kF32>(row, k, 1.0f / scale, p.top, codes);
        if (p.dtype == kBF16) to_codes<kBF16>(row, k, 1.0f / scale, p.top, codes);
        if (p.dtype == kF16) to_codes<kF16>(row, k, 1.0f / scale, p.top, codes);
        memset(codes + k, 0, to - k);
        for (int64_t g = 0; g < groups; g++) panel.sums[t * groups + g] = sum_codes(codes + g * p.group, p.group);
    }

    // Tokens are quantized one after the other, and interleaved when the panel is complete.
    static void gather(const Problem& p, const char* row, int t, const Panel<Acc>& panel) {
        static thread_local Scratch buffer;
        const int64_t kp = padded(p), stride = round_up(kp, 64);
        if (panel.tokens == 1) return quantize(p, row, (int8_t*)panel.data, kp, t, panel);
        int8_t* codes = (int8_t*)buffer.at_least(stride * panel.tokens);
        quantize(p, row, codes + t * stride, stride, t, panel);
        if (t == panel.tokens - 1) interleave(codes, stride, kp / 4, panel.tokens, (char*)panel.data);
    }

    // codes [tokens, stride] -> out [n4, tokens, 4]; up to 60 bytes of each row behind n4 are read.
    static void interleave(const int8_t* codes, int64_t stride, int64_t n4, int tokens, char* out) {
        int t = 0;
        for (; t + 4 <= tokens; t += 4)
            for (int64_t i = 0; i < n4; i += 16) {
                const int8_t* at = codes + t * stride + 4 * i;
                const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + stride);
                const __m512i c = _mm512_loadu_si512(at + 2 * stride), d = _mm512_loadu_si512(at + 3 * stride);
                const __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
                const __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
                alignas(64) __m128i four[16];  // of 16 k / 4, four tokens each: lanes 0, 4, 8, 12, then 1, 5, ...
                _mm512_store_si512(four, _mm512_unpacklo_epi64(ab0, cd0));
                _mm512_store_si512(four + 4, _mm512_unpackhi_epi64(ab0, cd0));
                _mm512_store_si512(four + 8, _mm512_unpacklo_epi64(ab1, cd1));
                _mm512_store_si512(four + 12, _mm512_unpackhi_epi64(ab1, cd1));
                const int64_t count = min64(16, n4 - i);
                for (int64_t j = 0; j < count; j++)
                    _mm_storeu_si128((__m128i*)(out + ((i + j) * tokens + t) * 4), four[j % 4 * 4 + j / 4]);
            }
        for (; t < tokens; t++)
            for (int64_t i = 0; i < n4; i++) memcpy(out + (i * tokens + t) * 4, codes + t * stride + 4 * i, 4);
    }
};

}  // namespace
