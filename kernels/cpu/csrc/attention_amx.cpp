// Attention with AMX tiles for bfloat16: 16 keys x 32 values of D times 32 values of D x 16 rows, and 16 values of D x 32
// keys times 32 keys x 16 rows. Keys are read where they lie; values are transposed once per call.
#include "amxtile.h"
#include "attention_run.h"

namespace {

struct TileUnits {
    using Scope = Tiles;
    static constexpr bool kPairs = true;
    static constexpr int kKeys = 2;
    static constexpr int kGroup = 32;
    static constexpr int64_t kRow = kBlockRows * 4;  // bytes
    static bool serves(const Attention& p) { return p.dtype == kBF16 && p.dim % 32 == 0; }

    // s [n, rows], up to a multiple of 32 keys.
    static void score_tile(const float* q, const Operands& in, int64_t k0, int n, int64_t dim, float* s) {
        alignas(64) uint16_t padded[32 * kMaxDim];
        settle(q);
        for (int j = 0; j < n; j += 32) {
            const char* k = in.k + (k0 + j) * in.k_row;
            int64_t k_row = in.k_row;
            if (j + 32 > n) {
                for (int i = 0; i < 32; i++)
                    if (j + i < n)
                        memcpy(padded + i * dim, k + i * k_row, 2 * dim);
                    else
                        memset(padded + i * dim, 0, 2 * dim);
                k = (const char*)padded, k_row = 2 * dim;
                settle(k);
            }
            const char* rows = (const char*)q;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t d = 0; d < dim; d += 32, k += 64, rows += 16 * kRow) multiply(k, k + 16 * k_row, k_row, rows);
            store(s + j * kBlockRows);
        }
    }

    static void weigh_tile(float* s, const Operands& in, int64_t k0, int n, int64_t dim, const Vec* alpha, float* o) {
        for (int u = (n + 1) / 2; u < (int)round_up(n, 32) / 2; u++)
            for (int i = 0; i < kRegs; i++) store_vec(s + (u * kRegs + i) * kWidth, Vec{});
        if (!all_one(alpha[0]) || !all_one(alpha[1]))
            for (int64_t d = 0; d < dim; d++)
                for (int i = 0; i < kRegs; i++) store_vec(o + (d * kRegs + i) * kWidth, load(o + (d * kRegs + i) * kWidth) * alpha[i]);
        settle(s);
        settle(o);
        for (int64_t d = 0; d < dim; d += 32) {
            float* sums = o + d * kBlockRows;
            _tile_loadd(0, sums, kRow);
            _tile_loadd(1, sums + 16, kRow);
            _tile_loadd(2, sums + 16 * kBlockRows, kRow);
            _tile_loadd(3, sums + 16 * kBlockRows + 16, kRow);
            for (int j = 0; j < n; j += 32) {
                const char* v = in.v + ((k0 + j) * dim + d * 32) * 2;
                multiply(v, v + 16 * 64, 64, (const char*)(s + j / 2 * kBlockRows));
            }
            store(sums);
        }
    }

    // 32 rows of V as [D, 32 keys].
    static void store_values(char* to, const uint16_t (*rows)[kMaxDim], int64_t dim) {
        alignas(64) uint32_t pairs[16][kMaxDim];
        for (int i = 0; i < 16; i++)
            for (int64_t d = 0; d < dim; d++) pairs[i][d] = rows[2 * i][d] | (uint32_t)rows[2 * i + 1][d] << 16;
        transpose((float*)to, 16, (const float*)pairs[0], kMaxDim, 16, dim);
    }

private:
    static bool all_one(Vec v) { return _mm512_cmp_ps_mask(v, _mm512_set1_ps(1), _CMP_EQ_OQ) == 0xFFFF; }

    static void multiply(const char* a0, const char* a1, int64_t a_row, const char* b) {
        _tile_loadd(4, a0, a_row);
        _tile_loadd(6, b, kRow);
        _tile_loadd(5, a1, a_row);
        _tile_loadd(7, b + 64, kRow);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }

    static void store(float* to) {
        _tile_stored(0, to, kRow);
        _tile_stored(1, to + 16, kRow);
        _tile_stored(2, to + 16 * kBlockRows, kRow);
        _tile_stored(3, to + 16 * kBlockRows + 16, kRow);
        settle(to);
    }
};

}  // namespace

void amx_attend(const Attention& p) {
    const int64_t rows = p.heads / p.kv_heads * p.tokens;
    if (rows > kFewRows && TileUnits::serves(p)) return attend_many<TileUnits>(p, threads_for(p));
    attend(p);
}
void amx_append(const Append& p) { append(p); }
