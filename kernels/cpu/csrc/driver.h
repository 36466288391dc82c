// From a call to blocks: tokens are gathered into panels, threads share out the blocks, results are scaled and stored.
//
// A panel is a few tokens interleaved so that the inner loop broadcasts from one contiguous stream. There are two ways
// through a kernel. Few tokens: codes are unpacked in registers, used, and forgotten. Many tokens: a slice of one
// block's codes is unpacked once into a buffer that stays in the L1 cache, and used by all panels of a token block.
//
// A kernel class K supplies
//   Acc                                  int32_t or float
//   kInteger                             whether a panel has token scales
//   kWidth                               tokens of a panel on the second way; 0 where there is none
//   kPairs                               whether one token takes two blocks at a time
//   panel_bytes(p, many)                 bytes of one token in a panel of either way
//   gather(p, row, t, panel)             converts token t of the panel
//   few<MT, B>(p, block, panel, out)     out [B, MT, 32], complete results of B neighbouring blocks
//   many(p, block, panels, count, out)   out [count * kWidth, 32], complete results
#pragma once
#include <cstdlib>

#include "numeric.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int kTokenBlock = 192;  // tokens that share one unpacked slice: a multiple of every kWidth
constexpr int64_t kChunk = 1536;  // tokens gathered at a time; bounds the scratch memory
constexpr int64_t kSerialWork = 200000;  // multiplications below which waking a second thread costs more than it saves

template <class Acc>
struct Panel {
    char* data;    // K::panel_bytes * tokens, interleaved
    float* scale;  // [tokens] of activations, integer kernels only
    Acc* sums;     // [tokens, groups] sum of the (quantized) token over each group
    int tokens;
    bool many;     // on the way for many tokens
};

// One growing buffer per calling thread, so that a decoding loop never allocates.
struct Scratch {
    char* data = nullptr;
    size_t size = 0;
    ~Scratch() { free(data); }
    char* at_least(size_t bytes) {
        if (bytes > size) {
            free(data);
            size = (bytes + 4095) / 4096 * 4096;
            data = (char*)aligned_alloc(64, size);
            if (!data) abort();
        }
        return data;
    }
};

inline Scratch& scratch() {
    static thread_local Scratch s;
    return s;
}

inline int max_threads() {
#if defined(_OPENMP)
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

// body(begin, end) over [0, count), cut into one contiguous range per thread.
template <class Body>
inline void parallel(int threads, int64_t count, const Body& body) {
    if (threads > count) threads = (int)count;
    if (threads <= 1) {
        body(0, count);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    {
        int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
        body(count * id / team, count * (id + 1) / team);
    }
#endif
}

// out [tokens, 32] -> y: y = out * row_scale * token_scale + bias, converted to the dtype of y.
template <class K>
inline void store(const Problem& p, int64_t block, int64_t first, int64_t tokens, const typename K::Acc* out,
                  const float* token_scale) {
    const Output* to = p.outputs;
    int64_t n0 = block * kRows;
    for (; n0 >= to->n; to++) n0 -= round_up(to->n, kRows);
    const int64_t valid = min64(kRows, to->n - n0), size = element_size(p.dtype);
    alignas(64) float scale[kRows] = {}, bias[kRows] = {}, row[kRows];
    for (int64_t r = 0; r < valid; r++) scale[r] = p.row_scale ? p.row_scale[block * kRows + r] : 1.0f;
    if (to->bias) to_float(bias, (const char*)to->bias + n0 * element_size((DType)to->bias_dtype), valid, (DType)to->bias_dtype);
    char* y = (char*)to->y + (first * to->n + n0) * size;
    for (int64_t t = 0; t < tokens; t++, y += to->n * size) {
        const float s = token_scale ? token_scale[t] : 1.0f;
        for (int r = 0; r < kRows; r++) row[r] = (float)out[t * kRows + r] * scale[r] * s + bias[r];
        if (valid == kRows)
            from_float(y, row, kRows, p.dtype);
        else
            from_float(y, row, valid, p.dtype);
    }
}

template <class K, int MT = kFew>
inline void few_dispatch(const Problem& p, int64_t block, const Panel<typename K::Acc>& panel, typename K::Acc* out) {
    if (panel.tokens == MT) return K::template few<MT, 1>(p, block, panel, out);
    if constexpr (MT > 1) few_dispatch<K, MT - 1>(p, block, panel, out);
}

// Tokens [first, first + m) of the call.
template <class K>
inline void run_chunk(const Problem& p, int64_t first, int64_t m, int threads) {
    using Acc = typename K::Acc;
    const bool many = K::kWidth > 0 && p.m > kFew;  // a remainder of a chunk goes the way of the others
    const int width = many ? K::kWidth : kFew;
    const int64_t count = ceil_div(m, width), groups = p.k / p.group, blocks = p.blocks;
    const int64_t token_bytes = round_up(K::panel_bytes(p, many), 64);
    const size_t data_bytes = token_bytes * count * width, sums_bytes = round_up(4 * groups * m, 64);
    char* memory = scratch().at_least(data_bytes + sums_bytes + round_up(4 * m, 64));
    Acc* sums = (Acc*)(memory + data_bytes);
    float* scales = (float*)(memory + data_bytes + sums_bytes);
    auto panel_at = [=](int64_t i) {
        const int64_t t = i * width;
        return Panel<Acc>{memory + t * token_bytes, scales + t, sums + t * groups, (int)min64(width, m - t), many};
    };
    // Scales of the tokens from t of this chunk on: those that gathering found, or those that came with the call, if any.
    auto scale_at = [&](int64_t t, const float* found) -> const float* {
        if (K::kInteger) return found;
        return p.token_scale ? p.token_scale + first + t : nullptr;
    };

    parallel(count < 2 * threads ? 1 : threads, count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const Panel<Acc> panel = panel_at(i);
            for (int t = 0; t < panel.tokens; t++)
                K::gather(p, (const char*)p.x + (first + i * width + t) * p.k * element_size(p.dtype), t, panel);
        }
    });

    if constexpr (K::kPairs)
        if (m == 1) {  // two streams of weights, and half the reading of the panel
            parallel(threads, ceil_div(blocks, 2), [&](int64_t begin, int64_t end) {
                alignas(64) Acc out[2 * kRows];
                const Panel<Acc> panel = panel_at(0);
                for (int64_t block = 2 * begin; block < min64(2 * end, blocks); block += 2) {
                    const int here = block + 1 < blocks ? 2 : 1;
                    here == 2 ? K::template few<1, 2>(p, block, panel, out) : K::template few<1, 1>(p, block, panel, out);
                    for (int b = 0; b < here; b++)
                        store<K>(p, block + b, first, 1, out + b * kRows, scale_at(0, panel.scale));
                }
            });
            return;
        }
    if (!many) {
        parallel(threads, blocks, [&](int64_t begin, int64_t end) {
            alignas(64) Acc out[kFew * kRows];
            for (int64_t block = begin; block < end; block++)
                for (int64_t i = 0; i < count; i++) {
                    const Panel<Acc> panel = panel_at(i);
                    few_dispatch<K>(p, block, panel, out);
                    store<K>(p, block, first + i * width, panel.tokens, out, scale_at(i * width, panel.scale));
                }
        });
        return;
    }
    if constexpr (K::kWidth > 0) {
        int64_t panels = kTokenBlock / K::kWidth;
        while (panels > 1 && ceil_div(count, panels) * blocks < 4 * threads) panels /= 2;
        const int64_t token_blocks = ceil_div(count, panels);
        parallel(threads, token_blocks * blocks, [&](int64_t begin, int64_t end) {
            alignas(64) Acc out[kTokenBlock * kRows];
            Panel<Acc> list[kTokenBlock / K::kWidth];
            for (int64_t task = begin; task < end; task++) {
                const int64_t block = task % blocks, i0 = task / blocks * panels;
                const int64_t here = min64(panels, count - i0), t0 = i0 * K::kWidth;
                for (int64_t i = 0; i < here; i++) list[i] = panel_at(i0 + i);
                K::many(p, block, list, (int)here, out);
                store<K>(p, block, first + t0, min64(here * K::kWidth, m - t0), out, scale_at(t0, scales + t0));
            }
        });
    }
}

template <class K>
inline void run(const Problem& p) {
    const int threads = p.m * p.blocks * kRows * p.k < kSerialWork ? 1 : max_threads();
    for (int64_t first = 0; first < p.m; first += kChunk) run_chunk<K>(p, first, min64(kChunk, p.m - first), threads);
}

// Shared by the integer kernels: int8 tokens, four values of one token side by side, [K/4, tokens, 4].
struct IntegerPanels {
    using Acc = int32_t;
    static constexpr bool kInteger = true;
    static int64_t padded(const Problem& p) { return round_up(p.k, 8); }
    static int64_t panel_bytes(const Problem& p, bool) { return padded(p); }

    // One token: codes [K], zeros up to `to`, with its scale and the sum of each group.
    static void quantize(const Problem& p, const char* row, int8_t* codes, int64_t to, int t, const Panel<Acc>& panel) {
        static thread_local Scratch buffer;
        const int64_t k = p.k, groups = k / p.group;
        const float* values = (const float*)row;
        if (p.dtype != kF32) {
            float* converted = (float*)buffer.at_least(k * 4);
            to_float(converted, row, k, p.dtype);
            values = converted;
        }
        panel.scale[t] = quantize_token(codes, values, k, p.top, p.reach);
        memset(codes + k, 0, to - k);
        for (int64_t g = 0; g < groups; g++) panel.sums[t * groups + g] = sum_int8(codes + g * p.group, p.group);
    }

    static void gather(const Problem& p, const char* row, int t, const Panel<Acc>& panel) {
        static thread_local Scratch buffer;
        const int64_t kp = padded(p);
        if (panel.tokens == 1) return quantize(p, row, (int8_t*)panel.data, kp, t, panel);
        int8_t* codes = (int8_t*)buffer.at_least(kp);
        quantize(p, row, codes, kp, t, panel);
        int32_t* out = (int32_t*)panel.data + t;
        for (int64_t i = 0; i < kp / 4; i++) memcpy(out + i * panel.tokens, codes + 4 * i, 4);
    }
};

}  // namespace
