"""One element of the output in one pass: flash attention. Before: element_v1.py; next:
attention_naive.py, where the same steps are gone with all elements at once.
"""

import math

import numpy as np


def single_element_V2(q_row, k_t, v_col):
    """One output element; a key and its value are seen once and forgotten.

    It removes S and the second pass from `single_element_V1`. That is exact: the accumulator
    o = sum exp(s[j] - m) v[j] owes the same factor alpha as the sum l when the maximum moves, and
    the division by l, common to all terms, is done once at the end. Stored: m, l and o, three
    numbers for any Lkv.

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

    m, l, o = -math.inf, 0.0, 0.0
    for key, v_j in zip(keys, v, strict=True):
        s_j = 0.0
        for d, q_d in enumerate(q):
            s_j += q_d * key[d]
        m_before, m = m, max(m, s_j)
        shift = m if m > -math.inf else 0.0
        alpha = math.exp(m_before - shift)
        p_j = math.exp(s_j - shift)
        l = l * alpha + p_j
        o = o * alpha + p_j * v_j
    return o / l if l != 0.0 else 0.0
