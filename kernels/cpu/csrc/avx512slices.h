// Many tokens for weights whose scales fit into the unpacked slice: an Engine of avx512weights.h multiplies one group as long as K.
#pragma once
#include "avx512weights.h"

namespace {

// float32 lanes rounded to bfloat16, half to even, in the upper halves.
inline __m512i rounded_bf16(__m512 v) {
    const __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    return _mm512_and_si512(up, _mm512_set1_epi32((int)0xFFFF0000));
}

template <class Engine, int UNIT>
struct ScaledSlices {
    using Element = typename Engine::Element;

    static int64_t columns(const Problem& p) { return round_up(round_up(p.k, UNIT), Engine::kAlign); }

    static void gather(const Problem& p, const char* row, int t, const Panel<float>& panel) {
        static thread_local Scratch buffer;
        float* values = (float*)buffer.at_least(columns(p) * 4);
        to_float(values, row, p.k, p.dtype);
        for (int64_t i = p.k; i < columns(p); i++) values[i] = 0;
        Engine::put(values, columns(p), t, panel);
    }

    // unpack(k, size, to): weights times their scales of k to k + size, a multiple of UNIT, of the block -> slice
    template <class Unpack>
    static void many(const Problem& p, int64_t block, const Panel<float>* panels, int count, float* out, const Unpack& unpack) {
        alignas(64) Element slice[kRows * Engine::kSlice];
        Problem plain = p;  // weights as they are: one group without a scale
        plain.scale = nullptr;
        plain.group = p.k;
        const int64_t stored = round_up(p.k, UNIT);
        for (int64_t k = 0; k < stored; k += Engine::kSlice) {
            const int64_t size = min64(stored - k, Engine::kSlice), end = round_up(size, Engine::kAlign);
            unpack(k, size, slice);
            memset(slice + size * kRows, 0, (end - size) * kRows * sizeof(Element));
            const Stretch stretch = {0, k, 0, end, false};
            for (int i = 0; i < count; i++)
                Engine::multiply(plain, 0, block, panels[i], &stretch, 1, slice, out + i * Engine::kWidth * kRows);
        }
    }
};

}  // namespace
