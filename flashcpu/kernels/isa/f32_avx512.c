#include "avx512.h"
#ifdef FC_ISA
#define FC_REAL 32
#define FC_DTYPE f32
#include "../tile.inc"
#endif
