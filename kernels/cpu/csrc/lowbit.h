// What the translation units share: the description of one call and the table of kernels of one instruction set.
//
// Words: M tokens, N out features, K in features, G group length along K. Weights are stored in blocks of 32 rows
// (two 512-bit registers of 16 rows); N is padded to whole blocks, so a block is always complete in memory.
#pragma once
#include <cstdint>

enum DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

constexpr int kRows = 32;  // rows per block

struct Problem {
    const void* x;           // [M, K] of dtype
    void* y;                 // [M, N] of dtype
    const uint8_t* codes;    // see the layout notes of each kernel's Python wrapper
    const void* scale;       // a8w4: uint8 [N/32, K/G, 2, 32] (s2, then o as int8); w4a16: float16 or float32 [N/32, K/G, 32]
    const uint8_t* zero;     // w4a16: uint8 [N/32, K/G, 32], null when symmetric
    const float* row_scale;  // a8w4, w8a8: [N]
    const void* bias;        // [N] of bias_dtype, or null
    int64_t m, n, k;
    int64_t group;           // K itself when there is one group per row
    DType dtype, bias_dtype;
    bool scale_is_f32;       // w4a16
};

struct KernelTable {
    void (*a8w4)(const Problem&);
    void (*w8a8)(const Problem&);
    void (*w4a16)(const Problem&);
};

// Each is defined by one translation unit, compiled with that unit's own instruction set flags.
void portable_a8w4(const Problem&);
void portable_w8a8(const Problem&);
void portable_w4a16(const Problem&);
#if defined(__x86_64__)
void avx2_a8w4(const Problem&);
void avx2_w8a8(const Problem&);
void avx2_w4a16(const Problem&);
void avx512_a8w4(const Problem&);
void avx512_w8a8(const Problem&);
void avx512bf16_w4a16(const Problem&);
#endif
