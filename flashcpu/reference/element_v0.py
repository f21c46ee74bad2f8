"""One element of the output without P. Before: element_naive.py; next: element_v1.py."""

import math

import numpy as np


def single_element_V0(q_row, k_t, v_col):
    """One output element; a probability is used where it is made.

    It removes P from `single_element_naive`. That is exact: every p[j] is read once, right after
    it is written, so it need not be stored. The same operations in the same order, the same bits.
    Stored: S, Lkv numbers.

    Parameters
    ----------
    q_row : array_like, shape (D,)
        The query.
    k_t : array_like, shape (D, Lkv)
        The keys, a column each.
    v_col : array_like, shape (Lkv,)
        One column of the values.

    Returns
    -------
    float
        sum_j softmax(q_row @ k_t)[j] v_col[j]; 0 when every score is -inf or there is no key.
    """
    q = np.asarray(q_row, dtype=np.float64).tolist()
    keys = np.asarray(k_t, dtype=np.float64).T.tolist()
    v = np.asarray(v_col, dtype=np.float64).tolist()

    s = [0.0] * len(keys)
    for j, key in enumerate(keys):
        for d, q_d in enumerate(q):
            s[j] += q_d * key[d]

    m = -math.inf
    for s_j in s:
        m = max(m, s_j)
    shift = m if m > -math.inf else 0.0

    l = 0.0
    for s_j in s:
        l += math.exp(s_j - shift)
    if l == 0.0:
        return 0.0

    o = 0.0
    for s_j, v_j in zip(s, v, strict=True):
        o += math.exp(s_j - shift) / l * v_j
    return o
