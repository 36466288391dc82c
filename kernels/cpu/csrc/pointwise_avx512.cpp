// Norms and activations for AVX-512.
#include "pointwise.h"

void avx512_norm(const Norm& p) { norm(p); }
void avx512_activate(const Activation& p) { activate(p); }
