"""Print the polynomials of flashcpu/kernels/exp2.h: 2^r on [-1/2, 1/2].

The value at r = 0 must be exactly 1 (the largest score of a row has weight 1, and an unchanged
maximum rescales by 1), so 2^r = 1 + r g(r), and g is interpolated at Chebyshev nodes in exact
rational arithmetic; each coefficient is then rounded once to the type.

Run: python bench/exp2_coefficients.py
"""

import math
from decimal import Decimal, getcontext
from fractions import Fraction

import numpy as np

getcontext().prec = 60


def coefficients(degree):
    """Monomial coefficients of g, constant term first, as fractions."""
    nodes = [Fraction(math.cos(math.pi * (2 * i + 1) / (2 * degree)) / 2) for i in range(degree)]
    ln2 = Decimal(2).ln()
    values = []
    for r in nodes:
        x = Decimal(r.numerator) / Decimal(r.denominator)
        g = ((x * ln2).exp() - 1) / x if x else ln2
        values.append(Fraction(g))
    total = [Fraction(0)] * degree
    for i, node in enumerate(nodes):
        basis, scale = [Fraction(1)], Fraction(1)
        for j, other in enumerate(nodes):
            if i == j:
                continue
            scale *= node - other
            shifted = [Fraction(0), *basis]
            basis = [s - other * b for s, b in zip(shifted, [*basis, 0], strict=True)]
        total = [t + values[i] * b / scale for t, b in zip(total, basis, strict=True)]
    return total


def main():
    for name, degree, dtype in (
        ("f32", 6, np.float32),
        ("f64", 11, np.float64),
        ("bf16", 4, np.float32),
    ):
        print(name, "degree", degree)
        for power, c in enumerate(coefficients(degree), start=1):
            print(f"  r^{power:<3} {float(dtype(float(c))).hex():24} {dtype(float(c))!r}")


if __name__ == "__main__":
    main()
