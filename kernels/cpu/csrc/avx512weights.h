// Weight-only kernels for AVX-512 in two ways, shared by the float, BF16 and AMX units.
//
// Few tokens run in float32 on codes looked up in registers (vpermps, 16 entries). 4-bit codes are looked up and
// multiplied. Of 2-bit codes a look-up takes two at once and gives x0 * c0 + x1 * c1 from a table made from the token;
// the top bits of 3-bit codes go four at a time through tables of their own. So a look-up and an addition do the work of
// two or four multiplications, and narrow codes are not slower than the memory they come from.
//
// Many tokens: a slice of codes, exact in any float type, is unpacked once and used by all panels. An Engine multiplies:
//   Element, kWidth                      of the unpacked slice; tokens of a panel
//   kSlice, kAlign                       k per slice; to what multiple of k groups are padded
//   panel_bytes(columns)                 bytes of a token
//   put(values, columns, t, panel)       float32 [columns] -> token t of the panel
//   unpack<BITS>(p, block, w, units, to) codes of a block -> slice
//   multiply(p, center, block, panel, stretches, count, slice, out)     out [kWidth, 32] += results
#pragma once
#include <immintrin.h>

#include "weights.h"

namespace {

inline __m512 load_scale(const Problem& p, int64_t index) {
    if (!p.scale) return _mm512_set1_ps(1.0f);  // it is in the weights
    if (p.scale_is_f32) return _mm512_loadu_ps((const float*)p.scale + index);
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)p.scale + index)));
}

// zero - center of 16 rows of one group.
inline __m512 load_zero(const Problem& p, int center, int64_t index) {
    const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p.zero + index)));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(zero, _mm512_set1_epi32(center)));
}

// out [MT, 32] (+)= scale * (part - (zero - center) * sum of the token over the group); the zero point at the group's end.
// part(t, h) gives 16 rows.
template <int MT, class Part>
inline void apply(const Problem& p, int center, int64_t block, const Panel<float>& panel, int64_t g, bool ends, bool add,
                  const Part& part, float* out) {
    const int64_t groups = p.k / p.group, index = (block * groups + g) * kRows;
    const bool shifted = p.zero && ends;
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        const __m512 scale = load_scale(p, index + 16 * h);
        const __m512 zero = shifted ? load_zero(p, center, index + 16 * h) : _mm512_setzero_ps();
#pragma GCC unroll 16
        for (int t = 0; t < MT; t++) {
            float* to = out + t * kRows + 16 * h;
            const __m512 before = add ? _mm512_load_ps(to) : _mm512_setzero_ps();
            __m512 sum = part(t, h);
            if (shifted) sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(panel.sums[t * groups + g]), sum);
            _mm512_store_ps(to, _mm512_fmadd_ps(scale, sum, before));
        }
    }
}

// Of a row of kQuarters: what the codes stand for.
inline __m512 float_values(const int8_t* quarters) {
    const __m512i four = _mm512_cvtepi8_epi32(_mm_load_si128((const __m128i*)quarters));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(four), _mm512_set1_ps(0.25f));
}

// Codes of one word or half word of 16 rows, k by k.
template <int BITS>
struct Words {
    __m512i word, tops;
    Words(const uint8_t* unit, int h) {
        word = _mm512_loadu_si512(unit + 64 * h);
        if constexpr (BITS == 3) tops = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(unit + 128 + 32 * h)));
    }
    // code k - center as float32
    __m512 weight(int k, __m512 table) const {
        if constexpr (BITS == 8) {
            const __m512i left = _mm512_slli_epi32(_mm512_xor_si512(word, _mm512_set1_epi8(-128)), 24 - 8 * k);
            return _mm512_cvtepi32_ps(_mm512_srai_epi32(left, 24));
        }
        __m512i index = _mm512_srli_epi32(word, Stored<BITS>::shift(k));
        if constexpr (BITS == 3) {
            const __m512i top = _mm512_srli_epi32(_mm512_slli_epi32(tops, 2), Stored<BITS>::top(k));
            index = _mm512_ternarylogic_epi32(_mm512_set1_epi32(3), index, top, 0xCA);  // the mask chooses bit by bit
        }
        return _mm512_permutexvar_ps(index, table);  // sees four bits of the index
    }
    static __m512 table(const Problem& p, int64_t block) {
        if constexpr (BITS == 4)
            return float_values(quarters(p, block));
        const __m512i code = _mm512_and_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32((1 << BITS) - 1));
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(Stored<BITS>::kCenter)));
    }
};

template <int BITS>
struct Few {
    using Acc = float;
    using S = Stored<BITS>;
    static constexpr bool kInteger = false, kPairs = true;
    static constexpr bool kTables = BITS <= 3;
    static constexpr int kPerUnit = BITS == 2 ? 8 * 16 : BITS == 3 ? 12 * 16 : S::kUnit;  // floats of a token per unit

    static int64_t panel_bytes(const Problem& p, bool) { return S::padded(p) / S::kUnit * kPerUnit * 4; }

    // [K / unit, 8 or 12 tables, tokens, 16]
    static void put_tables(const float* x, int64_t units, int t, const Panel<Acc>& panel) {
        const __m512i entry = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), three = _mm512_set1_epi32(3);
        const __m512i center = _mm512_set1_epi32(S::kCenter);
        const __m512 first = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(entry, three), center));
        const __m512 second = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(entry, 2), center));
        float* out = (float*)panel.data + 16 * t;
        for (int64_t u = 0; u < units; u++, x += 16) {
            for (int j = 0; j < 8; j++, out += 16 * panel.tokens) {
                const float* pair = x + j % 4 * 4 + j / 4;
                _mm512_store_ps(out, _mm512_fmadd_ps(first, _mm512_set1_ps(pair[0]), _mm512_mul_ps(second, _mm512_set1_ps(pair[2]))));
            }
            for (int j = 0; BITS == 3 && j < 4; j++, out += 16 * panel.tokens) {
                const float* four = x + j % 2 * 8 + j / 2;
                __m512 sum = _mm512_maskz_mov_ps(0xAAAA, _mm512_set1_ps(4 * four[0]));
                sum = _mm512_mask_add_ps(sum, 0xCCCC, sum, _mm512_set1_ps(4 * four[2]));
                sum = _mm512_mask_add_ps(sum, 0xF0F0, sum, _mm512_set1_ps(4 * four[4]));
                _mm512_store_ps(out, _mm512_mask_add_ps(sum, 0xFF00, sum, _mm512_set1_ps(4 * four[6])));
            }
        }
    }

    static void gather(const Problem& p, const char* row, int t, const Panel<Acc>& panel) {
        if constexpr (!kTables) return FloatPanels<BITS>::gather(p, row, t, panel);
        put_tables(FloatPanels<BITS>::values_of(p, row, t, panel), S::padded(p) / S::kUnit, t, panel);
    }

    // part [MT] of 16 rows += one unit
    template <int MT>
    static void unit(const uint8_t* w, int h, const float* x, __m512 table, __m512 (&part)[MT][2]) {
        const Words<BITS> words(w, h);
        if constexpr (!kTables) {
#pragma GCC unroll 8
            for (int k = 0; k < S::kUnit; k++) {
                const __m512 weight = words.weight(k, table);
#pragma GCC unroll 4
                for (int t = 0; t < MT; t++) part[t][h] = _mm512_fmadd_ps(weight, _mm512_set1_ps(x[k * MT + t]), part[t][h]);
            }
        } else {
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++, x += 16 * MT) {
                const __m512i index = _mm512_srli_epi32(words.word, 4 * j);
#pragma GCC unroll 4
                for (int t = 0; t < MT; t++)
                    part[t][h] = _mm512_add_ps(part[t][h], _mm512_permutexvar_ps(index, _mm512_load_ps(x + 16 * t)));
            }
#pragma GCC unroll 4
            for (int j = 0; BITS == 3 && j < 4; j++, x += 16 * MT) {
                const __m512i index = _mm512_srli_epi32(words.tops, 4 * j);
#pragma GCC unroll 4
                for (int t = 0; t < MT; t++)
                    part[t][h] = _mm512_add_ps(part[t][h], _mm512_permutexvar_ps(index, _mm512_load_ps(x + 16 * t)));
            }
        }
    }

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<Acc>& panel, float* out) {
        const int64_t groups = p.k / p.group, units = S::length(p) / S::kUnit, stride = S::padded(p) * 4 * BITS;
        const uint8_t* w = S::at(p, block, 0);
        const float* x = (const float*)panel.data;
        __m512 table[B];
        for (int b = 0; b < B; b++) table[b] = Words<BITS>::table(p, block + b);
        for (int64_t g = 0; g < groups; g++) {
            __m512 part[B][MT][2];
            for (int b = 0; b < B; b++)
                for (int t = 0; t < MT; t++) part[b][t][0] = part[b][t][1] = _mm512_setzero_ps();
            for (int64_t i = 0; i < units; i++, w += S::kUnitBytes, x += kPerUnit * MT)
#pragma GCC unroll 2
                for (int b = 0; b < B; b++) {
                    const uint8_t* at = w + b * stride;
#pragma GCC unroll 3
                    for (int line = 0; line < S::kUnitBytes; line += 64) _mm_prefetch((const char*)at + kAhead + line, _MM_HINT_T0);
                    unit<MT>(at, 0, x, table[b], part[b]);
                    unit<MT>(at, 1, x, table[b], part[b]);
                }
#pragma GCC unroll 2
            for (int b = 0; b < B; b++)
                apply<MT>(p, S::kCenter, block + b, panel, g, true, g > 0, [&](int t, int h) { return part[b][t][h]; },
                          out + b * MT * kRows);
        }
    }
};

// A run of k inside one group and one slice.
struct Stretch {
    int64_t group;
    int64_t column;   // in the panel, where groups are padded to Engine::kAlign
    int64_t at, size; // in the slice
    bool ends;        // the group ends here
};

template <int BITS, class Engine, class FewTokens = Few<BITS>>
struct WeightOnly : FewTokens {
    using S = Stored<BITS>;
    using Element = typename Engine::Element;
    static constexpr int kWidth = Engine::kWidth;

    static int64_t padded_length(const Problem& p) { return round_up(S::length(p), Engine::kAlign); }
    static int64_t panel_bytes(const Problem& p, bool many) {
        return many ? Engine::panel_bytes(p.k / p.group * padded_length(p)) : FewTokens::panel_bytes(p, many);
    }

    static void gather(const Problem& p, const char* row, int t, const Panel<float>& panel) {
        if (!panel.many) return FewTokens::gather(p, row, t, panel);
        static thread_local Scratch buffer;
        const float* values = FloatPanels<BITS>::values_of(p, row, t, panel);
        const int64_t groups = p.k / p.group, length = S::length(p), to = padded_length(p);
        if (length != to) {
            float* spread = (float*)buffer.at_least(groups * to * 4);
            memset(spread, 0, groups * to * 4);
            for (int64_t g = 0; g < groups; g++) memcpy(spread + g * to, values + g * length, length * 4);
            values = spread;
        }
        Engine::put(values, groups * to, t, panel);
    }

    static void many(const Problem& p, int64_t block, const Panel<float>* panels, int count, float* out) {
        alignas(64) Element slice[kRows * Engine::kSlice];
        Stretch list[Engine::kSlice / 16];
        const int64_t groups = p.k / p.group, length = S::length(p), to = padded_length(p);
        int64_t g = 0, done = 0;  // k of group g that earlier slices held
        while (g < groups) {
            int filled = 0;
            for (int64_t used = 0; g < groups && used < Engine::kSlice;) {
                const int64_t size = min64(length - done, Engine::kSlice - used), end = round_up(size, Engine::kAlign);
                Engine::template unpack<BITS>(p, block, S::at(p, block, g * length + done), size / S::kUnit, slice + used * kRows);
                memset(slice + (used + size) * kRows, 0, (end - size) * kRows * sizeof(Element));
                list[filled++] = {g, g * to + done, used, end, done + size == length};
                used += end;
                done = done + size == length ? 0 : done + size;
                g += done == 0;
            }
            for (int i = 0; i < count; i++)
                Engine::multiply(p, S::kCenter, block, panels[i], list, filled, slice, out + i * kWidth * kRows);
        }
    }
};

}  // namespace
