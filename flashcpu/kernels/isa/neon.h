#if defined(__aarch64__)
#define FC_NEON
#define FC_ISA neon
#endif
