"""Largest and mean error against NumPy's in the same type: the command that chose FC_SPAN.

Both are compared with the same formula in long double. Run: python bench/accuracy.py
"""

import argparse

import numpy as np

import flashcpu
from flashcpu.reference import oracle

# (Lkv, D, scale, size of the queries)
INPUTS = (
    (300, 64, None, 1),
    (1024, 64, None, 1),
    (2000, 64, None, 1),
    (4096, 64, None, 1),
    (1024, 128, 1.0, 1),
    (1024, 128, 1.0, 3),
    (300, 16, None, 10),
    (2000, 1, 1.0, 30),
    (4000, 8, 0.0, 1),
)


def truth(q, k, v, scale):
    """Softmax attention of q (Lq, D), k (Lkv, D), v (Lkv, D) in long double."""
    q, k, v = (x.astype(np.longdouble) for x in (q, k, v))
    s = (q @ k.T) * np.longdouble(scale)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return (p @ v) / p.sum(axis=-1, keepdims=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    seeds = parser.parse_args().seeds
    print("dtype      Lkv    D  scale   |q|   ours      NumPy     largest   mean square")
    for dtype in (np.float32, np.float64):
        for L, D, scale, size in INPUTS:
            scale = 1 / np.sqrt(D) if scale is None else scale
            errors = []
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                q = (size * rng.standard_normal((16, D))).astype(dtype)
                k, v = (rng.standard_normal((L, D)).astype(dtype) for _ in range(2))
                right = truth(q, k, v, scale)
                ours = flashcpu.attention(q, k, v, scale=scale) - right
                naive = oracle(q, k, v, scale=scale, dtype=dtype)[0] - right
                errors.append([f(np.abs(x)) for f in (np.max, rms) for x in (ours, naive)])
            largest, naive, mean, naive_mean = np.mean(errors, axis=0)
            print(
                f"{dtype.__name__}  {L:5} {D:4} {scale:6.3f} {size:5}   {largest:.1e}   {naive:.1e}"
                f"   {largest / naive:4.2f} x    {mean / naive_mean:4.2f} x"
            )


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


if __name__ == "__main__":
    main()
