"""What is asked: every argument of `attention` is checked here, and nowhere else.

`describe` turns shapes, strides and options into a `Problem`, plain integers that can be hashed,
cached and planned for; nothing here looks at an element of q, k or v. Next: plan.py.
"""

import math
import numbers
import operator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# The largest number a position or a length may be, so that sums of three of them fit 64 bits.
FARTHEST = 2**60
# The kernels compute 2^(scale log2(e) q.k), and multiply q by both.
LOG2_E = math.log2(math.e)
LARGEST = {"f32": float(np.finfo(np.float32).max), "f64": float(np.finfo(np.float64).max)}
# The largest depth: lengths of rows are C ints in the kernels.
DEEPEST = 2**24

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
# Names of dtypes here and in the kernels. The 16-bit ones are stored, and computed in float32;
# bfloat16 is the dtype of ml_dtypes, known by its name.
NAMES = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# What may be given as an integer or a truth; made once, for `|` takes longer than the question.
INTEGERS, TRUTHS = int | np.integer, bool | np.bool_
NO_INTEGERS = bool | np.timedelta64


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """One call in integers. Strides are in bytes; a leading axis that broadcasts has stride 0.

    Compared and hashed by identity: `describe` gives the same object for the same question.
    """

    real: str  # type of the arithmetic: f32 or f64
    rows: str  # how queries and results are stored: f64, f32, f16 or bf16
    stored: str  # how keys and values are stored
    lead: tuple  # broadcast leading axes: the members of the batch
    members: int  # how many there are
    Hq: int
    Hkv: int
    group: int  # query heads that share a KV head
    Lq: int
    Lkv: int
    D: int
    Dv: int
    q_lead: tuple
    k_lead: tuple
    v_lead: tuple
    q_strides: tuple  # (head, row)
    k_strides: tuple
    v_strides: tuple
    out_shape: tuple
    lse_shape: tuple
    scale: float
    causal: bool

    @property
    def lse_dtype(self):
        """The real type."""
        return F64 if self.real == "f64" else F32

    def result_strides(self, strides):
        """Strides of the result as (lead ..., head, row)."""
        if len(strides) > 3:
            return strides[:-1]
        return (strides[0] if len(strides) == 3 else 0, 0, strides[-2])


def as_array(value, name, instead):
    """What is given, as NumPy has it. A masked array would lose its mask: `instead` is what to pass
    then."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; pass {instead}")
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} is not an array: {error}") from None


def operand(array, name):
    """The array that is given; nothing is copied.

    Raises TypeError for other dtypes than float64, float32, float16 and bfloat16, and for masked
    arrays.
    """
    array = as_array(array, name, "its data, and kv_len or causal")
    dtype = array.dtype
    # The name of the type is found faster, and of what is named otherwise the dtype's counts.
    if (
        dtype is not F32
        and dtype is not F64
        and dtype.type.__name__ not in NAMES
        and dtype.name not in NAMES
    ):
        raise TypeError(
            f"{name} has dtype {dtype}; float64, float32, float16 or bfloat16 is needed"
        )
    return array


def is_readable(array):
    """Whether the kernels can read the array where it lies."""
    return array.dtype.isnative and array.flags.aligned and unit_last_stride(array)


def readable(array):
    """The array as the kernels can read it: itself, or one copy where its memory does not allow."""
    if is_readable(array):
        return array
    # The one dtype object of a type, by which questions are known again (_question.pyx).
    dtype = array.dtype if array.dtype.isnative else np.dtype(array.dtype.type)
    # Broadcast axes stay so: one copy of what is there, not one of every repetition.
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides[:-1])
    return np.broadcast_to(np.array(array[once], dtype, order="C"), array.shape)


def unit_last_stride(array):
    """Whether the elements of a row lie side by side."""
    return array.strides[-1] == array.itemsize or array.shape[-1] <= 1


def of(q, k, v, scale=None, causal=False):
    """The Problem of these arrays, as `operand` returns them, or `readable`."""
    return describe(
        (q.dtype, k.dtype, v.dtype),
        (q.shape, k.shape, v.shape),
        (q.strides, k.strides, v.strides),
        scale,
        causal,
    )


@lru_cache(maxsize=512)
def describe(dtypes, shapes, strides, scale, causal):
    """The Problem of q, k, v with these dtypes, shapes and strides (three of each).

    Raises ValueError for shapes that do not fit, TypeError for mixed dtypes.
    """
    rows, stored, of_v = (NAMES[dtype.name] for dtype in dtypes)
    if stored != of_v or (rows != stored and (rows, dtypes[1].itemsize) != ("f32", 2)):
        raise TypeError(
            "q, k, v must have one dtype, or q float32 and k, v the same one of 16 bits; "
            "got {}, {}, {}".format(*(dtype.name for dtype in dtypes))
        )
    seen = "got q {}, k {}, v {}".format(*shapes)
    for name, shape in zip("qkv", shapes, strict=True):
        if len(shape) < 2:
            raise ValueError(f"{name} needs at least 2 axes (length, depth); {seen}")
    rank = max(len(shape) for shape in shapes)
    axes = [_full_rank(*pair, rank) for pair in zip(shapes, strides, strict=True)]
    (q_lead, (Hq, Lq, D)), (k_lead, (Hkv, Lkv, Dk)), (v_lead, (Hv, Lv, Dv)) = (
        (shape[:-3], shape[-3:]) for shape, _ in axes
    )
    if D != Dk:
        raise ValueError(f"q and k must have one depth (last axis); {seen}")
    if D == 0:
        raise ValueError(f"q and k need a depth (last axis) of at least 1; {seen}")
    if Lkv != Lv:
        raise ValueError(f"k and v must have one length (axis -2); {seen}")
    if Hkv != Hv:
        raise ValueError(f"k and v must have one number of heads (axis -3); {seen}")
    if Hq % Hkv if Hkv else Hq:
        raise ValueError(f"the heads of q (axis -3) must be a multiple of those of k and v; {seen}")
    try:
        lead = np.broadcast_shapes(q_lead, k_lead, v_lead)
    except ValueError:
        raise ValueError(f"the leading axes do not broadcast; {seen}") from None
    except RuntimeError as error:  # NumPy has arrays of more axes than it broadcasts
        raise ValueError(f"too many leading axes: {error}; {seen}") from None
    if max(math.prod((*lead, Hq, Lq, max(Dv, 1))), Lkv, D) > FARTHEST or max(D, Dv) > DEEPEST:
        raise ValueError(f"too large to be computed; {seen}")

    real = "f64" if rows == "f64" else "f32"
    scale = 1 / math.sqrt(D) if scale is None else scale
    if abs(scale) * LOG2_E > LARGEST[real]:
        raise ValueError(f"scale is too large for the arithmetic in {real}, got {scale}")

    # The axes of the result are those that the caller used: 2-D, 3-D or with heads.
    rows_shape = (*lead, Hq, Lq) if rank > 3 else (*lead[3 - rank :], Lq)
    q_bytes, k_bytes, v_bytes = (stride for _, stride in axes)
    return Problem(
        real=real,
        rows=rows,
        stored=stored,
        lead=lead,
        members=math.prod(lead),
        Hq=Hq,
        Hkv=Hkv,
        group=Hq // Hkv if Hkv else 0,
        Lq=Lq,
        Lkv=Lkv,
        D=D,
        Dv=Dv,
        q_lead=_broadcast_strides(q_lead, q_bytes, lead),
        k_lead=_broadcast_strides(k_lead, k_bytes, lead),
        v_lead=_broadcast_strides(v_lead, v_bytes, lead),
        q_strides=q_bytes[-3:-1],
        k_strides=k_bytes[-3:-1],
        v_strides=v_bytes[-3:-1],
        out_shape=(*rows_shape, Dv),
        lse_shape=rows_shape,
        scale=scale,
        causal=causal,
    )


def _full_rank(shape, strides, rank):
    """Shape and strides as (lead ..., H, L, D), axes of length 1 put in where one is missing.

    rank is that of the largest array: 4 or more has heads, and axes are missing in front, as NumPy
    broadcasts; (B, L, D) and (L, D) have none, and the axis before L is a batch.
    """
    front = (1,) * ((rank if rank > 3 else 3) - len(shape))
    heads = () if rank > 3 else (1,)
    return front + shape[:-2] + heads + shape[-2:], (*front, *strides[:-2], *heads, *strides[-2:])


def _broadcast_strides(own, strides, lead):
    """Strides of the leading axes once they are broadcast to `lead`."""
    return tuple(0 if n == 1 else s for n, s in zip(own, strides[: len(lead)], strict=True))


def scale_factor(scale):
    """The scale as a float, or None for the default."""
    if scale is None or type(scale) is float:
        value = scale
    elif isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        try:
            value = float(scale)
        except OverflowError:
            value = math.inf
    else:
        raise TypeError(f"scale must be a real number, got {scale!r}")
    if value is not None and not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {scale!r}")
    return value


def flag(value, name):
    """True or False; NumPy's too, but no other truth."""
    if not isinstance(value, TRUTHS):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def per_member(value, name, lead, default, least, most):
    """One integer for each member of the batch: an int, or where they differ a tuple of them.

    value is None (the default), an int, or integers that broadcast to `lead`.
    """
    if value is None:
        return default
    if _is_integer(value):
        value = low = high = int(value)
    else:
        array = _integers(value, name)
        try:
            each = np.broadcast_to(array, lead)
        except ValueError:
            raise ValueError(
                f"{name} has shape {array.shape}, which does not fit the batch {lead}"
            ) from None
        if each.size == 0:
            return default
        low, high = int(array.min()), int(array.max())
        value = low if low == high else tuple(each.ravel().tolist())
    if low < least or high > most:
        wrong = low if low < least else high
        raise ValueError(f"{name} must be between {least} and {most}, got {wrong}")
    return value


def _integers(value, name):
    """An array of integers, of any size."""
    try:
        array = as_array(value, name, "its data")
    except ValueError:
        array = None
    if array is not None and array.dtype == object and all(map(_is_integer, array.flat)):
        # Some are beyond 64 bits. As Python's own, they can be compared whatever their types.
        return np.array([int(each) for each in array.flat], object).reshape(array.shape)
    if array is None or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(f"{name} must be an int or integers, one a batch member, got {value!r}")
    return array


def _is_integer(value):
    """A timedelta64 is a np.integer too, and a bool an int."""
    return isinstance(value, INTEGERS) and not isinstance(value, NO_INTEGERS)


def thread_count(threads):
    """A number of threads, or None for the machine's choice."""
    return None if threads is None else at_least_one(threads, "threads")


def tile_sizes(tiles):
    """(Tq, Tk), or None for the plan's choice."""
    if tiles is None:
        return None
    try:
        rows, keys = tiles
    except (TypeError, ValueError):
        raise TypeError(f"tiles must be a pair (query rows, keys), got {tiles!r}") from None
    return at_least_one(rows, "tiles[0]"), at_least_one(keys, "tiles[1]")


def at_least_one(value, name):
    try:
        if isinstance(value, TRUTHS):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if not 1 <= number <= FARTHEST:
        bound = "at least 1" if number < 1 else f"at most {FARTHEST}"
        raise ValueError(f"{name} must be {bound}, got {number}")
    return number


def output(out, problem, dtype):
    """Check the array that the caller wants filled; nothing is written here."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}, the result has {dtype}")
    if out.shape != problem.out_shape:
        raise ValueError(f"out has shape {out.shape}, the result has {problem.out_shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    extent = out.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(out.strides, out.shape, strict=True)):
        if n > 1 and out.size:
            if stride < extent:
                raise ValueError(f"out may have elements that share memory (strides {out.strides})")
            extent += (n - 1) * stride
    return out


def refuse(**later):
    """Arguments whose meaning is settled but which do nothing yet: better an error than silence."""
    for name, value in later.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not supported yet; pass {name}=None")


def needs_own_memory(out, *inputs):
    """Whether the result must be computed beside `out`, then copied: overlap, or odd memory."""
    return (
        not out.flags.aligned
        or not unit_last_stride(out)
        or any(np.may_share_memory(out, x) for x in inputs)
    )
