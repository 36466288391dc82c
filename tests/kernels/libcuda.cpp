// A stand-in for libcuda: records every call as one line of text, so that a test can read what a launch would have done.
// The names, argument lists and error codes are those of the driver API. `fail_next` makes a named call return an error.

#include <cstdio>
#include <cstring>
#include <string>

static std::string record, failing;

template <typename... T>
static int note(const char* name, const char* format, T... values) {
    char line[256];
    int length = std::snprintf(line, sizeof line, "%s ", name);
    std::snprintf(line + length, sizeof line - length, format, values...);
    record += line;
    record += '\n';
    return failing == name ? 999 : 0;
}

extern "C" {
const char* calls() { return record.c_str(); }
void forget() { record.clear(); }
void fail_next(const char* name) { failing = name; }

int cuInit(unsigned flags) { return note("cuInit", "%u", flags); }
int cuGetErrorName(int code, const char** out) { return *out = code == 999 ? "CUDA_ERROR_UNKNOWN" : nullptr, *out == nullptr; }
int cuGetErrorString(int code, const char** out) { return *out = code == 999 ? "unknown error" : nullptr, *out == nullptr; }
int cuDeviceGet(int* device, int ordinal) { return *device = 70 + ordinal, note("cuDeviceGet", "%d", ordinal); }
int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = (void*)0x7000000000000000;
    return note("cuDevicePrimaryCtxRetain", "%d", device);
}
int cuCtxSetCurrent(void* context) { return note("cuCtxSetCurrent", "%p", context); }
int cuModuleLoadData(void** module, const void* image) {
    *module = (void*)0x7100000000000000;
    return note("cuModuleLoadData", "%.3s", (const char*)image + 1);
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = (void*)0x7200000000000000;
    return note("cuModuleGetFunction", "%p %s", module, name);
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    return note("cuFuncSetAttribute", "%p %d %d", function, attribute, value);
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** params, void** extra) {
    int code = note("cuLaunchKernel", "%p %u %u %u %u %u %u %u %p", function, x, y, z, bx, by, bz, shared, stream);
    if (params != nullptr || extra == nullptr || extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4] != nullptr) return 1;
    const unsigned char* bytes = (const unsigned char*)extra[1];
    for (size_t i = 0, n = *(size_t*)extra[3]; i < n; i++) {
        char pair[3];
        std::snprintf(pair, sizeof pair, "%02x", bytes[i]);
        record += pair;
    }
    record += '\n';
    return code;
}
}
