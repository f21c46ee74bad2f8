#include "isa/neon_bf16.h"
#define FC_BF16
#include "probe.inc"
