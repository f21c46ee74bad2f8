#include "isa/scalar.h"
#define FC_REAL 64
#include "probe.inc"
