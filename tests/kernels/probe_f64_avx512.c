#include "isa/avx512.h"
#define FC_F64
#include "probe.inc"
