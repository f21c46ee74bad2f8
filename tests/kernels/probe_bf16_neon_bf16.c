#include "isa/bf16_neon_bf16.c"
#include "probe.inc"
