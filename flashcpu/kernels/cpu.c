/* What this CPU has, and which of it is fast here. __builtin_cpu_supports asks CPUID and, for the
 * vector registers, XGETBV too: an operating system that does not save them counts as without. On
 * aarch64 the Linux kernel tells; another system counts as one whose CPU has only what all have. */
#include "kernels.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP2_BF16 /* headers older than Linux 5.6 */
#define HWCAP2_BF16 (1 << 14)
#endif
#endif

const char *const *fc_isas(void) {
#if defined(__x86_64__)
    static const char *const all[] = {"avx512_bf16", "avx512", "avx2", "scalar", NULL};
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("f16c");
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const int bf16 = __builtin_cpu_supports("avx512bf16");
    return avx2 && avx512 && bf16 ? all : avx2 && avx512 ? all + 1 : avx2 ? all + 2 : all + 3;
#elif defined(__aarch64__)
    static const char *const all[] = {"neon_bf16", "neon", "scalar", NULL};
#if defined(__linux__)
    const int bf16 = (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
#else
    const int bf16 = 0;
#endif
    return bf16 ? all : all + 1;
#else
    static const char *const all[] = {"scalar", NULL};
    return all;
#endif
}

/* Intel's cores that have AVX512_FP16 too, or AMX, do a vdpbf16ps in the time of four FMAs: half as
 * many products a second as in f32 (Sapphire Rapids; prefill of bf16 widened is 1.6 times as fast,
 * decode of one query 1.07, of four 1.4). On Cooper Lake and on AMD's twice as many. A virtual
 * machine may hide one of these features. */
static int is_slow_in_pairs(void) {
#if defined(__x86_64__)
    unsigned a, b, c, d = 0;
    const unsigned amx_bf16 = 1u << 22, avx512_fp16 = 1u << 23, amx_tile = 1u << 24;
    return __builtin_cpu_is("intel") && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           (d & (amx_bf16 | avx512_fp16 | amx_tile));
#else
    return 0;
#endif
}

const char *fc_fastest_isa(void) {
    const char *const *isas = fc_isas();
    return isas[strcmp(isas[0], "avx512_bf16") == 0 && is_slow_in_pairs()];
}

/* AMD's Zen 4 multiplies one vector of 64 bytes a cycle, Intel's servers two, and all others of
 * Intel's CPUs count as such. Zen 5 does two as well, but was not measured: it counts as Zen 4. The
 * servers of Ice Lake load 16 such vectors out of L1 in 14.2 cycles, also where a number is spread
 * into each, but 16 of 32 bytes in 8. */
int fc_pipes(void) {
#if defined(__x86_64__)
    return __builtin_cpu_is("icelake-server") ? FC_ONE_LOAD
           : __builtin_cpu_is("intel")        ? FC_TWO_PRODUCTS
                                              : FC_ONE_PRODUCT;
#else
    return FC_ONE_PRODUCT;
#endif
}

/* Intel's servers do, all that have AVX-512; others were not measured. */
int fc_mixes(void) {
#if defined(__x86_64__)
    return __builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f");
#else
    return 0;
#endif
}
