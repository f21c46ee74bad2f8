#include "isa/avx2.h"
#define FC_F64
#include "probe.inc"
