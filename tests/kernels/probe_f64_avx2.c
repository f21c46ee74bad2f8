#include "isa/f64_avx2.c"
#include "probe.inc"
