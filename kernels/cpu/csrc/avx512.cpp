// Integer kernels for AVX-512 with VNNI; avx512integer.h says how they work.
#include "avx512integer.h"
#include "rotation.h"
#include "shift.h"

namespace {

// out [MT, 32] (+)= w [n4, 2, 16 rows, 4] * x [n4, MT, 4]
template <int MT>
inline void dot(const uint8_t* w, const int8_t* x, int64_t n4, int32_t* out, bool add) {
    __m512i acc[MT][2];
#pragma GCC unroll 16
    for (int t = 0; t < MT; t++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++)
            acc[t][h] = add ? _mm512_load_si512(out + t * kRows + 16 * h) : _mm512_setzero_si512();
    for (int64_t i = 0; i < n4; i++, w += 128, x += 4 * MT) {
        const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 16
        for (int t = 0; t < MT; t++) {
            const __m512i b = broadcast4(x + 4 * t);
            acc[t][0] = _mm512_dpbusd_epi32(acc[t][0], w0, b);
            acc[t][1] = _mm512_dpbusd_epi32(acc[t][1], w1, b);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < MT; t++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) _mm512_store_si512(out + t * kRows + 16 * h, acc[t][h]);
}

template <int MT>
inline void dot_dispatch(int tokens, const uint8_t* w, const int8_t* x, int64_t n4, int32_t* out, bool add) {
    if (tokens == MT) return dot<MT>(w, x, n4, out, add);
    if constexpr (MT > 1) dot_dispatch<MT - 1>(tokens, w, x, n4, out, add);
}

// The way for many tokens. S::slice gives w8 + 128 for k0 <= k < k1 as [(k1 - k0) / 4, 32, 4].
template <class S>
struct Many : S {
    static constexpr int kWidth = 12;  // 12 x 2 accumulators fill the register file

    static void many(const Problem& p, int64_t block, const Panel<int32_t>* panels, int count, int32_t* out) {
        alignas(64) uint8_t buffer[kRows * kSlice];
        const int64_t kp = S::padded(p), size = round_up(ceil_div(kp, ceil_div(kp, kSlice)), 8);  // equal slices
        for (int64_t k0 = 0; k0 < kp; k0 += size) {
            const int64_t k1 = min64(k0 + size, kp);
            const uint8_t* w = S::slice(p, block, k0, k1, buffer);
            for (int i = 0; i < count; i++)
                dot_dispatch<kWidth>(panels[i].tokens, w, (const int8_t*)panels[i].data + k0 * panels[i].tokens, (k1 - k0) / 4,
                                     out + i * kWidth * kRows, k0 > 0);
        }
        take_off_shift(p, panels, count, kWidth, out);
    }
};

}  // namespace

void avx512_a8w4(const Problem& p) { run<Many<A8W4>>(p); }
void avx512_w8a8(const Problem& p) { run<Many<W8A8>>(p); }
void avx512_rotate(const Rotation& r) { rotate_tokens(r); }
void avx512_shift(const Shift& s) { shift_tokens(s); }
