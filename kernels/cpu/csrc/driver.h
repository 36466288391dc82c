// From a call to blocks: tokens are gathered into panels, threads share out the blocks, results are scaled and stored.
//
// A panel is a few tokens interleaved so that the inner loop broadcasts from one contiguous stream. There are two ways
// through a kernel. Few tokens: codes are unpacked in registers, used, and forgotten. Many tokens: a slice of one
// block's codes is unpacked once into a buffer that stays in the L1 cache, and used by all panels of a token block.
//
// A kernel class K supplies
//   Acc                                  int32_t or float
//   kHasMany                             whether the second way exists
//   padded(p)                            K as stored
//   panel_bytes(p)                       bytes of one token in a panel
//   gather(p, row, t, panel)             converts token t of the panel
//   few<MT>(p, block, panel, out)        out [MT, 32], complete results
//   many(p, block, panels, count, out)   out [tokens, 32], complete results
#pragma once
#include <cstdlib>

#include "numeric.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

constexpr int kFew = 4;             // tokens per panel on the way for few tokens
constexpr int kMany = 12;           // and on the way for many: 12 x 2 accumulators fill the register file
constexpr int kTokenBlock = 192;    // tokens that share one unpacked slice
constexpr int64_t kChunk = 1536;    // tokens gathered at a time; bounds the scratch memory
constexpr int64_t kAhead = 4096;   // bytes of weights asked for ahead of use; the best of 512 to 16384 on Zen 4
constexpr int64_t kSerialWork = 200000;  // multiplications below which waking a second thread costs more than it saves

template <class Acc>
struct Panel {
    char* data;    // K::panel_bytes * tokens, interleaved
    float* scale;  // [tokens] of activations, integer kernels only
    Acc* sums;     // [tokens, groups] sum of the (quantized) token over each group
    int tokens;
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
    const int64_t n0 = block * kRows, valid = min64(kRows, p.n - n0), size = element_size(p.dtype);
    float scale[kRows] = {}, bias[kRows] = {}, row[kRows];
    for (int64_t r = 0; r < valid; r++) scale[r] = p.row_scale ? p.row_scale[n0 + r] : 1.0f;
    if (p.bias) to_float(bias, (const char*)p.bias + n0 * element_size(p.bias_dtype), valid, p.bias_dtype);
    for (int64_t t = 0; t < tokens; t++) {
        const float s = token_scale ? token_scale[t] : 1.0f;
        for (int r = 0; r < kRows; r++) row[r] = (float)out[t * kRows + r] * scale[r] * s + bias[r];
        from_float((char*)p.y + ((first + t) * p.n + n0) * size, row, valid, p.dtype);
    }
}

template <class K, int MT = kFew>
inline void few_dispatch(const Problem& p, int64_t block, const Panel<typename K::Acc>& panel, typename K::Acc* out) {
    if (panel.tokens == MT) return K::template few<MT>(p, block, panel, out);
    if constexpr (MT > 1) few_dispatch<K, MT - 1>(p, block, panel, out);
}

// Tokens [first, first + m) of the call.
template <class K>
inline void run_chunk(const Problem& p, int64_t first, int64_t m, int threads) {
    using Acc = typename K::Acc;
    const bool many = K::kHasMany && m > kFew;
    const int width = many ? kMany : kFew;
    const int64_t count = ceil_div(m, width), groups = p.k / p.group, blocks = ceil_div(p.n, kRows);
    const int64_t token_bytes = round_up(K::panel_bytes(p), 64);
    const size_t data_bytes = token_bytes * m, sums_bytes = round_up(4 * groups * m, 64);
    char* memory = scratch().at_least(data_bytes + sums_bytes + round_up(4 * m, 64));
    Acc* sums = (Acc*)(memory + data_bytes);
    float* scales = (float*)(memory + data_bytes + sums_bytes);
    auto panel_at = [=](int64_t i) {
        const int64_t t = i * width;
        return Panel<Acc>{memory + t * token_bytes, scales + t, sums + t * groups, (int)min64(width, m - t)};
    };

    parallel(count < 2 * threads ? 1 : threads, count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const Panel<Acc> panel = panel_at(i);
            for (int t = 0; t < panel.tokens; t++)
                K::gather(p, (const char*)p.x + (first + i * width + t) * p.k * element_size(p.dtype), t, panel);
        }
    });

    if (!many) {
        parallel(threads, blocks, [&](int64_t begin, int64_t end) {
            alignas(64) Acc out[kFew * kRows];
            for (int64_t block = begin; block < end; block++)
                for (int64_t i = 0; i < count; i++) {
                    const Panel<Acc> panel = panel_at(i);
                    few_dispatch<K>(p, block, panel, out);
                    store<K>(p, block, first + i * width, panel.tokens, out, K::kInteger ? panel.scale : nullptr);
                }
        });
        return;
    }
    if constexpr (K::kHasMany) {
        int64_t panels = kTokenBlock / kMany;
        while (panels > 1 && ceil_div(count, panels) * blocks < 4 * threads) panels /= 2;
        const int64_t token_blocks = ceil_div(count, panels);
        parallel(threads, token_blocks * blocks, [&](int64_t begin, int64_t end) {
            alignas(64) Acc out[kTokenBlock * kRows];
            Panel<Acc> list[kTokenBlock / kMany];
            for (int64_t task = begin; task < end; task++) {
                const int64_t block = task % blocks, i0 = task / blocks * panels;
                const int64_t here = min64(panels, count - i0), t0 = i0 * kMany;
                for (int64_t i = 0; i < here; i++) list[i] = panel_at(i0 + i);
                K::many(p, block, list, (int)here, out);
                store<K>(p, block, first + t0, min64(here * kMany, m - t0), out, K::kInteger ? scales + t0 : nullptr);
            }
        });
    }
}

template <class K>
inline void run(const Problem& p) {
    const int threads = p.m * p.n * p.k < kSerialWork ? 1 : max_threads();
    for (int64_t first = 0; first < p.m; first += kChunk) run_chunk<K>(p, first, min64(kChunk, p.m - first), threads);
}

// Shared by the integer kernels: int8 tokens, four values of one token side by side, [K/4, tokens, 4].
struct IntegerPanels {
    using Acc = int32_t;
    static constexpr bool kInteger = true;
    static int64_t padded(const Problem& p) { return round_up(p.k, 8); }
    static int64_t panel_bytes(const Problem& p) { return padded(p); }

    static void gather(const Problem& p, const char* row, int t, const Panel<Acc>& panel) {
        static thread_local Scratch buffer;
        const int64_t k = p.k, kp = padded(p), groups = k / p.group;
        char* memory = buffer.at_least(kp * 5);
        float* values = (float*)memory;
        int8_t* codes = (int8_t*)(memory + kp * 4);
        to_float(values, row, k, p.dtype);
        panel.scale[t] = quantize_token(codes, values, k);
        for (int64_t i = k; i < kp; i++) codes[i] = 0;
        for (int64_t g = 0; g < groups; g++) panel.sums[t * groups + g] = sum_int8(codes + g * p.group, p.group);
        if (panel.tokens == 1) {
            memcpy(panel.data, codes, kp);
            return;
        }
        int32_t* out = (int32_t*)panel.data + t;
        for (int64_t i = 0; i < kp / 4; i++) memcpy(out + i * panel.tokens, codes + 4 * i, 4);
    }
};

// Shared by the float kernels without bf16 arithmetic: float32 tokens, [K, tokens].
struct FloatPanels {
    using Acc = float;
    static constexpr bool kInteger = false;
    static int64_t padded(const Problem& p) { return round_up(p.k, 8); }
    static int64_t panel_bytes(const Problem& p) { return 4 * padded(p); }

    static void gather(const Problem& p, const char* row, int t, const Panel<Acc>& panel) {
        static thread_local Scratch buffer;
        const int64_t k = p.k, kp = padded(p), groups = k / p.group;
        float* values = (float*)buffer.at_least(kp * 4);
        to_float(values, row, k, p.dtype);
        for (int64_t i = k; i < kp; i++) values[i] = 0;
        for (int64_t g = 0; g < groups; g++) panel.sums[t * groups + g] = sum_float(values + g * p.group, p.group);
        float* out = (float*)panel.data + t;
        for (int64_t i = 0; i < kp; i++) out[i * panel.tokens] = values[i];
    }
};

}  // namespace
