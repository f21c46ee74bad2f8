#include "isa/avx2.h"
#include "probe.inc"
