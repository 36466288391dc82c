// codebook for AVX-512, shared by the float, BF16 and AMX units.
//
// A table of 256 floats is 16 registers: vpermi2ps looks 16 rows up in two of them by the lower five bits of a code, and the
// upper three choose among the eight answers. Few tokens look up products (codebook.h). Many tokens: the entries themselves
// are looked up into slices, summed over the books in float32, and rounded to bfloat16 where the Engine multiplies that.
#pragma once
#include "avx512slices.h"
#include "codebook.h"

namespace {

// Codes of 16 rows.
struct Sixteen {
    __m512i index;
    __mmask16 bit5, bit6, bit7;

    static Sixteen load(const uint8_t* codes) {
        const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
        return {index, _mm512_test_epi32_mask(index, _mm512_set1_epi32(32)),
                _mm512_movepi32_mask(_mm512_slli_epi32(index, 25)), _mm512_movepi32_mask(_mm512_slli_epi32(index, 24))};
    }
    __m512 quarter(const float* table) const {
        const __m512 low = _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
        const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32), index, _mm512_loadu_ps(table + 48));
        return _mm512_mask_blend_ps(bit5, low, high);
    }
    // Their entries of a table [256].
    __m512 of(const float* table) const {
        const __m512 low = _mm512_mask_blend_ps(bit6, quarter(table), quarter(table + 64));
        const __m512 high = _mm512_mask_blend_ps(bit6, quarter(table + 128), quarter(table + 192));
        return _mm512_mask_blend_ps(bit7, low, high);
    }
};

struct WideLookup {
    using Acc = float;

    static void make(const float* book, const float* tile, int vector, float* table) {
        __m512 sum[kEntries / 16];
#pragma GCC unroll 16
        for (int i = 0; i < kEntries / 16; i++) sum[i] = _mm512_setzero_ps();
        for (int d = 0; d < vector; d++, book += kEntries)
#pragma GCC unroll 16
            for (int i = 0; i < kEntries / 16; i++)
                sum[i] = _mm512_fmadd_ps(_mm512_loadu_ps(book + 16 * i), _mm512_set1_ps(tile[d]), sum[i]);
#pragma GCC unroll 16
        for (int i = 0; i < kEntries / 16; i++) _mm512_store_ps(table + 16 * i, sum[i]);
    }

    static void add(const Problem& p, int64_t block, bool both, int64_t column, int count, const float* tables, float* sums) {
        for (int b = 0; b < (both ? 2 : 1); b++, sums += kRows) {
            const uint8_t* codes = Columns::at(p, block + b, column);
            __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + 16);
            for (int i = 0; i < count; i++, codes += kRows) {
                if (i % 2 == 0) _mm_prefetch((const char*)codes + kCodesAhead, _MM_HINT_T0);
                low = _mm512_add_ps(low, Sixteen::load(codes).of(tables + i * kEntries));
                high = _mm512_add_ps(high, Sixteen::load(codes + 16).of(tables + i * kEntries));
            }
            _mm512_store_ps(sums, low);
            _mm512_store_ps(sums + 16, high);
        }
    }
};

// Neighbouring k of 16 rows -> [2, 32] float32, or [32, 2] bfloat16.
inline void put_two(__m512 even, __m512 odd, int h, float* to) {
    _mm512_store_ps(to + 16 * h, even);
    _mm512_store_ps(to + kRows + 16 * h, odd);
}
inline void put_two(__m512 even, __m512 odd, int h, uint16_t* to) {
    _mm512_store_si512(to + 32 * h, _mm512_or_si512(_mm512_srli_epi32(rounded_bf16(even), 16), rounded_bf16(odd)));
}

template <class Engine>
struct Codebook {
    using Acc = float;
    using Element = typename Engine::Element;
    using Slices = ScaledSlices<Engine, 2>;
    static constexpr bool kInteger = false, kPairs = false;
    static constexpr int kWidth = Engine::kWidth;

    static int64_t panel_bytes(const Problem& p, bool) { return Engine::panel_bytes(Slices::columns(p)); }
    static void gather(const Problem& p, const char* row, int t, const Panel<float>& panel) { Slices::gather(p, row, t, panel); }

    template <int MT, int B>
    static void few(const Problem&, int64_t, const Panel<float>&, float*) {
        abort();  // few tokens take look_up
    }

    // Entries of k0 to k0 + size -> slice. BOOKS: 0 where their number is known at run time only.
    template <int BOOKS>
    static void unpack(const Problem& p, int64_t block, int64_t k0, int64_t size, Element* to) {
        const int books = BOOKS ? BOOKS : p.books;
        int64_t column = k0 / p.vector * books;
        for (int64_t k = 0; k < size; k += p.vector, column += books)
            for (int h = 0; h < 2; h++) {
                _mm_prefetch((const char*)Columns::at(p, block, column + 2 * kTables) + 64 * h, _MM_HINT_T0);
                Sixteen picked[BOOKS ? BOOKS : kMostBooks];
                for (int b = 0; b < books; b++) picked[b] = Sixteen::load(Columns::at(p, block, column + b) + 16 * h);
                for (int d = 0; d < p.vector; d += 2) {
                    __m512 even = _mm512_setzero_ps(), odd = even;
#pragma GCC unroll 2
                    for (int b = 0; b < books; b++) {
                        const float* book = p.book + (b * p.vector + d) * kEntries;
                        even = _mm512_add_ps(even, picked[b].of(book));
                        odd = _mm512_add_ps(odd, picked[b].of(book + kEntries));
                    }
                    put_two(even, odd, h, to + (k + d) * kRows);
                }
            }
    }

    static void many(const Problem& p, int64_t block, const Panel<float>* panels, int count, float* out) {
        const auto way = p.books == 1 ? unpack<1> : p.books == 2 ? unpack<2> : unpack<0>;
        Slices::many(p, block, panels, count, out,
                     [&](int64_t k0, int64_t size, Element* to) { way(p, block, k0, size, to); });
    }
};

}  // namespace
