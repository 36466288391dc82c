// Attention in plain C++ for any processor.
#include "attention_run.h"

void portable_attend(const Attention& p) { attend(p); }
void portable_append(const Append& p) { append(p); }
