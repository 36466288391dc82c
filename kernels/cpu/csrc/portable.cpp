// The kernels in plain C++ for any processor: codes of eight k are spread out to [8, 32 rows], then every loop
// runs over rows with a constant bound, which compilers vectorize for whatever they target.
#include "codebook.h"
#include "dual.h"
#include "fp4.h"
#include "weights.h"
#include "rotation.h"
#include "shift.h"

namespace {

struct A8W4 : IntegerPanels {
    static constexpr int kWidth = 0;
    static constexpr bool kPairs = false;

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<int32_t>& panel, int32_t* out) {
        const int64_t groups = p.k / p.group;
        const uint8_t* w = p.codes + block * p.k * (kRows / 2);
        const uint8_t* params = (const uint8_t*)p.scale + block * groups * 2 * kRows;
        const int8_t* x = (const int8_t*)panel.data;
        for (int i = 0; i < MT * kRows; i++) out[i] = 0;
        for (int64_t g = 0; g < groups; g++, params += 2 * kRows) {
            int32_t part[MT][kRows] = {};
            for (int64_t i = 0; i < p.group / 8; i++, w += 128, x += 8 * MT) {
                int32_t codes[8][kRows];
                for (int b = 0; b < 4; b++)
                    for (int r = 0; r < kRows; r++) {
                        codes[b][r] = w[4 * r + b] & 15;
                        codes[4 + b][r] = w[4 * r + b] >> 4;
                    }
                for (int t = 0; t < MT; t++)
                    for (int k = 0; k < 8; k++) {
                        const int32_t q = x[(k / 4 * MT + t) * 4 + k % 4];
                        for (int r = 0; r < kRows; r++) part[t][r] += codes[k][r] * q;
                    }
            }
            for (int t = 0; t < MT; t++)
                for (int r = 0; r < kRows; r++)
                    out[t * kRows + r] += params[r] * part[t][r] + (int8_t)params[kRows + r] * panel.sums[t * groups + g];
        }
    }
};

struct W8A8 : IntegerPanels {
    static constexpr int kWidth = 0;
    static constexpr bool kPairs = false;

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<int32_t>& panel, int32_t* out) {
        const uint8_t* w = p.codes + block * padded(p) * kRows;
        const int8_t* x = (const int8_t*)panel.data;
        for (int i = 0; i < MT * kRows; i++) out[i] = 0;
        for (int64_t k = 0; k < padded(p); k += 4, w += 128, x += 4 * MT) {
            int32_t codes[4][kRows];
            for (int b = 0; b < 4; b++)
                for (int r = 0; r < kRows; r++) codes[b][r] = w[4 * r + b] - 128;
            for (int t = 0; t < MT; t++)
                for (int b = 0; b < 4; b++) {
                    const int32_t q = x[4 * t + b];
                    for (int r = 0; r < kRows; r++) out[t * kRows + r] += codes[b][r] * q;
                }
        }
    }
};

template <int BITS>
struct WeightOnly : FloatPanels<BITS> {
    using S = Stored<BITS>;
    static constexpr int kWidth = 0;
    static constexpr bool kPairs = false;

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        const int64_t groups = p.k / p.group;
        const uint8_t* w = S::at(p, block, 0);
        const int8_t* four = quarters(p, block);
        const float* x = (const float*)panel.data;
        for (int i = 0; i < MT * kRows; i++) out[i] = 0;
        for (int64_t g = 0; g < groups; g++) {
            float part[MT][kRows] = {};
            for (int64_t i = 0; i < S::length(p) / S::kUnit; i++, w += S::kUnitBytes, x += S::kUnit * MT) {
                uint32_t word[kRows];
                uint16_t tops[kRows] = {};
                memcpy(word, w, sizeof word);
                if (BITS == 3) memcpy(tops, w + sizeof word, sizeof tops);
                for (int k = 0; k < S::kUnit; k++) {
                    float code[kRows];
                    for (int r = 0; r < kRows; r++) {
                        int q = (word[r] >> S::shift(k)) & ((1u << S::kLow) - 1);
                        if (BITS == 3) q += (tops[r] >> S::top(k) & 1) << 2;
                        code[r] = BITS == 4 ? 0.25f * (float)four[q] : (float)(q - S::kCenter);
                    }
                    for (int t = 0; t < MT; t++)
                        for (int r = 0; r < kRows; r++) part[t][r] += code[r] * x[k * MT + t];
                }
            }
            const int64_t index = (block * groups + g) * kRows;
            float scale[kRows];
            to_float(scale, (const char*)p.scale + index * (p.scale_is_f32 ? 4 : 2), kRows, p.scale_is_f32 ? kF32 : kF16);
            for (int t = 0; t < MT; t++)
                for (int r = 0; r < kRows; r++) {
                    const float zero = p.zero ? (float)(p.zero[index + r] - S::kCenter) : 0.0f;
                    out[t * kRows + r] += scale[r] * (part[t][r] - zero * panel.sums[t * groups + g]);
                }
        }
    }
};

struct Fp4 : FloatPanels<4> {
    static constexpr int kWidth = 0;
    static constexpr bool kPairs = false;

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        const int64_t groups = p.k / p.group;
        const uint8_t* w = p.codes + block * p.k * 16;
        const uint8_t* scale = (const uint8_t*)p.scale + block * groups * kRows;
        const float* x = (const float*)panel.data;
        for (int i = 0; i < MT * kRows; i++) out[i] = 0;
        for (int64_t g = 0; g < groups; g++, scale += kRows) {
            float part[MT][kRows] = {};
            for (int64_t i = 0; i < p.group / 8; i++, w += 128, x += 8 * MT) {
                uint32_t word[kRows];
                memcpy(word, w, sizeof word);
                for (int k = 0; k < 8; k++) {
                    float value[kRows];
                    for (int r = 0; r < kRows; r++) value[r] = 0.25f * (float)kE2M1[word[r] >> Stored<4>::shift(k) & 15];
                    for (int t = 0; t < MT; t++)
                        for (int r = 0; r < kRows; r++) part[t][r] += value[r] * x[k * MT + t];
                }
            }
            float step[kRows];
            for (int r = 0; r < kRows; r++) step[r] = block_scale(p, scale[r]);
            for (int t = 0; t < MT; t++)
                for (int r = 0; r < kRows; r++) out[t * kRows + r] += step[r] * part[t][r];
        }
    }
};

struct Dual : SubsetSums<1> {  // entry 1 of each table is the value itself
    static constexpr int kWidth = 0;
    static constexpr bool kPairs = false;

    template <int MT, int B>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        const int64_t groups = p.k / p.group;
        const uint8_t* w = Planes::at(p, block, 0);
        const float* x = (const float*)panel.data;
        for (int i = 0; i < MT * kRows; i++) out[i] = 0;
        for (int64_t g = 0; g < groups; g++) {
            float part[2][MT][kRows] = {};
            for (int64_t i = 0; i < Planes::units(p); i++, w += Planes::kUnitBytes) {
                uint32_t word[kRows];
                memcpy(word, w, sizeof word);
                for (int k = 0; k < Planes::kUnit; k++, x += 2 * MT)
                    for (int plane = 0; plane < 2; plane++) {
                        float bit[kRows];
                        for (int r = 0; r < kRows; r++) bit[r] = (float)(word[r] >> (16 * plane + k) & 1);
                        for (int t = 0; t < MT; t++)
                            for (int r = 0; r < kRows; r++) part[plane][t][r] += bit[r] * x[2 * t + 1];
                    }
            }
            for (int plane = 0; plane < 2; plane++) {
                float scale[kRows];
                const int64_t size = p.scale_is_f32 ? 4 : 2;
                to_float(scale, (const char*)p.scale + Planes::scale_at(p, block, g, plane) * size, kRows, p.scale_is_f32 ? kF32 : kF16);
                for (int t = 0; t < MT; t++)
                    for (int r = 0; r < kRows; r++) out[t * kRows + r] += scale[r] * part[plane][t][r];
            }
        }
    }
};

}  // namespace

void portable_dual(const Problem& p) { run<Dual>(p); }
void portable_codebook(const Problem& p) { look_up<PlainLookup>(p); }
void portable_fp4(const Problem& p) { run<Fp4>(p); }
void portable_a8w4(const Problem& p) { run<A8W4>(p); }
void portable_w8a8(const Problem& p) { run<W8A8>(p); }
void portable_weight_only(const Problem& p) { LOWBIT_BY_BITS(p, WeightOnly) }
void portable_rotate(const Rotation& r) { rotate_tokens(r); }
void portable_shift(const Shift& s) { shift_tokens(s); }
