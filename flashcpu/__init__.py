"""flashcpu: exact tiled streaming attention (FlashAttention) for CPUs, on NumPy arrays.

    attention     softmax(scale * q k^T) v, streamed; O(L) memory; the same bits however it is cut
    KVCache       keys and values of a sequence as it grows; attend() is attention against them
    show_config   what this machine gives

The way through the package: api (check, plan, run) -> problem (what is asked) -> plan (how it is
cut) -> _engine (in what order) -> kernels (the arithmetic). `flashcpu.reference` derives the
method.
"""

from flashcpu import threads  # noqa: F401  first: it tells libgomp how to wait
from flashcpu.api import attention
from flashcpu.kvcache import KVCache
from flashcpu.machine import show_config

__all__ = ["KVCache", "attention", "show_config"]
__version__ = "0.1.0"
