#include "isa/f64_avx512.c"
#include "probe.inc"
