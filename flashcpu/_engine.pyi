from typing import Any

BLOCK: int
SPAN: int
STRIP_VECTORS: int
COMPILER: str

class Storage:
    few_shares: tuple[float, ...]
    line: int
    ring_k: int
    ring_v: int
    def __init__(self, dtype: str, arithmetic: str, isa: str) -> None: ...

class Kernels:
    dtype: str
    lanes: int
    step: int
    def __init__(self, dtype: str, isa: str) -> None: ...
    def fma_rate(self, seconds: float) -> float: ...
    def read_bytes(self, buffer: Any, threads: int) -> None: ...
    def flush(self, buffer: Any) -> None: ...

class Prepared:
    chains: int
    threads: int
    workspace_bytes: int
    def __init__(
        self,
        kernels: Kernels,
        rows: Storage,
        stored: Storage,
        strides: tuple[int, ...],
        shape: tuple[int, ...],
        plan: tuple[Any, ...],
        scale: float,
        causal: bool,
        out_shape: tuple[int, ...],
    ) -> None: ...
    def attend(
        self, q: Any, k: Any, v: Any, out: Any = None, lse: Any = None, stop: Any = None
    ) -> Any: ...

def isas() -> list[str]: ...
def fastest_isa() -> str: ...
def omp_threads() -> int: ...
def in_parallel() -> bool: ...
