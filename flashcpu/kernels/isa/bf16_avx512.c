#include "avx512.h"
#define FC_BF16
#include "../storage.inc"
