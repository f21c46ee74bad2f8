#include "isa/f32_scalar.c"
#include "probe.inc"
