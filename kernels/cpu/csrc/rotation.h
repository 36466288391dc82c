// Block Hadamard rotation of tokens, kernels/rotation.py, in float32.
//
// Every stage takes neighbours to their sum in the lower half and their difference in the upper half. log2(size) times
// the same stage is the Hadamard transform in natural order, and each of its loops is one that compilers vectorize.
#pragma once
#include "driver.h"

namespace {

constexpr int64_t kRotateWork = 1 << 16;  // elements below which waking a second thread costs more than it saves

inline void rotate_block(float* a, float* b, int64_t size, float scale) {
    const int64_t half = size / 2;
    for (int64_t reach = 1; reach < size; reach *= 2) {
        for (int64_t i = 0; i < half; i++) {
            const float left = a[2 * i], right = a[2 * i + 1];
            b[i] = left + right;
            b[half + i] = left - right;
        }
        float* swap = a;
        a = b;
        b = swap;
    }
    for (int64_t i = 0; i < size; i++) a[i] *= scale;
}

inline void rotate_tokens(const Rotation& r) {
    const int64_t bytes = element_size(r.dtype), blocks = r.m * (r.k / r.size);
    int stages = 0;
    while (int64_t(1) << stages < r.size) stages++;
    parallel(blocks * r.size < kRotateWork ? 1 : max_threads(), blocks, [&](int64_t begin, int64_t end) {
        static thread_local Scratch buffer;
        float* a = (float*)buffer.at_least(8 * r.size);
        float* b = a + r.size;
        for (int64_t at = begin * r.size; at < end * r.size; at += r.size) {
            to_float(a, (const char*)r.x + at * bytes, r.size, r.dtype);
            rotate_block(a, b, r.size, r.scale);
            from_float((char*)r.y + at * bytes, stages % 2 ? b : a, r.size, r.dtype);
        }
    });
}

}  // namespace
