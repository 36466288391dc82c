// Few queries, as in decoding: K and V are streamed once in their own dtype, lanes are values of D.
//
// The keys of one head may be shared out to several threads; each leaves its maximum, sum and weighted values, which are
// then joined.
#pragma once
#include "attention_vector.h"

namespace {

constexpr int kFewRows = 8;         // more rows than this go the other way
constexpr int kSpan = 64;           // keys per step of the running softmax
constexpr int64_t kMinSplit = 256;  // keys below which a second thread costs more than it saves

struct Partial {
    float top, total;
    float values[kMaxDim];
};

// s [R, kSpan] = q [R, D] . K [n, D]
template <class Source, int R>
inline void dot_keys(const float* q, const char* k, int64_t k_row, int n, int64_t dim, float* s) {
    for (int j = 0; j < n; j++, k += k_row) {
        Vec sum[R];
        for (int r = 0; r < R; r++) sum[r] = Vec{};
        for (int64_t d = 0; d < dim; d += kWidth) {
            const Vec key = Source::load_at(k + d * Source::kBytes);
            for (int r = 0; r < R; r++) sum[r] = fused(load(q + r * dim + d), key, sum[r]);
        }
        for (int r = 0; r < R; r++) s[r * kSpan + j] = sum_lanes(sum[r]);
    }
}

// values [R] += w [R, kSpan] . V [n, D], for kCols vectors of D starting at v.
constexpr int kCols = 4;
template <class Source, int R, int C>
inline void add_values(const float* w, const char* v, int64_t v_row, int n, const float* alpha, Partial* out, int64_t d) {
    Vec sum[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sum[r][c] = load(out[r].values + d + c * kWidth) * spread(alpha[r]);
    v += d * Source::kBytes;
    for (int j = 0; j < n; j++, v += v_row)
        for (int c = 0; c < C; c++) {
            const Vec value = Source::load_at(v + c * kWidth * Source::kBytes);
            for (int r = 0; r < R; r++) sum[r][c] = fused(spread(w[r * kSpan + j]), value, sum[r][c]);
        }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store_vec(out[r].values + d + c * kWidth, sum[r][c]);
}

// s [n] becomes weights 2^(s - max); updates the row's maximum and sum, returns the factor for what was summed before.
inline float softmax_span(float* s, int n, float c, Partial& row) {
    const Vec scale = spread(c);
    for (int j = n; j < (int)round_up(n, kWidth); j++) s[j] = -__builtin_inff();
    Vec most = spread(row.top);
    for (int j = 0; j < n; j += kWidth) {
        const Vec v = load(s + j) * scale;
        store_vec(s + j, v);
        most = larger(v, most);
    }
    const float before = row.top, top = max_lanes(most);
    const Vec shift = spread(top);
    Vec sum = Vec{};
    for (int j = 0; j < n; j += kWidth) {
        const Vec w = exp2_of(load(s + j) - shift);
        store_vec(s + j, w);
        sum = sum + w;
    }
    float factor[kWidth];
    store_vec(factor, exp2_of(spread(before) - shift));
    row.top = top;
    row.total = row.total * factor[0] + sum_lanes(sum);
    return factor[0];
}

template <class Source, int R>
inline void span(const Attention& p, const float* q, const char* k, const char* v, const float* k_scale, const float* v_scale,
                 int n, const int64_t* sees, float c, Partial* out) {
    const int64_t k_row = p.k_stride.token * Source::kBytes, v_row = p.v_stride.token * Source::kBytes;
    alignas(64) float s[R * kSpan], alpha[R];
    dot_keys<Source, R>(q, k, k_row, n, p.dim, s);
    for (int r = 0; r < R; r++) {
        const int m = (int)(sees[r] < 0 ? 0 : min64(n, sees[r]));
        if (k_scale)
            for (int j = 0; j < m; j++) s[r * kSpan + j] *= k_scale[j];
        alpha[r] = softmax_span(s + r * kSpan, m, c, out[r]);
        if (v_scale)
            for (int j = 0; j < m; j++) s[r * kSpan + j] *= v_scale[j];
        for (int j = m; j < n; j++) s[r * kSpan + j] = 0;
    }
    int64_t d = 0;
    for (; d + kCols * kWidth <= p.dim; d += kCols * kWidth) add_values<Source, R, kCols>(s, v, v_row, n, alpha, out, d);
    for (; d < p.dim; d += kWidth) add_values<Source, R, 1>(s, v, v_row, n, alpha, out, d);
}

template <class Source, int R = 4>
inline void span_dispatch(int64_t rows, const Attention& p, const float* q, const char* k, const char* v, const float* k_scale,
                          const float* v_scale, int n, const int64_t* sees, float c, Partial* out) {
    if (rows == R) return span<Source, R>(p, q, k, v, k_scale, v_scale, n, sees, c, out);
    if constexpr (R > 1) span_dispatch<Source, R - 1>(rows, p, q, k, v, k_scale, v_scale, n, sees, c, out);
}

// Keys [k0, k1), counted from the first that is seen, for all rows of one head.
template <class Source>
inline void attend_keys(const Attention& p, int64_t b, int64_t head, int64_t k0, int64_t k1, Partial* out) {
    const int64_t group = p.heads / p.kv_heads, rows = group * p.tokens, first = first_of(p, b);
    alignas(64) float q[kFewRows * kMaxDim];
    int64_t sees[kFewRows];
    for (int64_t r = 0; r < rows; r++) {
        float* row = q + r * p.dim;
        to_float(row, at(p.q, p.q_stride, b, head * group + r % group, r / group, element_size(p.dtype)), p.dim, p.dtype);
        if (p.k_channel)
            for (int64_t d = 0; d < p.dim; d++) row[d] *= p.k_channel[head * p.dim + d];
        sees[r] = visible(p, first, r / group);
        out[r].top = -1e30f;  // finite: -inf - -inf would be NaN
        out[r].total = 0;
        for (int64_t d = 0; d < p.dim; d++) out[r].values[d] = 0;
    }
    const float c = p.scale * 1.44269504088896f;
    const int64_t scales = (b * p.kv_heads + head) * p.keys + first;
    for (; k0 < k1; k0 += kSpan) {
        const int n = (int)min64(kSpan, k1 - k0);
        const char* k = at(p.k, p.k_stride, b, head, first + k0, Source::kBytes);
        const char* v = at(p.v, p.v_stride, b, head, first + k0, Source::kBytes);
        for (int64_t r = 0; r < rows; r += 4) {
            int64_t left[4];
            const int64_t some = min64(4, rows - r);
            for (int64_t i = 0; i < some; i++) left[i] = sees[r + i] - k0;
            span_dispatch<Source>(some, p, q + r * p.dim, k, v, p.k_scale ? p.k_scale + scales + k0 : nullptr,
                                  p.v_scale ? p.v_scale + scales + k0 : nullptr, n, left, c, out + r);
        }
    }
}

// Joins the parts of one row and stores it.
inline void join(const Attention& p, const Partial* part, int64_t count, int64_t pitch, char* y) {
    float top = -1e30f, total = 0, out[kMaxDim] = {};
    for (int64_t i = 0; i < count; i++) top = part[i * pitch].top > top ? part[i * pitch].top : top;
    for (int64_t i = 0; i < count; i++) {
        const Partial& one = part[i * pitch];
        float factor[kWidth];
        store_vec(factor, exp2_of(spread(one.top - top)));
        total += one.total * factor[0];
        for (int64_t d = 0; d < p.dim; d++) out[d] += one.values[d] * factor[0];
    }
    const float inverse = total == 0 ? 0 : 1.0f / total;  // a row that sees no key is zero
    for (int64_t d = 0; d < p.dim; d++) out[d] *= inverse;
    from_float(y, out, p.dim, p.dtype);
}

template <class Source>
inline void attend_few(const Attention& p, int threads) {
    const int64_t group = p.heads / p.kv_heads, rows = group * p.tokens, heads = p.batch * p.kv_heads;
    const int64_t longest = visible(p, 0, p.tokens - 1);
    int64_t splits = 1;
    while (heads * splits % threads && splits < threads && longest / (splits + 1) >= kMinSplit) splits++;
    Partial* parts = (Partial*)scratch().at_least(heads * splits * rows * sizeof(Partial));
    parallel(threads, heads * splits, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; task++) {
            const int64_t b = task / splits / p.kv_heads, head = task / splits % p.kv_heads, i = task % splits;
            const int64_t seen = visible(p, first_of(p, b), p.tokens - 1);
            attend_keys<Source>(p, b, head, seen * i / splits, seen * (i + 1) / splits, parts + task * rows);
        }
    });
    for (int64_t i = 0; i < heads; i++)
        for (int64_t r = 0; r < rows; r++)
            join(p, parts + i * splits * rows + r, splits, rows,
                 output_of(p, i / p.kv_heads, i % p.kv_heads * group + r % group, r / group));
}

}  // namespace
