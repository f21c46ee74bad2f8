"""The contenders of compare.py: flashcpu, NumPy, two bare matmuls, and other libraries.

A contender is a function of (case, q, k, v, threads) that returns a call without arguments, which
returns out (B, Hq, Lq, D); or None where it does not do such a case. Nothing here measures; next:
compare.py.
"""

from functools import partial

import numpy as np

from flashcpu import attention
from flashcpu.reference import visible_keys

# Bytes of scores that NumPy's contenders hold at a time: as many heads as fit, at least one. The
# softmax and the second matmul then find them in a cache (the whole batch at once is 10 % slower).
NUMPY_SCORES = 1 << 20


def flashcpu_attention(case, q, k, v, threads):
    return partial(attention, q, k, v, causal=case.causal, threads=threads)


def numpy_attention(case, q, k, v, threads):
    """Scores, softmax in place, matmul. Under causal the full square, with a mask added."""
    scale = q.dtype.type(case.D**-0.5)
    mask = None
    if case.causal:
        seen = visible_keys(case.Lq, case.Lkv, causal=True)
        mask = np.tile(np.where(seen, 0, -np.inf).astype(q.dtype), (case.Hq // case.Hkv, 1))

    def attend(q, k, v, s, out):
        np.matmul(q * scale, k.swapaxes(-1, -2), out=s)
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
    """What bare_matmuls is to return."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, case.Hq // case.Hkv, axis=1) for x in (k, v))
    return q @ k.swapaxes(-1, -2) @ v


def numpy_call(attend, case, q, k, v):
    """A call of attend(q, k, v, s, out) on as many KV heads at a time as NUMPY_SCORES allows."""
    heads, rows = case.B * case.Hkv, case.Hq // case.Hkv * case.Lq
    q = q.reshape(heads, rows, case.D)
    k, v = (x.reshape(heads, case.Lkv, case.D) for x in (k, v))
    step = min(heads, max(1, NUMPY_SCORES // (rows * case.Lkv * q.itemsize)))
    s, out = np.empty((step, rows, case.Lkv), q.dtype), np.empty_like(q)
    parts = [slice(head, head + step) for head in range(0, heads, step)]
    views = [(q[part], k[part], v[part], s[: len(q[part])], out[part]) for part in parts]
    result = out.reshape(case.B, case.Hq, case.Lq, -1)

    def call():
        for view in views:
            attend(*view)
        return result

    return call


def torch_attention(case, q, k, v, threads):
    import torch

    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    if case.causal and case.Lq != case.Lkv:
        return None  # its diagonal starts in the upper left corner

    def call():
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(
                *tensors, is_causal=case.causal, enable_gqa=case.Hq != case.Hkv
            ).numpy()

    return call


def onnxruntime_attention(case, q, k, v, threads):
    """MultiHeadAttention on (B, L, Hq * D), its fastest; a model of one node."""
    import onnxruntime
    from onnx import TensorProto, helper

    if case.dtype != "f32" or case.Hq != case.Hkv:
        return None
    feed = {
        name: x.swapaxes(1, 2).reshape(case.B, -1, case.Hq * case.D)
        for name, x in zip("qkv", (q, k, v), strict=True)
    }
    node = helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v"],
        ["out"],
        domain="com.microsoft",
        num_heads=case.Hq,
        unidirectional=int(case.causal),
    )
    shapes = {**{name: x.shape for name, x in feed.items()}, "out": feed["q"].shape}
    q_info, k_info, v_info, out_info = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    )
    graph = helper.make_graph([node], "attention", [q_info, k_info, v_info], [out_info])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def call():
        (out,) = session.run(None, feed)
        return out.reshape(case.B, case.Lq, case.Hq, case.D).swapaxes(1, 2)

    return call


def openvino_attention(case, q, k, v, threads):
    import openvino
    from openvino import opset13

    if case.dtype != "f32" or case.Hq != case.Hkv or (case.causal and case.Lq != case.Lkv):
        return None
    inputs = [opset13.parameter(x.shape, np.float32) for x in (q, k, v)]
    node = opset13.scaled_dot_product_attention(*inputs, causal=case.causal)
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bf16 where the CPU has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(openvino.Model([node], inputs), "CPU", options)
    request = model.create_infer_request()
    for index, x in enumerate((q, k, v)):
        request.set_input_tensor(index, openvino.Tensor(x, shared_memory=True))

    def call():
        request.infer()
        return request.get_output_tensor().data

    return call


CONTENDERS = {
    "flashcpu": flashcpu_attention,
    "numpy": numpy_attention,
    "matmuls": bare_matmuls,
}
PEERS = {
    "torch": (torch_attention, ["torch"]),
    "onnxruntime": (onnxruntime_attention, ["onnxruntime", "onnx"]),
    "openvino": (openvino_attention, ["openvino"]),
}
