#include "isa/avx512.h"
#include "probe.inc"
