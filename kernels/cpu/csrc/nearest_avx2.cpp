// Searches over codebooks for AVX2.
#include "nearest.h"

void avx2_nearest(const Nearest& p) { nearest_entries(p); }
void avx2_sweep(const Sweep& p) { sweep_tiles(p); }
