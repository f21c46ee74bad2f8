/* The tables of this build, and which of them are those of an instruction set. */
#include "kernels.h"

#include <string.h>

/* Best first. Every instruction set has f32, f64 and what is stored otherwise and widened; the bf16
 * arithmetic is all that BF16 adds. */
#if defined(__x86_64__)
#define BF16(X, ...) X(avx512_bf16, __VA_ARGS__)
#define ISAS(X, ...) X(avx512, __VA_ARGS__) X(avx2, __VA_ARGS__) X(scalar, __VA_ARGS__)
#elif defined(__aarch64__)
#define BF16(X, ...) X(neon_bf16, __VA_ARGS__)
#define ISAS(X, ...) X(neon, __VA_ARGS__) X(scalar, __VA_ARGS__)
#else
#define BF16(X, ...)
#define ISAS(X, ...) X(scalar, __VA_ARGS__)
#endif
#define KERNELS(X) BF16(X, fc_kernels, bf16) ISAS(X, fc_kernels, f32) ISAS(X, fc_kernels, f64)
#define STORAGES(X)                \
    BF16(X, fc_storage, bf16_bf16) \
    ISAS(X, fc_storage, f32_f32)   \
    ISAS(X, fc_storage, f64_f64) ISAS(X, fc_storage, f16_f32) ISAS(X, fc_storage, bf16_f32)
#define DECLARE(isa, what, dtype) extern const struct what what##_##dtype##_##isa;
#define ENTRY(isa, what, dtype) &what##_##dtype##_##isa,

KERNELS(DECLARE)
STORAGES(DECLARE)
static const struct fc_kernels *const kernels[] = {KERNELS(ENTRY)};
static const struct fc_storage *const storages[] = {STORAGES(ENTRY)};

/* An instruction set has what those after it have, so the search goes on from there. */
#define FIND(tables, matches)                                                        \
    int from_here = 0;                                                               \
    for (const char *const *name = fc_isas(); *name; name++) {                       \
        from_here |= strcmp(*name, isa) == 0;                                        \
        for (size_t i = 0; from_here && i < sizeof(tables) / sizeof(*tables); i++) { \
            if (strcmp(tables[i]->isa, *name) == 0 && (matches)) {                   \
                return tables[i];                                                    \
            }                                                                        \
        }                                                                            \
    }                                                                                \
    return NULL

const struct fc_kernels *fc_find_kernels(const char *dtype, const char *isa) {
    FIND(kernels, strcmp(kernels[i]->dtype, dtype) == 0);
}

const struct fc_storage *fc_find_storage(const char *dtype, const char *arithmetic,
                                         const char *isa) {
    FIND(storages, strcmp(storages[i]->dtype, dtype) == 0 &&
                       strcmp(storages[i]->arithmetic, arithmetic) == 0);
}
