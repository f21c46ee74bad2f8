"""The three passes as three NumPy calls. Before: softmax_safe.py; next: softmax_online.py."""

import numpy as np


@np.errstate(invalid="ignore")  # a score of +inf makes inf - inf, and NaN is the answer
def ref_softmax(vector):
    """Softmax of a vector, vectorised.

    It removes the Python loops of `safe_softmax`, not the passes. That is exact: the same terms,
    of which NumPy only sums the denominator in another order.

    Parameters
    ----------
    vector : array_like, shape (L,)
        Scores; -inf is a score that takes no part.

    Returns
    -------
    ndarray, shape (L,)
        Probabilities in float64; all 0 when every score is -inf.
    """
    s = np.asarray(vector, dtype=np.float64)
    m = np.max(s, initial=-np.inf)  # `initial` is the maximum of an empty vector
    shift = 0.0 if m == -np.inf else m
    p = np.exp(s - shift)
    l = np.sum(p)
    return p / l if l != 0 else p
