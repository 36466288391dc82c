// Conversions between stored floats and float32, and the sums and maxima that a compiler can vectorize.
//
// Everything here sits in an anonymous namespace: the same header is compiled for several instruction sets, and a
// linker that merged two copies would hand AVX-512 code to a machine without it. For the same reason no standard
// library template is used in headers.
#pragma once
#include <cstring>

#include "lowbit.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;  // independent partial results: lets strict floating point be vectorized

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t element_size(DType dtype) { return dtype == kF32 ? 4 : 2; }

inline uint32_t bits_of(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float v;
    memcpy(&v, &u, 4);
    return v;
}

// Round to nearest even; a NaN stays a NaN.
inline uint16_t bf16_of(float v) {
    uint32_t u = bits_of(v);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    return (uint16_t)((u & 0x7FFFFFFFu) > 0x7F800000u ? (u >> 16) | 0x40u : rounded);
}

// v rounded to a small float, as round_to in kernels/minifloat.py but for the sign of zero: adding half_steps binades and taking
// them off leaves the mantissa bits there are.
inline float round_small(float v, float floor, float half_steps, float largest) {
    v = v > largest ? largest : v;
    v = v < -largest ? -largest : v;
    const float binade = float_of(bits_of(v) & 0x7F800000u);
    const float shift = (binade > floor ? binade : floor) * half_steps;
    const float signed_shift = float_of(bits_of(shift) | (bits_of(v) & 0x80000000u));
    return (v + signed_shift) - signed_shift;
}

// float16 bits -> float32: shift into place and let a multiplication by 2^112 fix the exponent, subnormals included.
inline float float_of_half(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7FFFu) << 13;
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    if (magnitude >= 0x0F800000u) return float_of(sign | magnitude | 0x7F800000u);
    return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

// float32 -> float16 bits, round to nearest even. Adding a power of two lets the adder do subnormal rounding.
inline uint16_t half_of(float v) {
    uint32_t u = bits_of(v), sign = (u >> 16) & 0x8000u;
    u &= 0x7FFFFFFFu;
    if (u > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (u >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);
    if (u < 0x38800000u) return (uint16_t)(sign | (bits_of(float_of(u) + 0.5f) - 0x3F000000u));
    u += 0xFFFu + ((u >> 13) & 1u);
    return (uint16_t)(sign | ((u - 0x38000000u) >> 13));
}

// n values of dtype -> float32.
inline void to_float(float* out, const void* in, int64_t n, DType dtype) {
    if (dtype == kF32) {
        memcpy(out, in, n * 4);
        return;
    }
    const uint16_t* h = (const uint16_t*)in;
    int64_t i = 0;
    if (dtype == kBF16) {
        for (; i < n; i++) out[i] = float_of((uint32_t)h[i] << 16);
        return;
    }
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(h + i))));
#endif
    for (; i < n; i++) out[i] = float_of_half(h[i]);
}

// n float32 values -> dtype.
inline void from_float(void* out, const float* in, int64_t n, DType dtype) {
    if (dtype == kF32) {
        memcpy(out, in, n * 4);
        return;
    }
    uint16_t* h = (uint16_t*)out;
    int64_t i = 0;
    if (dtype == kBF16) {
        for (; i < n; i++) h[i] = bf16_of(in[i]);
        return;
    }
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i*)(h + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) h[i] = half_of(in[i]);
}

// max |v|, or a NaN if there is one: ordered as integers, every NaN is above every number.
inline float absmax(const float* v, int64_t n) {
    int32_t lane[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; l++) {
            int32_t b = (int32_t)(bits_of(v[i + l]) & 0x7FFFFFFFu);
            lane[l] = b > lane[l] ? b : lane[l];
        }
    int32_t top = 0;
    for (; i < n; i++) {
        int32_t b = (int32_t)(bits_of(v[i]) & 0x7FFFFFFFu);
        top = b > top ? b : top;
    }
    for (int l = 0; l < kLanes; l++) top = lane[l] > top ? lane[l] : top;
    return float_of((uint32_t)top);
}

inline float sum_float(const float* v, int64_t n) {
    float lane[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; l++) lane[l] += v[i + l];
    float total = 0;
    for (; i < n; i++) total += v[i];
    for (int l = 0; l < kLanes; l++) total += lane[l];
    return total;
}

inline int32_t sum_int8(const int8_t* v, int64_t n) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; i++) total += v[i];
    return total;
}

// One token to integers as kernels/activations/int_token.py says, bit for bit: scale = max(absmax, 1e-5) / reach, code =
// rint(v / scale), at most top, by multiplication with 1 / scale. Adding 1.5 * 2^23 rounds half to even in the adder.
inline float quantize_token(int8_t* codes, const float* v, int64_t n, int top = 127, float reach = 127.0f) {
    const float most = absmax(v, n), magic = 12582912.0f;
    const float scale = (most < 1e-5f ? 1e-5f : most) / reach;
    const float inverse = 1.0f / scale;
    for (int64_t i = 0; i < n; i++) {
        int32_t q = (int32_t)(bits_of(v[i] * inverse + magic) - bits_of(magic));
        q = q > top ? top : q;
        codes[i] = (int8_t)(q < -top ? -top : q);
    }
    return scale;
}

}  // namespace
