// What the translation units share: the description of one call and the table of kernels of one instruction set.
//
// Words: M tokens, N out features, K in features, G group length along K. Weights are stored in blocks of 32 rows
// (two 512-bit registers of 16 rows); N is padded to whole blocks, so a block is always complete in memory. Several
// layers that read the same tokens can lie one after the other in one weight; each then has an output of its own.
#pragma once
#include <cstdint>

enum DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

constexpr int kRows = 32;         // rows per block
constexpr int kFew = 4;           // as many tokens are few, and a panel of them
constexpr int64_t kAhead = 2048;  // bytes of weights asked for ahead of use

struct Output {
    void* y;           // [M, n] of the problem's dtype
    const void* bias;  // [n] of bias_dtype, or null
    int64_t n;
    int64_t bias_dtype;
};

struct Problem {
    const void* x;           // [M, K] of dtype
    const uint8_t* codes;    // see kernels/cpu/layout.py
    const void* scale;       // a8w4: uint8 [N/32, K/G, 2, 32] (s2, then o as int8); weight only: float16 or float32 [N/32, K/G, 32];
                             // fp4: uint8 [N/32, K/G, 32]; dual: float16 or float32 [N/32, K/G, 2, 32]
    const uint8_t* zero;     // weight only: uint8 [N/32, K/G, 32], null when symmetric
    const float* row_scale;  // a8w4, w8a8, nvfp4, codebook: [N], where every layer but the last fills whole blocks
    const Output* outputs;   // [layers]
    int64_t m, k;
    int64_t blocks;          // of all layers
    int64_t group;           // K itself when there is one group per row
    DType dtype;
    bool scale_is_f32;       // weight only, dual
    int bits;                // weight only: 2, 3, 4 or 8
    bool scale_is_e8m0 = false;          // fp4: the block scale is 2^(byte - 127), else E4M3
    const uint8_t* kinds = nullptr;      // weight only, 4 bits: [N/32] exponent bits of the floats that codes are; null: integers
    const float* token_scale = nullptr;  // weight only: [M], null for 1
    int top = 127;                       // a8w4: codes of tokens are -top .. top
    float reach = 127.0f;                // likewise: a token's largest value, in its steps
    const float* book = nullptr;         // codebook: [books, vector, 256]
    int vector = 0, books = 0;
};

struct Rotation {
    const void* x;  // [M, K] of dtype
    void* y;        // likewise
    int64_t m, k, size;
    float scale;    // 1 / sqrt(size)
    DType dtype;
};

struct Shift {
    const void* x;         // [M, K] of dtype
    void* y;               // likewise: what is left when the scale is taken off
    float* scale;          // [M]
    const uint8_t* shift;  // [K], n below 32
    int64_t m, k;
    float step;            // what `dynamic` multiplies with a token's largest |x 2^n|, else the scale
    bool dynamic;
    float floor, half_steps, largest;  // of the number format, see kernels/minifloat.py
    int64_t group;                     // channels under one scale
    float scale_half_steps;            // 0; or groups' scales are rounded with it and go into y, and `scale` is 1
    DType dtype;
};

struct KernelTable {
    void (*a8w4)(const Problem&);
    void (*w8a8)(const Problem&);
    void (*weight_only)(const Problem&);
    void (*fp4)(const Problem&);
    void (*dual)(const Problem&);
    void (*codebook_few)(const Problem&);
    void (*codebook_many)(const Problem&);
    void (*rotate)(const Rotation&);
    void (*shift)(const Shift&);
};

// Each is defined by one translation unit, compiled with that unit's own instruction set flags.
void portable_a8w4(const Problem&);
void portable_w8a8(const Problem&);
void portable_weight_only(const Problem&);
void portable_fp4(const Problem&);
void portable_dual(const Problem&);
void portable_codebook(const Problem&);
void portable_rotate(const Rotation&);
void portable_shift(const Shift&);
#if defined(__x86_64__)
void avx2_a8w4(const Problem&);
void avx2_w8a8(const Problem&);
void avx2_weight_only(const Problem&);
void avx2_fp4(const Problem&);
void avx2_dual(const Problem&);
void avx2_rotate(const Rotation&);
void avx2_shift(const Shift&);
void avx512_a8w4(const Problem&);
void avx512_w8a8(const Problem&);
void avx512_weight_only(const Problem&);
void avx512_fp4(const Problem&);
void avx512_dual(const Problem&);
void avx512_codebook_few(const Problem&);
void avx512_codebook_many(const Problem&);
void avx512_rotate(const Rotation&);
void avx512_shift(const Shift&);
void avx512vbmi_codebook_few(const Problem&);
void avx512bf16_weight_only(const Problem&);
void avx512bf16_fp4(const Problem&);
void avx512bf16_dual(const Problem&);
void avx512bf16_codebook_many(const Problem&);
void amx_a8w4(const Problem&);
void amx_w8a8(const Problem&);
void amx_weight_only(const Problem&);
void amx_fp4(const Problem&);
void amx_dual(const Problem&);
void amx_codebook_many(const Problem&);
#endif
