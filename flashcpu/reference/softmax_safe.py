"""Softmax in three passes: maximum, sum, quotient. The ladder starts here; next: softmax_ref.py."""

import math

import numpy as np


def safe_softmax(vector):
    """Softmax of a vector in three passes.

    It removes the overflow of the textbook formula exp(s) / sum exp(s). That is exact: with the
    maximum m, exp(s - m) = exp(s) exp(-m), and the factor exp(-m) stands above and below the
    fraction. No exponent is positive any more, so nothing exceeds 1.

    Parameters
    ----------
    vector : array_like, shape (L,)
        Scores; -inf is a score that takes no part.

    Returns
    -------
    ndarray, shape (L,)
        Probabilities in float64; all 0 when every score is -inf.

    Examples
    --------
    >>> safe_softmax([1000.0, 1000.0, float("-inf")])
    array([0.5, 0.5, 0. ])
    """
    # Python numbers: inf - inf is NaN without the warning that NumPy scalars would raise.
    s = np.asarray(vector, dtype=np.float64).tolist()
    out = np.zeros(len(s))

    m = -math.inf
    for s_j in s:
        m = max(m, s_j)  # in this order a NaN never becomes the maximum; it reaches the sum instead
    shift = m if m > -math.inf else 0.0

    l = 0.0
    for s_j in s:
        l += math.exp(s_j - shift)
    if l == 0.0:
        return out

    for j, s_j in enumerate(s):
        out[j] = math.exp(s_j - shift) / l
    return out
