#include "avx512.h"
#include "../tile.inc"
