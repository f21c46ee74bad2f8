#include "isa/avx512.h"
#define FC_REAL 64
#include "probe.inc"
