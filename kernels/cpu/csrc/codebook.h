// codebook: `vector` neighbouring k of a row are a sum of one entry of each of `books` codebooks, times one scale per row.
//
//     y[m, n] = s[n] * sum_{j, b} <x[m, tile j], C[b, code[n, j, b]]>
//
// A column is the codes of one tile and one book. Codes are [columns/16, N/32, 16, 32], codebooks float32 [books, vector, 256].
// Few tokens: a table of a token's products with all 256 entries is made once per column, and serves every row: a look-up and
// an addition do the work of `vector` multiplications, in float32. So many tables as the L1 cache holds meet all rows in turn.
#pragma once
#include "driver.h"

namespace {

constexpr int kEntries = 256;
constexpr int kMostBooks = 8;
constexpr int kTables = 16;            // columns at a time: 16 KiB of tables
constexpr int64_t kCodesAhead = 1024;  // bytes asked for ahead: two blocks

struct Columns {
    static int64_t count(const Problem& p) { return p.k / p.vector * p.books; }
    static const uint8_t* at(const Problem& p, int64_t block, int64_t column) {
        return p.codes + ((column / kTables * p.blocks + block) * kTables + column % kTables) * kRows;
    }
};

// A Lookup supplies
//   make(book, tile, vector, table)                   table [256]: products of a token's tile with the entries, as it reads them
//   add(p, block, both, column, count, tables, sums)  sums [64] += look-ups in `count` columns of a block, or of it and the next
template <class Lookup>
inline void look_up(const Problem& p) {
    const int64_t columns = Columns::count(p), pairs = ceil_div(p.blocks, 2);
    const int threads = p.m * p.blocks * kRows * p.k < kSerialWork ? 1 : max_threads();
    parallel(threads, pairs, [&](int64_t begin, int64_t end) {
        static thread_local Scratch buffer;
        const int64_t table_floats = kTables * kEntries, sum_floats = (end - begin) * 2 * kRows;
        float* tables = (float*)buffer.at_least(4 * (table_floats + sum_floats + p.k));
        float *sums = tables + table_floats, *x = sums + sum_floats;
        for (int64_t t = 0; t < p.m; t++) {
            to_float(x, (const char*)p.x + t * p.k * element_size(p.dtype), p.k, p.dtype);
            memset(sums, 0, 4 * sum_floats);
            for (int64_t column = 0; column < columns; column += kTables) {
                const int count = (int)min64(kTables, columns - column);
                for (int i = 0; i < count; i++) {
                    const int at = (int)column + i, tile = at / p.books, book = at % p.books;
                    Lookup::make(p.book + book * p.vector * kEntries, x + tile * p.vector, p.vector, tables + i * kEntries);
                }
                for (int64_t pair = begin; pair < end; pair++)
                    Lookup::add(p, 2 * pair, 2 * pair + 1 < p.blocks, column, count, tables, sums + (pair - begin) * 2 * kRows);
            }
            for (int64_t block = 2 * begin; block < min64(2 * end, p.blocks); block++)
                store<Lookup>(p, block, t, 1, sums + (block - 2 * begin) * kRows, nullptr);
        }
    });
}

// Without look-ups in registers: eight rows' codes as one word, one load for each.
struct PlainLookup {
    using Acc = float;

    static void make(const float* book, const float* tile, int vector, float* table) {
        for (int e = 0; e < kEntries; e += kLanes) {
            float sum[kLanes] = {};
            for (int d = 0; d < vector; d++)
                for (int l = 0; l < kLanes; l++) sum[l] += book[d * kEntries + e + l] * tile[d];
            memcpy(table + e, sum, sizeof sum);
        }
    }

    static void add(const Problem& p, int64_t block, bool both, int64_t column, int count, const float* tables, float* sums) {
        for (int64_t r = 0; r < (both ? 2 : 1) * kRows; r += 8) {
            const uint8_t* codes = Columns::at(p, block + r / kRows, column) + r % kRows;
            float sum[8];
            memcpy(sum, sums + r, sizeof sum);
            for (int i = 0; i < count; i++) {
                uint64_t word;
                memcpy(&word, codes + i * kRows, sizeof word);
                const float* table = tables + i * kEntries;
#pragma GCC unroll 8
                for (int l = 0; l < 8; l++, word >>= 8) sum[l] += table[word & 255];
            }
            memcpy(sums + r, sum, sizeof sum);
        }
    }
};

}  // namespace
