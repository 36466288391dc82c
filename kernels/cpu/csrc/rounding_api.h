// Levels for a block of channels, kernels/rounding.py: the description of one call, and the entry of each instruction set.
#pragma once
#include "lowbit.h"

enum LevelKind { kAffine = 0, kFloat = 1, kTwoBits = 2 };  // as in kernels/rounding.py

struct Channels {
    const float* start;   // [channels, rows]: the weight, or half the slope
    float* level;         // [channels, rows]: written, or moved in place
    const float* step;    // [channels, rows]
    const float* reach;   // [channels, rows], descent only
    const float* table;   // [channels, rows], none for floats
    const float* factor;  // [channels, channels]
    float* moved;         // [channels, rows]: errors, or what was taken off
    int64_t rows;
    int channels;
    LevelKind kind;
    float numbers[3];
};

struct RoundingTable {
    void (*gptq)(const Channels&);
    void (*descend)(const Channels&);
};

void portable_gptq(const Channels&);
void portable_descend(const Channels&);
#if defined(__x86_64__)
void avx2_gptq(const Channels&);
void avx2_descend(const Channels&);
void avx512_gptq(const Channels&);
void avx512_descend(const Channels&);
#endif
