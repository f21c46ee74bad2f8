/* Which instruction sets this CPU and this build have. __builtin_cpu_supports asks CPUID and, for
 * the vector registers, XGETBV too: an operating system that does not save them counts as without.
 */
#include "kernels.h"

#include <string.h>

#if defined(__x86_64__)
#define ISAS(X, ...) X(avx512, __VA_ARGS__) X(avx2, __VA_ARGS__) X(scalar, __VA_ARGS__)
#elif defined(__aarch64__)
#define ISAS(X, ...) X(neon, __VA_ARGS__) X(scalar, __VA_ARGS__)
#else
#define ISAS(X, ...) X(scalar, __VA_ARGS__)
#endif
#define KERNELS(X) ISAS(X, fc_kernels, f32) ISAS(X, fc_kernels, f64)
#define STORAGES(X)          \
    ISAS(X, fc_storage, f32) \
    ISAS(X, fc_storage, f64) ISAS(X, fc_storage, f16) ISAS(X, fc_storage, bf16)
#define DECLARE(isa, what, dtype) extern const struct what what##_##dtype##_##isa;
#define ENTRY(isa, what, dtype) &what##_##dtype##_##isa,

KERNELS(DECLARE)
STORAGES(DECLARE)
static const struct fc_kernels *const kernels[] = {KERNELS(ENTRY)};
static const struct fc_storage *const storages[] = {STORAGES(ENTRY)};

const char *const *fc_isas(void) {
#if defined(__x86_64__)
    static const char *const all[] = {"avx512", "avx2", "scalar", NULL};
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                     __builtin_cpu_supports("f16c");
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? all : avx2 ? all + 1 : all + 2;
#elif defined(__aarch64__)
    static const char *const all[] = {"neon", "scalar", NULL};
    return all;
#else
    static const char *const all[] = {"scalar", NULL};
    return all;
#endif
}

static int has(const char *isa) {
    for (const char *const *name = fc_isas(); *name; name++) {
        if (strcmp(*name, isa) == 0) {
            return 1;
        }
    }
    return 0;
}

#define FIND(tables)                                                                    \
    for (size_t i = 0; has(isa) && i < sizeof(tables) / sizeof(*tables); i++) {         \
        if (strcmp(tables[i]->dtype, dtype) == 0 && strcmp(tables[i]->isa, isa) == 0) { \
            return tables[i];                                                           \
        }                                                                               \
    }                                                                                   \
    return NULL

const struct fc_kernels *fc_find_kernels(const char *dtype, const char *isa) { FIND(kernels); }
const struct fc_storage *fc_find_storage(const char *dtype, const char *isa) { FIND(storages); }
