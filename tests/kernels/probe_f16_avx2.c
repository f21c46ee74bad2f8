#include "isa/f16_avx2.c"
#include "probe.inc"
