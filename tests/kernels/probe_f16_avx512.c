#include "isa/f16_avx512.c"
#include "probe.inc"
