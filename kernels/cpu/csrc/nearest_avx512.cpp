// Searches over codebooks for AVX-512.
#include "nearest.h"

void avx512_nearest(const Nearest& p) { nearest_entries(p); }
void avx512_sweep(const Sweep& p) { sweep_tiles(p); }
