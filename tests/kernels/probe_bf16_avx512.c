#include "isa/bf16_avx512.c"
#include "probe.inc"
