// Weight-only kernels for AVX-512 with BF16. vdpbf16ps multiplies pairs of bfloat16, exactly, and adds to a float32 lane.
// Only bfloat16 tokens take this way: wider ones would need two or three terms, which float32 units beat.
#include "avx512codebook.h"
#include "avx512dual.h"
#include "avx512fp4pairs.h"
#include "avx512pairs.h"

namespace {

struct Bf16Engine {
    using Element = uint16_t;
    static constexpr int kWidth = 12;  // 12 x 2 accumulators fill the register file
    static constexpr int64_t kSlice = 256, kAlign = 8;
    static int64_t panel_bytes(int64_t columns) { return 2 * columns; }

    static void put(const float* values, int64_t columns, int t, const Panel<float>& panel) {
        put_pairs(values, columns, t, panel);
    }

    template <int BITS>
    static void unpack(const Problem& p, int64_t block, const uint8_t* w, int64_t units, uint16_t* to) {
        unpack_bf16<BITS>(p, block, w, units, to);
    }

    static __m512 fma(__m512 acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

    template <int MT>
    static void dot(const Problem& p, int center, int64_t block, const Panel<float>& panel, const Stretch& s,
                    const uint16_t* slice, float* out) {
        const uint16_t *w = slice + s.at * kRows, *x = (const uint16_t*)panel.data + s.column * MT;
        __m512 part[MT][2];
#pragma GCC unroll 16
        for (int t = 0; t < MT; t++) part[t][0] = part[t][1] = _mm512_setzero_ps();
        for (int64_t i = 0; i < s.size; i += 2, w += 2 * kRows, x += 2 * MT) {
            const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 32);
#pragma GCC unroll 16
            for (int t = 0; t < MT; t++) {
                const __m512i b = broadcast_pair(x + 2 * t);
                part[t][0] = fma(part[t][0], w0, b);
                part[t][1] = fma(part[t][1], w1, b);
            }
        }
        apply<MT>(p, center, block, panel, s.group, s.ends, s.column > 0, [&](int t, int h) { return part[t][h]; }, out);
    }

    template <int MT = kWidth>
    static void multiply(const Problem& p, int center, int64_t block, const Panel<float>& panel, const Stretch* list, int count,
                         const uint16_t* slice, float* out) {
        if (panel.tokens == MT) {
            for (int i = 0; i < count; i++) dot<MT>(p, center, block, panel, list[i], slice, out);
            return;
        }
        if constexpr (MT > 1) multiply<MT - 1>(p, center, block, panel, list, count, slice, out);
    }
};

template <int BITS>
using Kernel = WeightOnly<BITS, Bf16Engine, FewPairs<BITS>>;

}  // namespace

void avx512bf16_weight_only(const Problem& p) {
    if (p.dtype != kBF16) return avx512_weight_only(p);
    LOWBIT_BY_BITS(p, Kernel)
}
void avx512bf16_fp4(const Problem& p) {
    if (p.dtype != kBF16) return avx512_fp4(p);
    run<Fp4Pairs<Bf16Engine>>(p);
}
void avx512bf16_dual(const Problem& p) {
    if (p.dtype != kBF16) return avx512_dual(p);
    run<Dual<Bf16Engine>>(p);
}
void avx512bf16_codebook_many(const Problem& p) {
    if (p.dtype != kBF16) return avx512_codebook_many(p);
    run<Codebook<Bf16Engine>>(p);
}
