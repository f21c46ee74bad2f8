#include "isa/bf16_scalar.c"
#include "probe.inc"
