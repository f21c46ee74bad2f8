"""The contenders of compare.py: flashcpu, NumPy, two bare matmuls, and other libraries.

A contender is a function of (case, q, k, v, threads) that returns a call without arguments, which
returns out (B, Hq, Lq, D); or None where it does not do such a case. What can be done before the
clock starts is done here: models are built, arrays are packed as the peer likes them best; a call
that reads copies of k and v names them as `reads`. Each
peer uses the form that was fastest on such a case; where there is a choice, it says what the other
one cost, on one thread of a Zen 4. Without a mask query heads that share a KV head are given as
more query rows of it, if that is faster. Nothing here measures; next: compare.py.
"""

import ctypes
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from flashcpu import attention
from flashcpu.reference import visible_keys

# Bytes of scores, and of widened keys, that NumPy's contenders hold at a time: as many heads as
# fit, at least one. The softmax and the second matmul then find them in a cache (the whole batch at
# once is 10 % slower).
NUMPY_SCORES = 1 << 20


def flashcpu_attention(case, q, k, v, threads):
    return partial(attention, q, k, v, causal=case.causal, threads=threads)


def numpy_attention(case, q, k, v, threads):
    """Scores, softmax in place, matmul. Under causal the full square, with a mask added."""
    mask = None
    if case.causal:
        seen = visible_keys(case.Lq, case.Lkv, causal=True)
        mask = np.tile(np.where(seen, 0, -np.inf), (case.Hq // case.Hkv, 1))
        mask = mask.astype(computed_dtype(q))

    def attend(q, k, v, s, out):
        np.matmul(q * q.dtype.type(case.D**-0.5), k.swapaxes(-1, -2), out=s)
        if mask is not None:
            s += mask
        s -= s.max(axis=-1, keepdims=True)
        np.exp(s, out=s)
        np.matmul(s, v, out=out)
        out /= s.sum(axis=-1, keepdims=True)

    return numpy_call(attend, case, q, k, v)


def bare_matmuls(case, q, k, v, threads):
    """The two matmuls with nothing between, which attention by NumPy could never beat.

    Not done under causal: the full square is not the same work.
    """

    def multiply(q, k, v, s, out):
        np.matmul(q, k.swapaxes(-1, -2), out=s)
        np.matmul(s, v, out=out)

    return None if case.causal else numpy_call(multiply, case, q, k, v)


def expected_products(case, q, k, v, q_start):
    """What bare_matmuls is to return, in float64, as measure.expected_attention."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    return q @ k.swapaxes(-1, -2) @ v


def computed_dtype(x):
    """What NumPy's contenders compute in: its matmuls of 16 bits are far slower than widening."""
    return np.dtype(np.float32) if x.itemsize == 2 else x.dtype


def numpy_call(attend, case, q, k, v):
    """A call of attend(q, k, v, s, out) on as many KV heads at a time as NUMPY_SCORES allows.

    Numbers of 16 bits are widened in every call, into arrays that are there before.
    """
    heads, rows = case.B * case.Hkv, case.Hq // case.Hkv * case.Lq
    q = q.reshape(heads, rows, case.D)
    k, v = (x.reshape(heads, case.Lkv, case.D) for x in (k, v))
    real, is_narrow = computed_dtype(q), q.itemsize == 2
    columns = max(rows, case.D) if is_narrow else rows
    step = min(heads, max(1, NUMPY_SCORES // (columns * case.Lkv * real.itemsize)))
    out, s = np.empty_like(q), np.empty((step, rows, case.Lkv), real)
    wide = [np.empty((step, *x.shape[1:]), real) for x in (q, k, v, out) if is_narrow]
    parts = [slice(head, head + step) for head in range(0, heads, step)]
    result = out.reshape(case.B, case.Hq, case.Lq, case.D)

    def call():
        for part in parts:
            arrays = [x[part] for x in (q, k, v, out)]
            count = len(arrays[0])
            if not is_narrow:
                attend(*arrays[:3], s[:count], arrays[3])
                continue
            widened = [x[:count] for x in wide]
            for to, x in zip(widened[:3], arrays[:3], strict=True):
                np.copyto(to, x)
            attend(*widened[:3], s[:count], widened[3])
            arrays[3][...] = widened[3]
        return result

    return call


def as_rows(case, q):
    """q as (B, Hkv, G * Lq, D): the query heads of a group below one another."""
    return q.reshape(case.B, case.Hkv, -1, case.D)


def has_plain_mask(case):
    """No mask, or a causal square without groups, where all libraries mean the same by it."""
    return not case.causal or (case.Lq == case.Lkv and case.Hq == case.Hkv)


def torch_attention(case, q, k, v, threads):
    """scaled_dot_product_attention. With enable_gqa 32 heads over 8 took 2 to 8 times as long."""
    import torch

    if not has_plain_mask(case):
        return None

    def tensor(x):
        if case.dtype == "bf16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    tensors = [tensor(x) for x in (as_rows(case, q), k, v)]

    def call():
        # Not only where torch.get_num_threads() differs: it may be others who limited OpenMP's
        # threads, and MKL's are still as many as before.
        torch.set_num_threads(threads)
        with torch.no_grad():
            out = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=case.causal)
        out = out.view(torch.int16).numpy().view(q.dtype) if case.dtype == "bf16" else out.numpy()
        return out.reshape(q.shape)

    return call


def onnxruntime_attention(case, q, k, v, threads):
    """The fastest of three operators, in float32 and float16.

    GroupQueryAttention is causal: for one query, or a causal square (73 ms, the others 110; f32,
    L 2048). With grouped heads in f16 it is half as fast as Attention on rows. Attention is faster
    than MultiHeadAttention with few queries (6 ms, 14; f16, Lq 4) and slower on squares (135 ms,
    91; f16, L 2048).
    """
    if case.dtype not in ("f32", "f16") or not has_plain_mask(case):
        return None
    is_grouped = case.Hq != case.Hkv
    if case.causal or (case.Lq == 1 and not (is_grouped and case.dtype == "f16")):
        # The keys and values of the queries' positions come again, as those of the new tokens.
        feed = {"q": packed(q), "k": packed(k[:, :, -case.Lq :]), "v": packed(v[:, :, -case.Lq :])}
        feed |= {"past_k": k, "past_v": v}
        feed |= {"last": np.full(case.B, case.Lkv - 1, np.int32), "Lkv": np.int32([case.Lkv])}
        options = {"num_heads": case.Hq, "kv_num_heads": case.Hkv}
        call = onnxruntime_call("com.microsoft", "GroupQueryAttention", feed, options, threads)
        return lambda: unpacked(call(), case.Hq)
    rows = as_rows(case, q)
    if case.Lq < case.Lkv:
        call = onnxruntime_call("", "Attention", {"q": rows, "k": k, "v": v}, {}, threads)
        return lambda: call().reshape(q.shape)
    feed = {"q": packed(rows), "k": packed(k), "v": packed(v)}
    options = {"num_heads": case.Hkv}
    call = onnxruntime_call("com.microsoft", "MultiHeadAttention", feed, options, threads)
    return lambda: unpacked(call(), case.Hkv).reshape(q.shape)


def packed(x):
    """(B, H, L, D) to (B, L, H * D)."""
    B, _, L, _ = x.shape
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(B, L, -1)


def unpacked(x, H):
    """(B, L, H * D) to (B, H, L, D)."""
    B, L, _ = x.shape
    return x.reshape(B, L, H, -1).swapaxes(1, 2)


def onnxruntime_call(domain, operator, feed, options, threads):
    """A call of a model of one node, whose result has the shape of q.

    Where it is fed past_k and past_v, it also writes them: with what is there.
    """
    import onnxruntime
    from onnx import helper

    def describe(arrays):
        return [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in arrays.items()
        ]

    out = np.empty_like(feed["q"])
    results = {"out": out}
    results |= {f"present_{x}": feed[f"past_{x}"] for x in "kv" if f"past_{x}" in feed}
    node = helper.make_node(operator, list(feed), list(results), domain=domain, **options)
    graph = helper.make_graph([node], "attention", describe(feed), describe(results))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for name, x in feed.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
    for name, x in results.items():
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(x))

    def call():
        session.run_with_iobinding(binding)
        return out

    call.keeps = feed  # what is bound is a view of it
    return call


def openvino_attention(case, q, k, v, threads):
    """ScaledDotProductAttention in float32, and in bfloat16 where bf16 is stored.

    float16 is computed in float32: the precision "f16" means bfloat16 where the CPU has no
    arithmetic of float16, and errs by 8 units of float16's epsilon.
    """
    import openvino
    from openvino import opset13

    kinds = {"f32": openvino.Type.f32, "f16": openvino.Type.f16, "bf16": openvino.Type.bf16}
    if case.dtype not in kinds or not has_plain_mask(case):
        return None
    arrays, kind = (as_rows(case, q), k, v), kinds[case.dtype]
    inputs = [opset13.parameter(x.shape, kind) for x in arrays]
    node = opset13.scaled_dot_product_attention(*inputs, causal=case.causal)
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if case.dtype == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    if case.Lq < case.Lkv:
        options["SNIPPETS_MODE"] = "DISABLE"  # matmul, softmax, matmul: up to 1.6 times as fast
    model = openvino.Core().compile_model(openvino.Model([node], inputs), "CPU", options)
    request = model.create_infer_request()
    for index, x in enumerate(arrays):
        bits = x.view(np.uint16) if case.dtype == "bf16" else x
        request.set_input_tensor(index, openvino.Tensor(bits, x.shape, kind))

    def call():
        request.infer()
        return request.get_output_tensor().data.view(q.dtype).reshape(q.shape)

    return call


class GgmlParameters(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class GgmlPlan(ctypes.Structure):
    """struct ggml_cplan."""

    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


# enum ggml_type
GGML_TYPES = {"f32": 0, "f16": 1, "bf16": 30}


@cache
def ggml():
    """The library of tensors inside llama_cpp, with its functions declared."""
    folder = Path(find_spec("llama_cpp").origin).parent / "lib"
    library = ctypes.CDLL(str(folder / "libggml-cpu.so"))  # it loads libggml-base.so
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    for name, result, *arguments in (
        ("ggml_cpu_init", None),
        ("ggml_init", pointer, GgmlParameters),
        ("ggml_free", None, pointer),
        ("ggml_new_tensor_4d", pointer, pointer, integer, *[ctypes.c_int64] * 4),
        ("ggml_get_data", pointer, pointer),
        ("ggml_flash_attn_ext", pointer, *[pointer] * 5, *[real] * 3),
        ("ggml_new_graph", pointer, pointer),
        ("ggml_build_forward_expand", None, pointer, pointer),
        ("ggml_graph_plan", GgmlPlan, pointer, integer, pointer),
        ("ggml_graph_compute", integer, pointer, ctypes.POINTER(GgmlPlan)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_cpu_init()
    return library


def llamacpp_attention(case, q, k, v, threads):
    """ggml_flash_attn_ext: queries and results are float32, K and V as they are stored.

    With few queries it sums P V in float16 where V is, which fails the check.
    """
    if case.dtype not in GGML_TYPES or case.causal:
        return None
    library = ggml()
    q = q.astype(np.float32)
    # Its tensors, a result like q, and room for its records of them.
    memory = np.empty(2 * q.nbytes + k.nbytes + v.nbytes + (1 << 20), np.uint8)
    context = library.ggml_init(GgmlParameters(memory.nbytes, memory.ctypes.data, False))

    def tensor(x, dtype):
        """A copy; the order of lengths is the other way round."""
        made = library.ggml_new_tensor_4d(context, GGML_TYPES[dtype], *reversed(x.shape))
        ctypes.memmove(library.ggml_get_data(made), x.ctypes.data, x.nbytes)
        return made

    tensors = tensor(q, "f32"), tensor(k, case.dtype), tensor(v, case.dtype)
    result = library.ggml_flash_attn_ext(context, *tensors, None, case.D**-0.5, 0, 0)
    start = library.ggml_get_data(result) - memory.ctypes.data
    out = memory[start : start + q.nbytes].view(np.float32)
    out = out.reshape(case.B, case.Lq, case.Hq, case.D).swapaxes(1, 2)
    graph = library.ggml_new_graph(context)
    library.ggml_build_forward_expand(graph, result)
    library.ggml_free(context)  # all that is needed now lies in memory
    plan = library.ggml_graph_plan(graph, threads, None)
    work = np.empty(plan.work_size, np.uint8)
    plan.work_data = work.ctypes.data

    def call():
        if library.ggml_graph_compute(graph, plan):
            raise RuntimeError("ggml_graph_compute failed")
        return out

    call.keeps = work  # of which plan has only the address
    call.reads = [memory]
    return call


CONTENDERS = {
    "flashcpu": flashcpu_attention,
    "numpy": numpy_attention,
    "matmuls": bare_matmuls,
}
# The others are asked for by name; with the packages that they need.
PEERS = {
    "torch": (torch_attention, ["torch"]),
    "onnxruntime": (onnxruntime_attention, ["onnxruntime", "onnx"]),
    "openvino": (openvino_attention, ["openvino"]),
    "llamacpp": (llamacpp_attention, ["llama-cpp-python"]),
}
