#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define FC_REAL 32
#define FC_F16
#define FC_AVX512
#define FC_DTYPE f16
#define FC_ISA avx512
#include "../storage.inc"
#endif
