#include "isa/avx2.h"
#define FC_REAL 32
#include "probe.inc"
