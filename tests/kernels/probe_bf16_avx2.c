#include "isa/bf16_avx2.c"
#include "probe.inc"
