/* Which instruction sets this CPU and this build have. __builtin_cpu_supports asks CPUID and, for
 * the vector registers, XGETBV too: an operating system that does not save them counts as without.
 */
#include "kernels.h"

#include <string.h>

#define DTYPES(X, isa) X(f32, isa) X(f64, isa)
#define DECLARE(dtype, isa) extern const struct fc_kernels fc_kernels_##dtype##_##isa;
#define ENTRY(dtype, isa) &fc_kernels_##dtype##_##isa,

DTYPES(DECLARE, scalar)
#if defined(__x86_64__)
DTYPES(DECLARE, avx512)
DTYPES(DECLARE, avx2)
#elif defined(__aarch64__)
DTYPES(DECLARE, neon)
#endif

static const struct fc_kernels *const tables[] = {DTYPES(ENTRY, scalar)
#if defined(__x86_64__)
                                                      DTYPES(ENTRY, avx512) DTYPES(ENTRY, avx2)
#elif defined(__aarch64__)
                                                      DTYPES(ENTRY, neon)
#endif
};

const char *const *fc_isas(void) {
#if defined(__x86_64__)
    static const char *const all[] = {"avx512", "avx2", "scalar", NULL};
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return all;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return all + 1;
    }
    return all + 2;
#elif defined(__aarch64__)
    static const char *const all[] = {"neon", "scalar", NULL};
    return all;
#else
    static const char *const all[] = {"scalar", NULL};
    return all;
#endif
}

const struct fc_kernels *fc_find(const char *dtype, const char *isa) {
    int has = 0;
    for (const char *const *name = fc_isas(); *name; name++) {
        has |= strcmp(*name, isa) == 0;
    }
    for (size_t i = 0; has && i < sizeof(tables) / sizeof(*tables); i++) {
        if (strcmp(tables[i]->dtype, dtype) == 0 && strcmp(tables[i]->isa, isa) == 0) {
            return tables[i];
        }
    }
    return NULL;
}
