// Attention for AVX2.
#include "attention_run.h"

void avx2_attend(const Attention& p) { attend(p); }
void avx2_append(const Append& p) { append(p); }
