// The two operations: attention over keys and values, and appending to their cache.
#pragma once
#include "attention_few.h"
#include "attention_many.h"

namespace {

inline int threads_for(const Attention& p) {
    return p.batch * p.heads * p.tokens * p.keys * p.dim < kSerialWork ? 1 : max_threads();
}

inline void attend(const Attention& p) {
    const int64_t rows = p.heads / p.kv_heads * p.tokens;
    const int threads = threads_for(p);
    if (rows <= kFewRows && p.dim % kWidth == 0) {
        if (p.k_scale) return attend_few<FromI8>(p, threads);
        switch (p.dtype) {
            case kF32: return attend_few<FromF32>(p, threads);
            case kBF16: return attend_few<FromBF16>(p, threads);
            default: return attend_few<FromF16>(p, threads);
        }
    }
#if defined(__AVX512BF16__)
    if (p.dtype == kBF16) return attend_many<PairUnits>(p, threads);
#endif
    attend_many<FloatUnits>(p, threads);
}

// One token of one head into its cache row.
inline void append_row(char* cache, float* scale, const char* from, int64_t dim, DType dtype, const float* channel) {
    if (!scale) {
        memcpy(cache, from, dim * element_size(dtype));
        return;
    }
    float values[kMaxDim];
    to_float(values, from, dim, dtype);
    if (channel)
        for (int64_t d = 0; d < dim; d++) values[d] /= channel[d];
    *scale = quantize_token((int8_t*)cache, values, dim);
}

inline void append(const Append& p) {
    const int64_t size = element_size(p.dtype), stored = p.k_scale ? 1 : size;
    const int threads = p.batch * p.kv_heads * p.tokens * p.dim < kSerialWork ? 1 : max_threads();
    parallel(threads, p.batch * p.kv_heads * p.tokens, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const int64_t b = i / p.tokens / p.kv_heads, head = i / p.tokens % p.kv_heads, t = i % p.tokens;
            const int64_t row = (b * p.kv_heads + head) * p.keys + p.start + t;
            append_row((char*)p.k_cache + row * p.dim * stored, p.k_scale ? p.k_scale + row : nullptr,
                       at(p.k, p.k_stride, b, head, t, size), p.dim, p.dtype, p.k_channel ? p.k_channel + head * p.dim : nullptr);
            append_row((char*)p.v_cache + row * p.dim * stored, p.v_scale ? p.v_scale + row : nullptr,
                       at(p.v, p.v_stride, b, head, t, size), p.dim, p.dtype, nullptr);
        }
    });
}

}  // namespace
