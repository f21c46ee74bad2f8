#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define FC_REAL 64
#define FC_AVX512
#define FC_DTYPE f64
#define FC_ISA avx512
#include "../tile.inc"
#endif
