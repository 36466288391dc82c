// Look-ups of codebook with AVX-512 VBMI (Ice Lake, Zen 4 and later). vpermi2b looks 64 rows up in 128 bytes, so a table of 256
// floats is kept as four planes of bytes: two look-ups and a choice give one byte of 64 floats, and unpacking puts the four
// bytes of each together again, exactly. A quarter of the instructions that vpermi2ps takes.
#include "avx512codebook.h"

namespace {

// Where a byte of each of 32 floats lies, twice.
inline __m512i bytes_of_floats(int byte) {
    alignas(64) uint8_t at[64];
    for (int i = 0; i < 64; i++) at[i] = (uint8_t)(i % 32 * 4 + byte);
    return _mm512_load_si512(at);
}

struct ByteLookup {
    using Acc = float;

    // bytes [4, 256]
    static void make(const float* book, const float* tile, int vector, float* table) {
        WideLookup::make(book, tile, vector, table);
        __m512i whole[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) whole[i] = _mm512_load_si512(table + 16 * i);
#pragma GCC unroll 4
        for (int byte = 0; byte < 4; byte++) {
            const __m512i index = bytes_of_floats(byte);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m512i low = _mm512_permutex2var_epi8(whole[4 * i], index, whole[4 * i + 1]);
                const __m512i high = _mm512_permutex2var_epi8(whole[4 * i + 2], index, whole[4 * i + 3]);
                _mm512_store_si512((char*)table + byte * kEntries + 64 * i, _mm512_mask_blend_epi32(0xFF00, low, high));
            }
        }
    }

    static void add(const Problem& p, int64_t block, bool both, int64_t column, int count, const float* tables, float* sums) {
        const int64_t next = both ? 1 : 0;  // a last block alone is looked up twice
        const uint8_t *first = Columns::at(p, block, column), *second = Columns::at(p, block + next, column);
        // unpacking takes 4 rows of every 16 at a time: put those there that shall lie side by side
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        __m512 sum[4];
        for (int i = 0; i < 4; i++) sum[i] = _mm512_load_ps(sums + 16 * i);
        for (int i = 0; i < count; i++, first += kRows, second += kRows, tables += kEntries) {
            _mm_prefetch((const char*)(i % 2 ? second : first) + kCodesAhead, _MM_HINT_T0);
            const __m256i lower = _mm256_loadu_si256((const __m256i*)first), upper = _mm256_loadu_si256((const __m256i*)second);
            const __m512i codes =
                _mm512_permutexvar_epi32(order, _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1));
            const __mmask64 top = _mm512_movepi8_mask(codes);
            __m512i byte[4];
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) {
                const char* plane = (const char*)tables + b * kEntries;
                const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(plane), codes, _mm512_load_si512(plane + 64));
                const __m512i high =
                    _mm512_permutex2var_epi8(_mm512_load_si512(plane + 128), codes, _mm512_load_si512(plane + 192));
                byte[b] = _mm512_mask_blend_epi8(top, low, high);
            }
            const __m512i even0 = _mm512_unpacklo_epi8(byte[0], byte[1]), even1 = _mm512_unpacklo_epi8(byte[2], byte[3]);
            const __m512i odd0 = _mm512_unpackhi_epi8(byte[0], byte[1]), odd1 = _mm512_unpackhi_epi8(byte[2], byte[3]);
            sum[0] = _mm512_add_ps(sum[0], _mm512_castsi512_ps(_mm512_unpacklo_epi16(even0, even1)));
            sum[1] = _mm512_add_ps(sum[1], _mm512_castsi512_ps(_mm512_unpackhi_epi16(even0, even1)));
            sum[2] = _mm512_add_ps(sum[2], _mm512_castsi512_ps(_mm512_unpacklo_epi16(odd0, odd1)));
            sum[3] = _mm512_add_ps(sum[3], _mm512_castsi512_ps(_mm512_unpackhi_epi16(odd0, odd1)));
        }
        for (int i = 0; i < 4; i++) _mm512_store_ps(sums + 16 * i, sum[i]);
    }
};

}  // namespace

void avx512vbmi_codebook_few(const Problem& p) { look_up<ByteLookup>(p); }
