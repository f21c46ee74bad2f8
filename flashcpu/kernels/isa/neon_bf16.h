#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+bf16")
#define FC_NEON
#define FC_PAIRS
#define FC_ISA neon_bf16
#endif
