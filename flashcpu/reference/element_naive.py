"""One element of the output with S and P stored. Before: softmax_online.py; next: element_v0.py.

The notebook's class `single_element_attention` is four functions here, each in its file, on the
same three arguments.
"""

import math

import numpy as np


def single_element_naive(q_row, k_t, v_col):
    """One output element by three-pass softmax over stored scores.

    It removes everything but one query row and one column of the values. That is exact: an output
    element depends on nothing else. Stored: S and P, 2 Lkv numbers.

    Parameters
    ----------
    q_row : array_like, shape (D,)
        The query.
    k_t : array_like, shape (D, Lkv)
        The keys, transposed as in the notebook: a column is a key.
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

    p = [math.exp(s_j - shift) / l for s_j in s]

    o = 0.0
    for p_j, v_j in zip(p, v, strict=True):
        o += p_j * v_j
    return o
