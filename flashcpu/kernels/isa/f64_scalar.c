#define FC_REAL 64
#define FC_SCALAR
#define FC_DTYPE f64
#define FC_ISA scalar
#include "../tile.inc"
