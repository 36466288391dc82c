// Norms and activations: the description of one call, and the entry of each instruction set.
#pragma once
#include "lowbit.h"

enum ActivationKind : int32_t { kSilu = 0, kGelu = 1 };

struct Norm {
    const void* x;       // [M, K] of dtype, as everything here
    const void* weight;  // [K]
    const void* bias;    // [K] or null
    void* y;             // [M, K]
    int64_t m, k;
    float eps;
    bool centered;       // layer norm; else root mean square norm
    DType dtype;
};

struct Activation {
    const void *x, *by;  // [count] of dtype; y = f(x), or f(x) * by where by is not null
    void* y;
    int64_t count;
    ActivationKind kind;
    DType dtype;
};

struct PointwiseTable {
    void (*norm)(const Norm&);
    void (*activate)(const Activation&);
};

void portable_norm(const Norm&);
void portable_activate(const Activation&);
#if defined(__x86_64__)
void avx2_norm(const Norm&);
void avx2_activate(const Activation&);
void avx512_norm(const Norm&);
void avx512_activate(const Activation&);
#endif
