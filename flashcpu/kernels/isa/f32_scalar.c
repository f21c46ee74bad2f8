#include "scalar.h"
#include "../tile.inc"
