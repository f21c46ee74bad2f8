#include "isa/f64_scalar.c"
#include "probe.inc"
