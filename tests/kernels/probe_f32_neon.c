#include "isa/neon.h"
#include "probe.inc"
