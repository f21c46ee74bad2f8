#include "neon.h"
/* Before registers are given out GCC 12 moves all broadcasts to the front, and spills. */
#pragma GCC optimize("no-schedule-insns")
#include "../tile.inc"
