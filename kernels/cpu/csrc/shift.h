// Tokens as small floats under one scale, kernels/activations/fp_shift.py: every channel moved by 2^n, rounded, moved back.
#pragma once
#include "driver.h"

namespace {

constexpr int64_t kShiftWork = 1 << 16;  // elements below which waking a second thread costs more than it saves
constexpr float kAbsmaxFloor = 1e-5f;    // an all-zero token gets this absmax, so its scale is never zero

// Positive v with fewer significant bits.
inline float shortened(float v, float half_steps) {
    const float shift = float_of(bits_of(v) & 0x7F800000u) * half_steps;
    return (v + shift) - shift;
}

inline void shift_tokens(const Shift& s) {
    const int64_t bytes = element_size(s.dtype);
    parallel(s.m * s.k < kShiftWork ? 1 : max_threads(), s.m, [&](int64_t begin, int64_t end) {
        static thread_local Scratch buffer;
        float* v = (float*)buffer.at_least(4 * s.k);
        for (int64_t t = begin; t < end; t++) {
            to_float(v, (const char*)s.x + t * s.k * bytes, s.k, s.dtype);
            for (int64_t j = 0; j < s.k; j++) v[j] *= float_of((127u + s.shift[j]) << 23);
            s.scale[t] = 1.0f;
            for (int64_t start = 0; start < s.k; start += s.group) {
                float* part = v + start;
                const float top = s.dynamic ? absmax(part, s.group) : 1.0f;
                float scale = (s.dynamic && top < kAbsmaxFloor ? kAbsmaxFloor : top) * s.step, back = 1.0f;
                if (s.scale_half_steps == 0)
                    s.scale[t] = scale;
                else
                    back = scale = shortened(scale, s.scale_half_steps);
                for (int64_t j = 0; j < s.group; j++)
                    part[j] = round_small(part[j] / scale, s.floor, s.half_steps, s.largest) * back * float_of((127u - s.shift[start + j]) << 23);
            }
            from_float((char*)s.y + t * s.k * bytes, v, s.k, s.dtype);
        }
    });
}

}  // namespace
