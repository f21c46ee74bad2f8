#define FC_REAL 32
#define FC_F16
#define FC_SCALAR
#define FC_DTYPE f16
#define FC_ISA scalar
#include "../storage.inc"
