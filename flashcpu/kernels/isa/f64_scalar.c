#include "scalar.h"
#define FC_REAL 64
#define FC_DTYPE f64
#include "../tile.inc"
