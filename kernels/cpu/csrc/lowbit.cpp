// The plain C interface, and the choice of instruction set at run time.
#include "lowbit.h"
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
    if (isa == kAmx) return {amx_a8w4, amx_w8a8, amx_weight_only};
    if (isa == kAvx512)  // Cascade Lake and Ice Lake have VNNI without BF16
        return {avx512_a8w4, avx512_w8a8, __builtin_cpu_supports("avx512bf16") ? avx512bf16_weight_only : avx512_weight_only};
    if (isa == kAvx2) return {avx2_a8w4, avx2_w8a8, avx2_weight_only};
#endif
    (void)isa;
    return {portable_a8w4, portable_w8a8, portable_weight_only};
}

KernelTable table = {portable_a8w4, portable_w8a8, portable_weight_only};

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
void lowbit_a8w4(const void* x, int dtype, int64_t m, int64_t k, const Output* outputs, int count, const void* codes,
                 const void* scale, int64_t group, const void* row_scale) {
    table.a8w4({x, (const uint8_t*)codes, scale, nullptr, (const float*)row_scale, outputs, m, k, blocks_of(outputs, count), group,
                (DType)dtype, false, 4});
}

void lowbit_w8a8(const void* x, int dtype, int64_t m, int64_t k, const Output* outputs, int count, const void* codes,
                 const void* row_scale) {
    table.w8a8({x, (const uint8_t*)codes, nullptr, nullptr, (const float*)row_scale, outputs, m, k, blocks_of(outputs, count), k,
                (DType)dtype, false, 8});
}

void lowbit_weight_only(const void* x, int dtype, int64_t m, int64_t k, const Output* outputs, int count, int bits,
                        const void* codes, const void* scale, int scale_is_f32, const void* zero, int64_t group) {
    table.weight_only({x, (const uint8_t*)codes, scale, (const uint8_t*)zero, nullptr, outputs, m, k, blocks_of(outputs, count),
                       group, (DType)dtype, scale_is_f32 != 0, bits});
}
}
#pragma GCC visibility pop
