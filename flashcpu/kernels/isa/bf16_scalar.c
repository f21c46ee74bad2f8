#include "scalar.h"
#define FC_BF16
#include "../storage.inc"
