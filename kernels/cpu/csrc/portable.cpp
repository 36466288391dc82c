// The three kernels in plain C++ for any processor: codes of eight k are spread out to [8, 32 rows], then every loop
// runs over rows with a constant bound, which compilers vectorize for whatever they target.
#include "driver.h"

namespace {

struct A8W4 : IntegerPanels {
    static constexpr bool kHasMany = false;
    static void many(const Problem&, int64_t, const Panel<int32_t>*, int, int32_t*) {}

    template <int MT>
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
    static constexpr bool kHasMany = false;
    static void many(const Problem&, int64_t, const Panel<int32_t>*, int, int32_t*) {}

    template <int MT>
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

struct W4A16 : FloatPanels {
    static constexpr bool kHasMany = false;
    static void many(const Problem&, int64_t, const Panel<float>*, int, float*) {}

    template <int MT>
    static void few(const Problem& p, int64_t block, const Panel<float>& panel, float* out) {
        const int64_t groups = p.k / p.group, length = groups == 1 ? padded(p) : p.group;
        const uint8_t* w = p.codes + block * padded(p) * (kRows / 2);
        const float* x = (const float*)panel.data;
        for (int i = 0; i < MT * kRows; i++) out[i] = 0;
        for (int64_t g = 0; g < groups; g++) {
            float part[MT][kRows] = {};
            for (int64_t i = 0; i < length / 8; i++, w += 128, x += 8 * MT) {
                float codes[8][kRows];  // byte 0 holds k = 0 2, byte 1 k = 4 6, byte 2 k = 1 3, byte 3 k = 5 7
                for (int b = 0; b < 4; b++)
                    for (int r = 0; r < kRows; r++) {
                        const int k = b % 2 * 4 + b / 2;
                        codes[k][r] = (float)((w[4 * r + b] & 15) - 8);
                        codes[k + 2][r] = (float)((w[4 * r + b] >> 4) - 8);
                    }
                for (int t = 0; t < MT; t++)
                    for (int k = 0; k < 8; k++) {
                        const float v = x[k * MT + t];
                        for (int r = 0; r < kRows; r++) part[t][r] += codes[k][r] * v;
                    }
            }
            const int64_t index = (block * groups + g) * kRows;
            float scale[kRows];
            to_float(scale, (const char*)p.scale + index * (p.scale_is_f32 ? 4 : 2), kRows, p.scale_is_f32 ? kF32 : kF16);
            for (int t = 0; t < MT; t++)
                for (int r = 0; r < kRows; r++) {
                    const float zero = p.zero ? (float)(p.zero[index + r] - 8) : 0.0f;
                    out[t * kRows + r] += scale[r] * (part[t][r] - zero * panel.sums[t * groups + g]);
                }
        }
    }
};

}  // namespace

void portable_a8w4(const Problem& p) { run<A8W4>(p); }
void portable_w8a8(const Problem& p) { run<W8A8>(p); }
void portable_w4a16(const Problem& p) { run<W4A16>(p); }
