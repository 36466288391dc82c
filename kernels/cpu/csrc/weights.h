// How the weights of the weight-only kernels are stored, and the tokens they meet.
//
// A unit is the k of one 32-bit word per row: 4 codes of 8 bits, 8 of 4, 16 of 2. Three bits are 16 codes of 2 bits and
// the top bits of the same codes in 16 bits more. In a word of 4- or 2-bit codes the lower half holds the even k and the
// upper half the odd k, so that one shift and one look-up of 16-bit lanes give neighbouring k side by side. A block's
// unit is [32] words, then for three bits [32] half words: 4 * bits bytes per k in every format.
//
//     y[m, n] = sum_g scale[n, g] * (sum_{k in g} x[m, k] * (code[n, k] - c) - (zero[n, g] - c) * sum_{k in g} x[m, k])
//
// with c = 2^(bits - 1), the zero point of the symmetric form. Codes and scales stay apart until the float32 sum of a
// group is known, so no weight is rounded. Codes of 4 bits may be floats, which stand for a value of a table instead of
// code - c.
#pragma once
#include "driver.h"

namespace {

template <int BITS>
struct Stored {
    static constexpr int kUnit = BITS == 8 ? 4 : BITS == 4 ? 8 : 16;
    static constexpr int kUnitBytes = kUnit * 4 * BITS;
    static constexpr int kCenter = 1 << (BITS - 1);
    static constexpr int kLow = BITS == 3 ? 2 : BITS;  // bits of a code inside the word

    static int64_t padded(const Problem& p) { return round_up(p.k, kUnit == 16 ? 16 : 8); }
    // k of one group as stored; a single group takes the padding in.
    static int64_t length(const Problem& p) { return p.group == p.k ? padded(p) : p.group; }
    static const uint8_t* at(const Problem& p, int64_t block, int64_t k) {
        return p.codes + (block * padded(p) + k) * 4 * BITS;
    }
    // Where code k of a unit starts in its word.
    static constexpr int shift(int k) { return BITS == 8 ? 8 * k : kLow * (k / 2) + 16 * (k & 1); }
    // And its top bit in the half word.
    static constexpr int top(int k) { return k / 2 + 8 * (k & 1); }
};

// Four times what a 4-bit code stands for, by exponent bits: integers (code - 8), E1M2, E2M1, E3M0.
alignas(16) constexpr int8_t kQuarters[4][16] = {
    {-32, -28, -24, -20, -16, -12, -8, -4, 0, 4, 8, 12, 16, 20, 24, 28},
    {0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7},
    {0, 2, 4, 6, 8, 12, 16, 24, 0, -2, -4, -6, -8, -12, -16, -24},
    {0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64},
};

constexpr const int8_t* kE2M1 = kQuarters[2];

inline const int8_t* quarters(const Problem& p, int64_t block) { return kQuarters[p.kinds ? p.kinds[block] : 0]; }

// Calls kernel<BITS> for the bits of p.
#define LOWBIT_BY_BITS(p, kernel)                \
    switch ((p).bits) {                          \
        case 2: return run<kernel<2>>(p);        \
        case 3: return run<kernel<3>>(p);        \
        case 4: return run<kernel<4>>(p);        \
        default: return run<kernel<8>>(p);       \
    }

// float32 tokens, [K, tokens].
template <int BITS>
struct FloatPanels {
    using Acc = float;
    static constexpr bool kInteger = false;
    static int64_t panel_bytes(const Problem& p, bool) { return 4 * Stored<BITS>::padded(p); }

    // One token as float32 with zeros up to the padded K, and the sum of each group.
    static float* values_of(const Problem& p, const char* row, int t, const Panel<Acc>& panel) {
        static thread_local Scratch buffer;
        const int64_t k = p.k, kp = Stored<BITS>::padded(p), groups = k / p.group;
        float* values = (float*)buffer.at_least(kp * 4);
        to_float(values, row, k, p.dtype);
        for (int64_t i = k; i < kp; i++) values[i] = 0;
        for (int64_t g = 0; g < groups; g++) panel.sums[t * groups + g] = sum_float(values + g * p.group, p.group);
        return values;
    }

    static void gather(const Problem& p, const char* row, int t, const Panel<Acc>& panel) {
        const float* values = values_of(p, row, t, panel);
        float* out = (float*)panel.data + t;
        for (int64_t i = 0; i < Stored<BITS>::padded(p); i++) out[i * panel.tokens] = values[i];
    }
};

}  // namespace
