/* The vector vocabulary of tile.inc. The only file with #if on the instruction set and the type.
 *
 * A stub (isa/<dtype>_<isa>.c) defines FC_REAL as 32 or 64 and one of FC_AVX512, FC_AVX2, FC_NEON,
 * FC_SCALAR, then includes tile.inc. Every type here is a GCC vector type, so + - * / mean the
 * lane-wise IEEE operations and are used as such. */
#include <math.h>
#include <string.h>

#if FC_REAL == 32
typedef float real;
typedef int32_t real_bits;
#define MANTISSA_BITS 23
#else
typedef double real;
typedef int64_t real_bits;
#define MANTISSA_BITS 52
#endif
typedef real elem;

#if defined(FC_AVX512)
#include <immintrin.h>
#define VEC_BYTES 64
#define MR 8 /* 24 accumulators of 32 registers */
#define HAS_FMA 1
#elif defined(FC_AVX2)
#include <immintrin.h>
#define VEC_BYTES 32
#define MR 4 /* 12 accumulators of 16 registers */
#define HAS_FMA 1
#elif defined(FC_NEON)
#include <arm_neon.h>
#define VEC_BYTES 16
#define MR 8 /* 24 accumulators of 32 registers */
#define HAS_FMA 1
#else
/* Four lanes in portable C; GCC lowers them to whatever the baseline has. No FMA: the bits differ
 * from those of the other instruction sets. */
#define VEC_BYTES 16
#define MR 4
#define HAS_FMA 0
#endif

#define W ((int)(VEC_BYTES / sizeof(real)))
#define INLINE static inline __attribute__((always_inline))

typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef real vec_unaligned
    __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real)), may_alias));
typedef real_bits vec_bits __attribute__((vector_size(VEC_BYTES)));

INLINE vec v_splat(real x) { return x - (vec){0}; }
INLINE vec v_load(const real *p) { return *(const vec *)p; }
INLINE void v_store(real *p, vec x) { *(vec *)p = x; }
INLINE vec v_load_unaligned(const elem *p) { return *(const vec_unaligned *)p; }
INLINE void v_store_unaligned(elem *p, vec x) { *(vec_unaligned *)p = x; }
/* 2^n from n + bias in the low bits of the sum n + magic (exp2.h). */
INLINE vec v_exponent(vec x) { return (vec)((vec_bits)x << MANTISSA_BITS); }

/* mask: what a comparison gives. NaN compares false.
 * v_max: the second operand when either is NaN, so NaN in the second reaches the result.
 * v_select(m, a, b): m ? a : b.  v_fma_where: a b + c where m, else c untouched.
 * mask_counted: all but -0.0, the weight that stands for a key the row does not see. */
#if defined(FC_AVX512) && FC_REAL == 32
typedef __mmask16 mask;
INLINE vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE mask mask_lt(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE mask mask_eq(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE mask mask_counted(vec p) {
    return _mm512_cmpneq_epi32_mask(_mm512_castps_si512(p), _mm512_set1_epi32(INT32_MIN));
}
INLINE vec v_select(mask m, vec a, vec b) { return _mm512_mask_mov_ps(b, m, a); }
INLINE vec v_fma_where(mask m, vec a, vec b, vec c) { return _mm512_mask3_fmadd_ps(a, b, c, m); }
INLINE vec v_load_n(const elem *p, int n) {
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
INLINE void v_store_n(elem *p, vec x, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x);
}
#elif defined(FC_AVX512)
typedef __mmask8 mask;
INLINE vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_pd(a, b, c); }
INLINE vec v_max(vec a, vec b) { return _mm512_max_pd(a, b); }
INLINE mask mask_lt(vec a, vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
INLINE mask mask_eq(vec a, vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_EQ_OQ); }
INLINE mask mask_counted(vec p) {
    return _mm512_cmpneq_epi64_mask(_mm512_castpd_si512(p), _mm512_set1_epi64(INT64_MIN));
}
INLINE vec v_select(mask m, vec a, vec b) { return _mm512_mask_mov_pd(b, m, a); }
INLINE vec v_fma_where(mask m, vec a, vec b, vec c) { return _mm512_mask3_fmadd_pd(a, b, c, m); }
INLINE vec v_load_n(const elem *p, int n) {
    return _mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), p);
}
INLINE void v_store_n(elem *p, vec x, int n) {
    _mm512_mask_storeu_pd(p, (__mmask8)((1u << n) - 1), x);
}
#else
typedef vec_bits mask;
INLINE mask mask_lt(vec a, vec b) { return a < b; }
INLINE mask mask_eq(vec a, vec b) { return a == b; }
INLINE mask mask_counted(vec p) { return (vec_bits)p != (vec_bits)v_splat((real)-0.0); }
#if defined(FC_AVX2) && FC_REAL == 32
INLINE vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec v_select(mask m, vec a, vec b) { return _mm256_blendv_ps(b, a, (vec)m); }
#elif defined(FC_AVX2)
INLINE vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_pd(a, b, c); }
INLINE vec v_max(vec a, vec b) { return _mm256_max_pd(a, b); }
INLINE vec v_select(mask m, vec a, vec b) { return _mm256_blendv_pd(b, a, (vec)m); }
#else
INLINE vec v_select(mask m, vec a, vec b) { return (vec)(((vec_bits)a & m) | ((vec_bits)b & ~m)); }
#if defined(FC_NEON) && FC_REAL == 32
INLINE vec v_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
INLINE vec v_max(vec a, vec b) { return vmaxq_f32(a, b); }
#elif defined(FC_NEON)
INLINE vec v_fma(vec a, vec b, vec c) { return vfmaq_f64(c, a, b); }
INLINE vec v_max(vec a, vec b) { return vmaxq_f64(a, b); }
#else
INLINE vec v_fma(vec a, vec b, vec c) { return a * b + c; }
INLINE vec v_max(vec a, vec b) { return v_select(a > b, a, b); }
#endif
#endif
INLINE vec v_fma_where(mask m, vec a, vec b, vec c) { return v_select(m, v_fma(a, b, c), c); }
/* Edges: n of W elements, the rest 0; nothing beyond the n is touched. */
INLINE vec v_load_n(const elem *p, int n) {
    vec x = {0};
    for (int i = 0; i < n; i++) {
        x[i] = p[i];
    }
    return x;
}
INLINE void v_store_n(elem *p, vec x, int n) {
    for (int i = 0; i < n; i++) {
        p[i] = x[i];
    }
}
#endif

/* One rounding where the instruction set has FMA: the scalar twin of v_fma. */
INLINE double fma_f64(double a, double b, double c) { return HAS_FMA ? fma(a, b, c) : a * b + c; }

/* Transpose W vectors of W lanes by log2 W rounds of interleaving row i with row i + W/2. */
#if VEC_BYTES == 64 && FC_REAL == 32
#define ZIP_LO (vec_bits){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#define ZIP_HI (vec_bits){8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}
#elif VEC_BYTES / (FC_REAL / 8) == 8
#define ZIP_LO (vec_bits){0, 8, 1, 9, 2, 10, 3, 11}
#define ZIP_HI (vec_bits){4, 12, 5, 13, 6, 14, 7, 15}
#elif VEC_BYTES / (FC_REAL / 8) == 4
#define ZIP_LO (vec_bits){0, 4, 1, 5}
#define ZIP_HI (vec_bits){2, 6, 3, 7}
#else
#define ZIP_LO (vec_bits){0, 2}
#define ZIP_HI (vec_bits){1, 3}
#endif
INLINE void v_transpose(vec x[W]) {
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        vec y[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; i++) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + W / 2], ZIP_LO);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + W / 2], ZIP_HI);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
            x[i] = y[i];
        }
    }
}
