// Attention for AVX-512 with BF16 arithmetic.
#include "attention_run.h"

void avx512bf16_attend(const Attention& p) { attend(p); }
void avx512bf16_append(const Append& p) { append(p); }
