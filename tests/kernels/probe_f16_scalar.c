#include "isa/f16_scalar.c"
#include "probe.inc"
