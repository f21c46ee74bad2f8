#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#define FC_AVX512
#define FC_ISA avx512
#endif
