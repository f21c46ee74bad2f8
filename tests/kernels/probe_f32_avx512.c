#include "isa/avx512.h"
#define FC_REAL 32
#include "probe.inc"
