#define FC_REAL 32
#define FC_BF16
#define FC_SCALAR
#define FC_DTYPE bf16
#define FC_ISA scalar
#include "../storage.inc"
