"""examples/embed.py on real sentences: close to float64, and a member alone = the same in a batch.

Skipped where the model or its readers are absent; examples/model.txt says how to get the model.
"""

import hashlib
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flashcpu

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "embed.py"

SENTENCES = (
    "Yes.",
    "Hello",
    "Thank you!",
    "Where is the station?",
    "The kettle is boiling.",
    "Nobody answered the door.",
    "He forgot his keys again.",
    "Snow fell all night on the pass.",
    "The bakery opens at six in the morning.",
    "My grandmother grew tomatoes on her balcony.",
    "Two and two make four, whatever the weather.",
    "The ferry to the island leaves every second hour.",
    "Could you tell me how to get to the nearest pharmacy?",
    "A flock of geese crossed the lake just before the storm broke.",
    "The committee postponed its decision until the figures had been checked once more.",
    "Bread needs flour, water, salt and time, and of these only time cannot be bought.",
    "Although the road was closed, the cyclists climbed over the barrier and rode to the summit.",
    "In 1969 a computer with less memory than a light bulb has today guided three people to the "
    "Moon and back.",
    "Naïve façades, a crème brûlée and 3.14159 are hard on a tokenizer; so are e-mail addresses, "
    "hashes and the word antidisestablishmentarianism.",
    "The museum keeps the letters in a room without windows, because the ink, which is made from "
    "oak galls and iron, fades when daylight falls on it.",
    "When the river rose for the third time that spring, the farmers stopped repairing the dikes "
    "and moved their animals to the hill, where the old church had stood dry for six hundred "
    "years.",
    "A matrix product looks like three loops that anybody can write in a minute, yet the order of "
    "those loops, the size of the blocks and the way in which numbers travel through the caches "
    "decide whether a machine works or waits.",
    "She had promised herself that she would not look back, but at the bend of the road, where "
    "the lime trees end and the valley opens towards the sea, she stopped, put down the heavy "
    "suitcase, and turned round to see whether there was still a light in the kitchen of the house "
    "in which all of them had once been happy.",
    "If every word of a sentence looks at every other word, the number of looks grows with the "
    "square of the length, and so does the memory of a program that writes all of them down; a "
    "program that keeps only the largest score, a sum and a weighted mean for each word can forget "
    "the rest at once and still arrive at the very same answer.",
)


@pytest.fixture(scope="module")
def embed():
    spec = importlib.util.spec_from_file_location("embed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(embed):
    """(tokenizer, config, weights) in float32."""
    try:
        return embed.load()
    except ModuleNotFoundError as error:
        pytest.skip(f"no module {error.name}: {embed.INSTALL}")


def bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


def test_embeddings_agree_with_numpy_attention_in_float64(embed, model):
    def attention_f64(q, k, v, *, kv_len):
        q, k, v = (x.astype(np.float64) for x in (q, k, v))
        return embed.numpy_attention(q, k, v, kv_len=kv_len).astype(np.float32)

    assert len(SENTENCES) >= 20
    ours = embed.encode(model, SENTENCES)
    oracle = embed.encode(model, SENTENCES, attention_f64)
    assert ours.dtype == np.float32
    assert abs(ours - oracle).max() <= 1e-5


def test_embeddings_agree_with_a_forward_pass_all_in_float64(embed, model):
    tokenizer, config, weights = model
    weights_f64 = {name: w.astype(np.float64) for name, w in weights.items()}
    ours = embed.encode(model, SENTENCES)
    oracle = embed.encode((tokenizer, config, weights_f64), SENTENCES, embed.numpy_attention)
    assert oracle.dtype == np.float64
    assert abs(ours - oracle).max() <= 1e-5


def test_attention_of_a_sentence_is_the_same_bits_alone_and_in_a_padded_batch(embed, model):
    calls = []
    embed.encode(model, SENTENCES, embed.recorded(flashcpu.attention, calls))
    assert len(calls) == 6
    for q, k, v, kv_len, out in calls:
        assert q.strides[1] < q.strides[2]  # heads lie side by side: a view of (B, L, H*D)
        assert min(kv_len) == 3  # [CLS] hello [SEP]
        assert max(kv_len) > 64  # more than one block of keys
        for b, n in enumerate(kv_len):
            member = np.s_[b : b + 1, :, :n]
            alone = flashcpu.attention(q[member], k[member], v[member])
            np.testing.assert_array_equal(bits(alone), bits(out[member]))


def test_what_lies_behind_the_end_of_a_sentence_is_never_read(embed, model):
    calls = []
    embed.encode(model, SENTENCES, embed.recorded(flashcpu.attention, calls))
    for q, k, v, kv_len, out in calls:
        k, v = k.copy(), v.copy()
        for b, n in enumerate(kv_len):
            k[b, :, n:] = np.nan
            v[b, :, n:] = np.inf
        np.testing.assert_array_equal(bits(flashcpu.attention(q, k, v, kv_len=kv_len)), bits(out))


def test_similarities_are_those_that_the_authors_publish(embed, model):
    # README of sentence-transformers, for this model
    embeddings = embed.encode(
        model,
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."],
    )
    published = [[1.0000, 0.6660, 0.1046], [0.6660, 1.0000, 0.1411], [0.1046, 0.1411, 1.0000]]
    np.testing.assert_allclose(embeddings @ embeddings.T, published, rtol=0, atol=6e-5)


def test_the_weights_are_the_ones_pinned(embed, model):
    folder = Path(importlib.util.find_spec(embed.PACKAGE).origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_gelu_is_exact(embed):
    x = np.concatenate([np.linspace(-12, 12, 20001), [-1e30, -40.0, 0.0, 5e-324, 40.0, 1e30]])
    exact = np.array([t * math.erfc(-t / math.sqrt(2)) / 2 for t in x])
    inside = abs(x) <= 12
    assert abs(embed.gelu(x) - exact)[inside].max() < 4e-12
    x32 = x.astype(np.float32)
    np.testing.assert_allclose(embed.gelu(x32)[inside], exact[inside], rtol=1e-6, atol=1e-6)


def run(*command):
    environment = dict(os.environ, PYTHONIOENCODING="utf-8")
    return subprocess.run(
        [sys.executable, *command], capture_output=True, encoding="utf-8", env=environment
    )


def test_the_command_prints_a_matrix_and_both_times(model):
    done = run(SCRIPT, "A cat sleeps.", "The cat is asleep.", "Steel prices rose.")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()[:4]
    assert head.split() == ["1", "2", "3"]
    cosines = np.array([[float(word) for word in row.split()[1:4]] for row in rows])
    np.testing.assert_array_equal(cosines, cosines.T)
    np.testing.assert_array_equal(np.diag(cosines), 1)
    assert cosines[0, 1] > 0.8 > 0.3 > cosines[0, 2]
    assert rows[0].endswith("A cat sleeps.")
    assert "attention by flashcpu" in done.stdout
    assert "attention by NumPy" in done.stdout


@pytest.mark.parametrize("module", ["safetensors.numpy", "tokenizers"])
def test_without_its_packages_the_command_says_what_to_install(module):
    code = f"""if True:
        import runpy, sys
        sys.modules[{module!r}] = None
        sys.argv = ["embed.py", "Hello"]
        runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
    """
    done = run("-c", code)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "pip install '.[examples]'" in done.stderr
