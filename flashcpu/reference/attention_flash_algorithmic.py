"""Tiled attention, rescale and stream. Before: attention_flash.py. The ladder ends here, and the
tile loop of the product, `flashcpu/_engine.pyx`, begins: the same steps in the same order.
"""

import numpy as np

from .tiles import tiles


@np.errstate(invalid="ignore", over="ignore")
def flash_attention_algorithmic(q, k, v, tile_Lq=64, tile_Lkv=64, *, scale=1.0):
    """softmax(scale * q k^T) v by tiles that stream through one running state.

    It removes from `flash_attention` the state of the tile, and with it the second rescale. That is
    exact: a tile's exponentials may be taken against the new maximum at once, since
    exp(s - m_tile) exp(m_tile - m') = exp(s - m'). Only what was there before owes a factor alpha.
    Stored: a tile of S and P, and m, l, o for each row of the query tile, whatever Lkv.

    Parameters
    ----------
    q : array_like, shape (B, Lq, D)
        Queries.
    k : array_like, shape (B, Lkv, D)
        Keys.
    v : array_like, shape (B, Lkv, Dv)
        Values.
    tile_Lq, tile_Lkv : int
        Rows of a query tile and of a key tile; they need not divide Lq and Lkv.
    scale : float
        Factor of the scores; the notebook's formulas have 1.

    Returns
    -------
    ndarray, shape (B, Lq, Dv)
        float64; 0 in a row whose scores are all -inf, and everywhere when Lkv = 0.

    Raises
    ------
    ValueError
        If a tile size is below 1.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    B, Lq, _ = q.shape
    _, Lkv, Dv = v.shape
    q_tiles, kv_tiles = tiles(Lq, tile_Lq), tiles(Lkv, tile_Lkv)

    out = np.zeros((B, Lq, Dv))
    for b in range(B):
        for rows in q_tiles:
            q_tile = q[b, rows]
            m = np.full((len(q_tile), 1), -np.inf)
            l = np.zeros((len(q_tile), 1))
            o = np.zeros((len(q_tile), Dv))
            # On entry to each turn m, l, o describe the keys before this tile.
            for keys in kv_tiles:
                # scores
                s = scale * np.matmul(q_tile, k[b, keys].T)
                # softmax: new maximum, rescale factor, exponentials
                m_before, m = m, np.maximum(m, np.max(s, axis=1, keepdims=True))
                shift = np.where(m == -np.inf, 0.0, m)
                alpha = np.exp(m_before - shift)
                p = np.exp(s - shift)
                l = l * alpha + np.sum(p, axis=1, keepdims=True)
                # accumulate
                o = o * alpha + np.matmul(p, v[b, keys])
            # finish: a row that has seen no key has l = 0 and stays 0
            np.divide(o, l, out=out[b, rows], where=l != 0)
    return out
