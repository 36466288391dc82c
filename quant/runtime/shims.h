// Our operators as AOTInductor calls them: tensor handles in, one new tensor out, no dispatcher and no Python between.
// The text is pasted into every compiled graph after torch's C interface. The functions declared first are those of
// kernels/cpu; the tensors have passed the operators' own checks when the graph was traced.

#include <cmath>
#include <cstddef>
#include <initializer_list>

extern "C" {
struct LowbitOutput {  // as in lowbit.h
    void* y;
    const void* bias;
    int64_t n, bias_dtype;
};
void lowbit_a8w4_multi(const void* x, int dtype, int64_t m, int64_t k, const LowbitOutput* outputs, int count, const void* codes,
                 const void* scale, int64_t group, const void* row_scale, int top, float reach);
void lowbit_w8a8_multi(const void* x, int dtype, int64_t m, int64_t k, const LowbitOutput* outputs, int count, const void* codes,
                 const void* row_scale);
void lowbit_weight_only_multi(const void* x, int dtype, int64_t m, int64_t k, const LowbitOutput* outputs, int count, int bits,
                        const void* codes, const void* scale, int scale_is_f32, const void* zero, int64_t group);
void lowbit_fp4_multi(const void* x, int dtype, int64_t m, int64_t k, const LowbitOutput* outputs, int count, const void* codes,
                      const void* scale, int group, const void* row_scale);
void lowbit_rotate(const void* x, int dtype, void* y, int64_t m, int64_t k, int64_t size, float scale);
void lowbit_attention(const void* q, const void* k, const void* v, void* y, const void* k_scale, const void* v_scale,
                      const void* k_channel, const void* first, const int64_t* sizes, int64_t start, float scale, int dtype);
void lowbit_append(const void* k, const void* v, void* k_cache, void* v_cache, void* k_scale, void* v_scale,
                   const void* k_channel, const int64_t* sizes, int64_t start, int dtype);
void lowbit_norm(const void* x, const void* weight, const void* bias, void* y, int64_t m, int64_t k, float eps, int centered,
                 int dtype);
void lowbit_activate(const void* x, const void* by, void* y, int64_t count, int kind, int dtype);
}

static void* lowbit_data(AtenTensorHandle tensor) {
    void* data = nullptr;
    aoti_torch_get_data_ptr(tensor, &data);
    return data;
}

static void* lowbit_data(const AtenTensorHandle* optional) { return optional ? lowbit_data(*optional) : nullptr; }

static int64_t lowbit_size(AtenTensorHandle tensor, int dimension) {
    int64_t* sizes = nullptr;
    aoti_torch_get_sizes(tensor, &sizes);
    return sizes[dimension];
}

static bool lowbit_is(AtenTensorHandle tensor, int32_t dtype) {
    int32_t found = 0;
    aoti_torch_get_dtype(tensor, &found);
    return found == dtype;
}

static int lowbit_dtype(AtenTensorHandle tensor) {
    return lowbit_is(tensor, aoti_torch_dtype_bfloat16()) ? 1 : lowbit_is(tensor, aoti_torch_dtype_float16()) ? 2 : 0;
}

static int lowbit_dtype(const AtenTensorHandle* optional) { return optional ? lowbit_dtype(*optional) : 0; }

// Makes [M, n] of x's dtype for each n and describes them to the C functions.
template <class Biases>
struct LowbitOutputs {
    static constexpr int kMost = 8;
    LowbitOutput outputs[kMost];
    int64_t m, k;
    int dtype;
    AOTITorchError error = 0;
    LowbitOutputs(AtenTensorHandle x, const Biases& biases, const int64_t* ns, std::initializer_list<AtenTensorHandle*> made)
        : m(lowbit_size(x, 0)), k(lowbit_size(x, 1)), dtype(lowbit_dtype(x)) {
        int32_t kind = 0;
        aoti_torch_get_dtype(x, &kind);
        int i = 0;
        for (AtenTensorHandle* out : made) {
            const int64_t sizes[] = {m, ns[i]}, strides[] = {ns[i], 1};
            error |= aoti_torch_empty_strided(2, sizes, strides, kind, aoti_torch_device_type_cpu(), 0, out);
            if (error) return;
            outputs[i] = {lowbit_data(*out), lowbit_data(biases[i]), ns[i], lowbit_dtype(biases[i])};
            i++;
        }
    }
};

template <class Biases, class... Out>
AOTITorchError aoti_torch_cpu_cpu_a8w4_multi(AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scales,
                                             AtenTensorHandle row_scale, const Biases& biases, int64_t, const int64_t* ns,
                                             int64_t, int64_t group, int64_t top, double reach, Out... out) {
    const LowbitOutputs<Biases> p(x, biases, ns, {out...});
    if (p.error) return p.error;
    lowbit_a8w4_multi(lowbit_data(x), p.dtype, p.m, p.k, p.outputs, sizeof...(out), lowbit_data(codes), lowbit_data(scales), group,
                lowbit_data(row_scale), (int)top, (float)reach);
    return 0;
}

template <class Biases, class... Out>
AOTITorchError aoti_torch_cpu_cpu_w8a8_multi(AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle row_scale,
                                             const Biases& biases, int64_t, const int64_t* ns, int64_t, int64_t, Out... out) {
    const LowbitOutputs<Biases> p(x, biases, ns, {out...});
    if (p.error) return p.error;
    lowbit_w8a8_multi(lowbit_data(x), p.dtype, p.m, p.k, p.outputs, sizeof...(out), lowbit_data(codes), lowbit_data(row_scale));
    return 0;
}

template <class Biases, class... Out>
AOTITorchError aoti_torch_cpu_cpu_weight_only_multi(AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scale,
                                                    AtenTensorHandle* zero, const Biases& biases, int64_t, const int64_t* ns,
                                                    int64_t, int64_t, int64_t bits, int64_t group, Out... out) {
    const LowbitOutputs<Biases> p(x, biases, ns, {out...});
    if (p.error) return p.error;
    lowbit_weight_only_multi(lowbit_data(x), p.dtype, p.m, p.k, p.outputs, sizeof...(out), (int)bits, lowbit_data(codes),
                       lowbit_data(scale), lowbit_is(scale, aoti_torch_dtype_float32()), lowbit_data(zero), group);
    return 0;
}

template <class Biases, class... Out>
AOTITorchError aoti_torch_cpu_cpu_fp4_multi(AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scale,
                                            AtenTensorHandle* row_scale, const Biases& biases, int64_t, const int64_t* ns, int64_t,
                                            int64_t group, Out... out) {
    const LowbitOutputs<Biases> p(x, biases, ns, {out...});
    if (p.error) return p.error;
    lowbit_fp4_multi(lowbit_data(x), p.dtype, p.m, p.k, p.outputs, sizeof...(out), lowbit_data(codes), lowbit_data(scale),
                     (int)group, lowbit_data(row_scale));
    return 0;
}

AOTITorchError aoti_torch_cpu_cpu_a8w4(AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scales,
                                       AtenTensorHandle row_scale, AtenTensorHandle* bias, int64_t group, int64_t top, double reach,
                                       AtenTensorHandle* out) {
    const int64_t n = lowbit_size(row_scale, 0);
    return aoti_torch_cpu_cpu_a8w4_multi(x, codes, scales, row_scale, &bias, 1, &n, 1, group, top, reach, out);
}

AOTITorchError aoti_torch_cpu_cpu_w8a8(AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle row_scale,
                                       AtenTensorHandle* bias, int64_t k, AtenTensorHandle* out) {
    const int64_t n = lowbit_size(row_scale, 0);
    return aoti_torch_cpu_cpu_w8a8_multi(x, codes, row_scale, &bias, 1, &n, 1, k, out);
}

AOTITorchError aoti_torch_cpu_cpu_weight_only(AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scale,
                                              AtenTensorHandle* zero, AtenTensorHandle* bias, int64_t n, int64_t k,
                                              int64_t bits, int64_t group, AtenTensorHandle* out) {
    return aoti_torch_cpu_cpu_weight_only_multi(x, codes, scale, zero, &bias, 1, &n, 1, k, bits, group, out);
}

AOTITorchError aoti_torch_cpu_cpu_fp4(AtenTensorHandle x, AtenTensorHandle codes, AtenTensorHandle scale,
                                      AtenTensorHandle* row_scale, AtenTensorHandle* bias, int64_t n, int64_t group,
                                      AtenTensorHandle* out) {
    return aoti_torch_cpu_cpu_fp4_multi(x, codes, scale, row_scale, &bias, 1, &n, 1, group, out);
}

AOTITorchError aoti_torch_cpu_rotate(AtenTensorHandle x, int64_t size, AtenTensorHandle* out) {
    int64_t numel = 0;
    int32_t dtype = 0;
    aoti_torch_get_numel(x, &numel);
    aoti_torch_get_dtype(x, &dtype);
    int64_t dimensions = 0, *sizes = nullptr, *strides = nullptr;
    aoti_torch_get_dim(x, &dimensions);
    aoti_torch_get_sizes(x, &sizes);
    aoti_torch_get_strides(x, &strides);
    const int64_t k = sizes[dimensions - 1];
    if (AOTITorchError error =
            aoti_torch_empty_strided(dimensions, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, out))
        return error;
    lowbit_rotate(lowbit_data(x), lowbit_dtype(x), lowbit_data(*out), numel / k, k, size, 1 / sqrtf((float)size));
    return 0;
}

static void lowbit_strides(AtenTensorHandle tensor, int64_t* three) {
    int64_t* strides = nullptr;
    aoti_torch_get_strides(tensor, &strides);
    for (int i = 0; i < 3; i++) three[i] = strides[i];
}

// q [B, H, T, D], k and v [B, H', S, D] -> out [B, T, H, D].
static AOTITorchError lowbit_attend(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, void* k_scale, void* v_scale,
                                    void* k_channel, AtenTensorHandle* start, AtenTensorHandle* first, double scale,
                                    AtenTensorHandle* out) {
    const int64_t b = lowbit_size(q, 0), h = lowbit_size(q, 1), t = lowbit_size(q, 2), d = lowbit_size(q, 3);
    int64_t sizes[15] = {b, h, lowbit_size(k, 1), t, lowbit_size(k, 2), d};
    lowbit_strides(q, sizes + 6);
    lowbit_strides(k, sizes + 9);
    lowbit_strides(v, sizes + 12);
    const int64_t shape[] = {b, t, h, d}, strides[] = {t * h * d, h * d, d, 1};
    int32_t dtype = 0;
    aoti_torch_get_dtype(q, &dtype);
    if (AOTITorchError error = aoti_torch_empty_strided(4, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, out))
        return error;
    lowbit_attention(lowbit_data(q), lowbit_data(k), lowbit_data(v), lowbit_data(*out), k_scale, v_scale, k_channel,
                     lowbit_data(first), sizes, start ? *static_cast<int64_t*>(lowbit_data(start)) : -1, (float)scale,
                     lowbit_dtype(q));
    return 0;
}

// k, v [B, H', T, D] into caches [B, H', S, D].
static AOTITorchError lowbit_store(AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle k_cache, AtenTensorHandle v_cache,
                                   void* k_scale, void* v_scale, void* k_channel, AtenTensorHandle start) {
    int64_t sizes[11] = {lowbit_size(k, 0), lowbit_size(k, 1), lowbit_size(k, 2), lowbit_size(k_cache, 2), lowbit_size(k, 3)};
    lowbit_strides(k, sizes + 5);
    lowbit_strides(v, sizes + 8);
    lowbit_append(lowbit_data(k), lowbit_data(v), lowbit_data(k_cache), lowbit_data(v_cache), k_scale, v_scale, k_channel, sizes,
                  *static_cast<int64_t*>(lowbit_data(start)), lowbit_dtype(k));
    return 0;
}

AOTITorchError aoti_torch_cpu_cpu_attention(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle* start,
                                            AtenTensorHandle* first, double scale, AtenTensorHandle* out) {
    return lowbit_attend(q, k, v, nullptr, nullptr, nullptr, start, first, scale, out);
}

AOTITorchError aoti_torch_cpu_cpu_attention_int8(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v,
                                                 AtenTensorHandle k_scale, AtenTensorHandle v_scale,
                                                 AtenTensorHandle k_channel, AtenTensorHandle* start, AtenTensorHandle* first,
                                                 double scale, AtenTensorHandle* out) {
    return lowbit_attend(q, k, v, lowbit_data(k_scale), lowbit_data(v_scale), lowbit_data(k_channel), start, first, scale, out);
}

AOTITorchError aoti_torch_cpu_cpu_append_kv(AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle k_cache,
                                            AtenTensorHandle v_cache, AtenTensorHandle start, std::nullptr_t) {
    return lowbit_store(k, v, k_cache, v_cache, nullptr, nullptr, nullptr, start);
}

AOTITorchError aoti_torch_cpu_cpu_append_kv_int8(AtenTensorHandle k, AtenTensorHandle v, AtenTensorHandle k_cache,
                                                 AtenTensorHandle v_cache, AtenTensorHandle k_scale, AtenTensorHandle v_scale,
                                                 AtenTensorHandle k_channel, AtenTensorHandle start, std::nullptr_t) {
    return lowbit_store(k, v, k_cache, v_cache, lowbit_data(k_scale), lowbit_data(v_scale), lowbit_data(k_channel), start);
}

// x [..., K], contiguous -> out of its shape. Returns the number of elements, or -1 for a strided x or where memory is short.
static int64_t lowbit_like(AtenTensorHandle x, AtenTensorHandle* out, int64_t* last) {
    constexpr int64_t kMost = 8;
    int64_t dims = 0, count = 1, strides[kMost], *sizes = nullptr, *given = nullptr;
    int32_t dtype = 0;
    aoti_torch_get_dim(x, &dims);
    aoti_torch_get_sizes(x, &sizes);
    aoti_torch_get_dtype(x, &dtype);
    aoti_torch_get_strides(x, &given);
    if (dims < 1 || dims > kMost) return -1;
    for (int64_t i = dims; i-- > 0; count *= sizes[i]) {
        strides[i] = count;
        if (sizes[i] > 1 && given[i] != count) return -1;
    }
    *last = sizes[dims - 1];
    return aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, out) ? -1 : count;
}

static AOTITorchError lowbit_normalize(AtenTensorHandle x, AtenTensorHandle weight, void* bias, double eps, int centered,
                                       AtenTensorHandle* out) {
    int64_t k = 0;
    const int64_t count = lowbit_like(x, out, &k);
    if (count < 0) return 1;
    if (count)
        lowbit_norm(lowbit_data(x), lowbit_data(weight), bias, lowbit_data(*out), count / k, k, (float)eps, centered,
                    lowbit_dtype(x));
    return 0;
}

static AOTITorchError lowbit_apply(AtenTensorHandle x, void* by, int kind, AtenTensorHandle* out) {
    int64_t k = 0;
    const int64_t count = lowbit_like(x, out, &k);
    if (count < 0) return 1;
    lowbit_activate(lowbit_data(x), by, lowbit_data(*out), count, kind, lowbit_dtype(x));
    return 0;
}

AOTITorchError aoti_torch_cpu_cpu_rms_norm(AtenTensorHandle x, AtenTensorHandle weight, double eps, AtenTensorHandle* out) {
    return lowbit_normalize(x, weight, nullptr, eps, 0, out);
}

AOTITorchError aoti_torch_cpu_cpu_layer_norm(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle bias, double eps,
                                             AtenTensorHandle* out) {
    return lowbit_normalize(x, weight, lowbit_data(bias), eps, 1, out);
}

AOTITorchError aoti_torch_cpu_cpu_silu(AtenTensorHandle x, AtenTensorHandle* out) { return lowbit_apply(x, nullptr, 0, out); }

AOTITorchError aoti_torch_cpu_cpu_silu_mul(AtenTensorHandle x, AtenTensorHandle by, AtenTensorHandle* out) {
    return lowbit_apply(x, lowbit_data(by), 0, out);
}

AOTITorchError aoti_torch_cpu_cpu_gelu(AtenTensorHandle x, AtenTensorHandle* out) { return lowbit_apply(x, nullptr, 1, out); }
