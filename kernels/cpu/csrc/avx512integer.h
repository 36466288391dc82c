// What the AVX-512 and AMX versions of the integer kernels share: their one and few token ways, and unpacked slices.
// vpdpbusd multiplies unsigned by signed bytes and adds four products to an int32 lane; a lane is one weight row, the
// four bytes are four neighbouring k.
//
// Few tokens, 4-bit codes u: u is already the unsigned operand, so the dot product runs on raw codes and the group's
// scale and offset are applied once per group: acc += s2 * sum(u * q) + o * sum(q). Everything stays in int32.
// Many tokens: w8 + 128 is the unsigned operand, and 128 * sum(q) is taken off each token at the end.
#pragma once
#include "avx512tokens.h"

namespace {

constexpr int kSlice = 576;  // most k per unpacked slice: 32 rows x 576 bytes are a third to a half of the L1 cache

inline __m512i broadcast4(const int8_t* x) {
    int32_t v;
    memcpy(&v, x, 4);
    return _mm512_set1_epi32(v);
}

// out [tokens, 32] -= 128 * (sum of the token's codes), for panels of `width` tokens.
inline void take_off_shift(const Problem& p, const Panel<int32_t>* panels, int count, int width, int32_t* out) {
    const int64_t groups = p.k / p.group;
    for (int i = 0; i < count; i++)
        for (int t = 0; t < panels[i].tokens; t++) {
            int32_t total = 0;
            for (int64_t g = 0; g < groups; g++) total += panels[i].sums[t * groups + g];
            int32_t* row = out + (i * width + t) * kRows;
            for (int r = 0; r < kRows; r++) row[r] -= 128 * total;
        }
}

struct A8W4 : Avx512Panels {
    static constexpr bool kPairs = true;

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<int32_t>& panel, int32_t* out) {
        const int64_t groups = p.k / p.group, stride = p.k * (kRows / 2);
        const uint8_t* w = p.codes + block * stride;
        const uint8_t* params = (const uint8_t*)p.scale + block * groups * 2 * kRows;
        const int8_t* x = (const int8_t*)panel.data;
        const __m512i mask = _mm512_set1_epi8(15);
        __m512i acc[B][MT][2];
        for (int b = 0; b < B; b++)
            for (int t = 0; t < MT; t++) acc[b][t][0] = acc[b][t][1] = _mm512_setzero_si512();
        for (int64_t g = 0; g < groups; g++, params += 2 * kRows) {
            __m512i part[B][MT][2];
            for (int b = 0; b < B; b++)
                for (int t = 0; t < MT; t++) part[b][t][0] = part[b][t][1] = _mm512_setzero_si512();
            for (int64_t i = 0; i < p.group / 8; i++, w += 128, x += 8 * MT)
#pragma GCC unroll 2
                for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        const uint8_t* at = w + b * stride + 64 * h;
                        _mm_prefetch((const char*)at + kAhead, _MM_HINT_T0);
                        const __m512i packed = _mm512_loadu_si512(at);
                        const __m512i low = _mm512_and_si512(packed, mask);
                        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
#pragma GCC unroll 4
                        for (int t = 0; t < MT; t++) {
                            part[b][t][h] = _mm512_dpbusd_epi32(part[b][t][h], low, broadcast4(x + 4 * t));
                            part[b][t][h] = _mm512_dpbusd_epi32(part[b][t][h], high, broadcast4(x + 4 * (MT + t)));
                        }
                    }
#pragma GCC unroll 2
            for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const uint8_t* at = params + b * groups * 2 * kRows + 16 * h;
                    const __m512i s2 = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
                    const __m512i o = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(at + kRows)));
#pragma GCC unroll 4
                    for (int t = 0; t < MT; t++) {
                        const __m512i sum = _mm512_set1_epi32(panel.sums[t * groups + g]);
                        __m512i& to = acc[b][t][h];
                        to = _mm512_add_epi32(to, _mm512_mullo_epi32(s2, part[b][t][h]));
                        to = _mm512_add_epi32(to, _mm512_mullo_epi32(o, sum));
                    }
                }
        }
        for (int b = 0; b < B; b++)
            for (int t = 0; t < MT; t++)
                for (int h = 0; h < 2; h++) _mm512_store_si512(out + (b * MT + t) * kRows + 16 * h, acc[b][t][h]);
    }

    // u * s2 + o + 128 as bytes. No product of a valid weight exceeds 255, so one 16-bit multiplication does two codes.
    static const uint8_t* slice(const Problem& p, int64_t block, int64_t k0, int64_t k1, uint8_t* buffer) {
        const int64_t groups = p.k / p.group;
        const uint8_t* w = p.codes + (block * p.k + k0) * (kRows / 2);
        const uint8_t* params = (const uint8_t*)p.scale + block * groups * 2 * kRows;
        const __m512i mask = _mm512_set1_epi8(15);
        uint8_t* out = buffer;
        for (int64_t k = k0; k < k1;) {
            const int64_t g = k / p.group, end = min64(k1, (g + 1) * p.group);
            __m512i s2[2], o[2];
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const uint8_t* at = params + g * 2 * kRows + 16 * h;
                const __m512i scale = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
                const __m512i offset = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(at + kRows)));
                s2[h] = _mm512_or_si512(scale, _mm512_slli_epi32(scale, 16));
                const __m512i pair = _mm512_or_si512(offset, _mm512_slli_epi32(offset, 8));
                o[h] = _mm512_xor_si512(_mm512_or_si512(pair, _mm512_slli_epi32(pair, 16)), _mm512_set1_epi8(-128));
            }
            for (; k < end; k += 8, w += 128, out += 256)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    const __m512i packed = _mm512_loadu_si512(w + 64 * h);
                    const __m512i low = _mm512_mullo_epi16(_mm512_and_si512(packed, mask), s2[h]);
                    const __m512i high = _mm512_mullo_epi16(_mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), s2[h]);
                    _mm512_store_si512(out + 64 * h, _mm512_add_epi8(low, o[h]));
                    _mm512_store_si512(out + 128 + 64 * h, _mm512_add_epi8(high, o[h]));
                }
        }
        return buffer;
    }
};

struct W8A8 : Avx512Panels {
    static constexpr bool kPairs = true;

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<int32_t>& panel, int32_t* out) {
        const int64_t kp = padded(p), stride = kp * kRows;
        const uint8_t* w = p.codes + block * stride;
        const int8_t* x = (const int8_t*)panel.data;
        __m512i acc[B][MT][2][2];
        for (int b = 0; b < B; b++)
            for (int t = 0; t < MT; t++)
                for (int h = 0; h < 2; h++) acc[b][t][h][0] = acc[b][t][h][1] = _mm512_setzero_si512();
        for (int64_t i = 0; i < kp / 8; i++, w += 256, x += 8 * MT)
#pragma GCC unroll 2
            for (int b = 0; b < B; b++)
#pragma GCC unroll 2
                for (int s = 0; s < 2; s++)
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        const uint8_t* at = w + b * stride + 128 * s + 64 * h;
                        _mm_prefetch((const char*)at + kAhead, _MM_HINT_T0);
                        const __m512i codes = _mm512_loadu_si512(at);
#pragma GCC unroll 4
                        for (int t = 0; t < MT; t++)
                            acc[b][t][h][s] = _mm512_dpbusd_epi32(acc[b][t][h][s], codes, broadcast4(x + 4 * (s * MT + t)));
                    }
        for (int b = 0; b < B; b++)
            for (int t = 0; t < MT; t++)
                for (int h = 0; h < 2; h++) {
                    const __m512i sum = _mm512_add_epi32(acc[b][t][h][0], acc[b][t][h][1]);
                    const __m512i shift = _mm512_set1_epi32(128 * panel.sums[t]);
                    _mm512_store_si512(out + (b * MT + t) * kRows + 16 * h, _mm512_sub_epi32(sum, shift));
                }
    }

    static const uint8_t* slice(const Problem& p, int64_t block, int64_t k0, int64_t, uint8_t*) {
        return p.codes + (block * padded(p) + k0) * kRows;
    }
};


}  // namespace
