#include "isa/f32_avx512.c"
#include "probe.inc"
