#include "isa/avx512_bf16.h"
#define FC_BF16
#include "probe.inc"
