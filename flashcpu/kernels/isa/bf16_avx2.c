#include "avx2.h"
#ifdef FC_ISA
#define FC_REAL 32
#define FC_BF16
#define FC_DTYPE bf16
#include "../storage.inc"
#endif
