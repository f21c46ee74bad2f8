"""Whole attention with S and P in memory. Before: element_v2.py; next: state.py.

The yardstick of the third rung: as slow to grow as it is simple to believe. With masks and grouped
heads it stands in attention_oracle.py.
"""

import numpy as np


@np.errstate(invalid="ignore", over="ignore")  # inf - inf, inf * 0, 0 / 0: NaN by intent
def naive_attention(q, k, v, *, scale=1.0):
    """softmax(scale * q k^T) v, every matrix at its full size.

    Against `single_element_naive` it removes the loops: all elements at once. That is exact: the
    elements are independent, and a matrix product is all their scalar products. Stored: S and P,
    2 B Lq Lkv numbers.

    Parameters
    ----------
    q : array_like, shape (B, Lq, D)
        Queries.
    k : array_like, shape (B, Lkv, D)
        Keys.
    v : array_like, shape (B, Lkv, Dv)
        Values.
    scale : float
        Factor of the scores; the notebook's formulas have 1.

    Returns
    -------
    ndarray, shape (B, Lq, Dv)
        float64; 0 in a row whose scores are all -inf, and everywhere when Lkv = 0.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))

    s = scale * np.matmul(q, k.transpose(0, 2, 1))
    m = np.max(s, axis=2, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(m == -np.inf, 0.0, m))
    l = np.sum(p, axis=2, keepdims=True)
    p = p / l
    # A row that has seen no key is 0 / 0 here. A NaN sum is not 0, so it reaches the output.
    return np.where(l != 0, np.matmul(p, v), 0.0)
