#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define FC_REAL 32
#define FC_BF16
#define FC_AVX2
#define FC_DTYPE bf16
#define FC_ISA avx2
#include "../storage.inc"
#endif
