// Levels for a block of channels for AVX-512.
#include "rounding.h"

void avx512_gptq(const Channels& p) { run_channels<false>(p); }
void avx512_descend(const Channels& p) { run_channels<true>(p); }
