#include "isa/bf16_neon.c"
#include "probe.inc"
