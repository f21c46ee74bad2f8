#if defined(__aarch64__)
#define FC_REAL 32
#define FC_F16
#define FC_NEON
#define FC_DTYPE f16
#define FC_ISA neon
#include "../storage.inc"
#endif
