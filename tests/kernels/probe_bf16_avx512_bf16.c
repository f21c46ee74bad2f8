#include "isa/bf16_avx512_bf16.c"
#include "probe.inc"
