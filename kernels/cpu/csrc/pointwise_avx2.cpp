// Norms and activations for AVX2.
#include "pointwise.h"

void avx2_norm(const Norm& p) { norm(p); }
void avx2_activate(const Activation& p) { activate(p); }
