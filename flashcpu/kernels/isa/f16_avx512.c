#include "avx512.h"
#define FC_F16
#include "../storage.inc"
