#include "isa/f64_neon.c"
#include "probe.inc"
