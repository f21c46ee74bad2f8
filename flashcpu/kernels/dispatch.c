/* The tables of this build, and which of them are those of an instruction set. */
#include "kernels.h"

#include <string.h>

/* Best first. Every instruction set has f32, f64 and what is stored otherwise and widened; the bf16
 * arithmetic is all that the first ones add to those below. */
#if defined(__x86_64__)
#define ISAS(X, ...) X(avx512, __VA_ARGS__) X(avx2, __VA_ARGS__) X(scalar, __VA_ARGS__)
#define BF16_ISA avx512_bf16
#elif defined(__aarch64__)
#define ISAS(X, ...) X(neon, __VA_ARGS__) X(scalar, __VA_ARGS__)
#define BF16_ISA neon_bf16
#else
#define ISAS(X, ...) X(scalar, __VA_ARGS__)
#endif
#define KERNELS(X) ISAS(X, fc_kernels, f32) ISAS(X, fc_kernels, f64)
#define STORAGES(X)              \
    ISAS(X, fc_storage, f32_f32) \
    ISAS(X, fc_storage, f64_f64) ISAS(X, fc_storage, f16_f32) ISAS(X, fc_storage, bf16_f32)
#define DECLARE(isa, what, dtype) DECLARE_(isa, what, dtype)
#define DECLARE_(isa, what, dtype) extern const struct what what##_##dtype##_##isa;
#define ENTRY(isa, what, dtype) ENTRY_(isa, what, dtype)
#define ENTRY_(isa, what, dtype) &what##_##dtype##_##isa,

KERNELS(DECLARE)
STORAGES(DECLARE)
#ifdef BF16_ISA
DECLARE(BF16_ISA, fc_kernels, bf16)
DECLARE(BF16_ISA, fc_storage, bf16_bf16)
#endif
static const struct fc_kernels *const kernels[] = {
#ifdef BF16_ISA
    ENTRY(BF16_ISA, fc_kernels, bf16)
#endif
        KERNELS(ENTRY)};
static const struct fc_storage *const storages[] = {
#ifdef BF16_ISA
    ENTRY(BF16_ISA, fc_storage, bf16_bf16)
#endif
        STORAGES(ENTRY)};

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
