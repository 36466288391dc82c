// Levels for a block of channels for any processor.
#include "rounding.h"

void portable_gptq(const Channels& p) { run_channels<false>(p); }
void portable_descend(const Channels& p) { run_channels<true>(p); }
