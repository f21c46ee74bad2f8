"""How a length is cut into tiles. Not the plan of the product, only what the ladder needs of it."""


def tiles(length, tile):
    """The tiles of range(length), in order.

    The last one is short when `tile` does not divide `length`. The notebook gives every tile its
    full number of rows, which breaks there; here a tile has the rows that its slice cuts out.

    Parameters
    ----------
    length : int
        Rows to be cut.
    tile : int
        Rows of a tile, at least 1.

    Returns
    -------
    list of slice
        Adjacent slices that cover range(length); none when it is empty.

    Raises
    ------
    ValueError
        If `tile` is below 1.

    Examples
    --------
    >>> [(rows.start, rows.stop) for rows in tiles(10, 4)]
    [(0, 4), (4, 8), (8, 10)]
    """
    if tile < 1:
        raise ValueError(f"a tile needs at least 1 row, got {tile}")
    return [slice(start, min(start + tile, length)) for start in range(0, length, tile)]
