"""One element of the output by online softmax. Before: element_v0.py; next: element_v2.py."""

import math

import numpy as np


def single_element_V1(q_row, k_t, v_col):
    """One output element; maximum and sum grow while the scores are made.

    It removes the passes for the maximum and the sum from `single_element_V0`. That is exact for
    the reason given in `safe_online_softmax`. S stays, because a weight needs the last maximum
    and the last sum, known only when all scores are. Stored: S, Lkv numbers.

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
    m, l, shift = -math.inf, 0.0, 0.0
    for j, key in enumerate(keys):
        for d, q_d in enumerate(q):
            s[j] += q_d * key[d]
        m_before, m = m, max(m, s[j])
        shift = m if m > -math.inf else 0.0
        alpha = math.exp(m_before - shift)
        l = l * alpha + math.exp(s[j] - shift)
    if l == 0.0:
        return 0.0

    o = 0.0
    for s_j, v_j in zip(s, v, strict=True):
        o += math.exp(s_j - shift) / l * v_j
    return o
