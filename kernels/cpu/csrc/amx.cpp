// Many tokens on AMX tiles: 16 tokens x 64 bytes of k times 64 bytes of k x 16 rows, added to 16 x 16 sums.
//
// A slice of weights as the AVX-512 kernels unpack it, four bytes of k side by side in each row's lane, is already what
// the second operand of a tile product must look like, and a token stored plainly is what the first must look like. A
// panel is 32 tokens; 2 x 2 tiles of sums stay in registers over a slice. Few tokens take the AVX-512 way.
#include "amxtile.h"
#include "avx512codebook.h"
#include "avx512dual.h"
#include "avx512fp4pairs.h"
#include "avx512integer.h"

namespace {

constexpr int kPanel = 32;
constexpr int kStride = kRows * 4;  // bytes from one token's sums to the next, and from one k of the slice to the next

inline void load_sums(const void* out, bool add) {
    if (!add) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        return;
    }
    settle(out);
    const char* at = (const char*)out;
    _tile_loadd(0, at, kStride);
    _tile_loadd(1, at + 64, kStride);
    _tile_loadd(2, at + 16 * kStride, kStride);
    _tile_loadd(3, at + 16 * kStride + 64, kStride);
}

inline void store_sums(void* out) {
    char* at = (char*)out;
    _tile_stored(0, at, kStride);
    _tile_stored(1, at + 64, kStride);
    _tile_stored(2, at + 16 * kStride, kStride);
    _tile_stored(3, at + 16 * kStride + 64, kStride);
    settle(out);
}

inline void load_operands(const char* x, int64_t token_bytes, const char* w) {
    settle(w);
    _tile_loadd(4, x, token_bytes);
    _tile_loadd(5, x + 16 * token_bytes, token_bytes);
    _tile_loadd(6, w, kStride);
    _tile_loadd(7, w + 64, kStride);
}

// Integer kernels. A token is int8 [K], zeros up to a multiple of 64.
template <class S>
struct IntegerTiles : S {
    static constexpr int kWidth = kPanel;
    static int64_t columns(const Problem& p) { return round_up(p.k, 64); }
    static int64_t panel_bytes(const Problem& p, bool many) { return many ? columns(p) : S::panel_bytes(p, many); }

    static void gather(const Problem& p, const char* row, int t, const Panel<int32_t>& panel) {
        if (!panel.many) return S::gather(p, row, t, panel);
        S::quantize(p, row, (int8_t*)panel.data + t * columns(p), columns(p), t, panel);
    }

    static void many(const Problem& p, int64_t block, const Panel<int32_t>* panels, int count, int32_t* out) {
        alignas(64) uint8_t buffer[kRows * kSlice];
        const Tiles tiles;
        const int64_t kp = S::padded(p), stride = columns(p);
        for (int64_t k0 = 0; k0 < kp; k0 += kSlice) {
            const int64_t k1 = min64(k0 + kSlice, kp);
            const uint8_t* w = S::slice(p, block, k0, k1, buffer);
            if (w != buffer && (k1 - k0) % 64) w = (const uint8_t*)memcpy(buffer, w, (k1 - k0) * kRows);
            for (int i = 0; i < count; i++) {
                int32_t* sums = out + i * kPanel * kRows;
                load_sums(sums, k0 > 0);
                for (int64_t k = k0; k < k1; k += 64) {
                    load_operands(panels[i].data + k, stride, (const char*)w + (k - k0) * kRows);
                    _tile_dpbsud(0, 4, 6);
                    _tile_dpbsud(1, 4, 7);
                    _tile_dpbsud(2, 5, 6);
                    _tile_dpbsud(3, 5, 7);
                }
                store_sums(sums);
            }
        }
        take_off_shift(p, panels, count, kPanel, out);
    }
};

// Weight-only kernels. A token is bfloat16 [K], each group padded with zeros to a multiple of 32.
struct TileEngine {
    using Element = uint16_t;
    static constexpr int kWidth = kPanel;
    static constexpr int64_t kSlice = 256, kAlign = 32;
    static int64_t panel_bytes(int64_t columns) { return round_up(2 * columns, 64); }

    static void put(const float* values, int64_t columns, int t, const Panel<float>& panel) {
        uint16_t* out = (uint16_t*)(panel.data + t * panel_bytes(columns));
        for (int64_t i = 0; i < columns; i++) out[i] = (uint16_t)(bits_of(values[i]) >> 16);
    }

    template <int BITS>
    static void unpack(const Problem& p, int64_t block, const uint8_t* w, int64_t units, uint16_t* to) {
        unpack_bf16<BITS>(p, block, w, units, to);
    }

    static void multiply(const Problem& p, int center, int64_t block, const Panel<float>& panel, const Stretch* list, int count,
                         const uint16_t* slice, float* out) {
        alignas(64) float sums[kPanel * kRows];
        const int64_t token_bytes = panel_bytes(p.k / p.group * round_up(p.group, kAlign));
        const Tiles tiles;
        for (int i = 0; i < count; i++) {
            const Stretch& s = list[i];
            const char* x = panel.data + 2 * s.column;
            const char* w = (const char*)(slice + s.at * kRows);
            load_sums(sums, false);
            for (int64_t k = 0; k < s.size; k += 32, x += 64, w += 32 * kRows * 2) {
                load_operands(x, token_bytes, w);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            store_sums(sums);
            apply_all(p, center, block, panel, s, sums, out);
        }
    }

    // All 32 tokens of a full panel, one by one at the end of the call.
    static void apply_all(const Problem& p, int center, int64_t block, const Panel<float>& panel, const Stretch& s,
                          const float* sums, float* out) {
        const int64_t groups = p.k / p.group;
        constexpr int kStep = 8;
        int t = 0;
        for (; t + kStep <= panel.tokens; t += kStep) apply_some<kStep>(p, center, block, panel, s, groups, t, sums, out);
        for (; t < panel.tokens; t++) apply_some<1>(p, center, block, panel, s, groups, t, sums, out);
    }

    template <int MT>
    static void apply_some(const Problem& p, int center, int64_t block, Panel<float> panel, const Stretch& s, int64_t groups,
                           int from, const float* sums, float* out) {
        panel.sums += from * groups;
        const float* part = sums + from * kRows;
        apply<MT>(p, center, block, panel, s.group, s.ends, s.column > 0,
                  [=](int t, int h) { return _mm512_load_ps(part + t * kRows + 16 * h); }, out + from * kRows);
    }
};

template <int BITS>
using Kernel = WeightOnly<BITS, TileEngine>;

}  // namespace

void amx_a8w4(const Problem& p) { run<IntegerTiles<A8W4>>(p); }
void amx_w8a8(const Problem& p) { run<IntegerTiles<W8A8>>(p); }
void amx_weight_only(const Problem& p) {
    if (p.dtype != kBF16) return avx512_weight_only(p);
    LOWBIT_BY_BITS(p, Kernel)
}
void amx_fp4(const Problem& p) {
    if (p.dtype != kBF16) return avx512_fp4(p);
    run<Fp4Pairs<TileEngine>>(p);
}
void amx_dual(const Problem& p) {
    if (p.dtype != kBF16) return avx512_dual(p);
    run<Dual<TileEngine>>(p);
}
void amx_codebook_many(const Problem& p) {
    if (p.dtype != kBF16) return avx512_codebook_many(p);
    run<Codebook<TileEngine>>(p);
}
