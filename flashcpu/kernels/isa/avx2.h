#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define FC_AVX2
#define FC_ISA avx2
#endif
