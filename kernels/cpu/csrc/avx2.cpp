// The kernels for AVX2 with FMA: one way for any number of tokens, four at a time, codes unpacked in registers.
//
// A register holds 8 rows, so a block of 32 is four strips. A8W4 uses vpmaddubsw on raw codes: 15 * 127 * 4 fits int16,
// which full bytes would not, so the group's scale goes on the int32 sum. W8A8 widens both sides to int16 instead.
#include <immintrin.h>

#include "dual.h"
#include "fp4.h"
#include "weights.h"
#include "rotation.h"
#include "shift.h"

namespace {

constexpr int kStrips = 4;

inline __m256i load(const void* at) { return _mm256_loadu_si256((const __m256i*)at); }

inline __m256i broadcast4(const int8_t* x) {
    int32_t v;
    memcpy(&v, x, 4);
    return _mm256_set1_epi32(v);
}

struct A8W4 : IntegerPanels {
    static constexpr int kWidth = 0;
    static constexpr bool kPairs = false;

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<int32_t>& panel, int32_t* out) {
        const int64_t groups = p.k / p.group;
        const uint8_t* params = (const uint8_t*)p.scale + block * groups * 2 * kRows;
        const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
        memset(out, 0, MT * kRows * sizeof(int32_t));
        for (int64_t g = 0; g < groups; g++, params += 2 * kRows)
            for (int strip = 0; strip < kStrips; strip++) {
                const uint8_t* w = p.codes + (block * p.k + g * p.group) * (kRows / 2) + 32 * strip;
                const int8_t* x = (const int8_t*)panel.data + g * p.group * MT;
                __m256i part[MT];
                for (int t = 0; t < MT; t++) part[t] = _mm256_setzero_si256();
                for (int64_t i = 0; i < p.group / 8; i++, w += 128, x += 8 * MT) {
                    const __m256i packed = load(w);
                    const __m256i low = _mm256_and_si256(packed, mask);
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
#pragma GCC unroll 4
                    for (int t = 0; t < MT; t++) {
                        const __m256i a = _mm256_maddubs_epi16(low, broadcast4(x + 4 * t));
                        const __m256i b = _mm256_maddubs_epi16(high, broadcast4(x + 4 * (MT + t)));
                        part[t] = _mm256_add_epi32(part[t], _mm256_madd_epi16(_mm256_add_epi16(a, b), ones));
                    }
                }
                const __m256i s2 = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(params + 8 * strip)));
                const __m256i o = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(params + kRows + 8 * strip)));
                for (int t = 0; t < MT; t++) {
                    __m256i* to = (__m256i*)(out + t * kRows + 8 * strip);
                    const __m256i scaled = _mm256_mullo_epi32(s2, part[t]);
                    const __m256i shift = _mm256_mullo_epi32(o, _mm256_set1_epi32(panel.sums[t * groups + g]));
                    _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), _mm256_add_epi32(scaled, shift)));
                }
            }
    }
};

struct W8A8 : IntegerPanels {
    static constexpr int kWidth = 0;
    static constexpr bool kPairs = false;
    static constexpr int64_t kStretch = 512;  // k walked by one strip before the next, so that lines are still in L1

    static __m256i even(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
    static __m256i odd(__m256i v) { return _mm256_srai_epi16(v, 8); }

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<int32_t>& panel, int32_t* out) {
        const int64_t kp = padded(p);
        const __m256i flip = _mm256_set1_epi8(-128);
        memset(out, 0, MT * kRows * sizeof(int32_t));
        for (int64_t k0 = 0; k0 < kp; k0 += kStretch)
            for (int strip = 0; strip < kStrips; strip++) {
                const uint8_t* w = p.codes + (block * kp + k0) * kRows + 32 * strip;
                const int8_t* x = (const int8_t*)panel.data + k0 * MT;
                __m256i acc[MT];
                for (int t = 0; t < MT; t++) acc[t] = _mm256_load_si256((const __m256i*)(out + t * kRows + 8 * strip));
                for (int64_t k = k0; k < min64(k0 + kStretch, kp); k += 4, w += 128, x += 4 * MT) {
                    const __m256i weight = _mm256_xor_si256(load(w), flip), w_even = even(weight), w_odd = odd(weight);
#pragma GCC unroll 4
                    for (int t = 0; t < MT; t++) {
                        const __m256i token = broadcast4(x + 4 * t);
                        acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(w_even, even(token)));
                        acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(w_odd, odd(token)));
                    }
                }
                for (int t = 0; t < MT; t++) _mm256_store_si256((__m256i*)(out + t * kRows + 8 * strip), acc[t]);
            }
    }
};

inline __m256 load_scale(const Problem& p, int64_t index) {
    if (p.scale_is_f32) return _mm256_loadu_ps((const float*)p.scale + index);
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)p.scale + index)));
}

template <int BITS>
struct WeightOnly : FloatPanels<BITS> {
    using S = Stored<BITS>;
    static constexpr int kWidth = 0;
    static constexpr bool kPairs = false;

    // part += weight times channel k of each token
    template <int MT>
    static void add(__m256 (&part)[MT][2], int k, __m256 weight, const float* x) {
#pragma GCC unroll 4
        for (int t = 0; t < MT; t++)
            part[t][k & 1] = _mm256_fmadd_ps(weight, _mm256_set1_ps(x[k * MT + t]), part[t][k & 1]);
    }

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        const int64_t groups = p.k / p.group, length = S::length(p);
        const __m256i mask = _mm256_set1_epi32((1 << S::kLow) - 1), center = _mm256_set1_epi32(S::kCenter);
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)quarters(p, block)));
        memset(out, 0, MT * kRows * sizeof(float));
        for (int64_t g = 0; g < groups; g++)
            for (int strip = 0; strip < kStrips; strip++) {
                const uint8_t* w = S::at(p, block, g * length);
                const float* x = (const float*)panel.data + g * length * MT;
                __m256 part[MT][2];
                for (int t = 0; t < MT; t++) part[t][0] = part[t][1] = _mm256_setzero_ps();
                for (int64_t i = 0; i < length / S::kUnit; i++, w += S::kUnitBytes, x += S::kUnit * MT) {
                    const __m256i word = load(w + 32 * strip);
                    __m256i tops = _mm256_setzero_si256(), low = tops, high = tops;
                    if (BITS == 4) {  // a byte look-up takes 32 codes at once
                        low = _mm256_shuffle_epi8(table, _mm256_and_si256(word, nibble));
                        high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(word, 4), nibble));
                    }
                    if (BITS == 3) tops = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(w + 128 + 16 * strip)));
#pragma GCC unroll 16
                    for (int k = 0; k < S::kUnit; k++) {
                        if (BITS == 4) {
                            const __m256i left = _mm256_slli_epi32(S::shift(k) % 8 ? high : low, 24 - S::shift(k) / 8 * 8);
                            add<MT>(part, k, _mm256_cvtepi32_ps(_mm256_srai_epi32(left, 24)), x);
                            continue;
                        }
                        __m256i code = _mm256_and_si256(_mm256_srli_epi32(word, S::shift(k)), mask);
                        if (BITS == 3) {
                            const __m256i top = _mm256_and_si256(_mm256_srli_epi32(tops, S::top(k)), _mm256_set1_epi32(1));
                            code = _mm256_or_si256(code, _mm256_slli_epi32(top, 2));
                        }
                        add<MT>(part, k, _mm256_cvtepi32_ps(_mm256_sub_epi32(code, center)), x);
                    }
                }
                const int64_t index = (block * groups + g) * kRows + 8 * strip;
                const __m256 scale = load_scale(p, index);
                __m256 zero = _mm256_setzero_ps();
                if (p.zero) {
                    const __m256i stored = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p.zero + index)));
                    zero = _mm256_cvtepi32_ps(_mm256_sub_epi32(stored, center));
                }
                for (int t = 0; t < MT; t++) {
                    float* to = out + t * kRows + 8 * strip;
                    const __m256 sum = _mm256_set1_ps(panel.sums[t * groups + g]);
                    __m256 both = _mm256_add_ps(part[t][0], part[t][1]);
                    if (BITS == 4) both = _mm256_mul_ps(both, _mm256_set1_ps(0.25f));
                    both = _mm256_fnmadd_ps(zero, sum, both);
                    _mm256_store_ps(to, _mm256_fmadd_ps(scale, both, _mm256_load_ps(to)));
                }
            }
    }
};

// Four times an E2M1 value is a small integer: a byte look-up does 32 codes at once, and the quarters go into the block's scale.
struct Fp4 : FloatPanels<4> {
    static constexpr int kWidth = 0;
    static constexpr bool kPairs = false;

    static __m256 quarter_scale(const Problem& p, const uint8_t* at) {
        const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at));
        if (p.scale_is_e8m0) {
            const __m256i bits = _mm256_max_epi32(_mm256_slli_epi32(byte, 23), _mm256_set1_epi32(1 << 22));
            return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0.25f));
        }
        return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(byte, 20)), _mm256_set1_ps(0x1p118f));
    }

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        const int64_t groups = p.k / p.group;
        const __m256i mask = _mm256_set1_epi8(15);
        const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kE2M1));
        memset(out, 0, MT * kRows * sizeof(float));
        for (int64_t g = 0; g < groups; g++)
            for (int strip = 0; strip < kStrips; strip++) {
                const uint8_t* w = p.codes + (block * p.k + g * p.group) * 16 + 32 * strip;
                const float* x = (const float*)panel.data + g * p.group * MT;
                __m256 part[MT][2];
                for (int t = 0; t < MT; t++) part[t][0] = part[t][1] = _mm256_setzero_ps();
                for (int64_t i = 0; i < p.group / 8; i++, w += 128, x += 8 * MT) {
                    const __m256i word = load(w);
                    const __m256i low = _mm256_shuffle_epi8(table, _mm256_and_si256(word, mask));
                    const __m256i high = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(word, 4), mask));
#pragma GCC unroll 8
                    for (int k = 0; k < 8; k++) {
                        const int byte = Stored<4>::shift(k) / 8;
                        const __m256i codes = Stored<4>::shift(k) % 8 ? high : low;
                        const __m256 weight =
                            _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(codes, 24 - 8 * byte), 24));
#pragma GCC unroll 4
                        for (int t = 0; t < MT; t++)
                            part[t][k & 1] = _mm256_fmadd_ps(weight, _mm256_set1_ps(x[k * MT + t]), part[t][k & 1]);
                    }
                }
                const __m256 scale = quarter_scale(p, (const uint8_t*)p.scale + (block * groups + g) * kRows + 8 * strip);
                for (int t = 0; t < MT; t++) {
                    float* to = out + t * kRows + 8 * strip;
                    _mm256_store_ps(to, _mm256_fmadd_ps(scale, _mm256_add_ps(part[t][0], part[t][1]), _mm256_load_ps(to)));
                }
            }
    }
};

// vpermilps reads two bits of each lane as its index, which pick one of the four subset sums of two tokens' values.
struct Dual : SubsetSums<2> {
    static constexpr int kWidth = 0;
    static constexpr bool kPairs = false;

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        const int64_t groups = p.k / p.group, units = Planes::units(p);
        memset(out, 0, MT * kRows * sizeof(float));
        for (int64_t g = 0; g < groups; g++)
            for (int strip = 0; strip < kStrips; strip++) {
                const uint8_t* w = Planes::at(p, block, g * units * Planes::kUnit) + 32 * strip;
                const float* x = (const float*)panel.data + g * units * kTables * kEntries * MT;
                __m256 part[2][MT];
                for (int t = 0; t < MT; t++) part[0][t] = part[1][t] = _mm256_setzero_ps();
                for (int64_t i = 0; i < units; i++, w += Planes::kUnitBytes) {
                    const __m256i word = load(w);
#pragma GCC unroll 8
                    for (int j = 0; j < kTables; j++)
#pragma GCC unroll 4
                        for (int t = 0; t < MT; t++, x += kEntries) {
                            const __m256 table = _mm256_broadcast_ps((const __m128*)x);
#pragma GCC unroll 2
                            for (int plane = 0; plane < 2; plane++) {
                                const __m256i index = _mm256_srli_epi32(word, 16 * plane + 2 * j);
                                part[plane][t] = _mm256_add_ps(part[plane][t], _mm256_permutevar_ps(table, index));
                            }
                        }
                }
                for (int plane = 0; plane < 2; plane++) {
                    const __m256 scale = load_scale(p, Planes::scale_at(p, block, g, plane) + 8 * strip);
                    for (int t = 0; t < MT; t++) {
                        float* to = out + t * kRows + 8 * strip;
                        _mm256_store_ps(to, _mm256_fmadd_ps(scale, part[plane][t], _mm256_load_ps(to)));
                    }
                }
            }
    }
};

}  // namespace

void avx2_dual(const Problem& p) { run<Dual>(p); }
void avx2_fp4(const Problem& p) { run<Fp4>(p); }
void avx2_a8w4(const Problem& p) { run<A8W4>(p); }
void avx2_w8a8(const Problem& p) { run<W8A8>(p); }
void avx2_weight_only(const Problem& p) { LOWBIT_BY_BITS(p, WeightOnly) }
void avx2_rotate(const Rotation& r) { rotate_tokens(r); }
void avx2_shift(const Shift& s) { shift_tokens(s); }
