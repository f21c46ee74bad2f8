#define FC_REAL 32
#define FC_SCALAR
#define FC_DTYPE f32
#define FC_ISA scalar
#include "../tile.inc"
