#include "isa/scalar.h"
#define FC_F64
#include "probe.inc"
