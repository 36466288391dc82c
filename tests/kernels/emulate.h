// Instructions that few processors have, by those of AVX-512: put before every source of the kernels, so that a machine with AVX-512
// runs the ways made for VBMI, BF16 and AMX too. Slow, and rounded as the processor rounds but for sums of products in float32.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#if defined(EMULATED_BF16)  // in place of -mavx512bf16, and after the headers that would take it for leave to use it
#define __AVX512BF16__ 1
#endif

namespace emulated {

static inline bool has(const char* name) { return !strcmp(name, "avx512vbmi") || !strcmp(name, "avx512bf16"); }

#if defined(__AVX512BW__)
static inline __m512i look_up(__m512i low, __m512i index, __m512i high) {
    alignas(64) uint8_t table[128], at[64];
    _mm512_store_si512(table, low);
    _mm512_store_si512(table + 64, high);
    _mm512_store_si512(at, index);
    for (int i = 0; i < 64; i++) at[i] = table[at[i] & 127];
    return _mm512_load_si512(at);
}

static inline __m512 odd(__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000u))); }
static inline __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

static inline __m512 dot(__m512 sum, __m512bh a, __m512bh b) {
    return _mm512_fmadd_ps(even((__m512i)a), even((__m512i)b), _mm512_fmadd_ps(odd((__m512i)a), odd((__m512i)b), sum));
}

static inline __m512bh round_to_bfloat16(__m512 high, __m512 low) {  // ties to even; no NaN comes here
    alignas(64) uint32_t value[32];
    alignas(64) uint16_t out[32];
    _mm512_store_si512(value, _mm512_castps_si512(low));
    _mm512_store_si512(value + 16, _mm512_castps_si512(high));
    for (int i = 0; i < 32; i++) out[i] = (uint16_t)((value[i] + 0x7FFF + (value[i] >> 16 & 1)) >> 16);
    return (__m512bh)_mm512_load_si512(out);
}

// Eight tiles of 16 rows of 64 bytes, which is how `Tiles` configures them.
alignas(64) static thread_local uint8_t tile[8][16][64];

static inline void load(int t, const void* from, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy(tile[t][row], (const char*)from + row * stride, 64);
}
static inline void store(int t, void* to, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy((char*)to + row * stride, tile[t][row], 64);
}
static inline void zero(int t) { memset(tile[t], 0, sizeof tile[t]); }

static inline void dot_bytes(int to, int a, int b) {  // signed times unsigned
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            memcpy(&sum, &tile[to][m][4 * n], 4);
            for (int k = 0; k < 64; k++) sum += (int8_t)tile[a][m][k] * (int)tile[b][k / 4][4 * n + k % 4];
            memcpy(&tile[to][m][4 * n], &sum, 4);
        }
}

static inline void dot_bfloat16(int to, int a, int b) {
    for (int m = 0; m < 16; m++) {
        __m512 sum = _mm512_load_ps((const float*)tile[to][m]);
        for (int k = 0; k < 16; k++) {
            int32_t pair;
            memcpy(&pair, &tile[a][m][4 * k], 4);
            sum = dot(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_load_si512(tile[b][k]));
        }
        _mm512_store_ps((float*)tile[to][m], sum);
    }
}

#define _mm512_permutex2var_epi8 emulated::look_up
#define _mm512_dpbf16_ps emulated::dot
#define _mm512_cvtne2ps_pbh emulated::round_to_bfloat16
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) (void)(config)
#define _tile_release()
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbsud emulated::dot_bytes
#define _tile_dpbf16ps emulated::dot_bfloat16
#endif

}  // namespace emulated

#define __builtin_cpu_supports(name) (emulated::has(name) || __builtin_cpu_supports(name))
#undef __get_cpuid_count
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(a) = *(b) = *(c) = *(d) = ~0u, 1)
#define syscall(...) 0
#endif
