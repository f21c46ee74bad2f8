#include "isa/scalar.h"
#include "probe.inc"
