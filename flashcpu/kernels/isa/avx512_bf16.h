#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define FC_AVX512
#define FC_PAIRS
#define FC_ISA avx512_bf16
#endif
