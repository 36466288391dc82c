// The nearest entry of a book for each of many short vectors: argmin_c size[c] - <target, C[c]>, kernels/nearest.py.
//
// Targets lie in the lanes, entries are broadcast one after the other from the L1 cache, so scores never reach memory and the
// least one needs no search across lanes. Sums go from the first channel on and nothing is contracted: codes are the same on
// every instruction set. Of equal scores the first entry is taken.
#pragma once
#include "driver.h"
#include "nearest_api.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTargets = 16;
#elif defined(__AVX2__)
constexpr int kTargets = 8;
#else
constexpr int kTargets = 4;
#endif
constexpr int kChains = 2;  // vectors of targets that share a broadcast

typedef float Scores __attribute__((vector_size(4 * kTargets), may_alias));
typedef int32_t Entries __attribute__((vector_size(4 * kTargets)));

// LENGTH: of a vector, 0 where it is known at run time only. x [length, kChains, kTargets] -> codes [kChains * kTargets].
template <int LENGTH>
inline void nearest_of(const Nearest& p, const Scores* x, int32_t* codes) {
    const int length = LENGTH ? LENGTH : p.length;
    const Scores none = {};
    Scores least[kChains];
    Entries found[kChains] = {};
    for (int i = 0; i < kChains; i++) least[i] = none + __builtin_inff();
    const float* entry = p.book;
    for (int c = 0; c < p.entries; c++, entry += length) {
        Scores score[kChains];
        for (int i = 0; i < kChains; i++) score[i] = none + p.size[c];
#pragma GCC unroll 8
        for (int j = 0; j < length; j++)
            for (int i = 0; i < kChains; i++) score[i] -= entry[j] * x[j * kChains + i];
        for (int i = 0; i < kChains; i++) {
            const Entries less = score[i] < least[i];
            least[i] = less ? score[i] : least[i];
            found[i] = less ? (Entries)(found[i] * 0 + c) : found[i];
        }
    }
    memcpy(codes, found, sizeof(found));
}

constexpr int kPanel = kChains * kTargets;

inline void nearest_in_panel(const Nearest& p, const float* x, int32_t* codes) {
    if (p.length == 4) return nearest_of<4>(p, (const Scores*)x, codes);
    if (p.length == 8) return nearest_of<8>(p, (const Scores*)x, codes);
    nearest_of<0>(p, (const Scores*)x, codes);
}

inline void nearest_entries(const Nearest& p) {
    const int threads = p.count * p.entries * p.length < kSerialWork ? 1 : max_threads();
    parallel(threads, ceil_div(p.count, kPanel), [&](int64_t begin, int64_t end) {
        float* x = (float*)scratch().at_least(4 * kPanel * p.length);
        memset(x, 0, 4 * kPanel * p.length);
        int32_t codes[kPanel];
        for (int64_t first = begin * kPanel; first < min64(end * kPanel, p.count); first += kPanel) {
            const int64_t here = min64(kPanel, p.count - first);
            for (int64_t t = 0; t < here; t++)
                for (int j = 0; j < p.length; j++) x[j * kPanel + t] = p.target[(first + t) * p.length + j];
            nearest_in_panel(p, x, codes);
            for (int64_t t = 0; t < here; t++) p.codes[first + t] = (uint8_t)codes[t];
        }
    });
}

// out [kPanel] += v * m.
inline void add_times(float* out, const float* v, float m) {
    for (int t = 0; t < kPanel; t++) out[t] += v[t] * m;
}

// Tile by tile of some channels, a panel of rows in the lanes: see kernels/nearest.py for what is computed.
inline void sweep_tiles(const Sweep& p) {
    const int length = p.length, books = p.books;
    const int64_t width = p.tiles * length, stored = p.tiles * books;
    const int threads = p.rows * stored * p.entries * length < kSerialWork ? 1 : max_threads();
    parallel(threads, ceil_div(p.rows, kPanel), [&](int64_t begin, int64_t end) {
        float* slope = (float*)scratch().at_least(4 * kPanel * (2 * width + 3 * length));  // [width, kPanel]
        float *moved = slope + width * kPanel, *x = moved + width * kPanel;                 // [width, kPanel], [length, kPanel]
        float *old = x + length * kPanel, *step = old + length * kPanel;                    // [length, kPanel]
        int32_t codes[kPanel];
        for (int64_t first = begin * kPanel; first < min64(end * kPanel, p.rows); first += kPanel) {
            const int64_t here = min64(kPanel, p.rows - first);
            memset(slope, 0, 8 * kPanel * width);
            memset(old, 0, 4 * kPanel * length);
            for (int64_t r = 0; r < here; r++)
                for (int64_t j = 0; j < width; j++) slope[j * kPanel + r] = p.slope[(first + r) * width + j];
            for (int64_t tile = 0; tile < p.tiles; tile++)
                for (int b = 0; b < books; b++) {
                    const int64_t at = tile * length;
                    const float *book = p.book + b * p.entries * length, *size = p.size + (tile * books + b) * p.entries;
                    const float* block = p.block + at * width;
                    uint8_t* code = p.codes + first * stored + tile * books + b;
                    for (int64_t r = 0; r < here; r++)
                        for (int i = 0; i < length; i++) old[i * kPanel + r] = book[code[r * stored] * length + i];
                    memcpy(x, slope + at * kPanel, 4 * kPanel * length);
                    for (int j = 0; j < length; j++)
                        for (int i = 0; i < length; i++) add_times(x + j * kPanel, old + i * kPanel, block[i * width + at + j]);
                    nearest_in_panel({nullptr, book, size, nullptr, kPanel, p.entries, length}, x, codes);
                    memset(step, 0, 4 * kPanel * length);
                    for (int64_t r = 0; r < here; r++) {
                        code[r * stored] = (uint8_t)codes[r];
                        for (int i = 0; i < length; i++) step[i * kPanel + r] = book[codes[r] * length + i] - old[i * kPanel + r];
                    }
                    for (int i = 0; i < length; i++) add_times(moved + (at + i) * kPanel, step + i * kPanel, 1.0f);
                    for (int64_t j = at; j < width; j++)  // channels before this tile are not looked at again
                        for (int i = 0; i < length; i++) add_times(slope + j * kPanel, step + i * kPanel, -block[i * width + j]);
                }
            for (int64_t r = 0; r < here; r++)
                for (int64_t j = 0; j < width; j++) p.moved[(first + r) * width + j] = moved[j * kPanel + r];
        }
    });
}

}  // namespace
