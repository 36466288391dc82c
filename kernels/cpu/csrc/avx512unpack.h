// Codes to bfloat16, exact, neighbouring k side by side: [k / 2, 32, 2], which both vdpbf16ps and AMX tiles read.
#pragma once
#include "avx512weights.h"

namespace {

inline __m512i broadcast_pair(const void* x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return _mm512_set1_epi32(pair);
}

// float32 [columns] that bfloat16 holds -> token t of a panel [columns / 2, tokens, 2].
inline void put_pairs(const float* values, int64_t columns, int t, const Panel<float>& panel) {
    uint16_t* out = (uint16_t*)panel.data + 2 * t;
    for (int64_t i = 0; i < columns; i += 2, out += 2 * panel.tokens) {
        out[0] = (uint16_t)(bits_of(values[i]) >> 16);
        out[1] = (uint16_t)(bits_of(values[i + 1]) >> 16);
    }
}

// bfloat16 of sixteen values that it holds, twice over: a look-up sees five bits, of which four are the code.
inline __m512i bf16_twice(__m512 values) {
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(values), 16)));
}

// bfloat16 of what a code stands for, for every 5-bit index, of which only the low bits are the code.
template <int BITS>
inline __m512i bf16_table(const Problem& p, int64_t block) {
    if constexpr (BITS == 4) return bf16_twice(float_values(quarters(p, block)));
    alignas(64) uint16_t entry[32];
    for (int i = 0; i < 32; i++) entry[i] = bf16_of((float)((i & ((1 << BITS) - 1)) - Stored<BITS>::kCenter));
    return _mm512_load_si512(entry);
}

template <int BITS>
inline void unpack_bf16(const Problem& p, int64_t block, const uint8_t* w, int64_t units, uint16_t* to) {
    using S = Stored<BITS>;
    const __m512i table = bf16_table<BITS == 8 ? 4 : BITS>(p, block);
    for (int64_t i = 0; i < units; i++, w += S::kUnitBytes, to += S::kUnit * kRows)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            if constexpr (BITS == 8) {
                const Words<8> words(w, h);
                const __m512 none = _mm512_setzero_ps();
#pragma GCC unroll 2
                for (int k = 0; k < 4; k += 2) {  // a code fits the upper half of a float32
                    const __m512i even = _mm512_srli_epi32(_mm512_castps_si512(words.weight(k, none)), 16);
                    const __m512i odd = _mm512_castps_si512(words.weight(k + 1, none));
                    _mm512_store_si512(to + k * kRows + 32 * h, _mm512_or_si512(even, odd));
                }
            } else {
                const __m512i word = _mm512_loadu_si512(w + 64 * h);
                __m512i tops = _mm512_setzero_si512();
                if constexpr (BITS == 3)  // a byte of top bits beside each half word of codes
                    tops = _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(w + 128 + 32 * h))), 2);
#pragma GCC unroll 8
                for (int k = 0; k < S::kUnit; k += 2) {
                    __m512i index = _mm512_srli_epi16(word, S::shift(k));
                    if constexpr (BITS == 3)
                        index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), index, _mm512_srli_epi16(tops, S::top(k)), 0xCA);
                    _mm512_store_si512(to + k * kRows + 32 * h, _mm512_permutexvar_epi16(index, table));
                }
            }
        }
}

}  // namespace
