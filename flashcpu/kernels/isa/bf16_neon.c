#include "neon.h"
#define FC_BF16
#include "../storage.inc"
