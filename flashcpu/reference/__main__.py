"""`python -m flashcpu.reference`: the ladder on the notebook's own case, step by step.

Each step is shown with its largest difference from the first step of its rung and with its time;
the case of the third rung then goes through `flashcpu.attention`.
"""

import time
from functools import partial

import numpy as np

from . import (
    flash_attention,
    flash_attention_algorithmic,
    naive_attention,
    ref_softmax,
    safe_online_softmax,
    safe_softmax,
    single_element_naive,
    single_element_V0,
    single_element_V1,
    single_element_V2,
)

REPEATS = 3  # the shortest counts: the first call of a step also pays for its pages


def timed(step, *arrays):
    """The answer of a step and its shortest time in seconds."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        answer = step(*arrays)
        seconds.append(time.perf_counter() - start)
    return answer, min(seconds)


def duration(seconds):
    """A time as a person reads it.

    >>> duration(0.0123)
    '12.3 ms'
    """
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def walk(title, arrays, steps):
    """Print a rung: a line a step, compared with the first."""
    print(f"\n{title}")
    first = None
    for name, step, what in steps:
        answer, seconds = timed(step, *arrays)
        if first is None:
            first, difference = answer, "-"
        else:
            difference = f"{np.max(np.abs(np.subtract(answer, first))):.1e}"
        print(f"  {name:<28} {difference:>10} {duration(seconds):>10}   {what}")


def main():
    """Walk the ladder from the softmax of a vector to the product."""
    # Only here does the reference meet the package, and only to be compared with it.
    from flashcpu import attention

    rng = np.random.default_rng(0)
    print("The reference ladder of flashcpu, float64, scale 1")
    print(f"\n  {'step':<28} {'difference':>10} {'time':>10}")

    walk(
        "Softmax of 16 normal numbers",
        [rng.standard_normal(16)],
        [
            ("safe_softmax", safe_softmax, "maximum, sum, quotient: three passes"),
            ("ref_softmax", ref_softmax, "the same passes in NumPy"),
            ("safe_online_softmax", safe_online_softmax, "maximum and sum in one pass"),
        ],
    )

    D, Lkv = 4, 32
    walk(
        f"One output element: D={D}, Lkv={Lkv}",
        [rng.standard_normal(D), rng.standard_normal((D, Lkv)), rng.standard_normal(Lkv)],
        [
            ("single_element_naive", single_element_naive, "keeps S and P"),
            ("single_element_V0", single_element_V0, "without P"),
            ("single_element_V1", single_element_V1, "without the pass for the maximum"),
            ("single_element_V2", single_element_V2, "without S: one pass, three numbers (flash)"),
        ],
    )

    B, Lq, Lkv, D, tile = 4, 512, 1024, 128, 64
    tiled = {"tile_Lq": tile, "tile_Lkv": tile}
    flash = partial(flash_attention, **tiled)
    algorithmic = partial(flash_attention_algorithmic, **tiled)
    product = partial(attention, scale=1.0)
    walk(
        f"Attention: B={B}, Lq={Lq}, Lkv={Lkv}, D={D}, tiles {tile} x {tile}",
        [rng.standard_normal((B, L, D)) for L in (Lq, Lkv, Lkv)],
        [
            ("naive_attention", naive_attention, "S and P at full size"),
            ("flash_attention", flash, "tiles, merged as partial states"),
            ("flash_attention_algorithmic", algorithmic, "tiles, rescale and stream"),
            ("flashcpu.attention", product, "the product: the last step, compiled"),
        ],
    )
    print("\nDifference: the largest from the first step of the rung. The notebook got 3.2e-14 for")
    print("flash_attention_algorithmic.")


if __name__ == "__main__":
    main()
