// The plain C interface, and the choice of instruction set at run time.
#include "lowbit.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

enum Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

bool has(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == kAvx2) return avx2;
    if (isa == kAvx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return isa == kPortable;
}

KernelTable table_of(Isa isa) {
#if defined(__x86_64__)
    // VNNI without BF16 (Cascade Lake, Ice Lake): the integer kernels of AVX-512, the float kernel of AVX2.
    if (isa == kAvx512) return {avx512_a8w4, avx512_w8a8, __builtin_cpu_supports("avx512bf16") ? avx512bf16_w4a16 : avx2_w4a16};
    if (isa == kAvx2) return {avx2_a8w4, avx2_w8a8, avx2_w4a16};
#endif
    (void)isa;
    return {portable_a8w4, portable_w8a8, portable_w4a16};
}

KernelTable table = {portable_a8w4, portable_w8a8, portable_w4a16};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Use an instruction set: 0 portable, 1 avx2, 2 avx512. Returns 0, or -1 where this machine lacks it.
int lowbit_select(int isa) {
    if (isa < kPortable || isa > kAvx512 || !has((Isa)isa)) return -1;
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

// Dtypes: 0 float32, 1 bfloat16, 2 float16. Pointers and lengths as in Problem.
void lowbit_a8w4(const void* x, int dtype, void* y, int64_t m, int64_t n, int64_t k, const void* codes, const void* scale,
                 int64_t group, const void* row_scale, const void* bias, int bias_dtype) {
    table.a8w4({x, y, (const uint8_t*)codes, scale, nullptr, (const float*)row_scale, bias, m, n, k, group, (DType)dtype,
                (DType)bias_dtype, false});
}

void lowbit_w8a8(const void* x, int dtype, void* y, int64_t m, int64_t n, int64_t k, const void* codes,
                 const void* row_scale, const void* bias, int bias_dtype) {
    table.w8a8({x, y, (const uint8_t*)codes, nullptr, nullptr, (const float*)row_scale, bias, m, n, k, k, (DType)dtype,
                (DType)bias_dtype, false});
}

void lowbit_w4a16(const void* x, int dtype, void* y, int64_t m, int64_t n, int64_t k, const void* codes, const void* scale,
                  int scale_is_f32, const void* zero, int64_t group, const void* bias, int bias_dtype) {
    table.w4a16({x, y, (const uint8_t*)codes, scale, (const uint8_t*)zero, nullptr, bias, m, n, k, group, (DType)dtype,
                 (DType)bias_dtype, scale_is_f32 != 0});
}
}
#pragma GCC visibility pop
