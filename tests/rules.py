"""The rules of the contract in NumPy: the answer that attention promises, bit for bit.

One FMA chain over d for a score, one over keys for an output element; the maximum, and with it the
rescaling, once a block of keys; the weights of a block summed in the order of the keys; spans of
keys streamed from nothing and merged left to right. Slow, and made to be compared with: any kernel
that rounds in another order gives other bits.

`fma` is how a b + c is rounded: once, as all vector instruction sets but the scalar one do, or
twice.
"""

import math
import re
from pathlib import Path

import numpy as np

# Frozen. The constants of _engine.pyx must be these.
BLOCK, SPAN = 64, 256
LOG2_E = math.log2(math.e)


# a b + c


def fma_once(a, b, c):
    """a b + c rounded once, for float32 and float64 arrays of ordinary size."""
    if np.result_type(a, b, c) == np.float32:
        product = np.multiply(a, b, dtype=np.float64)  # exact
        return odd_sum(product, np.float64(c)).astype(np.float32)
    # Boldo, Melquiond: Emulation of FMA and correctly rounded sums (2008), figure 1.
    high, low = two_product(a, b)
    t_high, t_low = two_sum(c, low)
    v_high, v_low = two_sum(high, t_high)
    return v_high + odd_sum(t_low, v_low)


def fma_twice(a, b, c):
    """a b + c with a rounded product."""
    return a * b + c


def two_sum(a, b):
    """The rounded sum and its error."""
    s = a + b
    part = s - a
    return s, (a - (s - part)) + (b - part)


def two_product(a, b):
    """The rounded product of float64 numbers and its error (Dekker)."""
    product = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def split(a):
    """a in two halves of 26 bits (Veltkamp)."""
    c = (2.0**27 + 1) * a
    high = c - (c - a)
    return high, a - high


def odd_sum(a, b):
    """a + b in float64, rounded to odd: a narrower rounding after it is as if it were the only."""
    s, error = two_sum(a, b)
    even = (np.asarray(s).view(np.int64) & 1) == 0
    return np.where((error != 0) & even, np.nextafter(s, np.copysign(np.inf, error)), s)


# 2^x


def exp2_constants(dtype):
    """Coefficients and bias, from the header that has them."""
    header = Path(__file__).parents[1] / "flashcpu" / "kernels" / "exp2.h"
    *_, narrow, wide = re.findall(r"exp2_g\[\] = \{(.*?)\}", header.read_text(), re.DOTALL)
    text = narrow if dtype == np.float32 else wide
    numbers = re.findall(r"-?0x[0-9a-f.]+p[+-]?\d+", text)
    return [dtype.type(float.fromhex(number)) for number in numbers], np.finfo(dtype).maxexp - 1


def exp2(x, fma):
    dtype = x.dtype
    coefficients, bias = exp2_constants(dtype)
    mantissa = np.finfo(dtype).nmant
    magic = dtype.type(1.5 * 2.0**mantissa + bias)
    x = np.maximum(x, dtype.type(-bias))
    t = x + magic
    r = x - (t - magic)
    g = np.full_like(x, coefficients[-1])
    for coefficient in [*coefficients[-2::-1], dtype.type(1)]:
        g = fma(g, r, coefficient)
    integer = np.dtype(f"i{dtype.itemsize}")
    return g * (t.view(integer) << integer.type(mantissa)).view(dtype)


# Attention


def attention_by_the_rules(q, k, v, ends, fma):
    """out (Lq, Dv) of q (Lq, D), k (Lkv, D), v (Lkv, Dv); row i sees the keys before ends[i]."""
    dtype = q.dtype
    scale = dtype.type(1 / math.sqrt(q.shape[1]) * LOG2_E)
    scores = np.zeros((len(q), len(k)), dtype)
    for d in range(q.shape[1]):
        scores = fma(k[None, :, d], (q[:, d] * scale)[:, None], scores)
    seen = np.arange(len(k)) < np.asarray(ends)[:, None]
    scores = np.where(seen, scores, dtype.type(-np.inf))
    spans = [
        stream(scores[:, at : at + SPAN], v[at : at + SPAN], seen[:, at : at + SPAN], fma)
        for at in range(0, len(k), SPAN)
    ]
    state = spans[0]
    for span in spans[1:]:
        state = merge(state, span, fma)
    m, l, o = state
    out = o * (1 / np.where(l == 0, dtype.type(1), l))[:, None]
    return np.where(l[:, None] == 0, dtype.type(0), out), m, l


def stream(scores, v, seen, fma):
    """(m, l, o) of one span, block by block."""
    dtype = v.dtype
    m = np.full(len(scores), -np.inf, dtype)
    l = np.zeros(len(scores), dtype)
    o = np.zeros((len(scores), v.shape[1]), dtype)
    for at in range(0, len(v), BLOCK):
        block = slice(at, at + BLOCK)
        new = np.maximum(m, scores[:, block].max(axis=1))
        top = finite(new)
        alpha = exp2(m - top, fma)
        p = exp2(scores[:, block] - top[:, None], fma)
        total = np.zeros_like(l)
        o = o * alpha[:, None]
        for j, key in enumerate(range(at, min(at + BLOCK, len(v)))):
            w, counts = p[:, j], seen[:, key]
            total = np.where(counts, total + w, total)
            o = np.where(counts[:, None], fma(v[key], w[:, None], o), o)
        l = fma(l, alpha, total)
        m = new
    return m, l, o


def merge(left, right, fma):
    """Two states into one; the left one has the earlier keys."""
    (m0, l0, o0), (m, l, o) = left, right
    new = np.maximum(m0, m)
    a0, a = exp2(m0 - finite(new), fma), exp2(m - finite(new), fma)

    def joined(x0, x, a0, a, none0, none):
        return np.where(none, x0, np.where(none0, x, fma(x0, a0, x * a)))

    sums = joined(l0, l, a0, a, l0 == 0, l == 0)
    columns = [x[:, None] for x in (a0, a, l0 == 0, l == 0)]
    return new, sums, joined(o0, o, *columns)


def finite(m):
    """A maximum that can be subtracted."""
    return np.where(m == -np.inf, m.dtype.type(0), m)
