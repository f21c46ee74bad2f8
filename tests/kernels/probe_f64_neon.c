#include "isa/neon.h"
#define FC_F64
#include "probe.inc"
