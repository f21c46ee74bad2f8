"""Maximum and sum in one pass. Before: softmax_ref.py; next rung: element_naive.py.

This is the step that all the others live on (Milakov and Gimelshein 2018, arXiv:1805.02867).
"""

import math

import numpy as np


def safe_online_softmax(vector):
    """Softmax of a vector with one pass for maximum and sum together.

    It removes the first pass of `safe_softmax`. That is exact: after j scores the sum is
    l = sum exp(s - m) with the maximum m of those j. When a score raises the maximum to m', every
    term owes the same factor alpha = exp(m - m'), since exp(s - m) alpha = exp(s - m'), so it is
    enough to multiply the sum.

    Parameters
    ----------
    vector : array_like, shape (L,)
        Scores; -inf is a score that takes no part.

    Returns
    -------
    ndarray, shape (L,)
        Probabilities in float64; all 0 when every score is -inf.
    """
    s = np.asarray(vector, dtype=np.float64).tolist()
    out = np.zeros(len(s))

    m, l, shift = -math.inf, 0.0, 0.0
    for s_j in s:
        m_before, m = m, max(m, s_j)
        shift = m if m > -math.inf else 0.0
        alpha = math.exp(m_before - shift)
        l = l * alpha + math.exp(s_j - shift)
    if l == 0.0:
        return out

    for j, s_j in enumerate(s):
        out[j] = math.exp(s_j - shift) / l
    return out
