"""Tiled attention, joined by merging states. Before: state.py; next:
attention_flash_algorithmic.py.

In the product this is how spans of keys, splits between threads, and caches are joined.
"""

import numpy as np

from .state import empty_state, finish_state, merge_states, partial_state
from .tiles import tiles


@np.errstate(invalid="ignore", over="ignore")
def flash_attention(q, k, v, tile_Lq=64, tile_Lkv=64, *, scale=1.0):
    """softmax(scale * q k^T) v by tiles; each tile is computed alone and merged into the rest.

    It removes S and P from `naive_attention`. That is exact: the keys of a tile leave a state of
    their own, and the merge of states is exact for any cut (`merge_states`). Stored: a tile of S
    and P, and a state for each row of the query tile, whatever Lkv.

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
            state = empty_state(len(q_tile), Dv)
            for keys in kv_tiles:
                s_tile = scale * np.matmul(q_tile, k[b, keys].T)
                state = merge_states(state, partial_state(s_tile, v[b, keys]))
            out[b, rows] = finish_state(state)
    return out
