#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+bf16")
/* Before registers are given out GCC 12 moves loads to the front, and spills. */
#pragma GCC optimize("no-schedule-insns")
#define FC_REAL 32
#define FC_BF16
#define FC_PAIRS
#define FC_NEON
#define FC_DTYPE bf16
#define FC_ISA neon_bf16
#include "../tile.inc"
#endif
