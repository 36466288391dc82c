// Many queries: tiles of kRowsPerBlock rows times kTileKeys keys with a running softmax.
//
// Lanes are rows. Scores are kept transposed, [keys, rows], so that maxima and sums over keys are whole-register
// operations, and both products broadcast one value of K or V from where it lies in memory: only Q is transposed, once
// per block. Operands come in units of 4 bytes: one float32, or a pair of bfloat16 that one instruction multiplies and
// adds. For the pairs V is interleaved beforehand, two keys side by side.
#pragma once
#include "attention_vector.h"

namespace {

constexpr int kRegs = 2;                             // vectors of rows per block
constexpr int kBlockRows = kRegs * kWidth;
constexpr int kTile = 64;                            // keys per step of the running softmax
constexpr int kReach = sizeof(Vec) == 64 ? 8 : 4;    // keys, or values of D, in registers at once: kReach * kRegs sums

struct Operands {
    const char *k, *v;               // from the first key that is seen
    int64_t k_row, v_row;            // bytes from key to key, and from unit to unit of V
};

// s [KB, rows] = K . Q over `units`; q [units, rows].
template <class M, int KB>
inline void scores(const float* q, const char* const* keys, int64_t units, float* s) {
    Vec sum[KB][kRegs];
#pragma GCC unroll 8
    for (int j = 0; j < KB; j++)
        for (int i = 0; i < kRegs; i++) sum[j][i] = Vec{};
    for (int64_t u = 0; u < units; u++) {
        Vec row[kRegs];
        for (int i = 0; i < kRegs; i++) row[i] = load(q + (u * kRegs + i) * kWidth);
#pragma GCC unroll 8
        for (int j = 0; j < KB; j++) {
            const Vec key = spread(keys[j] + 4 * u);
            for (int i = 0; i < kRegs; i++) sum[j][i] = M::dot(sum[j][i], key, row[i]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < KB; j++)
        for (int i = 0; i < kRegs; i++) store_vec(s + (j * kRegs + i) * kWidth, sum[j][i]);
}

// o [DB, rows] = o * alpha + V . P over `units` of keys; weights [units, rows].
template <class M, int DB>
inline void weigh(const float* weights, const char* v, int64_t v_row, int64_t units, const Vec* alpha, float* o) {
    Vec sum[DB][kRegs];
#pragma GCC unroll 8
    for (int j = 0; j < DB; j++)
        for (int i = 0; i < kRegs; i++) sum[j][i] = load(o + (j * kRegs + i) * kWidth) * alpha[i];
    for (int64_t u = 0; u < units; u++, v += v_row) {
        Vec row[kRegs];
        for (int i = 0; i < kRegs; i++) row[i] = load(weights + (u * kRegs + i) * kWidth);
#pragma GCC unroll 8
        for (int j = 0; j < DB; j++) {
            const Vec value = spread(v + 4 * j);
            for (int i = 0; i < kRegs; i++) sum[j][i] = M::dot(sum[j][i], value, row[i]);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < DB; j++)
        for (int i = 0; i < kRegs; i++) store_vec(o + (j * kRegs + i) * kWidth, sum[j][i]);
}

// An engine M supplies the two products of a tile, and the layout of V. This one broadcasts.
template <class M>
struct Broadcast {
    struct Scope {};  // what a thread holds while it works

    // s [n, rows] = the scores of keys [k0, k0 + n).
    static void score_tile(const float* q, const Operands& in, int64_t k0, int n, int64_t dim, float* s) {
        for (int j = 0; j < n; j += kReach) {
            const char* keys[kReach];
            for (int i = 0; i < kReach; i++) keys[i] = in.k + (k0 + (j + i < n ? j + i : n - 1)) * in.k_row;
            scores<M, kReach>(q, keys, M::kPairs ? dim / 2 : dim, s + j * kBlockRows);
        }
    }

    // o [D, rows] = o * alpha + the values of these keys times the weights in s.
    static void weigh_tile(const float* s, const Operands& in, int64_t k0, int n, int64_t dim, const Vec* alpha, float* o) {
        const char* v = in.v + k0 / M::kKeys * in.v_row;
        for (int64_t d = 0; d < dim; d += kReach)
            weigh<M, kReach>(s, v + 4 * d, in.v_row, ceil_div(n, M::kKeys), alpha, o + d * kBlockRows);
    }

    // Two bfloat16 rows of V, zero where there is no key, side by side.
    static void store_values(char* to, const uint16_t (*rows)[kMaxDim], int64_t dim) {
        uint32_t* out = (uint32_t*)to;
        for (int64_t d = 0; d < dim; d++) out[d] = rows[0][d] | (uint32_t)rows[1][d] << 16;
    }
};

struct FloatUnits : Broadcast<FloatUnits> {
    static constexpr bool kPairs = false;
    static constexpr int kKeys = 1;   // keys per unit of V
    static constexpr int kGroup = 2;  // keys that are laid out together
    static Vec dot(Vec sum, Vec a, Vec b) { return fused(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct PairUnits : Broadcast<PairUnits> {
    static constexpr bool kPairs = true;
    static constexpr int kKeys = 2, kGroup = 2;
    static Vec dot(Vec sum, Vec a, Vec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

inline void store_weights(float* to, Vec even, Vec odd) {
#if defined(__AVX512BF16__)
    alignas(64) static const uint16_t kZip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(kZip), both));
#else
    (void)to, (void)even, (void)odd;
#endif
}

// Scores [n, kWidth] with a row pitch of kBlockRows become weights 2^(c * (s - max)), in units of M. `limit` is the number
// of keys that each lane sees. Updates the lane's maximum and sum, returns the factor for what was summed before.
template <class M>
inline Vec softmax_step(float* s, int n, bool masked, Vec limit, Vec c, Vec& top, Vec& total) {
    const Vec before = top, hidden = spread(-__builtin_inff());
    if (n % 2) store_vec(s + n * kBlockRows, hidden);  // two keys at a time
    if (masked)
        for (int j = 0; j < n; j++) {
            const Vec v = load(s + j * kBlockRows);
            store_vec(s + j * kBlockRows, spread((float)j) < limit ? v : hidden);
        }
    Vec other = top;
    for (int j = 0; j < n; j += 2) {
        top = larger(load(s + j * kBlockRows), top);
        other = larger(load(s + (j + 1) * kBlockRows), other);
    }
    top = larger(top, other);
    const Vec shift = top * c, alpha = exp2_of(before * c - shift);
    Vec sum = total * alpha;
    for (int j = 0; j < n; j += 2) {
        const Vec even = exp2_of(fused(load(s + j * kBlockRows), c, -shift));
        const Vec odd = exp2_of(fused(load(s + (j + 1) * kBlockRows), c, -shift));
        sum = sum + (even + odd);
        if constexpr (M::kPairs) {
            store_weights(s + j / 2 * kBlockRows, even, odd);
        } else {
            store_vec(s + j * kBlockRows, even);
            store_vec(s + (j + 1) * kBlockRows, odd);
        }
    }
    total = sum;
    return alpha;
}

// Rows [row0, row0 + kBlockRows) of one key-value head.
template <class M>
inline void attend_block(const Attention& p, int64_t b, int64_t kv_head, int64_t row0, const Operands& in) {
    alignas(64) float q[kMaxDim * kBlockRows], o[kMaxDim * kBlockRows], s[kTile * kBlockRows];
    alignas(64) float rows_of_q[kBlockRows][kMaxDim];
    const int64_t group = p.heads / p.kv_heads, first = first_of(p, b), size = element_size(p.dtype);
    const int64_t rows = min64(kBlockRows, group * p.tokens - row0), units = M::kPairs ? p.dim / 2 : p.dim;
    float limits[kBlockRows];
    int64_t least = p.keys, most = 0;
    for (int64_t r = 0; r < kBlockRows; r++) {
        const int64_t row = row0 + (r < rows ? r : rows - 1), sees = visible(p, first, row / group);
        limits[r] = (float)sees;
        least = min64(least, sees);
        most = sees > most ? sees : most;
        const char* from = at(p.q, p.q_stride, b, kv_head * group + row % group, row / group, size);
        if (M::kPairs)
            memcpy(rows_of_q[r], from, p.dim * 2);
        else
            to_float(rows_of_q[r], from, p.dim, p.dtype);
    }
    transpose(q, kBlockRows, rows_of_q[0], kMaxDim, kBlockRows, units);
    for (int64_t i = 0; i < p.dim * kBlockRows; i++) o[i] = 0;
    Vec top[kRegs], total[kRegs], alpha[kRegs];
    for (int i = 0; i < kRegs; i++) top[i] = spread(-1e30f), total[i] = Vec{};  // finite: -inf - -inf would be NaN
    const Vec c = spread(p.scale * 1.44269504088896f);
    for (int64_t k0 = 0; k0 < most; k0 += kTile) {
        const int n = (int)min64(kTile, most - k0);
        M::score_tile(q, in, k0, n, p.dim, s);
        for (int i = 0; i < kRegs; i++) {
            const Vec limit = load(limits + i * kWidth) - spread((float)k0);
            alpha[i] = softmax_step<M>(s + i * kWidth, n, k0 + n > least, limit, c, top[i], total[i]);
        }
        M::weigh_tile(s, in, k0, n, p.dim, alpha, o);
    }
    float sums[kBlockRows];
    for (int i = 0; i < kRegs; i++) store_vec(sums + i * kWidth, total[i]);
    auto& out = rows_of_q;
    transpose(out[0], kMaxDim, o, kBlockRows, p.dim, kBlockRows);
    for (int64_t r = 0; r < rows; r++) {
        const float inverse = limits[r] > 0 ? 1.0f / sums[r] : 0.0f;
        for (int64_t d = 0; d < p.dim; d++) out[r][d] = limits[r] > 0 ? out[r][d] * inverse : 0.0f;  // sees no key: zero
        from_float(output_of(p, b, kv_head * group + (row0 + r) % group, (row0 + r) / group), out[r], p.dim, p.dtype);
    }
}

// One key or value as float32.
inline void unpack_row(float* to, const char* from, int64_t dim, DType dtype, const float* scale, const float* channel) {
    if (!scale) return to_float(to, from, dim, dtype);
    for (int64_t d = 0; d < dim; d++) to[d] = (float)((const int8_t*)from)[d] * *scale * (channel ? channel[d] : 1.0f);
}

inline void pack_row(char* to, const float* from, int64_t dim, bool pairs) {
    from_float(to, from, dim, pairs ? kBF16 : kF32);
}

// Keys [k0, k0 + count) of one head, a group, as M wants them. What is there already is left alone.
template <class M>
inline void unpack_keys(const Attention& p, int64_t b, int64_t head, int64_t k0, int64_t count, char* k, char* v, bool k_ready) {
    const int64_t first = first_of(p, b), size = p.k_scale ? 1 : element_size(p.dtype), width = M::kPairs ? 2 : 4;
    const int64_t scales = (b * p.kv_heads + head) * p.keys + first;
    float row[kMaxDim];
    uint16_t values[M::kGroup][kMaxDim];
    for (int64_t i = 0; i < count; i++) {
        const int64_t key = k0 + i;
        if (!k_ready) {
            unpack_row(row, at(p.k, p.k_stride, b, head, first + key, size), p.dim, p.dtype,
                       p.k_scale ? p.k_scale + scales + key : nullptr, p.k_channel ? p.k_channel + head * p.dim : nullptr);
            pack_row(k + key * p.dim * width, row, p.dim, M::kPairs);
        }
        const char* from = at(p.v, p.v_stride, b, head, first + key, size);
        if (M::kPairs && !p.v_scale) {
            memcpy(values[i], from, p.dim * 2);
            continue;
        }
        unpack_row(row, from, p.dim, p.dtype, p.v_scale ? p.v_scale + scales + key : nullptr, nullptr);
        pack_row(M::kPairs ? (char*)values[i] : v + key * p.dim * 4, row, p.dim, M::kPairs);
    }
    if (!M::kPairs) return;
    for (int64_t i = count; i < M::kGroup; i++) memset(values[i], 0, p.dim * 2);
    M::store_values(v + k0 * p.dim * 2, values, p.dim);
}

template <class M>
inline void attend_many(const Attention& p, int threads) {
    const int64_t group = p.heads / p.kv_heads, blocks = ceil_div(group * p.tokens, kBlockRows);
    const bool plain = !p.k_scale && p.dtype == kF32, k_ready = plain || (M::kPairs && !p.k_scale);
    const int64_t size = p.k_scale ? 1 : element_size(p.dtype);
    for (int64_t b = 0; b < p.batch; b++) {
        const int64_t first = first_of(p, b), seen = visible(p, first, p.tokens - 1), places = ceil_div(seen, M::kGroup);
        const int64_t head_bytes = round_up(places * M::kGroup * p.dim * (M::kPairs ? 2 : 4), 64);
        char* memory = plain ? nullptr : scratch().at_least(2 * p.kv_heads * head_bytes);
        const auto k_of = [=](int64_t head) { return memory + 2 * head * head_bytes; };
        if (!plain)
            parallel(threads, p.kv_heads * places, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) {
                    const int64_t head = i / places, k0 = i % places * M::kGroup;
                    unpack_keys<M>(p, b, head, k0, min64(M::kGroup, seen - k0), k_of(head), k_of(head) + head_bytes, k_ready);
                }
            });
        parallel(threads, threads, [&](int64_t begin, int64_t end) {
            [[maybe_unused]] const typename M::Scope scope{};
            for (int64_t id = begin; id < end; id++)  // in turns: under a causal mask later blocks are longer
                for (int64_t task = id; task < p.kv_heads * blocks; task += threads) {
                    const int64_t head = task / blocks, width = M::kPairs ? 2 : 4;
                    Operands in = {k_of(head), k_of(head) + head_bytes, p.dim * width, p.dim * 4};
                    if (k_ready) in.k = at(p.k, p.k_stride, b, head, first, size), in.k_row = p.k_stride.token * size;
                    if (plain) in.v = at(p.v, p.v_stride, b, head, first, size), in.v_row = p.v_stride.token * size;
                    attend_block<M>(p, b, head, task % blocks * kBlockRows, in);
                }
        });
    }
}

}  // namespace
