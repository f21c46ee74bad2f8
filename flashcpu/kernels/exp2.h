/* 2^x for x <= 0, the only transcendental function of the kernels.
 *
 *   n = round(x), r = x - n in [-1/2, 1/2];  2^x = 2^n (1 + r g(r))
 *
 * Adding MAGIC = 1.5 * 2^mantissa + bias rounds x to n and leaves n + bias in the low bits, which
 * shifted left are the float 2^n: no conversion, no separate exponent add. With n = -bias that
 * float is +0, so x below about -126.5 (f32) or -1022.5 (f64) gives exactly +0: a weight of less
 * than 2^-126 of the row's largest. x = 0 gives exactly 1; -inf gives 0; NaN stays NaN whatever its
 * payload, because the last step is a multiplication. Adds run beside FMAs; 7 (f32) or 12 (f64)
 * operations need the FMA pipes.
 *
 * The polynomials: bench/exp2_coefficients.py. Largest error 0.88 ulp in f32 and 0.89 ulp in f64;
 * without FMA 1.15 and 1.18 (tests/kernels). */
#ifndef FLASHCPU_EXP2_H
#define FLASHCPU_EXP2_H

#if defined(FC_PAIRS)
/* The weights are rounded to bf16, by up to 2^-8: degree 4 errs by 2^-17. */
static const real exp2_g[] = {0x1.62e2d2p-1f, 0x1.ebfb3ep-3f, 0x1.c96d5ep-5f, 0x1.3c6e5cp-7f};
#elif FC_REAL == 32
static const real exp2_g[] = {
    0x1.62e43p-1f, 0x1.ebfbep-3f, 0x1.c6af6cp-5f, 0x1.3b2a54p-7f, 0x1.5f089p-10f, 0x1.44138ap-13f,
};
#else
static const real exp2_g[] = {
    0x1.62e42fefa39efp-1,  0x1.ebfbdff82c598p-3,  0x1.c6b08d704a0c2p-5,  0x1.3b2ab6fba1ddap-7,
    0x1.5d87fe78a5276p-10, 0x1.430913096fd9fp-13, 0x1.ffcbfc670dcd4p-17, 0x1.62bfd47773353p-20,
    0x1.b524fae627834p-24, 0x1.e6063f7217bc6p-28, 0x1.e9d3fe3952179p-32,
};
#endif
enum { EXP2_DEGREE = sizeof(exp2_g) / sizeof(*exp2_g), EXP2_BIAS = FC_REAL == 32 ? 127 : 1023 };
#define EXP2_MAGIC ((real)(3ll << (MANTISSA_BITS - 1)) + EXP2_BIAS)

/* n vectors at once, step by step: the steps of one vector wait for each other, those of n
 * vectors overlap without filling the scheduler. */
INLINE void exp2_each(const int n, vec *x) {
    const vec magic = v_splat(EXP2_MAGIC);
    vec t[8], g[8];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        x[i] = v_max(v_splat(-EXP2_BIAS), x[i]);
        t[i] = x[i] + magic;
        x[i] -= t[i] - magic;
        g[i] = v_splat(exp2_g[EXP2_DEGREE - 1]);
    }
#pragma GCC unroll 16
    for (int power = EXP2_DEGREE - 2; power >= -1; power--) {
        const vec coefficient = power < 0 ? v_splat(1) : v_splat(exp2_g[power]);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            g[i] = v_fma(g[i], x[i], coefficient);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        x[i] = g[i] * v_exponent(t[i]);
    }
}

INLINE vec v_exp2(vec x) {
    exp2_each(1, &x);
    return x;
}

/* log l for l >= 1 (or NaN), in double with one order of operations on every instruction set:
 * l = 2^e f with f in [sqrt 1/2, sqrt 2), log f = 2 atanh((f-1)/(f+1)), |s| < 0.172, s^21 < 1e-16.
 */
INLINE double log_of_sum(double l) {
    int e;
    double f = frexp(l, &e);
    if (f < 0x1.6a09e667f3bcdp-1) {
        f *= 2;
        e -= 1;
    }
    double s = (f - 1) / (f + 1), z = s * s, sum = 0;
    for (int i = 21; i >= 3; i -= 2) {
        sum = fma_f64(sum, z, 1.0 / i);
    }
    double log_f = fma_f64(s * z * 2, sum, 2 * s);
    return fma_f64(e, 0x1.62e42fefa39efp-1, log_f);
}

#endif
