#include "avx512.h"
#ifdef FC_ISA
#define FC_REAL 64
#define FC_DTYPE f64
#include "../tile.inc"
#endif
