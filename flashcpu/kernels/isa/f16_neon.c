#include "neon.h"
#define FC_F16
#include "../storage.inc"
