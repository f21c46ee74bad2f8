#include "isa/avx2.h"
#define FC_REAL 64
#include "probe.inc"
