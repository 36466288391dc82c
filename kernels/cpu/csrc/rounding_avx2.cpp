// Levels for a block of channels for AVX2.
#include "rounding.h"

void avx2_gptq(const Channels& p) { run_channels<false>(p); }
void avx2_descend(const Channels& p) { run_channels<true>(p); }
