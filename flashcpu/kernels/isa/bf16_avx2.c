#include "avx2.h"
#define FC_BF16
#include "../storage.inc"
