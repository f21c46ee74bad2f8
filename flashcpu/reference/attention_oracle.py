"""The oracle of the tests: naive attention with masks and grouped heads, in a dtype of choice.

Not a step of the ladder and not a fallback of the product: it holds the whole score matrix. What
`flashcpu.attention` learns to do, this function learns too, in the plainest form.
"""

import math

import numpy as np


def visible_keys(Lq, Lkv, *, causal=False, q_start=None, kv_len=None):
    """Which keys each query may see.

    Causal, for (Lq, Lkv) = (2, 5) and (5, 2), with the default q_start:

        1 1 1 1 .        . .
        1 1 1 1 1        . .
                         . .
                         1 .
                         1 1

    Parameters
    ----------
    Lq, Lkv : int
        Number of queries and of keys.
    causal : bool
        Query i sees the keys j <= q_start + i.
    q_start : int or array_like of int, shape of the batch
        Position of query 0; by default kv_len - Lq, so that the last query sees the last key.
    kv_len : int or array_like of int, shape of the batch
        Keys from kv_len on are not seen; by default Lkv.

    Returns
    -------
    ndarray of bool, shape (..., Lq, Lkv)
        True where query i sees key j; the leading axes are those of q_start and kv_len together.
    """
    kv_len = np.asarray(Lkv if kv_len is None else kv_len, dtype=np.int64)[..., None, None]
    q_start = kv_len - Lq if q_start is None else np.asarray(q_start, np.int64)[..., None, None]
    i = np.arange(Lq)[:, None]
    j = np.arange(Lkv)
    seen = j < kv_len
    if causal:
        seen = seen & (j <= q_start + i)
    return np.broadcast_to(seen, np.broadcast_shapes(seen.shape, (Lq, Lkv)))


def share_heads(x, Hq):
    """Each KV head once for every query head of its group: (..., Hkv, L, D) to (..., Hq, L, D)."""
    Hkv = x.shape[-3]
    if Hkv == Hq:
        return x
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"{Hq} query heads are not a multiple of {Hkv} KV heads")
    return np.repeat(x, Hq // Hkv, axis=-3)


@np.errstate(invalid="ignore", over="ignore", divide="ignore")
def oracle(q, k, v, *, scale=None, causal=False, q_start=None, kv_len=None, dtype=np.float64):
    """softmax(scale * q k^T) v by safe softmax, with the meaning of `flashcpu.attention`.

    In float64 it is what the tests take for the truth. In float32 it is the same formula as NumPy
    computes it in that dtype, and its error is the measure of the product's error.

    Parameters
    ----------
    q : array_like, shape (..., Hq, Lq, D)
        Queries. 2-D (L, D) and 3-D (B, L, D) arrays have no head axis.
    k : array_like, shape (..., Hkv, Lkv, D)
        Keys. With 4-D or more Hq = G * Hkv, and G consecutive query heads share a KV head. Other
        leading axes broadcast.
    v : array_like, shape (..., Hkv, Lkv, Dv)
        Values.
    scale : float, optional
        Factor of the scores, 1 / sqrt(D) by default.
    causal : bool
        Query i sees the keys j <= q_start + i.
    q_start : int or array_like of int, shape of the batch, optional
        Position of query 0; by default kv_len - Lq (bottom-right).
    kv_len : int or array_like of int, shape of the batch, optional
        Keys from kv_len on are not seen; by default Lkv.
    dtype : dtype
        What inputs are converted to, and everything is computed in.

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        0 in a row that sees no key, or only scores of -inf. A NaN reaches the rows that see its key
        and no others.
    lse : ndarray, shape (..., Hq, Lq)
        Natural logarithm of sum exp(s); -inf in a row that sees no key.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.ones((3, 1)), np.ones((2, 1)), np.array([[4.0], [6.0]])
    >>> out, lse = oracle(q, k, v, causal=True)
    >>> out.ravel().tolist()
    [0.0, 4.0, 5.0]
    """
    dtype = np.dtype(dtype)
    q, k, v = (np.asarray(x).astype(dtype) for x in (q, k, v))
    ndim = max(q.ndim, k.ndim, v.ndim)
    q, k, v = (x.reshape((1,) * (ndim - x.ndim) + x.shape) for x in (q, k, v))
    if ndim >= 4:
        k, v = share_heads(k, q.shape[-3]), share_heads(v, q.shape[-3])
    lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    Lq, D = q.shape[-2:]
    Lkv, Dv = v.shape[-2:]
    if k.shape[-2] != Lkv:
        raise ValueError(f"{k.shape[-2]} keys and {Lkv} values")

    seen = visible_keys(Lq, Lkv, causal=causal, q_start=q_start, kv_len=kv_len)
    if ndim >= 4:
        seen = seen[..., None, :, :]  # one batch member, all heads
    seen = np.broadcast_to(seen, (*lead, Lq, Lkv))

    scale = dtype.type(1 / math.sqrt(D) if scale is None else scale)
    s = np.matmul(q, np.swapaxes(k, -1, -2)) * scale
    s = np.where(seen, s, dtype.type(-np.inf))  # selected, not added: NaN + -inf would stay NaN
    m = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
    shift = np.where(m == -np.inf, dtype.type(0), m)
    p = np.exp(s - shift)
    l = np.sum(p, axis=-1, keepdims=True)
    lse = (shift + np.log(l))[..., 0]
    p = p / l  # 0 / 0 in a row that sees no key; it is set to 0 at the end

    # A weight of 0 does not hide a NaN or an infinity from a matrix product, since 0 * NaN is NaN.
    # So those are left out of it and added key by key, to the rows that see the key.
    v = np.broadcast_to(v, (*lead, Lkv, Dv))
    finite = np.isfinite(v)
    out = np.matmul(p, np.where(finite, v, dtype.type(0)))
    lead_axes = tuple(range(len(lead)))
    is_key_seen = seen.any(axis=(*lead_axes, -2))
    is_key_finite = finite.all(axis=(*lead_axes, -1))
    for j in np.flatnonzero(is_key_seen & ~is_key_finite):
        reached = seen[..., :, j, None] & ~finite[..., None, j, :]
        out += np.where(reached, p[..., :, j, None] * v[..., None, j, :], dtype.type(0))
    return np.where(l != 0, out, dtype.type(0)), lse
