"""The partial state (m, l, o): all that is known of query rows after some of their keys.

Before: attention_naive.py; next: attention_flash.py, which is these functions in a loop.

    m   the largest score so far
    l   sum of exp(s - m) over those keys
    o   sum of exp(s - m) v over those keys

Keys of any set, in any order, leave such a state, and two states of disjoint sets make the state
of both. So attention can be cut along its keys wherever one likes, between tiles, threads or
machines, and joined afterwards; the product joins its spans and splits by the same merge.
"""

import numpy as np


def empty_state(rows, Dv):
    """The state of no keys, which every merge leaves as it found it.

    Parameters
    ----------
    rows : int
        Query rows.
    Dv : int
        Columns of the values.

    Returns
    -------
    m, l, o : ndarray, shapes (rows, 1), (rows, 1), (rows, Dv)
        -inf, 0 and 0.
    """
    return np.full((rows, 1), -np.inf), np.zeros((rows, 1)), np.zeros((rows, Dv))


@np.errstate(invalid="ignore", over="ignore")
def partial_state(s, v):
    """The state that one set of keys leaves, seen alone.

    Parameters
    ----------
    s : ndarray, shape (..., Lq, Lkv)
        Scores of these keys.
    v : ndarray, shape (..., Lkv, Dv)
        Their values.

    Returns
    -------
    m, l, o : ndarray, shapes (..., Lq, 1), (..., Lq, 1), (..., Lq, Dv)
        With (-inf, 0, 0) in a row whose scores are all -inf.
    """
    m = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
    p = np.exp(s - np.where(m == -np.inf, 0.0, m))
    return m, np.sum(p, axis=-1, keepdims=True), np.matmul(p, v)


@np.errstate(invalid="ignore", over="ignore")
def merge_states(left, right):
    """The state of two disjoint sets of keys together.

    Exact: exp(s - m1) exp(m1 - m) = exp(s - m), so one factor per row brings the sum and the
    accumulator of each side to the common maximum m, where they add. The order of merges matters
    to the rounding only. Where both sides are empty the result is (-inf, 0, 0), never NaN.

    Parameters
    ----------
    left, right : tuple of ndarray (m, l, o), shapes (..., Lq, 1), (..., Lq, 1), (..., Lq, Dv)
        The two states.

    Returns
    -------
    m, l, o : ndarray, shapes (..., Lq, 1), (..., Lq, 1), (..., Lq, Dv)
        Their union.

    Examples
    --------
    >>> import numpy as np
    >>> one = partial_state(np.array([[0.0]]), np.array([[3.0]]))
    >>> other = partial_state(np.array([[0.0, 0.0]]), np.array([[6.0], [9.0]]))
    >>> finish_state(merge_states(one, other))
    array([[6.]])
    """
    m1, l1, o1 = left
    m2, l2, o2 = right
    m = np.maximum(m1, m2)
    shift = np.where(m == -np.inf, 0.0, m)
    alpha1 = np.exp(m1 - shift)
    alpha2 = np.exp(m2 - shift)
    return m, alpha1 * l1 + alpha2 * l2, alpha1 * o1 + alpha2 * o2


def finish_state(state):
    """The output rows of a state: o / l, and 0 in a row that has seen no key.

    Parameters
    ----------
    state : tuple of ndarray (m, l, o), shapes (..., Lq, 1), (..., Lq, 1), (..., Lq, Dv)
        The state of all keys.

    Returns
    -------
    ndarray, shape (..., Lq, Dv)
        The output rows.
    """
    _, l, o = state
    return np.divide(o, l, out=np.zeros_like(o), where=l != 0)
