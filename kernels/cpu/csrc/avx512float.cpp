// Weight-only kernels for AVX-512 without BF16, and for tokens that bfloat16 cannot hold: float32 throughout.
#include "avx512codebook.h"
#include "avx512dual.h"
#include "avx512fp4.h"

namespace {

struct FloatEngine {
    using Element = float;
    static constexpr int kWidth = 12;  // 12 x 2 accumulators fill the register file
    static constexpr int64_t kSlice = 128, kAlign = 8;
    static int64_t panel_bytes(int64_t columns) { return 4 * columns; }

    static void put(const float* values, int64_t columns, int t, const Panel<float>& panel) {
        float* out = (float*)panel.data + t;
        for (int64_t i = 0; i < columns; i++) out[i * panel.tokens] = values[i];
    }

    template <int BITS>
    static void unpack(const Problem& p, int64_t block, const uint8_t* w, int64_t units, float* to) {
        const __m512 table = Words<BITS>::table(p, block);
        for (int64_t i = 0; i < units; i++, w += Stored<BITS>::kUnitBytes, to += Stored<BITS>::kUnit * kRows)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const Words<BITS> words(w, h);
#pragma GCC unroll 16
                for (int k = 0; k < Stored<BITS>::kUnit; k++) _mm512_store_ps(to + k * kRows + 16 * h, words.weight(k, table));
            }
    }

    // slice [k, 32], panel [k, MT]
    template <int MT>
    static void dot(const Problem& p, int center, int64_t block, const Panel<float>& panel, const Stretch& s, const float* slice,
                    float* out) {
        const float *w = slice + s.at * kRows, *x = (const float*)panel.data + s.column * MT;
        __m512 part[MT][2];
#pragma GCC unroll 16
        for (int t = 0; t < MT; t++) part[t][0] = part[t][1] = _mm512_setzero_ps();
        for (int64_t i = 0; i < s.size; i++, w += kRows, x += MT) {
            const __m512 w0 = _mm512_load_ps(w), w1 = _mm512_load_ps(w + 16);
#pragma GCC unroll 16
            for (int t = 0; t < MT; t++) {
                const __m512 b = _mm512_set1_ps(x[t]);
                part[t][0] = _mm512_fmadd_ps(w0, b, part[t][0]);
                part[t][1] = _mm512_fmadd_ps(w1, b, part[t][1]);
            }
        }
        apply<MT>(p, center, block, panel, s.group, s.ends, s.column > 0, [&](int t, int h) { return part[t][h]; }, out);
    }

    template <int MT = kWidth>
    static void multiply(const Problem& p, int center, int64_t block, const Panel<float>& panel, const Stretch* list, int count,
                         const float* slice, float* out) {
        if (panel.tokens == MT) {
            for (int i = 0; i < count; i++) dot<MT>(p, center, block, panel, list[i], slice, out);
            return;
        }
        if constexpr (MT > 1) multiply<MT - 1>(p, center, block, panel, list, count, slice, out);
    }
};

template <int BITS>
using Kernel = WeightOnly<BITS, FloatEngine>;

}  // namespace

void avx512_weight_only(const Problem& p) { LOWBIT_BY_BITS(p, Kernel) }
void avx512_fp4(const Problem& p) { run<Fp4<FloatEngine>>(p); }
void avx512_dual(const Problem& p) { run<Dual<FloatEngine>>(p); }
void avx512_codebook_few(const Problem& p) { look_up<WideLookup>(p); }
void avx512_codebook_many(const Problem& p) { run<Codebook<FloatEngine>>(p); }
