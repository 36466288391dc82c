// Norms and activations, one row or one stretch of values at a time.
//
// Eager layers and compiled graphs both call these, so both round alike. The code is the same plain C++ for every
// instruction set: sums run in 16 strict lanes and nothing is contracted, so the bits are the same on every machine too.
#pragma once
#include "driver.h"
#include "pointwise_api.h"

namespace {

constexpr int64_t kStretch = 1024;  // values converted at a time

inline float root(float v) { return __builtin_sqrtf(v); }

// e^x with a relative error below 1.2e-7; 3e38 above 88, 1e-38 below -87, NaN for NaN.
inline float exp_of(float x) {
    const float kept = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x, magic = 12582912.0f;
    const float shifted = kept * 1.44269504f + magic, n = shifted - magic;  // adding 1.5 * 2^23 rounds to a whole number
    const float f = ((kept - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f) * 1.44269504f;  // ln 2 in two parts: the first product is exact
    float y = 0x1.41d332p-13f;  // 2^f on [-1/2, 1/2]
    y = y * f + 0x1.5f456ap-10f;
    y = y * f + 0x1.3b2dbcp-7f;
    y = y * f + 0x1.c6aed4p-5f;
    y = y * f + 0x1.ebfbdap-3f;
    y = y * f + 0x1.62e430p-1f;
    y = y * f + 1.0f;
    return y * float_of((bits_of(shifted) << 23) + (127u << 23));
}

// The error function within 3 units of the last place: x P(x^2) below 1, else 1 - e^(-x Q(x)); minimax polynomials.
inline float erf_of(float x) {
    const float a = float_of(bits_of(x) & 0x7FFFFFFFu), top = a > 4.0f ? 4.0f : a, t = x * x;
    float p = 0x1.496a2ep-14f;
    p = p * t - 0x1.a3f6fep-11f;
    p = p * t + 0x1.5405b2p-8f;
    p = p * t - 0x1.b7f90cp-6f;
    p = p * t + 0x1.ce2cf8p-4f;
    p = p * t - 0x1.81273ep-2f;
    p = p * t + 0x1.20dd74p+0f;
    float q = 0x1.d47f86p-17f;
    q = q * top - 0x1.6f9f0ap-12f;
    q = q * top + 0x1.ec7fdap-9f;
    q = q * top - 0x1.89617ep-6f;
    q = q * top + 0x1.b459b2p-4f;
    q = q * top + 0x1.451abap-1f;
    q = q * top + 0x1.20f21cp+0f;
    const float far = 1.0f - exp_of(-top * q);
    return a < 1.0f ? x * p : x < 0 ? -far : far;
}

inline float silu_of(float x) { return x / (1.0f + exp_of(-x)); }
inline float gelu_of(float x) { return 0.5f * x * (1.0f + erf_of(x * 0.70710678f)); }

inline int pointwise_threads(int64_t values) { return values * 8 < kSerialWork ? 1 : max_threads(); }

// What a value becomes by being stored.
inline void round_to(float* v, int64_t n, DType dtype) {
    if (dtype == kF32) return;
    uint16_t stored[kStretch];
    for (int64_t i = 0; i < n; i += kStretch) {
        const int64_t here = min64(kStretch, n - i);
        from_float(stored, v + i, here, dtype);
        to_float(v + i, stored, here, dtype);
    }
}

inline float sum_squares(const float* v, int64_t n, float center) {
    float lane[kLanes] = {}, total = 0;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; l++) lane[l] += (v[i + l] - center) * (v[i + l] - center);
    for (; i < n; i++) total += (v[i] - center) * (v[i] - center);
    for (int l = 0; l < kLanes; l++) total += lane[l];
    return total;
}

inline void norm(const Norm& p) {
    const int64_t size = element_size(p.dtype), k = p.k;
    parallel(p.m > 1 ? pointwise_threads(p.m * k) : 1, p.m, [&](int64_t begin, int64_t end) {
        float* row = (float*)scratch().at_least(3 * k * sizeof(float));
        float *weight = row + k, *bias = weight + k;
        to_float(weight, p.weight, k, p.dtype);
        if (p.bias) to_float(bias, p.bias, k, p.dtype);
        for (int64_t t = begin; t < end; t++) {
            to_float(row, (const char*)p.x + t * k * size, k, p.dtype);
            const float center = p.centered ? sum_float(row, k) / (float)k : 0.0f;
            const float scale = 1.0f / root(sum_squares(row, k, center) / (float)k + p.eps);
            for (int64_t i = 0; i < k; i++) row[i] = (row[i] - center) * scale;
            if (!p.centered) round_to(row, k, p.dtype);  // transformers multiplies by the weight in x's dtype
            for (int64_t i = 0; i < k; i++) row[i] *= weight[i];
            if (p.bias)
                for (int64_t i = 0; i < k; i++) row[i] += bias[i];
            from_float((char*)p.y + t * k * size, row, k, p.dtype);
        }
    });
}

inline void activate(const Activation& p) {
    const int64_t size = element_size(p.dtype);
    parallel(pointwise_threads(p.count), ceil_div(p.count, kStretch), [&](int64_t begin, int64_t end) {
        float v[kStretch], by[kStretch];
        for (int64_t i = begin * kStretch; i < min64(end * kStretch, p.count); i += kStretch) {
            const int64_t here = min64(kStretch, p.count - i);
            to_float(v, (const char*)p.x + i * size, here, p.dtype);
            if (p.kind == kSilu)
                for (int64_t j = 0; j < here; j++) v[j] = silu_of(v[j]);
            else
                for (int64_t j = 0; j < here; j++) v[j] = gelu_of(v[j]);
            if (p.by) {
                round_to(v, here, p.dtype);  // as a layer of its own would
                to_float(by, (const char*)p.by + i * size, here, p.dtype);
                for (int64_t j = 0; j < here; j++) v[j] *= by[j];
            }
            from_float((char*)p.y + i * size, v, here, p.dtype);
        }
    });
}

}  // namespace
