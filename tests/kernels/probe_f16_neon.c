#include "isa/f16_neon.c"
#include "probe.inc"
