#include "avx2.h"
#include "../tile.inc"
