// binary_dual: two planes of bits with a scale each. A unit is 16 k of a block, one 32-bit word per row: the bits of plane 1 in
// the lower half, those of plane 2 in the upper, bit i of a half being k i. K is padded with zero bits to whole units.
//
//     y[m, n] = sum_g (a1[n, g] * sum_{k in g} B1[n, k] x[m, k] + a2[n, g] * sum_{k in g} B2[n, k] x[m, k])
//
// The inner sums are of a token's values where bits are set. Few tokens take them from tables of subset sums, made once per
// token and used by both planes of all rows: a look-up and an addition for several k.
#pragma once
#include "weights.h"

namespace {

struct Planes {
    static constexpr int64_t kUnit = 16, kUnitBytes = 128;

    static int64_t padded(const Problem& p) { return round_up(p.k, kUnit); }
    // Units of one group; a single group takes the padding in.
    static int64_t units(const Problem& p) { return (p.group == p.k ? padded(p) : p.group) / kUnit; }
    static const uint8_t* at(const Problem& p, int64_t block, int64_t k) { return p.codes + (block * padded(p) + k) * 8; }
    // Of [N/32, K/G, 2, 32].
    static int64_t scale_at(const Problem& p, int64_t block, int64_t g, int plane) {
        return ((block * (p.k / p.group) + g) * 2 + plane) * kRows;
    }
};

// Tables of the 2^BITS subset sums of every BITS neighbouring k, [K / BITS, tokens, 2^BITS], entry e holding the k of e's bits.
template <int BITS>
struct SubsetSums {
    using Acc = float;
    static constexpr bool kInteger = false;
    static constexpr int kEntries = 1 << BITS, kTables = 16 / BITS;  // per unit

    static int64_t panel_bytes(const Problem& p, bool) { return Planes::padded(p) / BITS * kEntries * 4; }

    static void gather(const Problem& p, const char* row, int t, const Panel<Acc>& panel) {
        static thread_local Scratch buffer;
        const int64_t kp = Planes::padded(p);
        float* values = (float*)buffer.at_least(kp * 4);
        to_float(values, row, p.k, p.dtype);
        for (int64_t i = p.k; i < kp; i++) values[i] = 0;
        float* out = (float*)panel.data + t * kEntries;
        for (int64_t i = 0; i < kp; i += BITS, out += panel.tokens * kEntries) {
            out[0] = 0;
            for (int b = 0; b < BITS; b++)
                for (int e = 0; e < 1 << b; e++) out[(1 << b) + e] = out[e] + values[i + b];
        }
    }
};

}  // namespace
