#include "isa/f32_neon.c"
#include "probe.inc"
