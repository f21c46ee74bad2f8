/* The vector vocabulary of tile.inc, ring.inc, storage.inc and decode.inc. The only file that
 * knows an instruction set; constants of a type are also in exp2.h.
 *
 * A stub (isa/<dtype>_<isa>.c) defines FC_F64, FC_F16 or FC_BF16, or for float32 nothing;
 * isa/<isa>.h one of FC_AVX512, FC_AVX2, FC_NEON, FC_SCALAR, and FC_PAIRS if it has the
 * dot product of bf16. Every type here is a GCC vector type, so + - * / mean the lane-wise IEEE
 * operations and are used as such. */
#ifndef FLASHCPU_VEC_H
#define FLASHCPU_VEC_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef FC_F64
#define FC_REAL 64
typedef double real;
typedef int64_t real_bits;
#define MANTISSA_BITS 52
#else
#define FC_REAL 32
typedef float real;
typedef int32_t real_bits;
#define MANTISSA_BITS 23
#endif
#if defined(FC_BF16)
#define FC_DTYPE bf16
typedef uint16_t elem;
#elif defined(FC_F16)
#define FC_DTYPE f16
typedef uint16_t elem;
#else
#define FC_DTYPE FC_ARITHMETIC
typedef real elem;
#endif

/* A unit is what a lane of a product takes from each side, as large as a real: one number, or with
 * FC_PAIRS two neighbouring bf16 numbers, whose two products are added to a float. */
#if defined(FC_PAIRS)
#define FC_ARITHMETIC bf16
#define STEP 2
#elif FC_REAL == 32
#define FC_ARITHMETIC f32
#define STEP 1
#else
#define FC_ARITHMETIC f64
#define STEP 1
#endif
#define UNITS(n) (((n) + STEP - 1) / STEP)

#if defined(FC_AVX512)
#include <immintrin.h>
#define VEC_BYTES 64
#define REGISTERS 32
#define HAS_FMA 1
#elif defined(FC_AVX2)
#include <immintrin.h>
#define VEC_BYTES 32
#define REGISTERS 16
#define HAS_FMA 1
#elif defined(FC_NEON)
#include <arm_neon.h>
#define VEC_BYTES 16
#define REGISTERS 32
#define HAS_FMA 1
#elif defined(FC_SCALAR)
/* Four lanes in portable C; GCC lowers them to whatever the baseline has. No FMA: the bits differ
 * from those of the other instruction sets. */
#define VEC_BYTES 16
#define REGISTERS 16
#define HAS_FMA 0
#endif

/* Keys, or columns of V, of a register tile: 24 or 12 accumulators with FC_NV vectors. */
#define MR (REGISTERS > 16 ? 8 : 4)
/* Whether a product takes a number out of memory into all its lanes by itself. */
#define BROADCASTS (VEC_BYTES == 64)

/* f16 in vectors wider than NEON's: widened beside products, and rows are slower than memory with
 * fewer of them than in other types. */
#if defined(FC_F16) && VEC_BYTES > 16
#define WIDE_F16 1
#else
#define WIDE_F16 0
#endif

#define W ((int)(VEC_BYTES / sizeof(real)))
/* Columns of V in a staged panel: a cache line, so that the keys of a tile never share a set. */
#define PANEL ((int)(64 / sizeof(real)))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define INLINE static inline __attribute__((always_inline))
/* A value of which the compiler does not know how it came about. */
#define OPAQUE(x) __asm__("" : "+r"(x))
/* A place in the code that the compiler moves nothing across. */
#define NOTHING_PASSES() __asm__ volatile("")
/* A vector that several instructions take. Else GCC has each of them load it: twice the lines,
 * where rows begin within one; NEON has no products with memory. */
#if defined(FC_AVX512) || defined(FC_AVX2)
#define LOADED_ONCE(x) __asm__("" : "+v"(x))
#else
#define LOADED_ONCE(x) (void)(x)
#endif

/* A line out of the caches of all cores; where there is no instruction for it, nothing happens. */
INLINE void flush_line(const char *line) {
#if defined(__x86_64__)
    __builtin_ia32_clflush(line);
#elif defined(__aarch64__) && defined(__linux__)
    __asm__ volatile("dc civac, %0" ::"r"(line) : "memory");
#else
    (void)line;
#endif
}

typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef real vec_unaligned
    __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real)), may_alias));
typedef real_bits vec_bits __attribute__((vector_size(VEC_BYTES)));
typedef real vec_stored_units
    __attribute__((vector_size(VEC_BYTES), aligned(sizeof(elem)), may_alias));

INLINE vec v_splat(real x) { return x - (vec){0}; }
INLINE vec v_load(const real *p) { return *(const vec *)p; }
INLINE void v_store(real *p, vec x) { *(vec *)p = x; }
INLINE vec v_load_unaligned(const real *p) { return *(const vec_unaligned *)p; }
INLINE void v_store_unaligned(real *p, vec x) { *(vec_unaligned *)p = x; }
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
#endif

/* Stored elements, W of them from anywhere: widened exactly, rounded to nearest even. */
#if defined(FC_BF16)
typedef uint16_t vec_stored __attribute__((vector_size(VEC_BYTES / 2), aligned(2), may_alias));
typedef uint32_t vec_unsigned __attribute__((vector_size(VEC_BYTES)));
INLINE vec v_load_elems(const elem *p) {
    /* GCC 12 makes a conversion of four shuffles or, with NEON, of loads of one number each (Ice
     * Lake, AVX2, time of staging K and V: 0.83). */
#if defined(FC_AVX512)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#elif defined(FC_AVX2)
    /* Both halves load all eight, and one shuffle moves four into place above zeros. */
    const __m256i eight = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    const __m256i above =
        _mm256_set_epi8(15, 14, -1, -1, 13, 12, -1, -1, 11, 10, -1, -1, 9, 8, -1, -1, 7, 6, -1, -1,
                        5, 4, -1, -1, 3, 2, -1, -1, 1, 0, -1, -1);
    return (vec)_mm256_shuffle_epi8(eight, above);
#elif defined(FC_NEON)
    return (vec)vshll_n_u16(vld1_u16(p), 16);
#else
    return (vec)(__builtin_convertvector(*(const vec_stored *)p, vec_unsigned) << 16);
#endif
}
INLINE void v_store_elems(elem *p, vec x) {
    const vec_unsigned bits = (vec_unsigned)x, is_nan = (vec_unsigned)(x != x);
    const vec_unsigned rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
    const vec_unsigned either = ((quiet & is_nan) | (rounded & ~is_nan)) >> 16;
    *(vec_stored *)p = __builtin_convertvector(either, vec_stored);
}
#elif defined(FC_F16) && defined(FC_AVX512)
INLINE vec v_load_elems(const elem *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE void v_store_elems(elem *p, vec x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(FC_F16) && defined(FC_AVX2)
INLINE vec v_load_elems(const elem *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
INLINE void v_store_elems(elem *p, vec x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(FC_F16) && defined(FC_NEON)
INLINE vec v_load_elems(const elem *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE void v_store_elems(elem *p, vec x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
#elif defined(FC_F16)
INLINE vec v_load_elems(const elem *p) {
    vec x;
    for (int i = 0; i < W; i++) {
        const uint32_t sign = (uint32_t)(p[i] & 0x8000) << 16, rest = p[i] & 0x7fff;
        uint32_t bits = rest << 13;
        float wide;
        memcpy(&wide, &bits, 4);
        wide *= 0x1p112f; /* the difference of the biases, 127 - 15; subnormals become normal */
        memcpy(&bits, &wide, 4);
        bits |= sign | (rest >= 0x7c00 ? 0x7f800000 : 0) | (rest > 0x7c00 ? 0x400000 : 0);
        memcpy(&wide, &bits, 4);
        x[i] = wide;
    }
    return x;
}
INLINE void v_store_elems(elem *p, vec x) {
    for (int i = 0; i < W; i++) {
        /* a ulp of 1/2 is the f16 subnormal: adding it rounds to nearest even */
        const float wide = x[i], small = fabsf(wide) + 0.5f;
        uint32_t bits, units, half;
        memcpy(&bits, &wide, 4);
        memcpy(&units, &small, 4);
        const uint32_t sign = bits >> 16 & 0x8000;
        bits &= 0x7fffffff;
        if (bits > 0x7f800000) {
            half = 0x7e00 | (bits >> 13 & 0x3ff);
        } else if (bits >= 0x477ff000) {
            half = 0x7c00;
        } else if (bits < 0x38800000) {
            half = units - 0x3f000000;
        } else {
            half = (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13;
        }
        p[i] = (elem)(sign | half);
    }
}
#else
INLINE vec v_load_elems(const elem *p) { return v_load_unaligned(p); }
INLINE void v_store_elems(elem *p, vec x) { v_store_unaligned(p, x); }
#endif

/* Edges: n of W elements, the rest 0; nothing beyond the n is touched. */
INLINE vec v_load_elems_n(const elem *p, int n) {
    elem edge[W] = {0};
    for (int i = 0; i < n; i++) {
        edge[i] = p[i];
    }
    return v_load_elems(edge);
}
INLINE void v_store_elems_n(elem *p, vec x, int n) {
    elem edge[W];
    v_store_elems(edge, x);
    for (int i = 0; i < n; i++) {
        p[i] = edge[i];
    }
}

/* Where lanes are keys: K is read in pieces of 16 bytes, PIECE numbers as large as a real, or
 * PIECE * PACKED elements. */
#define PIECE ((int)(16 / sizeof(real)))
#define PACKED ((int)(sizeof(real) / sizeof(elem)))
typedef real piece_unaligned __attribute__((vector_size(16), aligned(sizeof(elem)), may_alias));

#ifdef FC_BF16
/* Element i of each unit-sized number, as reals. */
INLINE vec v_unpack(vec packed, int i) {
    const vec_unsigned bits = (vec_unsigned)packed;
    return (vec)(i ? bits & 0xffff0000 : bits << 16);
}
#endif

/* One piece of TURNED_KEYS keys lies in TURNED vectors, and is turned over in them, in ROUNDS,
 * until each holds a number of all keys that is as large as a real: in pairs a unit, of bf16
 * otherwise two elements, which are widened by shifts. f16 is turned over by elements, for the CPU
 * widens those next to each other beside products (Zen 4, 4 rows, D = 128, cycles a line of K out
 * of L2, turned over ahead: 10.7; two at a time, by shifts, and with a maximum to find infinity and
 * NaN 10.9); with AVX2, where they are stored first, two vectors of keys at once. */
#ifdef FC_F16
#define TURNED (WIDE_F16 ? 8 : 4)
#define TURNED_BYTES (VEC_BYTES == 64 ? VEC_BYTES / 2 : VEC_BYTES)
typedef elem turned __attribute__((vector_size(TURNED_BYTES)));
#else
#define TURNED PIECE
#define TURNED_BYTES VEC_BYTES
typedef vec turned;
#endif
#define TURNED_KEYS (WIDE_F16 && VEC_BYTES == 32 ? 2 * W : W)
enum { ROUNDS = TURNED == 8 ? 3 : TURNED == 4 ? 2 : 1 }; /* log2 */

/* Number i of them before the first round: the pieces of keys i, TURNED + i, 2 TURNED + i ... Rows
 * of keys 0, PIECE, 2 PIECE ... begin at `at`, the others ld bytes apart. */
#define STARTS (TURNED_KEYS / PIECE)
INLINE turned v_load_pieces(const char *const at[STARTS], ptrdiff_t ld, int i) {
#define PIECE_AT(j) \
    (*(const piece_unaligned *)(at[((j) * TURNED + i) / PIECE] + ((j) * TURNED + i) % PIECE * ld))
#if TURNED_BYTES == 64
    /* Two halves first: 44 GB/s out of L2 (f32, 4 rows, D = 128), 38 one after the other, 33 by
     * masked broadcasts, 27 by whole rows and four shuffles a vector instead of two. */
    const __m256 low =
        _mm256_insertf128_ps(_mm256_castps128_ps256((__m128)PIECE_AT(0)), (__m128)PIECE_AT(1), 1);
    const __m256 high =
        _mm256_insertf128_ps(_mm256_castps128_ps256((__m128)PIECE_AT(2)), (__m128)PIECE_AT(3), 1);
    return (turned)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#elif TURNED_BYTES == 32
    /* What is known to be 0 keeps GCC from moving it out of a low register first. */
    return (turned)_mm256_insertf128_ps(_mm256_zextps128_ps256((__m128)PIECE_AT(0)),
                                        (__m128)PIECE_AT(1), 1);
#else
    return (turned)PIECE_AT(0);
#endif
#undef PIECE_AT
}

/* Interleaved: what two vectors begin with, and what they end with. */
#if VEC_BYTES == 64 && FC_REAL == 32
#define ZIP_LO (vec_bits){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#elif VEC_BYTES / (FC_REAL / 8) == 8
#define ZIP_LO (vec_bits){0, 8, 1, 9, 2, 10, 3, 11}
#elif VEC_BYTES / (FC_REAL / 8) == 4
#define ZIP_LO (vec_bits){0, 4, 1, 5}
#else
#define ZIP_LO (vec_bits){0, 2}
#endif
#define ZIP_HI (ZIP_LO + W / 2)

/* The same inside every 16 bytes. */
#if defined(FC_F16) && TURNED_BYTES == 32
#define TURN_LO (turned){0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27}
#elif defined(FC_F16)
#define TURN_LO (turned){0, 8, 1, 9, 2, 10, 3, 11}
#elif VEC_BYTES == 64 && FC_REAL == 32
#define TURN_LO (vec_bits){0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29}
#elif VEC_BYTES == 64
#define TURN_LO (vec_bits){0, 8, 2, 10, 4, 12, 6, 14}
#elif VEC_BYTES == 32 && FC_REAL == 32
#define TURN_LO (vec_bits){0, 8, 1, 9, 4, 12, 5, 13}
#elif VEC_BYTES == 32
#define TURN_LO (vec_bits){0, 4, 2, 6}
#else
#define TURN_LO ZIP_LO
#endif
#define TURN_HI (TURN_LO + 8 / (int)sizeof((turned){0}[0])) /* half of 16 bytes on */
/* One of the log2 n rounds that turn n vectors over: number i is interleaved with i + n / 2. */
#define INTERLEAVE(type, n, x, lo, hi)                                             \
    do {                                                                           \
        type y_[n];                                                                \
        _Pragma("GCC unroll 8") for (int i = 0; i < (n) / 2; i++) {                \
            y_[2 * i] = __builtin_shuffle((x)[i], (x)[i + (n) / 2], lo);           \
            y_[2 * i + 1] = __builtin_shuffle((x)[i], (x)[i + (n) / 2], hi);       \
        }                                                                          \
        _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++) { (x)[i] = y_[i]; } \
    } while (0)
INLINE void v_turn(turned x[TURNED]) { INTERLEAVE(turned, TURNED, x, TURN_LO, TURN_HI); }

/* Unit i of W keys: those of number `half` of as many among TURNED_KEYS. */
INLINE vec v_unit_of(const turned x[TURNED], int i, int half) {
#if defined(FC_F16) && defined(FC_AVX2)
    return _mm256_cvtph_ps(((const __m128i *)&x[i])[half]);
#else
    (void)half;
#if defined(FC_F16) && defined(FC_AVX512)
    return _mm512_cvtph_ps((__m256i)x[i]);
#elif defined(FC_F16) && defined(FC_NEON)
    const float16x8_t two = vreinterpretq_f16_u16((uint16x8_t)x[i / PACKED]);
    return i % PACKED ? vcvt_high_f32_f16(two) : vcvt_f32_f16(vget_low_f16(two));
#elif defined(FC_F16)
    return v_load_elems((const elem *)&x[i / PACKED] + i % PACKED * W);
#elif defined(FC_BF16) && !defined(FC_PAIRS)
    return v_unpack(x[i / PACKED], i % PACKED);
#else
    return x[i];
#endif
#endif
}

/* Products of units: c + a b, or c + a0 b0 + a1 b1 in the CPU's own way. Units travel in a vec,
 * whatever they hold. v_splat_unit: the same unit in every lane, or only in the first, from where
 * the dot product of NEON takes it; so a is always such a splat. v_dot_where_counted: nothing from
 * a number whose weight, in b, is -0.0. */
#ifdef FC_PAIRS
typedef uint32_t unit_unaligned __attribute__((aligned(2), may_alias));
typedef elem stored_weight; /* side by side they are pairs */
#if defined(FC_AVX512)
INLINE vec v_splat_unit(const elem *p) {
    return (vec)(*(const unit_unaligned *)p - (vec_unsigned){0});
}
INLINE vec v_dot(vec a, vec b, vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
INLINE vec v_dot_where_counted(vec a, vec b, vec c) {
    const __m512i counted =
        _mm512_movm_epi16(_mm512_cmpneq_epi16_mask((__m512i)b, _mm512_set1_epi16(INT16_MIN)));
    return _mm512_mask_dpbf16_ps(c, _mm512_test_epi32_mask(counted, counted),
                                 (__m512bh)((__m512i)a & counted), (__m512bh)b);
}
/* Pairs of one number of each, rounded to nearest even. */
INLINE vec v_pair(vec low, vec high) {
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (vec)_mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
/* Weights side by side, rounded as those of v_pair, where 0 is made of subnormal ones first. */
INLINE void v_store_weights(stored_weight *p, vec x) {
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x));
}
/* Pairs of an element of each of two rows, n of 2 W elements, the rest 0: x[0] has those that the
 * 16 bytes of a row begin with, x[1] the others. v_unzip brings what became of them in order. */
INLINE void v_zip_elems(const elem *low, const elem *high, int n, vec x[2]) {
    const __mmask32 there = n >= 2 * W ? UINT32_MAX : ((uint32_t)1 << n) - 1;
    __m512i a = n >= 2 * W ? _mm512_loadu_si512(low) : _mm512_maskz_loadu_epi16(there, low);
    __m512i b = n >= 2 * W ? _mm512_loadu_si512(high) : _mm512_maskz_loadu_epi16(there, high);
    LOADED_ONCE(a);
    LOADED_ONCE(b);
    x[0] = (vec)_mm512_unpacklo_epi16(a, b);
    x[1] = (vec)_mm512_unpackhi_epi16(a, b);
}
INLINE void v_unzip(vec x[2]) {
    const vec a = x[0], b = x[1];
    x[0] =
        __builtin_shuffle(a, b, (vec_bits){0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23});
    x[1] = __builtin_shuffle(
        a, b, (vec_bits){8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31});
}
#elif defined(FC_NEON)
/* In every lane it would cost the pipes that multiply an operation for every three products. */
INLINE vec v_splat_unit(const elem *p) {
    return vcombine_f32(vcreate_f32(*(const unit_unaligned *)p), vcreate_f32(0));
}
INLINE vec v_dot(vec a, vec b, vec c) {
    return vbfdotq_lane_f32(c, (bfloat16x8_t)b, vget_low_bf16((bfloat16x8_t)a), 0);
}
INLINE vec v_dot_where_counted(vec a, vec b, vec c) {
    const uint16x8_t in_every_lane = (uint16x8_t)vdupq_lane_f32(vget_low_f32(a), 0);
    const uint16x8_t counted = (uint16x8_t)((uint16x8_t)b != 0x8000);
    /* Each a is read again for each b: kept, they push accumulators out of registers, also in the
     * loop that has no need of them. */
    __asm__ volatile("" ::: "memory");
    /* Twice -0.0 leaves c as it was, but makes 0 of a subnormal one. Only a rescale leaves such a
     * c, and a row that is rescaled counts some key of the block: that makes 0 of it anyway. */
    return vbfdotq_f32(c, (bfloat16x8_t)(in_every_lane & counted), (bfloat16x8_t)b);
}
INLINE vec v_pair(vec low, vec high) {
    return (vec)vzip1q_u16((uint16x8_t)vcvtq_low_bf16_f32(low),
                           (uint16x8_t)vcvtq_low_bf16_f32(high));
}
INLINE void v_store_weights(stored_weight *p, vec x) { vst1_u16(p, (uint16x4_t)vcvt_bf16_f32(x)); }
INLINE void v_zip_elems(const elem *low, const elem *high, int n, vec x[2]) {
    elem edge[2][2 * W] = {{0}};
    if (n < 2 * W) {
        for (int i = 0; i < n; i++) {
            edge[0][i] = low[i], edge[1][i] = high[i];
        }
        low = edge[0], high = edge[1];
    }
    const uint16x8_t a = vld1q_u16(low), b = vld1q_u16(high);
    x[0] = (vec)vzip1q_u16(a, b);
    x[1] = (vec)vzip2q_u16(a, b);
}
INLINE void v_unzip(vec x[2]) { (void)x; }
#endif
/* W units from n elements. */
INLINE vec v_load_units(const elem *p, int n) {
    elem edge[W * STEP] = {0};
    if (n >= W * STEP) {
        return *(const vec_stored_units *)p;
    }
    for (int i = 0; i < n; i++) {
        edge[i] = p[i];
    }
    return *(const vec_stored_units *)edge;
}
#else
typedef real stored_weight;
INLINE void v_store_weights(stored_weight *p, vec x) { v_store(p, x); }
INLINE void v_unzip(vec x[1]) { (void)x; }
INLINE vec v_splat_unit(const elem *p) {
#if WIDE_F16
    /* As a whole number: to spread a float takes a pipe of the shuffles, which widening needs too
     * (Zen 4, AVX-512: eight spreads beside eight products 8.0 cycles, as floats 11.0; V of 4 rows
     * 0.94 of the time). f32 waits for other things: V of 4 rows 0.98 to 1.07. */
    real_bits bits;
    memcpy(&bits, p, sizeof(bits));
    return (vec)(bits - (vec_bits){0});
#else
    return v_splat(*(const real *)p);
#endif
}
INLINE vec v_dot(vec a, vec b, vec c) { return v_fma(a, b, c); }
INLINE vec v_dot_where_counted(vec a, vec b, vec c) {
    return v_fma_where(mask_counted(b), a, b, c);
}
#endif

/* v_dot, which writes its sum over c. GCC writes it over any operand that is not needed any more,
 * and then moves sums about, with 16 registers into memory too: 6 to 9 % of the instructions of few
 * rows with a block of K; with 32 K of 12 and 16 rows of bf16 took 1.09 and 1.04 times as long. */
INLINE vec v_dot_onto(vec a, vec b, vec c) {
#if (defined(FC_AVX2) || defined(FC_AVX512)) && FC_REAL == 32 && STEP == 1
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
#else
    return v_dot(a, b, c);
#endif
}

/* v_dot with a unit in memory. GCC would make a vector of it first, in the pipes of the
 * shuffles; of other products it makes one instruction by itself, if the unit is a float. */
INLINE vec v_dot_unit(const elem *unit, vec b, vec c) {
#if defined(FC_PAIRS) && defined(FC_AVX512)
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*(const unit_unaligned *)unit));
    return c;
#else
    return v_dot(BROADCASTS ? v_splat(*(const real *)unit) : v_splat_unit(unit), b, c);
#endif
}

/* Vectors of eight for K of 16 bits that was turned over and stored (scores_stored.inc): with AVX2
 * the usual ones, with AVX-512 half as long. Unit i of TURNED_KEYS keys, the h-th eight of them. */
#if WIDE_F16 || (defined(FC_BF16) && defined(FC_AVX2))
#define HAS_VEC8 1
#if VEC_BYTES == 32
typedef vec vec8;
INLINE vec8 v8_unit_of(const turned x[TURNED], int i, int h) { return v_unit_of(x, i, h); }
INLINE vec8 v8_splat(const real *p) { return v_splat_unit((const elem *)p); }
INLINE vec8 v8_fma(vec8 a, vec8 b, vec8 c) { return v_fma(a, b, c); }
INLINE vec v_of_vec8(const vec8 x[1]) { return x[0]; }
#else
typedef real vec8 __attribute__((vector_size(32)));
typedef real_bits vec8_bits __attribute__((vector_size(32)));
INLINE vec8 v8_unit_of(const turned x[TURNED], int i, int h) {
    return _mm256_cvtph_ps(((const __m128i *)&x[i])[h]);
}
INLINE vec8 v8_splat(const real *p) { /* as v_splat_unit */
    real_bits bits;
    memcpy(&bits, p, sizeof(bits));
    return (vec8)(bits - (vec8_bits){0});
}
INLINE vec8 v8_fma(vec8 a, vec8 b, vec8 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec v_of_vec8(const vec8 x[2]) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(x[0]), x[1], 1);
}
#endif
#else
#define HAS_VEC8 0
#endif

/* Units of PARTS * W stored elements, in the order of place_of_unit: of a row of K v_widen has all,
 * of a row of V, or of the two of a pair, v_widen_part those of one part, which has PART_RUN of
 * every PARTS * PART_RUN columns. Widened exactly, or in pairs as they are. */
#if defined(FC_PAIRS)
#define PARTS 2
#define PART_RUN 4
INLINE void v_widen(const elem *p, vec x[PARTS / STEP]) { x[0] = *(const vec_stored_units *)p; }
INLINE vec v_widen_part(const elem *row, const elem *next, int part) {
    vec x[2];
    v_zip_elems(row, next, 2 * W, x);
    return x[part];
}
#elif defined(FC_BF16)
#define PARTS 2
#define PART_RUN 1
INLINE void v_widen(const elem *p, vec x[PARTS / STEP]) {
    vec both = *(const vec_stored_units *)p;
    LOADED_ONCE(both);
    x[0] = v_unpack(both, 0);
    x[1] = v_unpack(both, 1);
}
INLINE vec v_widen_part(const elem *row, const elem *next, int part) {
    return (void)next, v_unpack(*(const vec_stored_units *)row, part);
}
#else
#define PARTS 1
#define PART_RUN 1
INLINE void v_widen(const elem *p, vec x[PARTS / STEP]) { x[0] = v_load_elems(p); }
INLINE vec v_widen_part(const elem *row, const elem *next, int part) {
    return (void)next, (void)part, v_load_elems(row);
}
#endif
INLINE int place_of_unit(int i) { return STEP > 1 ? i : i % PARTS * W + i / PARTS; }

/* One rounding where the instruction set has FMA: the scalar twin of v_fma. */
INLINE double fma_f64(double a, double b, double c) { return HAS_FMA ? fma(a, b, c) : a * b + c; }

/* From two vectors, and back: the numbers in even places, those in odd ones. */
INLINE void v_even_odd(vec x[2]) {
    const vec a = x[0], b = x[1];
    vec_bits even;
    for (int i = 0; i < W; i++) {
        even[i] = 2 * i;
    }
    x[0] = __builtin_shuffle(a, b, even);
    x[1] = __builtin_shuffle(a, b, even + 1);
}
INLINE void v_in_order(vec x[2]) {
    const vec even = x[0], odd = x[1];
    x[0] = __builtin_shuffle(even, odd, ZIP_LO);
    x[1] = __builtin_shuffle(even, odd, ZIP_HI);
}

/* Transpose W vectors of W lanes by log2 W rounds of interleaving row i with row i + W/2. */
INLINE void v_transpose(vec x[W]) {
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
        INTERLEAVE(vec, W, x, ZIP_LO, ZIP_HI);
    }
}

/* The largest lane; one of them if some are NaN. */
INLINE real v_top(vec x) {
    vec_bits half;
    for (int i = 0; i < W; i++) {
        half[i] = i;
    }
#pragma GCC unroll 4
    for (int n = W / 2; n; n /= 2) {
        x = v_max(x, __builtin_shuffle(x, half ^ n));
    }
    return x[0];
}

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define TABLE_(what, dtype, isa) what##_##dtype##_##isa
#define TABLE(what, dtype, isa) TABLE_(what, dtype, isa)
#define TABLE3_(what, dtype, arithmetic, isa) what##_##dtype##_##arithmetic##_##isa
#define TABLE3(what, dtype, arithmetic, isa) TABLE3_(what, dtype, arithmetic, isa)

#endif
