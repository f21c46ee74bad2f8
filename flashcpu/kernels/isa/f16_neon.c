#include "neon.h"
#ifdef FC_ISA
#define FC_REAL 32
#define FC_F16
#define FC_DTYPE f16
#include "../storage.inc"
#endif
