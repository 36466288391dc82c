// Searches over codebooks for any processor.
#include "nearest.h"

void portable_nearest(const Nearest& p) { nearest_entries(p); }
void portable_sweep(const Sweep& p) { sweep_tiles(p); }
