#if defined(__aarch64__)
#define FC_REAL 32
#define FC_BF16
#define FC_NEON
#define FC_DTYPE bf16
#define FC_ISA neon
#include "../storage.inc"
#endif
