// FP4 blocks: the value of the byte that scales a block. Codes are E2M1, stored as all 4-bit codes are in weights.h.
#pragma once
#include "weights.h"

namespace {

// E8M0: the byte is the exponent, and 0 the subnormal 2^-127. E4M3: into float32's fields, where 2^120 corrects the bias.
inline float block_scale(const Problem& p, uint8_t byte) {
    if (p.scale_is_e8m0) return float_of(byte ? (uint32_t)byte << 23 : 1u << 22);
    return float_of((uint32_t)byte << 20) * 0x1p120f;
}

}  // namespace
