// Attention: the description of one call, and the entry of each instruction set.
//
// Words: B batch, H query heads, Hkv key-value heads, G = H / Hkv, T queries per head, S keys, D head dimension. The
// G * T queries that share one key-value head are its rows: row r is query r / G of head r % G of the group.
#pragma once
#include "lowbit.h"

constexpr int64_t kMaxDim = 256;

struct Strides {  // in elements; D is contiguous
    int64_t batch, head, token;
};

struct Attention {
    const void* q;           // [B, H, T, D] of dtype
    const void *k, *v;       // [B, Hkv, S, D] of dtype, or int8 when there are scales
    void* y;                 // [B, T, H, D] of dtype, contiguous
    const float *k_scale, *v_scale;  // [B, Hkv, S] contiguous, or both null
    const float* k_channel;  // [Hkv, D]: a key is code * k_scale * k_channel; null where there are no scales
    const int64_t* first;    // [B]: keys before it are not seen; null: 0
    Strides q_stride, k_stride, v_stride;
    int64_t batch, heads, kv_heads, tokens, keys, dim;
    int64_t start;           // query t sees keys up to start + t; -1: all S
    float scale;
    DType dtype;
};

struct Append {
    const void *k, *v;  // [B, Hkv, T, D] of dtype
    void *k_cache, *v_cache;  // [B, Hkv, S, D] contiguous, of dtype or int8 when there are scales
    float *k_scale, *v_scale;
    const float* k_channel;
    Strides k_stride, v_stride;
    int64_t batch, kv_heads, tokens, keys, dim, start;
    DType dtype;
};

struct AttentionTable {
    void (*attend)(const Attention&);
    void (*append)(const Append&);
};

void portable_attend(const Attention&);
void portable_append(const Append&);
#if defined(__x86_64__)
void avx2_attend(const Attention&);
void avx2_append(const Append&);
void avx512bf16_attend(const Attention&);
void avx512bf16_append(const Append&);
void amx_attend(const Attention&);
void amx_append(const Append&);
#endif
