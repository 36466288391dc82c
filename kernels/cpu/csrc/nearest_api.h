// Searches over codebooks, kernels/nearest.py: the description of one call, and the entry of each instruction set.
#pragma once
#include "lowbit.h"

struct Nearest {
    const float* target;  // [count, length]
    const float* book;    // [entries, length]
    const float* size;    // [entries]
    uint8_t* codes;       // [count]
    int64_t count;
    int entries, length;  // at most 256 entries
};

struct Sweep {
    const float* slope;  // [rows, tiles * length]
    uint8_t* codes;      // [rows, tiles, books], changed in place
    const float* book;   // [books, entries, length]
    const float* size;   // [tiles, books, entries]
    const float* block;  // [tiles * length, tiles * length]
    float* moved;        // as slope
    int64_t rows, tiles;
    int books, entries, length;
};

struct SearchTable {
    void (*nearest)(const Nearest&);
    void (*sweep)(const Sweep&);
};

void portable_nearest(const Nearest&);
void portable_sweep(const Sweep&);
#if defined(__x86_64__)
void avx2_nearest(const Nearest&);
void avx2_sweep(const Sweep&);
void avx512_nearest(const Nearest&);
void avx512_sweep(const Sweep&);
#endif
