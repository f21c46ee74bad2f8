"""flashcpu: exact tiled streaming attention for CPUs, on NumPy arrays."""

from flashcpu.api import attention

__all__ = ["attention"]
__version__ = "0.1.0"
