// The tile registers of AMX, configured for the length of a scope.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

// The compiler's tile operations do not tell it that they read and write memory.
inline void settle(const void* at) { asm volatile("" : : "r"(at) : "memory"); }

// Tile registers: sums 0 1 / 2 3, left operands 4 5, right operands 6 7, each 16 rows of 64 bytes. Released at the end of the scope, as
// other libraries of the process configure tiles of their own.
struct Tiles {
    struct alignas(64) Config {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Tiles() {
        const Config config;
        settle(&config);
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

}  // namespace
