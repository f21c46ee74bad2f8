#include "scalar.h"
#define FC_REAL 32
#define FC_F16
#define FC_DTYPE f16
#include "../storage.inc"
