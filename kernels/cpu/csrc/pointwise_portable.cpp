// Norms and activations in plain C++ for any processor.
#include "pointwise.h"

void portable_norm(const Norm& p) { norm(p); }
void portable_activate(const Activation& p) { activate(p); }
