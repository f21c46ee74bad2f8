#include "scalar.h"
#define FC_REAL 32
#define FC_DTYPE f32
#include "../tile.inc"
