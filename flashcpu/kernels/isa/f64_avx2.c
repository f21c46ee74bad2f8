#include "avx2.h"
#define FC_F64
#include "../tile.inc"
