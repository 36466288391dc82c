// W4A16 for AVX-512 with BF16. vdpbf16ps multiplies pairs of bfloat16 and adds two products to a float32 lane.
//
// A code enters as q - 8, exact in bfloat16, straight out of a 16-entry table (vpermw: shift, look up, multiply). A
// token enters as a sum of bfloat16 terms that is exact up to float32 rounding: one term for bfloat16, two for float16,
// three for float32. The group's scale, and its zero point if there is one, are applied to the group's float32 partial
// sum, so nothing is rounded to bfloat16 on the way.
#include <immintrin.h>

#include "driver.h"

namespace {

constexpr int kSlice = 256;  // k per unpacked slice: 32 rows x 256 bfloat16 fill half of the L1 cache

// bfloat16 of (i & 15) - 8 for i in 0..31: vpermw looks at five bits, the fifth belongs to the next code.
alignas(64) const uint16_t kTable[32] = {
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};

inline __m512 fma_bf16(__m512 acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

inline __m512i broadcast2(const uint16_t* x) {
    int32_t v;
    memcpy(&v, x, 4);
    return _mm512_set1_epi32(v);
}

inline int terms_of(DType dtype) { return dtype == kBF16 ? 1 : dtype == kF16 ? 2 : 3; }

// scale and zero - 8 of 16 rows of one group.
inline __m512 load_scale(const Problem& p, int64_t index) {
    if (p.scale_is_f32) return _mm512_loadu_ps((const float*)p.scale + index);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)p.scale + index)));
}
inline __m512 load_zero(const Problem& p, int64_t index) {
    const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p.zero + index)));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(zero, _mm512_set1_epi32(8)));
}

// part [MT, 2] += w [n2, 2, 16 rows, 2] * x [n2, T, MT, 2]
template <int MT, int T>
inline void dot(const uint16_t* w, const uint16_t* x, int64_t n2, __m512 (&part)[MT][2]) {
    for (int64_t i = 0; i < n2; i++, w += 64, x += 2 * T * MT) {
        const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 32);
#pragma GCC unroll 3
        for (int s = 0; s < T; s++)
#pragma GCC unroll 16
            for (int t = 0; t < MT; t++) {
                const __m512i b = broadcast2(x + 2 * (s * MT + t));
                part[t][0] = fma_bf16(part[t][0], w0, b);
                part[t][1] = fma_bf16(part[t][1], w1, b);
            }
    }
}

struct W4A16 {
    using Acc = float;
    static constexpr bool kInteger = false, kHasMany = true;
    static int64_t padded(const Problem& p) { return round_up(p.k, 8); }
    static int64_t panel_bytes(const Problem& p) { return 2 * terms_of(p.dtype) * padded(p); }

    // Panels are [K/2, T, tokens, 2] bfloat16.
    static void gather(const Problem& p, const char* row, int t, const Panel<Acc>& panel) {
        static thread_local Scratch buffer;
        const int64_t k = p.k, kp = padded(p), groups = k / p.group;
        const int terms = terms_of(p.dtype);
        char* memory = buffer.at_least(kp * 6);
        float* values = (float*)memory;
        uint16_t* rounded = (uint16_t*)(memory + kp * 4);
        to_float(values, row, k, p.dtype);
        for (int64_t i = k; i < kp; i++) values[i] = 0;
        for (int64_t g = 0; g < groups; g++) panel.sums[t * groups + g] = sum_float(values + g * p.group, p.group);
        for (int s = 0; s < terms; s++) {
            for (int64_t i = 0; i < kp; i++) {
                rounded[i] = bf16_of(values[i]);
                values[i] -= float_of((uint32_t)rounded[i] << 16);
            }
            uint32_t* out = (uint32_t*)panel.data + s * panel.tokens + t;
            for (int64_t i = 0; i < kp / 2; i++) memcpy(out + i * terms * panel.tokens, rounded + 2 * i, 4);
        }
    }

    template <int MT, int T>
    static void few_terms(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        const int64_t groups = p.k / p.group, length = groups == 1 ? padded(p) : p.group;
        const uint8_t* w = p.codes + block * padded(p) * (kRows / 2);
        const uint16_t* x = (const uint16_t*)panel.data;
        const __m512i table = _mm512_load_si512(kTable);
        for (int64_t g = 0; g < groups; g++) {
            // Chains: one sum per row would wait for the latency of every multiplication when tokens are few.
            constexpr int kChains = MT == 1 ? 4 : MT == 2 ? 2 : 1;
            __m512 chain[MT][2][kChains], part[MT][2];
            for (int t = 0; t < MT; t++)
                for (int h = 0; h < 2; h++)
                    for (int c = 0; c < kChains; c++) chain[t][h][c] = _mm512_setzero_ps();
            for (int64_t i = 0; i < length / 8; i++, w += 128, x += 8 * T * MT) {
                _mm_prefetch((const char*)w + kAhead, _MM_HINT_T0);
                _mm_prefetch((const char*)w + kAhead + 64, _MM_HINT_T0);
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const __m512i packed = _mm512_loadu_si512(w + 64 * h);
                    __m512i pair[4];
                    pair[0] = _mm512_permutexvar_epi16(packed, table);
                    pair[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4), table);
                    pair[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 8), table);
                    pair[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 12), table);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++)
#pragma GCC unroll 3
                        for (int s = 0; s < T; s++)
#pragma GCC unroll 4
                            for (int t = 0; t < MT; t++) {
                                __m512& sum = chain[t][h][(j + s) % kChains];
                                sum = fma_bf16(sum, pair[j], broadcast2(x + 2 * ((j * T + s) * MT + t)));
                            }
                }
            }
            for (int t = 0; t < MT; t++)
                for (int h = 0; h < 2; h++) {
                    part[t][h] = chain[t][h][0];
                    for (int c = 1; c < kChains; c++) part[t][h] = _mm512_add_ps(part[t][h], chain[t][h][c]);
                }
            apply<MT>(p, (block * groups + g) * kRows, panel, g, true, part, out, g > 0);
        }
    }

    // out [MT, 32] (+)= scale * (part - (zero - 8) * sum of the token over the group); the zero point at the group's end.
    template <int MT>
    static inline void apply(const Problem& p, int64_t index, const Panel<float>& panel, int64_t g, bool ends,
                             const __m512 (&part)[MT][2], float* out, bool add) {
        const int64_t groups = p.k / p.group;
        const bool shifted = p.zero && ends;
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const __m512 scale = load_scale(p, index + 16 * h);
            const __m512 zero = shifted ? load_zero(p, index + 16 * h) : _mm512_setzero_ps();
#pragma GCC unroll 16
            for (int t = 0; t < MT; t++) {
                float* to = out + t * kRows + 16 * h;
                const __m512 before = add ? _mm512_load_ps(to) : _mm512_setzero_ps();
                __m512 sum = part[t][h];
                if (shifted) sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(panel.sums[t * groups + g]), sum);
                _mm512_store_ps(to, _mm512_fmadd_ps(scale, sum, before));
            }
        }
    }

    template <int MT>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        switch (terms_of(p.dtype)) {
            case 1: return few_terms<MT, 1>(p, block, panel, out);
            case 2: return few_terms<MT, 2>(p, block, panel, out);
            default: return few_terms<MT, 3>(p, block, panel, out);
        }
    }

    // One panel times one slice: a partial sum per stretch of k inside one group, added to out [MT, 32] in memory.
    template <int MT, int T>
    static void slice_terms(const Problem& p, int64_t block, int64_t k0, int64_t k1, const uint16_t* w,
                            const Panel<float>& panel, float* out) {
        const int64_t groups = p.k / p.group;
        const uint16_t* x = (const uint16_t*)panel.data + k0 * T * MT;
        for (int64_t k = k0; k < k1;) {
            const int64_t g = min64(k / p.group, groups - 1);
            const int64_t group_end = g == groups - 1 ? padded(p) : (g + 1) * p.group, end = min64(k1, group_end);
            __m512 part[MT][2];
#pragma GCC unroll 16
            for (int t = 0; t < MT; t++) part[t][0] = part[t][1] = _mm512_setzero_ps();
            dot<MT, T>(w, x, (end - k) / 2, part);
            apply<MT>(p, (block * groups + g) * kRows, panel, g, end == group_end, part, out, k > 0);
            w += (end - k) * kRows;
            x += (end - k) * T * MT;
            k = end;
        }
    }

    template <int T, int MT = kMany>
    static void slice_dispatch(const Problem& p, int64_t block, int64_t k0, int64_t k1, const uint16_t* w,
                               const Panel<float>& panel, float* out) {
        if (panel.tokens == MT) return slice_terms<MT, T>(p, block, k0, k1, w, panel, out);
        if constexpr (MT > 1) slice_dispatch<T, MT - 1>(p, block, k0, k1, w, panel, out);
    }

    static void many(const Problem& p, int64_t block, const Panel<float>* panels, int count, float* out) {
        alignas(64) uint16_t buffer[kRows * kSlice];
        const int64_t kp = padded(p);
        const __m512i table = _mm512_load_si512(kTable);
        for (int64_t k0 = 0; k0 < kp; k0 += kSlice) {
            const int64_t k1 = min64(k0 + kSlice, kp);
            const uint8_t* w = p.codes + (block * kp + k0) * (kRows / 2);
            uint16_t* to = buffer;
            for (int64_t k = k0; k < k1; k += 8, w += 128, to += 256)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const __m512i packed = _mm512_loadu_si512(w + 64 * h);
                    _mm512_store_si512(to + 32 * h, _mm512_permutexvar_epi16(packed, table));
                    _mm512_store_si512(to + 64 + 32 * h, _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 4), table));
                    _mm512_store_si512(to + 128 + 32 * h, _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 8), table));
                    _mm512_store_si512(to + 192 + 32 * h, _mm512_permutexvar_epi16(_mm512_srli_epi16(packed, 12), table));
                }
            for (int i = 0; i < count; i++) {
                float* to_rows = out + i * kMany * kRows;
                switch (terms_of(p.dtype)) {
                    case 1: slice_dispatch<1>(p, block, k0, k1, buffer, panels[i], to_rows); break;
                    case 2: slice_dispatch<2>(p, block, k0, k1, buffer, panels[i], to_rows); break;
                    default: slice_dispatch<3>(p, block, k0, k1, buffer, panels[i], to_rows);
                }
            }
        }
    }
};

}  // namespace

void avx512bf16_w4a16(const Problem& p) { run<W4A16>(p); }
