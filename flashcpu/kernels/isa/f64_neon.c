#if defined(__aarch64__)
#define FC_REAL 64
#define FC_NEON
#define FC_DTYPE f64
#define FC_ISA neon
#include "../tile.inc"
#endif
