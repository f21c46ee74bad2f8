/* What kernels_test.c asks of the inside of the kernels: the functions of vec.h and exp2.h that the
 * tables of kernels.h do not show. Plain C, like kernels.h. */
#include <stddef.h>

struct probe {
    const char *arithmetic, *isa;
    /* y <- 2^x and y <- v_max(a, b), n elements at a time; n fills whole vectors, 64-byte aligned
     */
    void (*exp2)(const void *x, void *y, size_t n);
    void (*max)(const void *a, const void *b, void *y, size_t n);
    /* c <- c + a b, or in pairs c + a0 b0 + a1 b1, n units at a time; a is a splat */
    void (*dot)(const void *a, const void *b, void *c, size_t n);
    double (*log_of_sum)(double l);
};
