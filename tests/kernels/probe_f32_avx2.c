#include "isa/f32_avx2.c"
#include "probe.inc"
