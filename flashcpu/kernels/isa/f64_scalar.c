#include "scalar.h"
#define FC_F64
#include "../tile.inc"
