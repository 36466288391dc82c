// Levels for a block of channels, one after the other: the inner loops of GPTQ and of coordinate descent.
//
// Rows of the weight lie in the lanes and never meet, so a panel of them goes through all channels of the block with what is
// still to be moved in the L1 cache. Nothing is contracted: levels are the same on every instruction set.
#pragma once
#include "driver.h"
#include "rounding_api.h"

namespace {

constexpr int kRowsAtOnce = 32;
constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, half to even
constexpr float kFar = 1048576.0f;     // beyond every level

typedef float Row[kRowsAtOnce];

inline float clamped(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

struct Affine {
    static float nearest(float u, float zero, const float* numbers) {
        const float whole = (clamped(u, -kFar, kFar) + kWhole) - kWhole;
        return clamped(whole + zero, 0.0f, numbers[0]) - zero;
    }
};

struct Float {  // numbers: floor, half_steps, largest
    static float nearest(float u, float, const float* numbers) {
        const float size = round_small(u, numbers[0], numbers[1], numbers[2]);
        return float_of((bits_of(size) & 0x7FFFFFFFu) | (bits_of(u) & 0x80000000u));  // codes know a zero's sign
    }
};

struct TwoBits {
    static float nearest(float u, float r, const float*) {
        const float first = u >= (1.0f + r) / 2 ? 1.0f : 0.0f;
        return first + ((u - first) * r > r * r / 2 ? r : 0.0f);
    }
};

inline void take(Row* panel, const float* from, const Channels& p, int64_t first, int64_t here) {
    for (int j = 0; j < p.channels; j++)
        for (int64_t r = 0; r < here; r++) panel[j][r] = from[j * p.rows + first + r];
}

inline void give(float* to, const Row* panel, const Channels& p, int64_t first, int64_t here) {
    for (int j = 0; j < p.channels; j++)
        for (int64_t r = 0; r < here; r++) to[j * p.rows + first + r] = panel[j][r];
}

// panel[i] += sign * by[i] * moved for the channels behind j.
inline void push(Row* panel, const float* by, float sign, const float* moved, int j, int channels) {
    for (int i = j + 1; i < channels; i++) {
        const float factor = sign * by[i];
        for (int r = 0; r < kRowsAtOnce; r++) panel[i][r] += factor * moved[r];
    }
}

template <class Kind, bool DESCEND>
inline void run_panels(const Channels& p) {
    const int threads = p.rows * p.channels * p.channels / 2 < kSerialWork ? 1 : max_threads();
    parallel(threads, ceil_div(p.rows, kRowsAtOnce), [&](int64_t begin, int64_t end) {
        const size_t bytes = sizeof(Row) * p.channels;
        char* memory = scratch().at_least(6 * bytes);
        Row *x = (Row*)memory, *level = (Row*)(memory + bytes), *step = (Row*)(memory + 2 * bytes);
        Row *reach = (Row*)(memory + 3 * bytes), *table = (Row*)(memory + 4 * bytes), *moved = (Row*)(memory + 5 * bytes);
        for (int64_t first = begin * kRowsAtOnce; first < min64(end * kRowsAtOnce, p.rows); first += kRowsAtOnce) {
            const int64_t here = min64(kRowsAtOnce, p.rows - first);
            if (here < kRowsAtOnce)
                for (size_t i = 0; i < 6 * bytes / 4; i++) ((float*)memory)[i] = 1.0f;  // lanes that no row is in
            take(x, p.start, p, first, here);
            take(step, p.step, p, first, here);
            if (p.kind != kFloat) take(table, p.table, p, first, here);
            if (DESCEND) {
                take(level, p.level, p, first, here);
                take(reach, p.reach, p, first, here);
            }
            for (int j = 0; j < p.channels; j++) {
                const float *by = p.factor + (int64_t)j * p.channels, own = by[j];
                for (int r = 0; r < kRowsAtOnce; r++) {
                    const float u = DESCEND ? x[j][r] * reach[j][r] + level[j][r] : x[j][r] / step[j][r];
                    const float best = Kind::nearest(u, table[j][r], p.numbers);
                    moved[j][r] = DESCEND ? (level[j][r] - best) * step[j][r] : (x[j][r] - best * step[j][r]) / own;
                    level[j][r] = best;
                }
                push(x, by, DESCEND ? 1.0f : -1.0f, moved[j], j, p.channels);
            }
            give(p.level, level, p, first, here);
            give(p.moved, moved, p, first, here);
        }
    });
}

template <bool DESCEND>
inline void run_channels(const Channels& p) {
    if (p.kind == kAffine) return run_panels<Affine, DESCEND>(p);
    if (p.kind == kFloat) return run_panels<Float, DESCEND>(p);
    run_panels<TwoBits, DESCEND>(p);
}

}  // namespace
