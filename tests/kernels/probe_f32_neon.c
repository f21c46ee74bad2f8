#include "isa/neon.h"
#define FC_REAL 32
#include "probe.inc"
