#include "scalar.h"
#define FC_REAL 32
#define FC_BF16
#define FC_DTYPE bf16
#include "../storage.inc"
