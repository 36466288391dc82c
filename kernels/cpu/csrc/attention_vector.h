// The widest vector of float32 that a translation unit was compiled for, and exp2 on it.
#pragma once
#include "attention.h"
#include "driver.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
using Vec = __m512;
#elif defined(__AVX2__)
using Vec = __m256;
#else
typedef float Vec __attribute__((vector_size(16)));
#endif
constexpr int kWidth = sizeof(Vec) / 4;
typedef int32_t IntVec __attribute__((vector_size(sizeof(Vec))));

inline Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void store_vec(float* p, Vec v) { memcpy(p, &v, sizeof v); }

// The float at any address in every lane; a pair of bfloat16 travels the same way.
inline Vec spread(const void* p) {
    float f;
    memcpy(&f, p, 4);
#if defined(__AVX512F__)
    return _mm512_set1_ps(f);
#elif defined(__AVX2__)
    return _mm256_set1_ps(f);
#else
    return Vec{f, f, f, f};
#endif
}
inline Vec spread(float f) { return spread(&f); }

inline Vec fused(Vec a, Vec b, Vec c) {  // a * b + c
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// The larger; b where either is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline float sum_lanes(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float lane[kWidth], total = 0;
    store_vec(lane, v);
    for (int i = 0; i < kWidth; i++) total += lane[i];
    return total;
#endif
}

inline float max_lanes(Vec v) {
    float lane[kWidth];
    store_vec(lane, v);
    float top = lane[0];
    for (int i = 1; i < kWidth; i++) top = lane[i] > top ? lane[i] : top;
    return top;
}

// 2^x for x <= 0 with a relative error below 2.5e-7; NaN for NaN, and 0 where the result would be subnormal, which
// processors multiply slowly. Write x = n + f with n whole; a polynomial of degree 5, the minimax of the relative error (7.5e-8), gives 2^f.
inline Vec exp2_of(Vec x) {
#if defined(__AVX512DQ__)
    const Vec f = _mm512_reduce_ps(x, 1);  // x - floor(x); 0 for -inf
    Vec y = spread(0x1.ec320ap-10f);
    y = fused(y, f, spread(0x1.26900cp-7f));
    y = fused(y, f, spread(0x1.c95446p-5f));
    y = fused(y, f, spread(0x1.ebd5a8p-3f));
    y = fused(y, f, spread(0x1.62e4f6p-1f));
    y = fused(y, f, spread(0x1.fffffep-1f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, spread(-126.0f), _CMP_NLT_UQ), y, x);  // times 2^floor(x)
#else
    const Vec lowest = spread(-126.0f), magic = spread(12582912.0f);  // adding 1.5 * 2^23 rounds to a whole number
    const Vec kept = larger(lowest, x), shifted = kept + magic, f = kept - (shifted - magic);
    Vec y = spread(0x1.5c08e6p-10f);
    y = fused(y, f, spread(0x1.3d0c52p-7f));
    y = fused(y, f, spread(0x1.c6b6e4p-5f));
    y = fused(y, f, spread(0x1.ebf918p-3f));
    y = fused(y, f, spread(0x1.62e428p-1f));
    y = fused(y, f, spread(0x1.000002p+0f));
    const IntVec power = ((IntVec)shifted << 23) + (127 << 23);  // the low bits of `shifted` are n
    return x < lowest ? Vec{} : y * (Vec)power;
#endif
}

// to [columns, rows] = from [rows, columns] transposed. Rows and columns beyond whole blocks go one by one.
inline void transpose(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t columns) {
    int64_t whole_rows = 0, whole_columns = 0;
#if defined(__AVX512F__)
    whole_rows = rows / 16 * 16, whole_columns = columns / 16 * 16;
    for (int64_t r = 0; r < whole_rows; r += 16)
        for (int64_t c = 0; c < whole_columns; c += 16) {
            __m512 a[16], b[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from + (r + i) * from_row + c);
#pragma GCC unroll 8
            for (int i = 0; i < 16; i += 2) {
                b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {  // a[i + c] holds column c of each quarter, of rows i to i + 3
                    const __m512d x = _mm512_castps_pd(b[i + j]), y = _mm512_castps_pd(b[i + j + 2]);
                    a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
                    a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
                }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m512 low = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD);
                const __m512 high = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
                const __m512 last = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xDD);
                float* out = to + (c + i) * to_row + r;
                _mm512_storeu_ps(out, _mm512_shuffle_f32x4(low, high, 0x88));
                _mm512_storeu_ps(out + 4 * to_row, _mm512_shuffle_f32x4(odd, last, 0x88));
                _mm512_storeu_ps(out + 8 * to_row, _mm512_shuffle_f32x4(low, high, 0xDD));
                _mm512_storeu_ps(out + 12 * to_row, _mm512_shuffle_f32x4(odd, last, 0xDD));
            }
        }
#endif
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; c++) to[c * to_row + r] = from[r * from_row + c];
}

// A vector of consecutive values in another dtype.
struct FromF32 {
    static constexpr int64_t kBytes = 4;
    static Vec load_at(const void* p) { return load((const float*)p); }
};

struct FromBF16 {
    static constexpr int64_t kBytes = 2;
    static Vec load_at(const void* p) {
#if defined(__AVX512F__)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
#elif defined(__AVX2__)
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
#else
        float lane[kWidth];
        to_float(lane, p, kWidth, kBF16);
        return load(lane);
#endif
    }
};

struct FromF16 {
    static constexpr int64_t kBytes = 2;
    static Vec load_at(const void* p) {
#if defined(__AVX512F__)
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
        float lane[kWidth];
        to_float(lane, p, kWidth, kF16);
        return load(lane);
#endif
    }
};

struct FromI8 {
    static constexpr int64_t kBytes = 1;
    static Vec load_at(const void* p) {
#if defined(__AVX512F__)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
        const int8_t* c = (const int8_t*)p;
        return Vec{(float)c[0], (float)c[1], (float)c[2], (float)c[3]};
#endif
    }
};

// Keys that query t sees, counted from `first`.
inline int64_t visible(const Attention& p, int64_t first, int64_t t) {
    const int64_t end = p.start < 0 ? p.keys : min64(p.keys, p.start + t + 1);
    return end > first ? end - first : 0;
}
inline int64_t first_of(const Attention& p, int64_t b) { return p.first ? p.first[b] : 0; }

inline const char* at(const void* base, const Strides& s, int64_t b, int64_t head, int64_t token, int64_t size) {
    return (const char*)base + (b * s.batch + head * s.head + token * s.token) * size;
}

// The row's place in y.
inline char* output_of(const Attention& p, int64_t b, int64_t head, int64_t t) {
    return (char*)p.y + ((b * p.tokens + t) * p.heads + head) * p.dim * element_size(p.dtype);
}

}  // namespace
