// The plain C interface, and the choice of instruction set at run time.
#include "attention.h"
#include "lowbit.h"
#include "nearest_api.h"
#include "pointwise_api.h"
#include "rounding_api.h"
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

enum Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

#if defined(__x86_64__)
// Tiles of int8 and bfloat16, and the kernel's leave to use them: their registers are saved on demand only.
bool has_amx() {
    unsigned a, b, c, d;
    constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tile, int8
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool has(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (isa == kAvx2) return avx2;
    if (isa == kAvx512) return avx512;
    if (isa == kAmx) return avx512 && __builtin_cpu_supports("avx512bf16") && has_amx();
#endif
    return isa == kPortable;
}

KernelTable table_of(Isa isa) {
#if defined(__x86_64__)
    const auto codebook_few = __builtin_cpu_supports("avx512vbmi") ? avx512vbmi_codebook_few : avx512_codebook_few;
    if (isa == kAmx)
        return {amx_a8w4, amx_w8a8, amx_weight_only, amx_fp4, amx_dual, codebook_few, amx_codebook_many, avx512_rotate,
                avx512_shift};
    if (isa == kAvx512) {  // Cascade Lake and Ice Lake have VNNI without BF16
        const bool bf16 = __builtin_cpu_supports("avx512bf16");
        return {avx512_a8w4, avx512_w8a8, bf16 ? avx512bf16_weight_only : avx512_weight_only,
                bf16 ? avx512bf16_fp4 : avx512_fp4, bf16 ? avx512bf16_dual : avx512_dual, codebook_few,
                bf16 ? avx512bf16_codebook_many : avx512_codebook_many, avx512_rotate, avx512_shift};
    }
    if (isa == kAvx2) return {avx2_a8w4, avx2_w8a8, avx2_weight_only, avx2_fp4, avx2_dual, portable_codebook,
                              portable_codebook, avx2_rotate, avx2_shift};
#endif
    (void)isa;
    return {portable_a8w4, portable_w8a8, portable_weight_only, portable_fp4, portable_dual, portable_codebook,
            portable_codebook, portable_rotate, portable_shift};
}

AttentionTable attention_of(Isa isa) {
#if defined(__x86_64__)
    if (isa == kAmx) return {amx_attend, amx_append};
    if (isa >= kAvx512 && __builtin_cpu_supports("avx512bf16")) return {avx512bf16_attend, avx512bf16_append};
    if (isa >= kAvx2) return {avx2_attend, avx2_append};
#endif
    (void)isa;
    return {portable_attend, portable_append};
}

PointwiseTable pointwise_of(Isa isa) {
#if defined(__x86_64__)
    if (isa >= kAvx512) return {avx512_norm, avx512_activate};
    if (isa >= kAvx2) return {avx2_norm, avx2_activate};
#endif
    (void)isa;
    return {portable_norm, portable_activate};
}

SearchTable search_of(Isa isa) {
#if defined(__x86_64__)
    if (isa >= kAvx512) return {avx512_nearest, avx512_sweep};
    if (isa >= kAvx2) return {avx2_nearest, avx2_sweep};
#endif
    (void)isa;
    return {portable_nearest, portable_sweep};
}

RoundingTable rounding_of(Isa isa) {
#if defined(__x86_64__)
    if (isa >= kAvx512) return {avx512_gptq, avx512_descend};
    if (isa >= kAvx2) return {avx2_gptq, avx2_descend};
#endif
    (void)isa;
    return {portable_gptq, portable_descend};
}

RoundingTable rounding = {portable_gptq, portable_descend};
SearchTable search = {portable_nearest, portable_sweep};
PointwiseTable pointwise = {portable_norm, portable_activate};
AttentionTable attention = {portable_attend, portable_append};
KernelTable table = table_of(kPortable);

int64_t blocks_of(const Output* outputs, int count) {
    int64_t blocks = 0;
    for (int i = 0; i < count; i++) blocks += (outputs[i].n + kRows - 1) / kRows;
    return blocks;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Use an instruction set: 0 portable, 1 avx2, 2 avx512, 3 amx. Returns 0, or -1 where this machine lacks it.
int lowbit_select(int isa) {
    if (isa < kPortable || isa > kAmx || !has((Isa)isa)) return -1;
    table = table_of((Isa)isa);
    attention = attention_of((Isa)isa);
    pointwise = pointwise_of((Isa)isa);
    search = search_of((Isa)isa);
    rounding = rounding_of((Isa)isa);
    return 0;
}

// Threads a parallel region would use; 0 where the library was compiled without OpenMP.
int lowbit_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 0;
#endif
}

// Reads `bytes` (a multiple of 256) at p, asking for them ahead as the kernels do: the yardstick of reading bandwidth.
int64_t lowbit_read(const void* p, int64_t bytes) {
    int64_t total = 0;
#pragma omp parallel reduction(+ : total)
    {
        int64_t id = 0, team = 1;
#if defined(_OPENMP)
        id = omp_get_thread_num(), team = omp_get_num_threads();
#endif
        const char* at = (const char*)p + bytes / 256 * id / team * 256;
        const char* end = (const char*)p + bytes / 256 * (id + 1) / team * 256;
        int64_t lane[8] = {};
        for (; at < end; at += 256)
            for (int line = 0; line < 4; line++) {
                __builtin_prefetch(at + 64 * line + kAhead);
                for (int i = 0; i < 8; i++) lane[i] += ((const int64_t*)at)[8 * line + i];
            }
        for (int i = 0; i < 8; i++) total += lane[i];
    }
    return total;
}

// Dtypes: 0 float32, 1 bfloat16, 2 float16. Pointers and lengths as in Problem; `count` layers share x and the weight.
void lowbit_a8w4_multi(const void* x, int dtype, int64_t m, int64_t k, const Output* outputs, int count, const void* codes,
                       const void* scale, int64_t group, const void* row_scale, int top, float reach) {
    table.a8w4({x, (const uint8_t*)codes, scale, nullptr, (const float*)row_scale, outputs, m, k, blocks_of(outputs, count), group,
                (DType)dtype, false, 4, false, nullptr, nullptr, top, reach});
}

void lowbit_w8a8_multi(const void* x, int dtype, int64_t m, int64_t k, const Output* outputs, int count, const void* codes,
                       const void* row_scale) {
    table.w8a8({x, (const uint8_t*)codes, nullptr, nullptr, (const float*)row_scale, outputs, m, k, blocks_of(outputs, count), k,
                (DType)dtype, false, 8});
}

void lowbit_weight_only_multi(const void* x, int dtype, int64_t m, int64_t k, const Output* outputs, int count, int bits,
                              const void* codes, const void* scale, int scale_is_f32, const void* zero, int64_t group) {
    table.weight_only({x, (const uint8_t*)codes, scale, (const uint8_t*)zero, nullptr, outputs, m, k, blocks_of(outputs, count),
                       group, (DType)dtype, scale_is_f32 != 0, bits});
}

// 4-bit floats: kinds [blocks], scale as above, token_scale [M] or null.
void lowbit_fp_channel_multi(const void* x, int dtype, int64_t m, int64_t k, const Output* outputs, int count, const void* codes,
                             const void* scale, int scale_is_f32, const void* kinds, int64_t group, const void* token_scale) {
    table.weight_only({x, (const uint8_t*)codes, scale, nullptr, nullptr, outputs, m, k, blocks_of(outputs, count), group,
                       (DType)dtype, scale_is_f32 != 0, 4, false, (const uint8_t*)kinds, (const float*)token_scale});
}

// Two planes of bits, see dual.h.
void lowbit_dual_multi(const void* x, int dtype, int64_t m, int64_t k, const Output* outputs, int count, const void* codes,
                       const void* scale, int scale_is_f32, int64_t group) {
    table.dual({x, (const uint8_t*)codes, scale, nullptr, nullptr, outputs, m, k, blocks_of(outputs, count), group, (DType)dtype,
                scale_is_f32 != 0, 2});
}

// Whether many tokens share the entries that are looked up; without AVX-512 every token looks its products up.
int lowbit_codebook_shares() { return table.codebook_many != table.codebook_few; }

// Sums of vectors from codebooks, see codebook.h: book [books, vector, 256], row_scale [N].
void lowbit_codebook(const void* x, int dtype, int64_t m, int64_t k, const Output* outputs, int count, const void* codes,
                     const void* book, int books, int vector, const void* row_scale) {
    Problem p = {x, (const uint8_t*)codes, nullptr, nullptr, (const float*)row_scale, outputs, m, k, blocks_of(outputs, count), k,
                 (DType)dtype, false, 8};
    p.book = (const float*)book, p.books = books, p.vector = vector;
    (m <= kFew ? table.codebook_few : table.codebook_many)(p);
}

// Tokens as floats of few bits, see Shift.
void lowbit_fp_shift(const void* x, int dtype, void* y, void* scale, const void* shift, int64_t m, int64_t k, float step,
                     int dynamic, float floor, float half_steps, float largest, int64_t group, float scale_half_steps) {
    table.shift({x, y, (float*)scale, (const uint8_t*)shift, m, k, step, dynamic != 0, floor, half_steps, largest, group,
                 scale_half_steps, (DType)dtype});
}

// y [M, K] = x [M, K] with every block of `size` channels multiplied by H / sqrt(size).
void lowbit_rotate(const void* x, int dtype, void* y, int64_t m, int64_t k, int64_t size, float scale) {
    table.rotate({x, y, m, k, size, scale, (DType)dtype});
}

// group: 32 with E8M0 scales (mxfp4), 16 with E4M3 (nvfp4); row_scale null for ones.
void lowbit_fp4_multi(const void* x, int dtype, int64_t m, int64_t k, const Output* outputs, int count, const void* codes,
                      const void* scale, int group, const void* row_scale) {
    table.fp4({x, (const uint8_t*)codes, scale, nullptr, (const float*)row_scale, outputs, m, k, blocks_of(outputs, count),
               group, (DType)dtype, false, 4, group == 32});
}

// The same for one layer: y [M, N], bias [N] of bias_dtype or null.
void lowbit_a8w4(const void* x, int dtype, void* y, int64_t m, int64_t n, int64_t k, const void* codes, const void* scale,
                 int64_t group, const void* row_scale, const void* bias, int bias_dtype) {
    const Output output = {y, bias, n, bias_dtype};
    lowbit_a8w4_multi(x, dtype, m, k, &output, 1, codes, scale, group, row_scale, 127, 127.0f);
}

void lowbit_w8a8(const void* x, int dtype, void* y, int64_t m, int64_t n, int64_t k, const void* codes, const void* row_scale,
                 const void* bias, int bias_dtype) {
    const Output output = {y, bias, n, bias_dtype};
    lowbit_w8a8_multi(x, dtype, m, k, &output, 1, codes, row_scale);
}

void lowbit_weight_only(const void* x, int dtype, void* y, int64_t m, int64_t n, int64_t k, int bits, const void* codes,
                        const void* scale, int scale_is_f32, const void* zero, int64_t group, const void* bias, int bias_dtype) {
    const Output output = {y, bias, n, bias_dtype};
    lowbit_weight_only_multi(x, dtype, m, k, &output, 1, bits, codes, scale, scale_is_f32, zero, group);
}

// Pointers as in Attention; sizes: batch, heads, kv_heads, tokens, keys, dim, then strides of q, k, v (batch, head, token).
void lowbit_attention(const void* q, const void* k, const void* v, void* y, const void* k_scale, const void* v_scale,
                      const void* k_channel, const void* first, const int64_t* sizes, int64_t start, float scale, int dtype) {
    const int64_t* s = sizes;
    attention.attend({q, k, v, y, (const float*)k_scale, (const float*)v_scale, (const float*)k_channel, (const int64_t*)first,
                      {s[6], s[7], s[8]}, {s[9], s[10], s[11]}, {s[12], s[13], s[14]}, s[0], s[1], s[2], s[3], s[4], s[5],
                      start, scale, (DType)dtype});
}

// Pointers as in Append; sizes: batch, kv_heads, tokens, keys, dim, then strides of k, v (batch, head, token).
void lowbit_append(const void* k, const void* v, void* k_cache, void* v_cache, void* k_scale, void* v_scale,
                   const void* k_channel, const int64_t* sizes, int64_t start, int dtype) {
    const int64_t* s = sizes;
    attention.append({k, v, k_cache, v_cache, (float*)k_scale, (float*)v_scale, (const float*)k_channel, {s[5], s[6], s[7]},
                      {s[8], s[9], s[10]}, s[0], s[1], s[2], s[3], s[4], start, (DType)dtype});
}

// Pointers and sizes as in Nearest.
void lowbit_nearest(const void* target, const void* book, const void* size, void* codes, int64_t count, int entries, int length) {
    search.nearest({(const float*)target, (const float*)book, (const float*)size, (uint8_t*)codes, count, entries, length});
}

// Pointers and sizes as in Sweep.
void lowbit_sweep(const void* slope, void* codes, const void* book, const void* size, const void* block, void* moved, int64_t rows,
                  int64_t tiles, int books, int entries, int length) {
    search.sweep({(const float*)slope, (uint8_t*)codes, (const float*)book, (const float*)size, (const float*)block, (float*)moved,
                  rows, tiles, books, entries, length});
}

// Pointers and sizes as in Channels.
void lowbit_gptq_block(const void* weight, const void* step, const void* table, const void* factor, void* level, void* errors,
                       int64_t rows, int channels, int kind, float a, float b, float c) {
    rounding.gptq({(const float*)weight, (float*)level, (const float*)step, nullptr, (const float*)table, (const float*)factor,
                   (float*)errors, rows, channels, (LevelKind)kind, {a, b, c}});
}

// Pointers and sizes as in Channels.
void lowbit_descend_block(const void* pull, void* level, const void* step, const void* reach, const void* table, const void* gram,
                          void* moved, int64_t rows, int channels, int kind, float a, float b, float c) {
    rounding.descend({(const float*)pull, (float*)level, (const float*)step, (const float*)reach, (const float*)table,
                      (const float*)gram, (float*)moved, rows, channels, (LevelKind)kind, {a, b, c}});
}

// y = norm(x) of each row [K] of x [M, K]; bias may be null. centered: layer norm, else root mean square norm.
void lowbit_norm(const void* x, const void* weight, const void* bias, void* y, int64_t m, int64_t k, float eps, int centered,
                 int dtype) {
    pointwise.norm({x, weight, bias, y, m, k, eps, centered != 0, (DType)dtype});
}

// y = f(x), or f(x) * by; kind 0: silu, 1: gelu.
void lowbit_activate(const void* x, const void* by, void* y, int64_t count, int kind, int dtype) {
    pointwise.activate({x, by, y, count, (ActivationKind)kind, (DType)dtype});
}
}
#pragma GCC visibility pop
