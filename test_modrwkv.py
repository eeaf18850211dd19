"""What is promised, against something the project did not write: numpy, float64 autograd, the package `rwkv`, PIL;
then the scripts as a user runs them."""

import ast
import base64
import contextlib
import copy
import ctypes
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import sklearn.datasets
import soundfile
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import modrwkv
import sample
import train
from data import ablate
from data import records as data_records
from data import scores as data_scores
from data.media import (
    LOADERS,
    cache_features,
    feature_file,
    fingerprint,
    load_media,
    load_pretrained_picture,
    read_features,
    read_picture,
    read_series,
    read_sound,
    read_table,
    write_features,
)
from data.records import (
    held_out_samples,
    read_records,
    record_media,
    record_sample,
    record_turns,
)
from data.released import convert, load, read_checkpoint
from data.text import PROMPT_STYLES, SHORT_ANSWER, TEMPLATES, conversation, generate_text, get_tokenizer
from modrwkv import (
    Adapter,
    Config,
    InputError,
    MelEncoder,
    ModRWKV,
    PatchEncoder,
    SpeechAdapter,
    Timer,
    WaveNet,
    save,
)

torch.set_num_threads(1)
REPO = Path(modrwkv.__file__).resolve().parent
SEEDS = st.integers(0, 2**31)
trials = lambda n: settings(max_examples=n, deadline=None, derandomize=True, database=None)


def distance(got, exact):
    """Norm-wise relative error; below 1e-20 the exact norm counts as 1e-20."""
    got, exact = torch.as_tensor(got).double().cpu(), torch.as_tensor(exact).double().cpu()
    assert got.shape == exact.shape
    return ((got - exact).norm() / exact.norm().clamp(min=1e-20)).item()


def randomise(model, seed=0):
    """Every parameter random: as it starts, a model's branches are silent, and no test of them could fail."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=g)
            if name.endswith(".weight") and p.dim() > 1:
                p.copy_(x / (p.numel() / len(p)) ** 0.5)
            elif re.search(r"att\.[wavg][12]$", name):
                p.copy_(x / len(p) ** 0.5)
            else:
                p.add_(0.2 * x)
    return model.eval()


SMALL = Config(
    n_layer=2,
    n_embd=64,
    head_size=32,
    patch_width=8,
    encoder_width=48,
    conv_kernel=3,
    conv_stride=2,
    audio_encoder="mel",
)
SMALL = dataclasses.replace(SMALL, series_encoder="wavenet", series_kernel=6, series_stride=4, lookback=48, horizon=12)


@pytest.fixture(scope="session")
def model():
    """A small random model in float64, so that what must be equal is equal to 1e-6 or better (the decay is float32)."""
    return randomise(ModRWKV(SMALL)).double()


MARKS = {
    257: b"\n\n",
    258: b"User:",
    259: b"Assistant:",
}  # the tokens of the tokenizer "bytes" that are more than a byte
codes = lambda string: [
    b + 1 for b in (string if isinstance(string, bytes) else string.encode())
]  # and those that are one
text = lambda string: ("text", codes(string))
pixels = lambda seed, *shape: np.random.RandomState(seed).randint(0, 256, shape, np.uint8)
picture = lambda seed, patches=3: ("image", torch.from_numpy(pixels(seed, 3, 32, 8 * patches)))


def features(encoder, media):
    """What an encoder makes of a batch, as one tensor (length, width) for each."""
    return encoder(*encoder.collate(media)).split([encoder.length(x) for x in media])


def adapted(adapter, xs):
    """What an adapter makes of a batch of features (length, width), as one tensor (windows, n_embd) for each."""
    lengths = [len(x) for x in xs]
    return adapter(torch.cat(xs), *adapter.collate(lengths)).split([adapter.length(n) for n in lengths])


sound = lambda seed, frames=30: (
    "audio",
    torch.from_numpy(np.random.RandomState(seed).randn(80, frames).astype(np.float32)),
)
series = lambda seed, points=30: (
    "series",
    modrwkv.normalise(torch.from_numpy(np.random.RandomState(seed).randn(points)))[0],
)
noise = lambda width, height: Image.fromarray(pixels(0, height, width, 3))


def stored(image, path, **how):
    image.save(path, **how)
    return path


def talk(*values, **more):
    """A record: questions and answers by turns."""
    return more | {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    }


def refusal(function, *args, **more):
    """The one line with which function(*args) says that it cannot use them."""
    with pytest.raises(InputError) as e:
        function(*args, **more)
    assert "\n" not in str(e.value)
    return str(e.value)


def n_targets(model, samples):
    """How many tokens and vectors of samples are learned from."""
    return len(model.collate(samples).n_targets)


def jsonl(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------- text: tokenizers, records, conversations


@trials(100)
@given(
    st.one_of(st.text(), st.lists(st.sampled_from(["\n", "User:", "Assistant:", "User", ":", "a", "é"])).map("".join))
)
def test_bytes_tokenizer(string):
    tokenizer, want = get_tokenizer("bytes"), []
    for piece in re.split("(\n\n|User:|Assistant:)", string):
        want += [i for i, mark in MARKS.items() if mark == piece.encode()] or codes(piece)
    assert tokenizer.encode(string) == want
    assert tokenizer.decode([*want, 0]) == string.encode()
    assert (tokenizer.end, tokenizer.vocab_size) == (0, 260)


@pytest.fixture(scope="session")
def official():
    """The package `rwkv`: (its class RWKV, the path of its vocabulary, its tokenizer)."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")  # read when the package is imported
    import rwkv.model
    import rwkv.rwkv_tokenizer

    path = os.path.join(os.path.dirname(rwkv.model.__file__), "rwkv_vocab_v20230424.txt")
    return rwkv.model.RWKV, path, rwkv.rwkv_tokenizer.TRIE_TOKENIZER(path)


PIECES = ["User: ", "Assistant:", "\n", "\n\n", " ", "   ", "\t", "。", "，", "中文", "机器学习", "日本語", "привет"]
PIECES += ["🙂", "👨\u200d👩\u200d👧", "é", "e\u0301", "1234", "def f(x):", "\x16", "\x17", "\x00"]


@trials(150)
@given(st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3))).map("".join)))
def test_world_tokenizer_is_the_official_one(official, string):
    ours = get_tokenizer(official[1])
    ids = ours.encode(string)
    assert ids == official[2].encode(string)
    assert (
        ours.decode([0, *ids, 65535]) == string.encode()
    )  # neither the end nor what is above the vocabulary has a text
    assert (ours.end, ours.vocab_size) == (0, 65536)


@pytest.mark.parametrize("line", ["", "5", "x 'b' 1", "2 'b' x", "2 b 1", "2 'b 1", "2 'bb' 1", "2 5 1", "2 'é' 1"])
def test_broken_vocabulary(tmp_path, line):
    path = tmp_path / "vocab.txt"
    path.write_text(f"1 'a' 1\n{line}\n3 'c' 1\n", encoding="utf-8")
    assert f"{path}, line 2" in refusal(get_tokenizer, str(path))
    path.write_text("1 'a' 1\n")
    assert "98" in refusal(get_tokenizer(str(path)).encode, "ab")  # a byte that it does not hold


def test_gpt2_tokenizer_or_a_clear_word():
    try:
        tokenizer = get_tokenizer("gpt2")
    except InputError as e:  # without a network
        assert "gpt2" in str(e) and "bytes" in str(e)
    else:
        assert tokenizer.encode("hello world") == [31373, 995] and tokenizer.decode([31373, 995]) == b"hello world"
        assert (tokenizer.end, tokenizer.vocab_size) == (50256, 50257)


UNUSABLE = {  # reason: records
    "JSON": ["{oops"],
    "object": ["[1, 2]", "3"],
    "conversations": [{}, {"conversations": []}, {"text": 5}],
    "empty": [{"text": ""}],
    "level": [talk("q", "a", level="hard")],
    "turn 1": [{"conversations": ["hi"]}, talk(1, "b")],
    "turn 2": [talk("q", " \n")],
    "human": [{"conversations": [{"from": "gpt", "value": "a"}]}],
    "gpt": [{"conversations": [{"from": "human", "value": "a"}] * 2}],
    "question": [talk("q"), talk("q", "a", "q")],
    "audio": [talk("<audio>?", "a"), talk("?", "a", audio="x.wav"), talk("<audio>", "a", audio=5)],
    "series": [
        talk("<series>?", "a"),
        talk("?", "a", series=[1.0, 2]),
        talk("<series>", "a", series=[1, "x"]),
        talk("<series>", "a", series=5),
    ],
    '"series"': [{"series": 5, "target": [1, 2]}, {"series": ["a", "b"], "target": [1, 2]}],
    "target": [{"target": x} for x in (5, [], [1], ["a", "b"], [1, None], [1, math.nan])],
    "image": [talk("<image>?", "a", image=files) for files in (None, ["x.png", "y.png"], 5, [5], {"path": "x.png"})]
    + [talk("?", "a", image="x.png"), talk("?", "a <image>", image="x.png")],
}


@pytest.mark.parametrize(
    "reason,record", [(reason, record) for reason, records in UNUSABLE.items() for record in records]
)
def test_records_that_cannot_be_used(tmp_path, reason, record):
    good, bad = json.dumps(talk("q", "a")), record if isinstance(record, str) else json.dumps(record)
    one, other = tmp_path / "x.json", tmp_path / "x.jsonl"
    one.write_text(f"[{good}, {bad}]")
    other.write_text(f"{good}\n\n{bad}\n")
    for path, place in ((one, str(one) if reason == "JSON" else f"{one}, record 2"), (other, f"{other}, line 3")):
        message = refusal(read_records, path)
        assert place in message and reason in message


def spell(segments):
    """Segments as a string: what is learned in brackets, what is no text as <kind>."""
    string = lambda ids: b"".join(MARKS.get(i, bytes([(i - 1) % 256])) for i in ids).decode()
    signal = lambda kind: lambda data: f"<{data if isinstance(data, str) else kind}>"
    forms = {"text": string, "answer": lambda ids: f"[{string(ids)}]", **{kind: signal(kind) for kind in modrwkv.MEDIA}}
    return "".join(forms[kind](data) for kind, data in segments)


@pytest.mark.parametrize(
    "template,want",
    [
        ("world", "User: hi\n\nAssistant:[ hello\n\n]User: who?\n\nAssistant:[ me\n\n]"),
        ("v1", "\x16User: hi\x17Assistant:[ hello\x17]User: who?\x17Assistant:[ me\x17]"),
        ("v2", "\x16User: hi\x17\x16Assistant:[ hello\x17]\x16User: who?\x17\x16Assistant:[ me\x17]"),
        ("v3", "\x16User:hi\x17\x16Assistant:[hello\x17]\x16User:who?\x17\x16Assistant:[me\x17]"),
    ],
)
def test_templates(template, want):
    config = dataclasses.replace(SMALL, template=template)
    assert spell(conversation(config, [("hi", "hello"), ("who?", "me")], iter(()))) == want
    later = conversation(config, [("who?", None)], iter(()), first=False)  # a chat that goes on
    assert spell(later) == want.split("]")[1].split("[")[0]


@pytest.mark.parametrize(
    "template,want",
    [
        ("world", "<A>Assistant:[ yes\n\n]"),
        ("v1", "<A>\x16Assistant:[ yes\x17]"),
        ("v2", "<A>\x16Assistant:[ yes\x17]"),
        ("v3", "<A>\x16Assistant:[yes\x17]"),
    ],
)
@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_what_is_to_be_written_down_has_no_question(template, want, style):
    config = dataclasses.replace(SMALL, template=template, prompt_style=style)
    assert spell(conversation(config, [("<audio>\n", "yes")], iter([("audio", "A")]))) == want
    assert "Why?" in spell(conversation(config, [("<audio>\nWhy?", "yes")], iter([("audio", "A")])))


def test_pictures_spaces_and_the_end_in_a_conversation(official):
    turns = [
        ("<image>\nWhat is this?", "A cat."),
        ("And <image><image>\n\n \nits colour?  ", " black\n\n\nand white\n"),
    ]
    want = "User: <A>\nWhat is this?\n\nAssistant:[ A cat.\n\n]User: And <B><C>\nits colour?\n\nAssistant:[ black\nand white\n\n]"
    assert spell(conversation(SMALL, turns, iter([("image", name) for name in "ABC"]))) == want
    config = dataclasses.replace(SMALL, tokenizer=official[1])  # by itself, this tokenizer makes 28329 of "。\n"
    assert (
        conversation(config, [("q", "好。")], iter(()))[-1][1][-1] == 261
    )  # but the end is always the token it is when answering


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "message",
    ["a\n\nb", "a\n \t\n\n b", "a\r\n\r\nb", "a\x17b", "\x16a\x17", "a\n\x16\nb", "a\n\x17", "{}", "a\n\x17\n\x16\nb"],
)
def test_no_message_ends_its_turn(template, message):
    config, end = dataclasses.replace(SMALL, template=template), TEMPLATES[template].end
    question, answer = map(spell, zip(conversation(config, [(message, message)], iter(()))))
    assert question.count(end) == answer.count(end) == 1 and answer.endswith(f"{end}]")


def test_records_as_llava_writes_them(tmp_path, model):
    """A list in .json, or a record a line; paths are relative to the file, and a record can be read again and again."""
    (tmp_path / "sub").mkdir()
    files = ["sub/x.png", "sub/y.png"]
    x, y = (
        load_media(model.encoder["image"], stored(drawing(at=(10 + 20 * i, 8)), tmp_path / file))
        for i, file in enumerate(files)
    )
    records = [
        talk("<image>\nWhat?", "A thing.", id="1", image=files[0]),
        talk("<image> and <image>", "two", image=files),
    ]
    records += [talk("hi", "hello", id="2"), {"text": "ab\n\nc"}, {"text": "d", "conversations": None}]
    (tmp_path / "x.json").write_text(json.dumps(records))
    for path in (tmp_path / "x.json", jsonl(tmp_path / "x.jsonl", *records)):
        one, two, none, text, more = read_records(path)
        assert record_media(one) == [("image", str(tmp_path / "sub/x.png"))] and record_media(none) == []
        assert spell(record_sample(model, one)) == "User: <image>\nWhat?\n\nAssistant:[ A thing.\n\n]"
        for _epoch in range(2):
            pictures = [data for kind, data in record_sample(model, two) if kind == "image"]
            assert len(pictures) == 2 and torch.equal(pictures[0], x) and torch.equal(pictures[1], y)
        assert record_sample(model, text) == [("answer", [98, 99, 257, 100, 0])]  # all of it learned, id 0 ends it
        assert record_sample(model, more) == [("answer", [101, 0])]


def test_records_are_told_by_what_a_file_holds(tmp_path, model):
    """A list, one a line, a text, a byte order mark: against the record that was written; without private keys it is a sample."""
    record = talk("What?", "A thing.")
    contents = {"list.jsonl": json.dumps([record]), "lines.json": "\n" + json.dumps(record) + "\n"}
    for name, content in contents.items():
        (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
        [got] = read_records(tmp_path / name)
        assert got["conversations"] == record["conversations"] and got["_folder"] == str(tmp_path)
        assert record_sample(model, got) == record_sample(model, record)
    (tmp_path / "x.txt").write_text("[a\n")
    assert read_records(tmp_path / "x.txt")[0]["text"] == "[a\n"
    assert "no media" in refusal(read_records, jsonl(tmp_path / "x.jsonl", {"text": "a", "image": "x.png"}))
    for n, line in enumerate(("[" * 100000, '{"target": [1, 2' + "0" * 5000 + "]}", "\0")):
        (tmp_path / f"{n}.jsonl").write_text('{"text": "a"}\n' + line)
        assert f"{n}.jsonl, line 2, is not JSON" in refusal(read_records, tmp_path / f"{n}.jsonl")


def test_question_puts_pictures_first(tmp_path, model):
    path = stored(drawing(), tmp_path / "x.png")
    segments = data_records.question(model, "What?", [("image", path)])
    assert spell(segments) == "User: <image>\nWhat?\n\nAssistant:" and torch.equal(
        segments[1][1], load_media(model.encoder["image"], path)
    )
    assert (
        spell(data_records.question(model, "What <image>?", [("image", path)] * 2))
        == "User: <image>\nWhat <image>?\n\nAssistant:"
    )
    assert "<image>" in refusal(data_records.question, model, "<image>", [])
    blind = ModRWKV(dataclasses.replace(SMALL, image_encoder="none"))
    assert "image encoder" in refusal(data_records.question, blind, "What?", [("image", path)])
    assert "image encoder" in refusal(blind, [segments])


# ---------------------------------------------------------------------------------------------- the recurrence


def formula(r, w, k, v, a, b, S):
    """The paper's equation 17, entry by entry, in numpy."""
    ys = []
    for t in range(r.shape[1]):
        Sa = np.einsum("bhij,bhj->bhi", S, a[:, t])
        vk = np.einsum("bhi,bhj->bhij", v[:, t], k[:, t])
        S = S * np.exp(w[:, t])[:, :, None, :] + np.einsum("bhi,bhj->bhij", Sa, b[:, t]) + vk
        ys.append(np.einsum("bhij,bhj->bhi", S, r[:, t]))
    return np.stack(ys, 1), S


@pytest.mark.parametrize("function", [modrwkv.wkv7_loop, modrwkv.wkv7_chunked, modrwkv.wkv7])
@pytest.mark.parametrize("T", [1, 9, 100])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("infinite", [False, True])
def test_wkv7_is_the_formula(function, T, with_state, infinite):
    rng = np.random.RandomState(0)
    r, k, v, a, b = rng.randn(5, 2, T, 3, 4) / 2
    w, S = -0.6 * rng.rand(2, T, 3, 4), rng.randn(2, 3, 4, 4) * with_state
    w[0, T // 2, 1, 2] = -np.inf if infinite else 0
    exact = formula(r, w, k, v, a, b, S)
    got = function(*map(torch.from_numpy, (r, w, k, v, a, b)), torch.from_numpy(S) if with_state else None)
    for x, y in zip(got, exact):
        assert distance(x, y) < 1e-12


def wkv7_inputs(T, N, fastest, mixed, transition, with_state, seed, scale=1.0, infinite=0.0, dtype=torch.float32, H=2):
    """[r, w, k, v, a, b(, state)]: decays all -fastest, or mixed: each log-uniform between 1e-6 and fastest; a share infinite."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    uniform = lambda: torch.rand(1, T, H, N, generator=g, dtype=torch.float64)
    r, k, v = (scale * normal(1, T, H, N) for _ in range(3))
    w = (
        -(1e-6 * (max(fastest, 1e-6) / 1e-6) ** uniform())
        if mixed
        else torch.full((1, T, H, N), -fastest, dtype=torch.float64)
    )
    w[uniform() < infinite] = -math.inf
    kk, rate = F.normalize(normal(1, T, H, N), dim=-1) * transition, uniform()
    state = [scale**2 * normal(1, H, N, N)] if with_state else []
    return [x.to(dtype) for x in [r, w, k, v, -kk, kk * rate, *state]]


def run_wkv7(function, inputs, dtype, used=(0, 1), device="cpu"):
    """y, the state, and the gradients in every input of a random linear function of those of the two that are used."""
    xs = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    results, g = function(*xs), torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in results]
    loss = sum((results[i] * weights[i]).sum() for i in used)
    return [*results, *torch.autograd.grad(loss, xs, materialize_grads=True)]


def assert_wkv7_exact(inputs, used=(0, 1)):
    exact = run_wkv7(modrwkv.wkv7_loop, inputs, torch.float64, used)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        for function in (modrwkv.wkv7, modrwkv.wkv7_chunked):
            got = run_wkv7(function, inputs, dtype, used)
            errors = {
                name: distance(x, y) for name, x, y in zip("y state dr dw dk dv da db dstate".split(), got, exact)
            }
            assert all(e <= tolerance for e in errors.values()), (function, dtype, errors)  # a NaN fails too


@trials(40)
@given(
    T=st.integers(1, 130),
    N=st.sampled_from([8, 16, 32, 48, 64, 128]),
    exponent=st.floats(-6, math.log10(60)),
    mixed=st.booleans(),
    transition=st.sampled_from([1, 1, 0]),
    with_state=st.booleans(),
    scale=st.sampled_from([1.0, 1.0, 1e-6, 1e6]),
    infinite=st.sampled_from([0, 0, 0, 0.02, 0.5, 1]),
    used=st.sampled_from([(0, 1), (0,), (1,)]),
    seed=SEEDS,
)
@example(
    T=130,
    N=64,
    exponent=math.log10(0.6065),
    mixed=True,
    transition=1,
    with_state=True,
    scale=1.0,
    infinite=0,
    used=(0, 1),
    seed=1,
)
@example(
    T=96,
    N=64,
    exponent=math.log10(0.6065),
    mixed=False,
    transition=1,
    with_state=False,
    scale=1e6,
    infinite=0,
    used=(0, 1),
    seed=2,
)
@example(
    T=40,
    N=16,
    exponent=math.log10(0.6065),
    mixed=True,
    transition=1,
    with_state=True,
    scale=1.0,
    infinite=0.02,
    used=(0, 1),
    seed=3,
)
@example(
    T=40,
    N=16,
    exponent=math.log10(0.6065),
    mixed=True,
    transition=1,
    with_state=True,
    scale=1.0,
    infinite=0.5,
    used=(0, 1),
    seed=4,
)
@example(
    T=40,
    N=16,
    exponent=math.log10(0.6065),
    mixed=True,
    transition=1,
    with_state=True,
    scale=1.0,
    infinite=1,
    used=(0, 1),
    seed=5,
)
def test_wkv7_is_exact_with_its_gradients(T, N, exponent, mixed, transition, with_state, scale, infinite, used, seed):
    assert_wkv7_exact(wkv7_inputs(T, N, 10**exponent, mixed, transition, with_state, seed, scale, infinite), used)


@pytest.mark.parametrize("fastest", [1e-6, 0.3, 0.6065, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.5, 7.6, 20.0, 60.0])
@pytest.mark.parametrize("T", [8, 20, 64])
def test_wkv7_is_exact_at_every_decay(fastest, T):
    for transition, with_state, scale in itertools.product((1, 0), (True, False), (1, 1e-6)):
        assert_wkv7_exact(wkv7_inputs(T, 16, fastest, False, transition, with_state, T, scale))


METHODS = (modrwkv.wkv7, modrwkv.wkv7_chunked, modrwkv.wkv7_loop)


@trials(100)
@given(
    name=st.sampled_from(["r", "w", "k", "v", "a", "b", "state"]),
    shape=st.lists(st.integers(0, 17), max_size=5).map(tuple),
    dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
    device=st.sampled_from(["cpu", "meta"]),
    method=st.sampled_from(METHODS),
)
@example(name="w", shape=(1, 5, 2, 16), dtype=torch.float32, device="cpu", method=modrwkv.wkv7)  # fewer steps
@example(name="k", shape=(1, 9, 1, 16), dtype=torch.float32, device="cpu", method=modrwkv.wkv7)  # fewer heads
@example(name="state", shape=(1, 16, 16), dtype=torch.float32, device="cpu", method=modrwkv.wkv7_chunked)
@example(name="r", shape=(1, 9, 2, 8), dtype=torch.float32, device="cpu", method=modrwkv.wkv7_loop)
def test_wkv7_refuses_tensors_that_do_not_fit(name, shape, dtype, device, method):
    """One tensor of seven has another shape, dtype or device: a sentence that names it, or the result if that one fits."""
    inputs = dict(zip(("r", "w", "k", "v", "a", "b", "state"), wkv7_inputs(9, 16, 0.6, True, 1, True, seed=1)))
    good = inputs[name]
    inputs[name] = torch.ones(shape, dtype=dtype, device=device)
    if shape == good.shape and dtype.is_floating_point and device == "cpu":
        return
    with pytest.raises(ValueError, match=f"wkv7: (r|w|{name}) (has|is) ") as e:
        method(*inputs.values())
    assert "\n" not in str(e.value)
    inputs[name] = good.to(dtype, copy=True).to(device)
    if dtype.is_floating_point and device == "cpu":
        assert method(*inputs.values())[0].shape == (1, 9, 2, 16)
    else:
        with pytest.raises(ValueError, match=f"wkv7: (w|{name}) is floating point on r's device"):
            method(*inputs.values())


class Dispatched(TorchDispatchMode):
    """The names of all operations inside."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **kwargs or {})


def test_rwkv7_without_a_kernel_reads_no_values(monkeypatch):
    """A GPU would have to be waited for; RWKV-6, whose decays are free, looks for the fastest."""
    monkeypatch.setattr(modrwkv, "has_kernel", lambda *args: False)
    x = torch.randn(2, 20, 32)
    for generation, reads in ((7, False), (6, True)):
        model = ModRWKV(Config(rwkv=generation, n_layer=1, n_embd=32, head_size=16, image_encoder="none"))
        with Dispatched() as operations:
            y, *_ = model.blocks[0].att(x, None)
            y.sum().backward()
        assert ("aten::_local_scalar_dense" in operations.names) == reads


@pytest.mark.parametrize("T", [1, 8, 97, 300])
def test_wkv7_of_known_decays_reads_no_values(T):
    """As RWKV-7 calls it: the loop's values, and no copy to the host."""
    chunked = functools.partial(modrwkv.wkv7_chunked, w_min=-0.607)
    inputs = wkv7_inputs(T, 8, 0.6065, False, 1, True, seed=T)

    with Dispatched() as operations:
        got = run_wkv7(chunked, inputs, torch.float32)
    assert "aten::bmm" in operations.names and "aten::_local_scalar_dense" not in operations.names
    for x, exact in zip(got, run_wkv7(modrwkv.wkv7_loop, inputs, torch.float64), strict=True):
        assert distance(x, exact) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("N", [8, 48, 64])
def test_wkv7_on_fake_tensors(method, N):
    """Shapes and dtypes of the results and gradients, where there are no values to look at."""
    with FakeTensorMode():
        xs = [torch.rand(2, 12, 3, N, dtype=torch.bfloat16, requires_grad=True) for _ in range(6)]
        xs.append(torch.rand(2, 3, N, N, requires_grad=True))
        y, S = method(*xs)
        gradients = torch.autograd.grad(y.sum() + S.sum(), xs)
    assert (y.shape, y.dtype, S.shape, S.dtype) == ((2, 12, 3, N), torch.bfloat16, (2, 3, N, N), torch.float32)
    assert all(g.shape == x.shape and g.dtype == x.dtype for g, x in zip(gradients, xs, strict=True))


def test_the_line_that_says_why_there_is_no_kernel(capsys):
    """Once for each reason."""
    modrwkv.WARNED.clear()
    modrwkv.kernel.cache_clear()
    for _ in range(2):
        assert not modrwkv.has_kernel("mps")
        modrwkv.wkv7(*wkv7_inputs(9, 48, 0.6, True, 1, True, seed=1))
    reasons = "kernel.cu is for CPUs and NVIDIA GPUs, not for mps", "kernel.cu has head sizes 16, 32, 64 and 128 alone"
    line = "the recurrence runs in PyTorch's own operations, which is several times slower: %s\n"
    assert capsys.readouterr().err == "".join(line % reason for reason in reasons)


def test_wkv7_without_a_kernel_compiles():
    """Into one graph, for one length at a time, where decays are known: the values are those without torch.compile."""
    function = functools.partial(modrwkv.wkv7, w_min=-0.607)
    inputs = wkv7_inputs(97, 8, 0.6, True, 1, True, seed=1)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    for x, y in zip(run_wkv7(compiled, inputs, torch.float32), run_wkv7(function, inputs, torch.float32), strict=True):
        assert distance(x, y) < 1e-6


def test_wkv7_of_free_decays_compiles():
    """With graph breaks: the smallest decay is looked up. In no case a value other than the loop's."""
    for fastest in (0.5, 5.0):
        inputs = wkv7_inputs(40, 8, fastest, True, 1, True, seed=1)
        compiled = torch.compile(modrwkv.wkv7, backend="eager")
        for x, y in zip(compiled(*inputs), modrwkv.wkv7_loop(*inputs), strict=True):
            assert distance(x, y) < 1e-5


@pytest.mark.parametrize("T", [3, 10, 65], ids=["loop", "one chunk", "two chunks"])
@pytest.mark.parametrize("with_state", [True, False])
def test_wkv7_gradcheck(T, with_state):
    """By finite differences."""
    inputs = wkv7_inputs(T, 2, 1.0, False, 1, with_state, seed=4, dtype=torch.float64, H=1)
    assert torch.autograd.gradcheck(modrwkv.wkv7, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("dtype,unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("T", [5, 70])
@pytest.mark.parametrize("N", [8, 32])  # without the kernel and with it
def test_wkv7_in_half_precision(dtype, unit, T, N):
    inputs = wkv7_inputs(T, N, 0.6, True, 1, False, seed=6, dtype=dtype)
    state = torch.randn(1, 2, N, N, generator=torch.Generator().manual_seed(0))
    exact_y, exact_S = modrwkv.wkv7_loop(*(x.double() for x in inputs), state.double())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, S = modrwkv.wkv7(*inputs, state)
        assert y.dtype == dtype and S.dtype == torch.float32
        assert distance(y, exact_y) <= unit  # the one rounding of y, nothing more
        assert distance(S, exact_S) <= 1e-5


# ---------------------------------------------------------------------------------------------- kernel.cu on the CPU

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@trials(40)
@given(
    T=st.integers(1, 100),
    N=st.sampled_from([16, 32, 64, 128]),
    exponent=st.floats(-6, math.log10(60)),
    mixed=st.booleans(),
    transition=st.sampled_from([1, 0]),
    with_state=st.booleans(),
    infinite=st.sampled_from([0, 0, 0.1, 1]),
    seed=SEEDS,
)
@example(T=100, N=64, exponent=math.log10(0.6065), mixed=True, transition=1, with_state=True, infinite=0, seed=1)
def test_kernel_deviates_by_2e_6_at_most(device, T, N, exponent, mixed, transition, with_state, infinite, seed):
    inputs = wkv7_inputs(T, N, 10**exponent, mixed, transition, with_state, seed, infinite=infinite)
    assert modrwkv.has_kernel(device)
    for got, exact in zip(
        run_wkv7(modrwkv.wkv7, inputs, torch.float32, device=device), run_wkv7(modrwkv.wkv7_loop, inputs, torch.float64)
    ):
        assert distance(got, exact) <= 2e-6


@needs_compiler
@pytest.mark.parametrize("T", [1, 32, 45])
def test_kernel_writes_all_it_returns(monkeypatch, T):
    inputs = wkv7_inputs(T, 16, 0.6, True, 1, False, seed=1)
    want = run_wkv7(modrwkv.wkv7, inputs, torch.float32)
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **how: empty(*args, **how).fill_(math.nan))
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *shape, **how: self.new_full(shape if len(shape) > 1 else shape[0], math.nan, **how),
    )
    assert all(map(torch.equal, run_wkv7(modrwkv.wkv7, inputs, torch.float32), want))


@needs_compiler
@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 33])
def test_kernel_without_gradients(T, N):
    """As in decoding, where a few steps go another way."""
    inputs = wkv7_inputs(T, N, 60.0, True, 1, True, seed=T, infinite=0.1)
    want = modrwkv.wkv7_loop(*(x.double() for x in inputs))
    with torch.no_grad():
        got = modrwkv.wkv7(*inputs)
    assert all(distance(x, y) < 2e-6 for x, y in zip(got, want))


@needs_compiler
@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("threads", [2, 3, 4, 16, 64])
def test_kernel_with_rows_shared_out_among_threads(N, threads):
    """Of one head, so that there are more threads than heads, and at last than blocks of rows."""
    inputs = wkv7_inputs(600, N, 0.6, True, 1, True, seed=2, H=1)
    want = run_wkv7(modrwkv.wkv7, inputs, torch.float32)
    torch.set_num_threads(threads)
    try:
        got = run_wkv7(modrwkv.wkv7, inputs, torch.float32)
    finally:
        torch.set_num_threads(1)
    assert all(distance(x, y) < 1e-6 for x, y in zip(got, want))


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_rounds_half_precision_once(device, dtype):
    inputs = [x.to(dtype) for x in wkv7_inputs(70, 64, 0.6, True, 1, False, seed=3)]
    exact = run_wkv7(modrwkv.wkv7_loop, inputs, torch.float64)
    for i, (got, want) in enumerate(zip(run_wkv7(modrwkv.wkv7, inputs, dtype, device=device), exact)):
        assert distance(got, want) <= (
            1.5 * distance(want.to(dtype), want) if i != 1 else 2e-6
        )  # the state stays float32


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_state", [True, False])
def test_kernel_as_an_operator_of_torch(device, with_state):
    *six, state = [x.to(device).requires_grad_() for x in wkv7_inputs(40, 16, 0.6, True, 1, True, seed=4)]
    checks = torch.library.opcheck(modrwkv.wkv7_kernel, (*six, state if with_state else None, True))
    assert set(checks.values()) == {"SUCCESS"}

    def loss(*inputs):
        y, S = modrwkv.wkv7(*inputs)
        return y.square().sum() + S.square().sum()

    inputs = (*six, state) if with_state else six
    want = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    again = torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False)
    for other in (compiled(*inputs), again):
        assert all(distance(x, y) < 1e-6 for x, y in zip(torch.autograd.grad(other, inputs), want))


@needs_compiler
def test_kernel_compiles_once_for_all_lengths():
    """torch.compile: one graph, made twice at most; the values are the loop's."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(modrwkv.wkv7, fullgraph=True, dynamic=True, backend=counter)
    for T in (17, 40, 77, 200):
        inputs = wkv7_inputs(T, 16, 0.6, True, 1, False, seed=T)
        got = run_wkv7(compiled, inputs, torch.float32)
        for x, exact in zip(got, run_wkv7(modrwkv.wkv7_loop, inputs, torch.float32), strict=True):
            assert distance(x, exact) < 1e-5
    assert counter.frame_count <= 2


@needs_compiler
def test_kernel_takes_any_strides():
    inputs = wkv7_inputs(20, 16, 0.6, True, 1, True, seed=5)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:6]] + [inputs[6].mT.contiguous().mT]
    assert not strided[0].is_contiguous()
    assert all(
        map(torch.equal, run_wkv7(modrwkv.wkv7, strided, torch.float32), run_wkv7(modrwkv.wkv7, inputs, torch.float32))
    )


RECURRENCE = """
import torch, modrwkv
x = torch.ones(1, 9, 1, 16)
print(modrwkv.wkv7(x, -x, x, x, x, x * 0)[0].sum().item(), flush=True)
"""


def recurrence(cache, **environment):
    """The printed sum, and what was said, of a fresh process whose compiled kernels are in the folder `cache`."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", RECURRENCE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@needs_compiler
def test_kernel_is_compiled_once_by_processes_at_once(tmp_path):
    said = [process.communicate() for process in [recurrence(tmp_path) for _ in range(2)]]
    assert said[0][0] == said[1][0] != ""
    [library] = [path for path in tmp_path.rglob("*") if path.is_file()]
    out, err = recurrence(tmp_path).communicate()
    assert (out, err) == (said[0][0], "") and library.suffix == ".so"


@needs_compiler
def test_kernel_that_was_damaged_is_compiled_again(tmp_path, monkeypatch, capsys):
    """To open a library that was cut short would end the process with SIGBUS."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "kernel.cu").write_text('extern "C" int answer() { return 42; }\n')
    compile = functools.partial(modrwkv.compile_for_cpu, str(tmp_path / "kernel.cu"))
    path = Path(compile())
    data = path.read_bytes()
    assert path.parent.stat().st_mode & 0o777 == 0o700 and "compiling kernel.cu" in capsys.readouterr().err
    for damaged in (data[: len(data) // 2], data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], b""):
        path.write_bytes(damaged)
        for said in ("compiling kernel.cu for this CPU, once, about 2 seconds ...\n", ""):
            assert Path(compile()).read_bytes() == data and capsys.readouterr().err == said
    assert ctypes.CDLL(compile()).answer() == 42 and list(tmp_path.glob("modrwkv/*")) == [path]


@pytest.mark.parametrize(
    "case", ["no home", "empty home", "relative", "anyone writes", "a link", "a file", "read only"]
)
def test_kernel_cache_is_the_users_alone(tmp_path, monkeypatch, case):
    """Otherwise a temporary folder of this process, and nothing is written where it runs."""
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    cache.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if case in ("no home", "empty home"):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "")
    if case == "no home":
        monkeypatch.delenv("HOME")
    if case == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    if case == "anyone writes":
        (cache / "modrwkv").mkdir()
        (cache / "modrwkv").chmod(0o777)
    if case == "a link":
        (cache / "modrwkv").symlink_to(cache)
    if case == "a file":
        (cache / "modrwkv").touch()
    if case == "read only":
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    folder = Path(modrwkv.kernel_folder())
    assert folder.parent == temporary and folder.stat().st_mode & 0o777 == 0o700
    assert len(list(cache.iterdir())) <= 1 and not list(folder.iterdir())
    assert sorted(tmp_path.iterdir()) == [cache, temporary]


NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A list of capabilities: the GPUs that this machine has then, and a PyTorch with CUDA; kernels go to tmp_path."""
    found = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: found[i])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    modrwkv.kernel.cache_clear()
    modrwkv.WARNED.clear()
    yield found
    modrwkv.kernel.cache_clear()


def test_gpu_kernel_is_compiled_by_a_package_of_pip(gpus, cuda, tmp_path, monkeypatch, capsys):
    """Where there is no nvcc but that of cuda-toolkit; here a script, which gives the library that runs CUDA on the CPU."""
    script = f'#!/bin/sh\nPATH=/usr/bin:/bin\necho "$@" >> {tmp_path}/calls\nfor last; do :; done\n'
    folder = tmp_path / "site" / "nvidia" / "cu13" / "bin"
    folder.mkdir(parents=True)
    (folder / "nvcc").write_text(script + f'cp {cuda._name} "$last"\n')
    (folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    gpus += [(9, 0), (7, 5), (9, 0)]
    assert not modrwkv.has_kernel("cuda")
    assert 'there is no nvcc; pip install "cuda-toolkit[nvcc,cccl]" brings it' in capsys.readouterr().err
    monkeypatch.syspath_prepend(tmp_path / "site")
    for said in ("compiling kernel.cu for this GPU, once, about 30 seconds ...\n", ""):
        modrwkv.kernel.cache_clear()
        assert modrwkv.has_kernel("cuda") and capsys.readouterr().err == said
    [call] = (tmp_path / "calls").read_text().splitlines()
    gencode = "-gencode=arch=compute_75,code=sm_75 -gencode=arch=compute_90,code=sm_90"
    assert gencode in call and f"-L{folder.parent}/lib" in call
    gpus.append((8, 0))  # another GPU, another library
    assert modrwkv.compile_for_gpu(str(KERNEL)) and "compiling" in capsys.readouterr().err


@pytest.mark.skipif(not NVCC, reason="no nvcc")
def test_gpu_kernel_without_its_driver(gpus, tmp_path, capsys):
    """What nvcc makes is a library that can be opened here; one line says why there is no kernel."""
    source = re.sub(r"\n *case (16|32|128|1|2): .*", "", KERNEL.read_text())  # of the 24 kernels two
    (tmp_path / "kernel.cu").write_text(source)
    gpus += [(7, 5), (12, 0)]
    path = modrwkv.compile_for_gpu(str(tmp_path / "kernel.cu"))
    assert ctypes.CDLL(path).wkv7_backward and "compiling" in capsys.readouterr().err
    assert modrwkv.compile_for_gpu(str(tmp_path / "kernel.cu")) == path and not capsys.readouterr().err
    gpus[:] = [(1, 0)]
    message = refusal(modrwkv.compile_for_gpu, str(tmp_path / "kernel.cu"))
    assert "cannot compile kernel.cu: nvcc fatal" in message and "compute_10" in message


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "there is no C++ compiler; install g++ or clang++"),
        ("echo no error: >&2; exit 1", "cannot compile kernel.cu"),
    ],
)
def test_without_a_compiler_torch_does_it(tmp_path, compiler, reason):
    bin = tmp_path / "bin"
    bin.mkdir()
    if compiler:
        (bin / "g++").write_text(f"#!/bin/sh\n{compiler}\n")
        (bin / "g++").chmod(0o755)
    out, err = recurrence(tmp_path, PATH=str(bin), CXX="").communicate()
    want, _ = recurrence(tmp_path).communicate()
    assert float(out) == pytest.approx(float(want), rel=1e-6)
    assert reason in err and "the recurrence runs in PyTorch's own operations" in err and "Traceback" not in err


# ---------------------------------------------------------------------------------------------- kernel.cu's CUDA, run on the CPU

KERNEL = REPO / "kernel.cu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("r", "w", "k", "v", "a", "b")


def open_cuda_on_cpu(folder, *flags):
    """The CUDA section as g++ builds it."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    path = folder / "kernel.so"
    flags = ["-std=c++20", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-D__CUDACC__", *flags]
    subprocess.run(["g++", *flags, "-include", REPO / "cuda_on_cpu.h", "-x", "c++", KERNEL, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    library.wkv7_error.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="session")
def cuda(tmp_path_factory):
    return open_cuda_on_cpu(tmp_path_factory.mktemp("cuda"))


def guarded(shape, dtype, margin=2048):
    """A tensor full of NaN inside a larger one full of NaN."""
    return torch.full((math.prod(shape) + 2 * margin,), math.nan, dtype=dtype)[margin:-margin].view(shape)


def intact(*tensors):
    """All is written, and nothing around it."""
    for x in tensors:
        if x is not None:
            assert not x.isnan().any()
            whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
            assert whole.isnan().sum() == len(whole) - x.numel()


def call(function, shape, dtype, *tensors, stream=None):
    B, T, H, N = (ctypes.c_int64(n) for n in shape)
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]
    return function(B, T, H, N, [F32, BF16, F16].index(dtype), *pointers, ctypes.c_void_p(stream))


def cuda_forward(cuda, x, s0=None, keep=True):
    """x: r, w, k, v, a, b. Returns y, the last state, the kept states or None."""
    (B, T, H, N), dtype = x[0].shape, x[0].dtype
    y, sT = guarded((B, T, H, N), dtype), guarded((B, H, N, N), F32)
    kept = guarded((B, H, -(-T // 16), N, N), F32) if keep else None
    assert call(cuda.wkv7_forward, x[0].shape, dtype, *x, s0, y, sT, kept) == 0
    intact(y, sT, kept)
    return y, sT, kept


def cuda_backward(cuda, x, kept, dy, dsT=None, want_ds0=True):
    """Returns dr, dw, dk, dv, da, db, ds0."""
    (B, T, H, N), dtype = x[0].shape, x[0].dtype
    grads = [guarded((B, T, H, N), F32 if name == "w" else dtype) for name in NAMES]
    ds0 = guarded((B, H, N, N), F32) if want_ds0 else None
    assert call(cuda.wkv7_backward, x[0].shape, dtype, *x, kept, dy, dsT, *grads, ds0) == 0
    intact(*grads, ds0)
    return *grads, ds0


def into_guarded(x, dtype):
    return guarded(x.shape, dtype).copy_(x)


def cuda_inputs(shape, dtype, decay, seed, removal=True):
    """r, w, k, v, a, b, s0, dy, dsT as RWKV-7 has them: a = -kk, b = kk * rate with kk of unit length, or both 0."""
    B, T, H, N = shape
    g = torch.Generator().manual_seed(seed)
    r, k, v, kk, dy = torch.randn(5, *shape, generator=g)
    kk, rate, u = kk / kk.norm(dim=-1, keepdim=True), torch.rand(shape, generator=g), torch.rand(shape, generator=g)
    w = {
        "rwkv7": -0.606531 * u,
        "wide": -(10 ** (u * 7.778 - 6)),  # -1e-6 .. -60
        "edges": torch.where(u < 0.3, 0.0, torch.where(u < 0.6, -math.inf, -u)),
        "one": torch.zeros(shape),
        "zero": torch.full(shape, -math.inf),
    }.get(decay)
    w = torch.full(shape, decay) if w is None else w
    s0, dsT = torch.randn(2, B, H, N, N, generator=g)
    x = [into_guarded(t, dtype) for t in (r, w, k, v, -kk * removal, kk * rate * removal)]
    x[1] = into_guarded(w, F32)
    return x, into_guarded(s0, F32), into_guarded(dy, dtype), into_guarded(dsT, F32)


def loop(x, s0, dy, dsT, dtype=torch.float64):
    """wkv7_loop and its gradients: y, sT, dr, dw, dk, dv, da, db, ds0."""
    B, T, H, N = x[0].shape
    zero = torch.zeros(B, H, N, N)
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (*x, zero if s0 is None else s0)]
    y, sT = modrwkv.wkv7_loop(*leaves)
    loss = (y * dy.to(dtype)).sum() + (sT * (zero if dsT is None else dsT).to(dtype)).sum()
    return y.detach(), sT.detach(), *torch.autograd.grad(loss, leaves)


def check(found, *problem):
    """Against float64: 2e-6 of the norm in float32 (for ds0, ill-conditioned at fast decays, twice what the loop in float32 has); rounding in 16 bits."""
    for name, x, e, e32 in zip(RESULTS, found, loop(*problem), loop(*problem, F32), strict=True):
        if x is None:
            continue
        error, size = (x.double() - e).norm().item(), e.norm().item()
        bound = max(2e-6 * size, 2 * (e32.double() - e).norm().item() if name == "ds0" else 0, 1e-20)
        if x.dtype != F32:
            bound = max(1.5 * (e.to(x.dtype).double() - e).norm().item(), 1e-20)
        assert error <= bound, f"{name} {x.dtype}: error {error:.3g}, bound {bound:.3g}, norm {size:.3g}"


RESULTS = ("y", "sT", "dr", "dw", "dk", "dv", "da", "db", "ds0")


def run_all(cuda, x, s0, dy, dsT, want_ds0=True):
    y, sT, kept = cuda_forward(cuda, x, s0)
    return y, sT, *cuda_backward(cuda, x, kept, dy, dsT, want_ds0)


@trials(40)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 40),
    H=st.integers(1, 2),
    N=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from([F32, BF16, F16]),
    decay=st.sampled_from(["rwkv7", "wide", "edges", "one", "zero", -1e-6, -0.6, -5.0, -20.0, -60.0]),
    has=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
@example(B=2, T=33, H=3, N=64, dtype=F32, decay="rwkv7", has=(True, True, True, True), seed=0)
@example(B=1, T=19, H=2, N=128, dtype=F32, decay="wide", has=(True, True, True, True), seed=0)
@example(B=1, T=32, H=1, N=64, dtype=F32, decay=-20.0, has=(True, True, True, True), seed=0)
@example(B=1, T=37, H=1, N=128, dtype=BF16, decay="rwkv7", has=(True, True, True, True), seed=0)
@example(B=1, T=16, H=1, N=32, dtype=F16, decay="edges", has=(True, True, True, True), seed=0)
@example(B=2, T=1, H=1, N=16, dtype=BF16, decay="one", has=(False, False, False, True), seed=0)
def test_cuda_agrees_with_float64(cuda, B, T, H, N, dtype, decay, has, seed):
    x, s0, dy, dsT = cuda_inputs((B, T, H, N), dtype, decay, seed, removal=has[3])
    s0, dsT = s0 if has[0] else None, dsT if has[1] else None
    check(run_all(cuda, x, s0, dy, dsT, has[2]), x, s0, dy, dsT)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("N", [16, 32, 64, 128])
def test_cuda_gives_the_same_bits_in_any_order_of_threads(cuda, N, dtype, monkeypatch):
    x, s0, dy, dsT = cuda_inputs((1, 21 if N < 128 else 9, 2 if N < 128 else 1, N), dtype, "rwkv7", 5)
    results = []
    for order in ("0", "-1", "1", "2") if dtype == BF16 else ("0", "-1"):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        results.append(run_all(cuda, x, s0, dy, dsT))
    for other in results[1:]:
        for name, found, first in zip(RESULTS, other, results[0], strict=True):
            assert torch.equal(found, first), name


def test_cuda_without_asynchronous_copies_gives_the_same_bits(cuda, tmp_path):
    """The copies of sm_75, which has no cp.async, beside those of sm_80."""
    sm_75 = open_cuda_on_cpu(tmp_path, "-DCUDA_ON_CPU_ARCH=75")
    for N, dtype in itertools.product((16, 32, 64, 128), (F32, BF16, F16)):
        problem = cuda_inputs((1, 21 if N < 128 else 9, 1, N), dtype, "edges", N)
        for name, found, want in zip(RESULTS, run_all(sm_75, *problem), run_all(cuda, *problem), strict=True):
            assert torch.equal(found, want), name


@pytest.mark.parametrize("N", [32, 64, 128])
def test_cuda_overflows_in_float16_as_rounding_does(cuda, N):
    """GradScaler looks for infinities: they are where the float64 loop's results are beyond float16, and nowhere else;
    at N = 128 also where the gradient of one half of the rows is, which is added to the other's in float16."""
    x, s0, dy, dsT = cuda_inputs((1, 20, 1, N), F16, "rwkv7", 3)
    x[2], x[3], dy = 20 * x[2], 1000 * x[3], 5000 * dy
    found, exact = run_all(cuda, x, s0, dy, dsT), loop(x, s0, dy, dsT)
    assert sum(y.isinf().any().item() for y in found) >= 4
    for name, y, e in zip(RESULTS, found, exact, strict=True):
        sure = (e.abs() - 65520).abs() > 100  # not on the edge
        beyond = e.to(y.dtype).isinf()
        assert not (y.isfinite() & beyond & sure).any(), name
        assert N == 128 or not (~y.isfinite() & ~beyond & sure).any(), name
        finite = y.isfinite() & ~beyond
        assert distance(y[finite], e[finite]) < (1e-3 if y.dtype == F16 else 2e-6), name
    dy[0, 7, 0, 3] = math.inf  # what a layer above has left of an overflow reaches every input that it depends on
    _, _, kept = cuda_forward(cuda, x, s0)
    grads = [torch.zeros(x[0].shape, dtype=F32 if name == "w" else F16) for name in NAMES]
    assert call(cuda.wkv7_backward, x[0].shape, F16, *x, kept, dy, dsT, *grads, ds0 := torch.zeros_like(s0)) == 0
    assert not any(y.isfinite().all() for y in (*grads, ds0))


def test_cuda_forward_alone_and_split(cuda):
    x, s0, dy, dsT = cuda_inputs((2, 45, 1, 64), F32, "rwkv7", 7)
    whole, sT, _ = cuda_forward(cuda, x, s0, keep=False)
    first = [into_guarded(t[:, :18], F32) for t in x]
    second = [into_guarded(t[:, 18:], F32) for t in x]
    y1, s1, kept1 = cuda_forward(cuda, first, s0)
    y2, s2, kept2 = cuda_forward(cuda, second, s1)
    assert torch.equal(torch.cat([y1, y2], 1), whole) and torch.equal(s2, sT)
    grads2 = cuda_backward(cuda, second, kept2, into_guarded(dy[:, 18:], F32), dsT)
    grads1 = cuda_backward(cuda, first, kept1, into_guarded(dy[:, :18], F32), grads2[-1])
    both = [torch.cat(pair, 1) for pair in zip(grads1[:-1], grads2[:-1])]
    check((whole, sT, *both, grads1[-1]), x, s0, dy, dsT)


def test_cuda_refuses_what_it_cannot_do(cuda):
    x, s0, dy, dsT = cuda_inputs((1, 2, 1, 16), F32, "one", 0)
    y, sT, kept = cuda_forward(cuda, x, s0)
    assert call(cuda.wkv7_forward, (0, 1, 1, 16), F32, *[None] * 10) == 0  # nothing to do
    assert call(cuda.wkv7_forward, (1, 2, 1, 24), F32, *x, s0, y, sT, kept) == 1
    assert call(cuda.wkv7_forward, (1, 0, 1, 16), F32, *x, s0, y, sT, kept) == 1
    x[0] = x[0].flatten()[1:]
    assert call(cuda.wkv7_forward, (1, 1, 1, 16), F32, *x, s0, y, sT, kept) == 716 and cuda.wkv7_error(716)


def test_cuda_launches(cuda):
    """The stream that was given; shared memory that lets two blocks run on an SM of sm_80 and sm_90 at N = 64, and one of sm_75."""
    stream, shared = (
        kind.in_dll(cuda, name) for kind, name in ((ctypes.c_void_p, "last_stream"), (ctypes.c_size_t, "last_shared"))
    )
    for dtype, N, most in ((F32, 16, 40), (BF16, 64, 64), (F32, 64, 64), (F32, 128, 64)):
        x, s0, dy, dsT = cuda_inputs((1, 1, 1, N), dtype, "one", 0)
        kept, grads = torch.zeros(1, 1, 1, N, N), [torch.empty(1, 1, 1, N) for _ in range(6)]
        y, sT = torch.empty(1, 1, 1, N, dtype=dtype), torch.empty(1, 1, N, N)
        assert call(cuda.wkv7_forward, (1, 1, 1, N), dtype, *x, s0, y, sT, kept, stream=4711) == 0
        assert stream.value == 4711 and shared.value <= 40 << 10
        assert call(cuda.wkv7_backward, (1, 1, 1, N), dtype, *x, kept, dy, dsT, *grads, sT, stream=4712) == 0
        assert stream.value == 4712 and shared.value <= most << 10


@pytest.mark.skipif(not NVCC, reason="no nvcc")
@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_cuda_compiles_without_spills(arch, tmp_path):
    """Of the sixteen kernels of float32 and bfloat16 those of N = 64 and 128: half the compile time."""
    source = re.sub(r"\n *case (16|32|2): .*", "", KERNEL.read_text())
    (tmp_path / "kernel.cu").write_text(source)
    command = [
        NVCC,
        "-std=c++17",
        f"-arch=sm_{arch}",
        "-cubin",
        "-Xptxas",
        "-v",
        "-o",
        tmp_path / "kernel.cubin",
        tmp_path / "kernel.cu",
    ]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.S,
    )
    assert len(kernels) == 8
    for name, stores, loads, registers in kernels:
        assert (stores, loads) == ("0", "0"), name
        assert int(registers) <= (255 if "backward" in name else 168), name


# ---------------------------------------------------------------------------------------------- blocks, as the official code has them


def official_weights(n_layer, C, V=300, N=64, ranks=(32, 32, 32, 32), seed=0):
    """A checkpoint as BlinkDL's files are, every tensor random and non-zero, the logits of order 2."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    uniform = lambda low, high: low + (high - low) * torch.rand(1, 1, C, generator=g)
    norm = lambda name: {f"{name}.weight": 1 + 0.2 * normal(C), f"{name}.bias": 0.2 * normal(C)}
    z = {"emb.weight": normal(V, C), "head.weight": 2 * normal(V, C) / C**0.5, **norm("ln_out"), **norm("blocks.0.ln0")}
    for i in range(n_layer):
        z |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2") | norm(f"blocks.{i}.att.ln_x")
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        z |= {att + f"x_{s}": uniform(0, 1) for s in "rwkvag"} | {ffn + "x_k": uniform(0, 1)}
        z |= {att + "w0": uniform(-6, 2), att + "a0": uniform(-1, 1), att + "v0": uniform(-1, 1)}
        for s, rank in zip("wavg", ranks):
            z |= {att + f"{s}1": normal(C, rank) / C**0.5, att + f"{s}2": normal(rank, C) / rank**0.5}
        z |= {att + "k_k": uniform(0.5, 1), att + "k_a": uniform(0.8, 1.2), att + "r_k": 0.3 * normal(C // N, N)}
        z |= {att + f"{s}.weight": normal(C, C) / C**0.5 for s in ("receptance", "key", "value", "output")}
        z |= {ffn + "key.weight": normal(4 * C, C) / C**0.5, ffn + "value.weight": normal(C, 4 * C) / (4 * C) ** 0.5}
    assert all(x.std() > 0.02 for x in z.values())
    return z


def assert_logits_agree(ours, theirs, tokens):
    """Whole and token by token; returns our states after both, and theirs."""
    exact, exact_state = theirs.forward(tokens.tolist(), None, full_output=True)
    assert 1 < exact.std() < 5  # there is something to compare
    logits, state = ours(tokens[None])
    steps, step_state, exact_steps, exact_step_state = [], None, [], None
    for t in tokens:
        z, step_state = ours(t.view(1, 1), step_state)
        steps.append(z[0, 0])
        z, exact_step_state = theirs.forward([t.item()], exact_step_state)
        exact_steps.append(z.clone())
    for got, want in itertools.product((logits[0], torch.stack(steps)), (exact, torch.stack(exact_steps))):
        error = (got - want).abs().amax(-1)
        assert error[0] < 1e-2  # one token's k . r may be nearly 0, and the norm after it blows up its rounding
        assert error[1:].max() < 1e-4
    return state, step_state, exact_state


@pytest.mark.parametrize(
    "n_layer,C,N,ranks",
    [
        (1, 64, 64, (32, 32, 32, 32)),
        (2, 128, 64, (64, 32, 16, 96)),
        (3, 192, 64, (32, 48, 24, 64)),
        (3, 128, 32, (8, 16, 64, 40)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # released files are in bfloat16
@torch.no_grad()
def test_logits_are_those_of_the_official_package(official, tmp_path, n_layer, C, N, ranks, dtype):
    weights = {name: x.to(dtype) for name, x in official_weights(n_layer, C, N=N, ranks=ranks, seed=n_layer).items()}
    torch.save(weights, tmp_path / "x.pth")
    theirs, ours = official[0](str(tmp_path / "x"), "cpu fp32"), load(tmp_path / "x.pth")
    tokens = torch.randint(300, (60,), generator=torch.Generator().manual_seed(7))
    *states, exact_state = assert_logits_agree(ours, theirs, tokens)
    for got, (i, layer) in itertools.product(states, enumerate(zip(*[iter(exact_state)] * 3))):
        for x, want in zip(got[i], layer):
            assert distance(x[0], want) < 1e-5


def weights_of(rwkv, n_layer, C, V=300, N=64, seed=0):
    """An official checkpoint of RWKV-5.2 or RWKV-6, every tensor random, some decays near 0, the logits of order 2."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(*(shape or (1, 1, C)), generator=g)
    matrix = lambda rows, columns: normal(rows, columns) / columns**0.5
    norm = lambda name: {f"{name}.weight": 1 + 0.2 * normal(C), f"{name}.bias": 0.2 * normal(C)}
    F_ = int(3.5 * C) // 32 * 32
    z = {"emb.weight": normal(V, C), "head.weight": 2 * matrix(V, C), **norm("ln_out"), **norm("blocks.0.ln0")}
    shift = "mix" if rwkv == 5 else "maa"
    for i in range(n_layer):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        z |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2") | norm(att + "ln_x")
        z |= {att + f"time_{shift}_{s}": uniform(0, 1) for s in ("kvrg" if rwkv == 5 else "xwkvrg")}
        z |= {ffn + f"time_{shift}_{s}": uniform(0, 1) for s in "kr"}
        z |= {att + "time_faaaa": normal(C // N, N)}
        if rwkv == 5:
            z |= {att + "time_decay": uniform(-6, 3, C // N, N)}
        else:
            z |= {
                att + "time_decay": uniform(-6, 3),
                att + "time_decay_w1": matrix(C, 24),
                att + "time_decay_w2": normal(24, C) / 5,
            }
            z |= {att + "time_maa_w1": normal(C, 5 * 16) / C**0.5, att + "time_maa_w2": normal(5, 16, C) / 8}
        z |= {att + f"{s}.weight": matrix(C, C) for s in ("receptance", "key", "value", "gate", "output")}
        z |= {
            ffn + "key.weight": matrix(F_, C),
            ffn + "value.weight": matrix(C, F_),
            ffn + "receptance.weight": matrix(C, C),
        }
    return z


@pytest.fixture(scope="session")
def official_before_7():
    """The class of the package `rwkv` for the generations before 7: a flag read at import decides which it is."""
    before, os.environ["RWKV_V7_ON"] = os.environ.get("RWKV_V7_ON"), "0"
    os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    spec = importlib.util.find_spec("rwkv.model")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if before is not None:
        os.environ["RWKV_V7_ON"] = before
    return lambda path: module.RWKV(path, "cpu fp32", verbose=False)


@pytest.mark.parametrize("rwkv", [5, 6])
@pytest.mark.parametrize("n_layer,C", [(1, 64), (3, 128)])
@torch.no_grad()
def test_logits_of_earlier_generations_are_the_official_ones(official_before_7, tmp_path, rwkv, n_layer, C):
    torch.save(weights_of(rwkv, n_layer, C), tmp_path / "x.pth")
    theirs, ours = official_before_7(str(tmp_path / "x")), load(tmp_path / "x.pth")
    assert ours.config.rwkv == rwkv
    assert_logits_agree(ours, theirs, torch.randint(300, (40,), generator=torch.Generator().manual_seed(7)))


def test_official_checkpoint_is_found_out_from_its_tensors(tmp_path):
    weights = official_weights(3, 128, N=32, ranks=(8, 16, 24, 40))
    torch.save(weights, tmp_path / "x.pth")
    ours = load(tmp_path / "x.pth", tokenizer="bytes", template="v2")
    assert ours.config == Config(
        n_layer=3, n_embd=128, head_size=32, tokenizer="bytes", template="v2", image_encoder="none"
    )
    own = ours.state_dict()
    unused = {f"blocks.0.att.v{i}" for i in "012"}
    assert set(own) == set(weights) - unused
    assert all(torch.equal(x, weights[name]) for name, x in own.items())
    flat = {
        name: x.flatten() if x.dim() == 3 else x for name, x in weights.items() if name not in unused
    }  # as some converters do
    torch.save(flat, tmp_path / "flat.pth")
    seeing = load(tmp_path / "flat.pth", image_encoder="patch", tokenizer="bytes")  # a language model may be given eyes
    assert "image" in seeing.encoder and all(torch.equal(seeing.state_dict()[name], x) for name, x in own.items())


def test_initial_values():
    torch.manual_seed(0)
    L, C, N = 3, 128, 64
    z = {name: x.double().numpy() for name, x in ModRWKV(Config(n_layer=L, n_embd=C, head_size=N)).state_dict().items()}
    i = np.arange(C)
    q, lin, zz = i / C, i / (C - 1) - 0.5, (i % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zz * abs(zz)
    want, gains = {"ln_out.weight": 1, "ln_out.bias": 0}, {"head.weight": 0.5 * math.sqrt(len(z["emb.weight"]) / C)}
    for ell in range(L):
        block, rho0, rho1 = f"blocks.{ell}.", ell / (L - 1), 1 - ell / L
        want |= {
            f"{block}att.x_{s}": 1 - q ** (p * rho1) for s, p in dict(r=0.2, g=0.2, w=0.9, a=0.9, k=0.7, v=0.7).items()
        }
        want[f"{block}att.w0"] = -6 + 6 * (i / (C - 1)) ** (1 + rho0**0.3) + 0.5 + 2.5 * zigzag
        want[f"{block}att.a0"] = -0.19 + 0.3 * zigzag + 0.4 * lin
        want |= {f"{block}att.k_k": 0.71 - 0.1 * lin, f"{block}att.k_a": 1.02, f"{block}att.r_k": -0.04}
        want[f"{block}ffn.x_k"] = 1 - q ** (rho1**4)
        want |= {f"{block}att.v0": 0.73 - 0.4 * lin} if ell else {}
        want |= {
            f"{block}att.ln_x.weight": ((ell + 1) / L) ** 0.7,
            f"{block}att.ln_x.bias": 0,
            f"{block}ffn.value.weight": 0,
        }
        for norm in ("ln1", "ln2") + ("ln0",) * (ell == 0):
            want |= {f"{block}{norm}.weight": 1, f"{block}{norm}.bias": 0}
        for s in "wag" + "v" * (ell > 0):
            want[f"{block}att.{s}1"], gains[f"{block}att.{s}2"] = 0, 0.1
        gains |= {
            f"{block}att.{name}.weight": gain for name, gain in dict(receptance=1, key=0.1, value=1, output=0).items()
        }
        gains[f"{block}ffn.key.weight"] = 1
    for name, x in want.items():
        assert np.allclose(z[name].squeeze(), x, rtol=0, atol=2e-6), name
    for name, gain in gains.items():  # orthogonal
        x = z[name] if len(z[name]) <= z[name].shape[1] else z[name].T
        assert np.allclose(x @ x.T, gain**2 * np.eye(len(x)), atol=1e-6 if gain == 0.1 else 1e-5), name
    assert abs(z["emb.weight"]).max() <= 1e-4 and z["emb.weight"].std() == pytest.approx(1e-4 / 3**0.5, rel=0.02)
    assert {"emb.weight", *want, *gains} == {name for name in z if not name.startswith(("encoder.", "adapter."))}


def test_initial_values_at_the_edges():
    torch.manual_seed(0)
    narrow = ModRWKV(Config(n_layer=1, n_embd=16, head_size=16, image_encoder="none"), vocab_size=8)
    assert all(x.isfinite().all() for x in narrow.state_dict().values())  # one layer: its depth is 0 of 0
    head, w2 = narrow.head.weight.double(), narrow.blocks[0].att.w2.double()
    assert torch.allclose(head @ head.T, 0.5**2 * torch.eye(8).double(), atol=1e-6)  # V < C
    assert w2.shape == (32, 16) and torch.allclose(
        w2.T @ w2, 0.1**2 * 2 * torch.eye(16).double(), atol=1e-6
    )  # rank > C


@pytest.mark.parametrize(
    "C,ranks",
    [
        (128, (32, 32, 32, 64)),
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 64, 160)),
        (2048, (128, 128, 64, 224)),
    ],
)
def test_ranks_are_the_official_ones(C, ranks):
    with torch.device("meta"):
        att = modrwkv.TimeMix7(2, C, 64, layer=1)
    for s, rank in zip("wavg", ranks):
        assert att.get_parameter(f"{s}1").shape == (C, rank) and att.get_parameter(f"{s}2").shape == (rank, C)


def test_optimizer_groups():
    model = ModRWKV(Config(n_layer=2, n_embd=128))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = modrwkv.parameter_groups(model, 0.1)
    found = [[names[id(p)] for p in group["params"]] for group in groups]
    layers = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]
    decayed = {"emb.weight", "head.weight"} | {f"blocks.{i}.{s}.weight" for i in (0, 1) for s in layers}
    decayed |= {f"encoder.image.{name}.weight" for name in ("conv1", "conv2", "proj")}
    decayed |= {"adapter.image.conv.weight", "adapter.image.mlp.0.weight", "adapter.image.mlp.2.weight"}
    assert set(found[0]) == decayed
    assert set(found[1]) == {"blocks.0.att.w0", "blocks.1.att.w0"}
    assert sorted(sum(found, [])) == sorted(names.values())  # none lost, none twice
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0, 0.0]
    assert [g["lr_scale"] for g in groups] == [1.0, 2.0, 1.0]
    assert [g["lr_scale"] for g in modrwkv.parameter_groups(model, 0.1, 1.0)] == [1.0, 1.0, 1.0]
    groups = modrwkv.parameter_groups(model, 0.1, muon=True)
    outside, *unchanged, inside = [{names[id(p)] for p in group["params"]} for group in groups]
    assert outside == {
        name for name in decayed if name.startswith(("emb", "head", "encoder")) or ".conv." in name
    }  # its encoder has no matrices
    assert inside == decayed - outside and unchanged == [set(found[1]), set(found[2])]
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(0.1, 1.0), (0.0, 2.0), (0.0, 1.0), (0.1, 1.0)]


# ---------------------------------------------------------------------------------------------- pictures: encoder, Conv1D and adapter


WHOLE = PatchEncoder(Config(image_trim=False))


def drawing(size=(60, 40), at=(10, 8), mode="RGB"):
    """A grey and coloured figure on white."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle([at[0], at[1], at[0] + 19, at[1] + 23], fill=(20, 20, 20))
    draw.rectangle([at[0] + 5, at[1] + 5, at[0] + 9, at[1] + 12], fill=(200, 40, 90))
    return image.convert(mode)


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("mode", ["P", "L", "1", "LA", "RGBA", "I;16", "CMYK"])
def test_every_kind_of_picture_is_read_as_its_rgb(tmp_path, mode, trim):
    encoder = PatchEncoder(Config(image_trim=trim))
    image = drawing(mode="L" if mode == "I;16" else mode)
    want = load_media(encoder, image.convert("RGB"))
    if mode == "I;16":
        image = Image.fromarray(np.array(image).astype(np.uint16) * 257)  # 257 * x is x in 16 bits
    how = {"format": "JPEG", "quality": 95, "subsampling": 0} if mode == "CMYK" else {"format": "PNG"}
    got = load_media(encoder, stored(image, tmp_path / "x", **how))
    assert image.mode == mode and got.dtype == torch.uint8 and got.shape == want.shape
    assert (got.int() - want.int()).abs().float().mean() <= (4 if mode == "CMYK" else 0)  # what JPEG loses
    assert got.float().std() > 20  # the figure is there


def test_what_is_transparent_lies_on_white(tmp_path):
    rgba = pixels(0, 32, 64, 4)
    alpha = rgba[..., 3:] / 255
    got = load_media(WHOLE, stored(Image.fromarray(rgba, "RGBA"), tmp_path / "x.png")).permute(1, 2, 0).numpy()
    assert abs(got - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1  # PIL rounds its own way
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0, 250, 0, 0])
    palette.paste(1, (8, 8, 24, 24))
    got = load_media(WHOLE, stored(palette, tmp_path / "p.png", transparency=0))
    assert got[:, 0, 0].tolist() == [255, 255, 255] and got[:, 16, 16].tolist() == [250, 0, 0]


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("patch_width", [4, 8, 12, 32])
@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000), (700, 1), (1, 700), (513, 32), (32, 32), (33, 31)])
def test_every_size_becomes_patches(size, patch_width, trim):
    encoder = PatchEncoder(Config(encoder_width=64, patch_width=patch_width, image_trim=trim))
    x = load_media(encoder, noise(*size))
    assert x.shape[:2] == (3, 32) and x.shape[2] % patch_width == 0
    assert 1 <= x.shape[2] / patch_width == encoder.length(x) <= 16 * 32 / patch_width + 1
    y = features(encoder, [x])[0]
    assert y.shape == (encoder.length(x), 64) and y.isfinite().all()


def test_a_picture_is_scaled_and_its_margins_are_taken_away():
    scaled = np.array(noise(75, 50).resize((48, 32), Image.BILINEAR))
    assert torch.equal(load_media(WHOLE, noise(75, 50)), torch.from_numpy(scaled).permute(2, 0, 1))
    trimming = PatchEncoder(Config(image_trim=True))
    first, *others = [
        load_media(trimming, drawing(size, at))
        for size, at in [((60, 40), (10, 8)), ((300, 200), (140, 2)), ((21, 25), (1, 1))]
    ]
    assert all(torch.equal(first, other) for other in others)
    assert first.shape == (3, 32, 28)  # 20 x 24, scaled to 26.7 x 32, in patches of 4
    black = Image.eval(drawing((80, 80), (30, 30)), lambda x: 255 - x)  # the paper may be dark
    assert (load_media(trimming, black).int() + first.int() - 255).abs().max() <= 1
    assert not torch.equal(load_media(WHOLE, drawing(at=(1, 1))), load_media(WHOLE, drawing()))
    white = load_media(trimming, Image.new("RGB", (50, 25), "white"))  # nothing to trim it to
    assert white.shape == (3, 32, 64) and (white == 255).all()


@torch.no_grad()
def test_patches_are_cut_row_by_row():
    """In a batch of several widths as each picture by itself, after the two convolutions of F.conv2d."""
    encoder = randomise(PatchEncoder(Config(encoder_width=8, image_height=24, patch_height=12, patch_width=8))).double()
    images = [torch.from_numpy(pixels(width, 3, 24, width)) for width in (24, 8, 16)]
    gelu = lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2
    for image, got in zip(images, features(encoder, images)):
        x = (1 - image.double() / 255)[None]
        for conv in (encoder.conv1, encoder.conv2):  # 4 pixels become 1
            x = gelu(F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1))
        want = []
        for row, col in itertools.product(range(2), range(image.shape[2] // 8)):
            patch = x[0, :, 3 * row : 3 * row + 3, 2 * col : 2 * col + 2]
            place = encoder.row[row] + encoder.col[col]
            want.append(gelu(encoder.proj.weight.flatten(1) @ patch.flatten() + encoder.proj.bias + place))
        assert len(want) == encoder.length(image)
        assert distance(got, torch.stack(want)) < 1e-5


def plain_adapter(adapter, x):
    """One signal through the formulas, window by window, in numpy; the last window ends on the last vector."""
    z = {name: p.detach().double().numpy() for name, p in adapter.named_parameters()}
    x, k, s = x.double().numpy(), adapter.kernel, adapter.stride
    if k:
        left = (s - (len(x) - k) % s) % s if len(x) >= k else k - len(x)
        x = np.concatenate([np.zeros((left, x.shape[1])), x])
        x = np.stack([sum(z["conv.weight"][:, :, j] @ x[i + j] for j in range(k)) for i in range(0, len(x) - k + 1, s)])
    y = np.maximum(x @ z["mlp.0.weight"].T + z["mlp.0.bias"], 0) @ z["mlp.2.weight"].T + z["mlp.2.bias"]
    norm = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
    return y + norm * z["pre_norm.weight"] + z["pre_norm.bias"]


COUNTS = {
    (3, 2): (288, 288, 360),
    (4, 3): (192, 192, 240),
    (5, 4): (144, 144, 180),
    (0, 2): (577, 576, 720),
}  # of 577, 576, 720


@pytest.mark.parametrize("kernel,stride", [*COUNTS, (1, 1), (4, 2), (2, 5)])
@torch.no_grad()
def test_adapter_is_conv_mlp_and_norm(kernel, stride):
    adapter = randomise(Adapter(12, 16, 2, kernel, stride)).double()
    signals = [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)).double() for n in [23, *range(1, 16), 40]]
    for x, y in zip(signals, adapted(adapter, signals)):
        assert len(y) == adapter.length(len(x)) >= 1
        assert distance(y, plain_adapter(adapter, x)) < 1e-12
        assert distance(adapted(adapter, [x])[0], y) < 1e-12  # alone as in the batch
    lengths = tuple(map(adapter.length, (577, 576, 720)))
    assert COUNTS.get((kernel, stride), lengths) == lengths


@pytest.mark.parametrize("kind", ["mlp", "linear", "gated"])
@torch.no_grad()
def test_each_vector_of_a_series_is_given_its_place_from_the_end(kind):
    adapter = Adapter(12, 16, 2, 4, 2, kind, vectors=20)
    assert adapter.place.shape == (9, 16) and 1.5 < adapter.place.std() < 2.5
    adapter = randomise(adapter).double()
    signals = [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)).double() for n in (20, 1, 9, 60)]
    placed, place = adapted(adapter, signals), adapter.place.clone()
    adapter.place.zero_()
    for x, y, z in zip(signals, placed, adapted(adapter, signals)):
        n = len(y)
        for i in range(n):
            assert distance(y[i] - z[i], place[max(0, 9 - n + i)]) < 1e-12
    assert len(placed[0]) == 9 and len(placed[3]) == 29
    with_series = ModRWKV(dataclasses.replace(SMALL, lookback=50))
    assert with_series.adapter["series"].place.shape == (12, 64) and with_series.adapter["image"].place is None


@pytest.mark.parametrize("n", [480, 1600, 16000, 16000 * 31])
def test_frames_are_those_of_whisper(n):
    """Of the whole sound: Whisper's own cuts it at 30 seconds unless told otherwise."""
    from transformers import WhisperFeatureExtractor

    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * torch.linspace(0, 0.5, n)
    theirs = WhisperFeatureExtractor()(x.numpy(), sampling_rate=16000, padding="do_not_pad", truncation=False)[
        "input_features"
    ][0]
    ours = load_media(MelEncoder(Config()), x)
    assert ours.shape == theirs.shape and np.abs(ours.numpy() - theirs).max() < 1e-6


def test_pictures_are_those_that_a_viewer_shows(tmp_path):
    """Against the picture before it was stored turned (EXIF), or with a colour that is transparent; an EPS is no picture."""
    image = noise(50, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "turned.png"), image)
    Image.new("RGB", (5, 4)).save(tmp_path / "clear.png", transparency=(0, 0, 0))
    assert np.asarray(read_picture(tmp_path / "clear.png")).min() == 255
    image.save(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "program.png")
    assert "PNG" in refusal(read_picture, tmp_path / "program.png")
    Image.fromarray(np.ones((4, 5), np.float32)).save(tmp_path / "float.tif")
    assert "save it with 8" in refusal(read_picture, tmp_path / "float.tif")


def test_no_sample_is_lost_and_the_shortest_sound_has_a_frame():
    encoder, x = MelEncoder(Config()), torch.zeros(1700)
    x[1650] = 1  # behind the last whole hop
    assert load_media(encoder, x).shape == (80, 11) and load_media(encoder, x).std() > 0.1
    assert load_media(encoder, x[:1]).shape[1] == 3 and load_media(encoder, x[:1]).isfinite().all()


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_sounds_of_any_kind(tmp_path, rate, channels, kind):
    if kind in ("ogg", "mp3") and channels > 2:
        return  # there is no such mp3, and one of ogg's six is for low notes alone
    wave = lambda rate: 0.4 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
    loudness = 1 + 0.5 * np.linspace(-1, 1, channels) if channels > 1 else np.ones(1)
    soundfile.write(tmp_path / f"x.{kind}", wave(rate)[:, None] * loudness, rate)
    got = read_sound(tmp_path / f"x.{kind}", 16000).numpy()
    assert abs(len(got) - 8000) < (
        2 if kind in ("wav", "flac") else 2500
    )  # mp3 is in whole blocks, with silence before and after
    spectrum = np.abs(np.fft.rfft(got * np.hanning(len(got))))
    assert abs(spectrum.argmax() * 16000 / len(got) - 440) < 4
    middle = got[2000:6000]
    assert middle.std() == pytest.approx(0.4 / 2**0.5, rel=0.1)  # the channels' mean
    if kind in ("wav", "flac"):
        assert np.abs(got[500:7500] - wave(16000)[500:7500]).max() < 1e-3


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "aiff"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.9])
def test_a_sound_that_is_cut_short_is_refused(tmp_path, kind, part):
    path = tmp_path / f"x.{kind}"
    soundfile.write(path, np.random.RandomState(0).randn(30000) / 10, 16000)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert str(path) in refusal(read_sound, path, 16000)


def test_sounds_with_odd_headers_and_channels(tmp_path):
    """Against the samples that were written: what a header counts too much, and channels whose mean is silence."""
    x = np.random.RandomState(0).randn(800).astype(np.float32) / 10
    soundfile.write(tmp_path / "x.wav", x, 16000, "FLOAT")
    data = (tmp_path / "x.wav").read_bytes()
    at = data.index(b"data") + 4
    for promised in (3200 + 44, 0x7FFFF000, 0xFFFFFFFF):  # the header itself, and streams
        (tmp_path / "y.wav").write_bytes(data[:at] + promised.to_bytes(4, "little") + data[at + 4 :])
        assert np.array_equal(read_sound(tmp_path / "y.wav", 16000), x)
    soundfile.write(tmp_path / "z.wav", np.stack([x, -x], 1), 16000, "FLOAT")
    assert np.array_equal(read_sound(tmp_path / "z.wav", 16000), x)


def test_sounds_that_cannot_be_read(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"no sound at all")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    for name, word in (
        ("none.wav", "No such file"),
        ("x.wav", "not a sound"),
        ("empty.wav", "no sound"),
        ("", "Is a directory"),
    ):
        message = refusal(load_media, MelEncoder(Config()), tmp_path / name)
        assert str(tmp_path / name) in message and word in message
    soundfile.write(tmp_path / "s.wav", np.ones(500) / 2, 16000)
    data = bytearray((tmp_path / "s.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # of a program that could not know the length
    (tmp_path / "s.wav").write_bytes(data)
    assert len(read_sound(tmp_path / "s.wav", 16000)) == 500


@torch.no_grad()
def test_a_sound_in_a_batch_is_the_sound_alone_through_the_convolutions():
    encoder = randomise(MelEncoder(Config(encoder_width=8))).double()
    sounds = [sound(n, n)[1] for n in (1, 2, 7, 90, 16)]
    gelu = lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2
    z = dict(encoder.named_parameters())
    for x, got in zip(sounds, features(encoder, sounds)):
        want = torch.maximum(x, x.max() - 1)
        want = (want - want.double().mean(1, keepdim=True).float()).double()
        want = gelu(F.conv1d(want[None], z["conv1.weight"], z["conv1.bias"], padding=1))
        want = gelu(F.conv1d(want, z["conv2.weight"], z["conv2.bias"], stride=2, padding=1))[0]
        for i, d in enumerate((1, 2, 4, 8)):
            padded = F.pad(want, (2 * d, 2 * d))
            y = (
                sum(z[f"deep.{i}.0.weight"][:, :, j] * padded[:, j * d : j * d + want.shape[1]] for j in range(5))
                + z[f"deep.{i}.0.bias"][:, None]
            )
            want = want + gelu(z[f"deep.{i}.1.weight"][:, :, 0] @ y + z[f"deep.{i}.1.bias"][:, None])
        assert want.shape[1] == encoder.length(x) and distance(got, want.T) < 1e-12
    flat = [x / x.abs().max() / 4 for x in sounds]  # nothing 40 dB below the loudest
    for got, again in zip(
        features(encoder, flat), features(encoder, [x + torch.arange(80)[:, None] / 200 for x in flat])
    ):
        assert distance(again, got) < 1e-4  # a microphone that is louder in some bins is not heard
    x = sounds[3] - sounds[3].max()
    assert (
        distance(*features(encoder, [x, torch.where(x < -1.1, x - 1, x)])) == 0 and (x < -1.1).any()
    )  # nor what is far fainter than the loudest


@torch.no_grad()
def test_speech_adapter_halves_and_has_no_norm():
    adapter = randomise(SpeechAdapter(12, 16, 2)).double()
    z = {name: p.numpy() for name, p in adapter.named_parameters()}
    signals = [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)).double() for n in [23, *range(1, 9), 40]]
    for x, y in zip(signals, adapted(adapter, signals)):
        padded = np.pad(x.numpy(), ((2, 2), (0, 0)))
        x = (
            np.stack(
                [sum(z["conv.weight"][:, :, j] @ padded[i + j] for j in range(3)) for i in range(0, len(padded) - 2, 2)]
            )
            + z["conv.bias"]
        )
        x = np.maximum(x @ z["mlp.0.weight"].T + z["mlp.0.bias"], 0) @ z["mlp.2.weight"].T + z["mlp.2.bias"]
        assert distance(y, x) < 1e-12
    assert [adapter.length(n) for n in (49, 576, 1499, 1500)] == [26, 289, 751, 751]  # those of [1]'s code


@torch.no_grad()
def test_wavenet_is_causal_and_a_series_in_a_batch_is_the_series_alone():
    encoder = randomise(WaveNet(Config(encoder_width=8))).double()
    batch = [series(n, n)[1].double() for n in (1, 2, 16, 17, 60)]
    for x, got in zip(batch, features(encoder, batch)):
        assert got.shape == (encoder.length(x), 8) and distance(got, features(encoder, [x])[0]) < 1e-12
    x, full = batch[-1], features(encoder, batch)[-1]
    for t in range(60):
        other = x.clone()
        other[0, t] += 1
        changed = (features(encoder, [other])[0] - full).abs().amax(1) > 1e-12
        assert not changed[:t].any() and changed[t]  # no vector knows what comes after it
        assert not changed[t + 17 :].any()  # 1 + 1 + 2 + 4 + 8 points, and the one before them, are all that it sees
    z = {name: p.numpy() for name, p in encoder.named_parameters()}
    at = lambda name, x, j=0: z[f"{name}.weight"][:, :, j] @ x
    for x, got in zip(batch, features(encoder, batch)):
        x = x.numpy()
        x = np.vstack([x, 5 * np.diff(x[0], prepend=x[0, 0])])
        h, skips = at("start", x) + z["start.bias"][:, None], 0
        for i, d in enumerate((1, 2, 4, 8)):
            before = np.pad(h, ((0, 0), (d, 0)))[:, : h.shape[1]]
            value, opening = np.split(
                at(f"gates.{i}", before) + at(f"gates.{i}", h, 1) + z[f"gates.{i}.bias"][:, None], 2
            )
            y = np.tanh(value) / (1 + np.exp(-opening))
            h, skips = h + at(f"residuals.{i}", y) + z[f"residuals.{i}.bias"][:, None], skips + y
        assert distance(got, (at("end", np.vstack([skips.clip(0), x])) + z["end.bias"][:, None]).T) < 1e-12


LAYOUT = {
    "model.embed_layer.emb.weight": (1024, 96),
    "model.norm.weight": (1024,),
    "model.norm.bias": (1024,),
    "lm_heads.0.weight": (96, 1024),
}
for i in range(8):
    at = f"model.layers.{i}"
    LAYOUT |= {f"{at}.self_attn.{x}_proj.weight": (1024, 1024) for x in "qkvo"} | {
        f"{at}.self_attn.{x}_proj.bias": (1024,) for x in "qkv"
    }
    LAYOUT |= {f"{at}.ffn_layer.{x}_proj.weight": (2048, 1024) for x in ("gate", "up")} | {
        f"{at}.ffn_layer.down_proj.weight": (1024, 2048)
    }
    LAYOUT |= {f"{at}.norm{j}.{x}": (1024,) for j in (1, 2) for x in ("weight", "bias")}


def test_timer_has_the_published_layout():
    with torch.device("meta"):
        own = {name: tuple(x.shape) for name, x in Timer(Config()).state_dict().items()}
    assert own == LAYOUT and len(own) == 116 and sum(map(math.prod, own.values())) == 84_142_080


class TinyTimer(Timer):
    width, PATCH, LAYERS, HEADS, HIDDEN = 16, 4, 2, 2, 24


@torch.no_grad()
def test_timer_is_the_formula():
    """Against one in numpy: complex rotations, a softmax over what came before, the norms behind the sums."""
    encoder = randomise(TinyTimer(Config())).double()
    z = {name: p.numpy() for name, p in encoder.named_parameters()}
    norm = lambda x, at: (
        (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * z[f"{at}.weight"] + z[f"{at}.bias"]
    )
    batch = [series(n, n)[1].double() for n in (1, 4, 7, 8, 23)]
    for points, got in zip(batch, features(encoder, batch)):
        n = len(points[0])
        assert (
            len(got) == encoder.length(points) == max(1, n // 4) == len(encoder.window_ends(n))
            and encoder.window_ends(n)[-1] == n - 1
        )
        x = points[0].numpy()[n % 4 :] if n >= 4 else np.pad(points[0].numpy(), (4 - n, 0))  # the newest points count
        x = x.reshape(-1, 4) @ z["model.embed_layer.emb.weight"].T
        for i in range(2):
            at = f"model.layers.{i}"
            proj = lambda y, name: y @ z[f"{at}.{name}_proj.weight"].T + z.get(f"{at}.{name}_proj.bias", 0)
            turn = np.exp(1j * np.outer(np.arange(len(x)), 10000 ** (-np.arange(4) / 4)))
            out = []
            for h in (slice(0, 8), slice(8, 16)):
                q, k, v = (proj(x, f"self_attn.{name}")[:, h] for name in "qkv")
                q, k = ((y[:, :4] + 1j * y[:, 4:]) * turn for y in (q, k))
                scores = np.exp((q @ k.conj().T).real / 8**0.5) * np.tri(len(x))
                out.append(scores / scores.sum(1, keepdims=True) @ v)
            x = norm(x + proj(np.concatenate(out, 1), "self_attn.o"), f"{at}.norm1")
            gate = proj(x, "ffn_layer.gate")
            x = norm(x + proj(gate / (1 + np.exp(-gate)) * proj(x, "ffn_layer.up"), "ffn_layer.down"), f"{at}.norm2")
        assert distance(got, norm(x, "model.norm")) < 1e-6


def test_timer_trains_from_its_weights_and_stays_as_it_is(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setitem(modrwkv.ENCODERS["series"], "timer", TinyTimer)
    data = jsonl(tmp_path / "x.jsonl", *({"target": [math.sin(i / 3 + n) for i in range(100)]} for n in range(8)))
    flags = (
        "--series_encoder=timer",
        "--image_encoder=none",
        "--series_kernel=0",
        "--lookback=48",
        "--horizon=8",
        "--max_steps=2",
        "--level_steps=0",
    )
    assert "--timer_weights" in refusal(learn, tmp_path / "out", (data, data), *flags)
    weights = {name: x.contiguous() for name, x in randomise(TinyTimer(Config()), 5).state_dict().items()}
    less, more = lambda w: w.pop("model.norm.bias"), lambda w: w.update(more=torch.zeros(1))
    for change, words in ((less, "model.norm.bias is missing"), (more, "more is not expected")):
        broken = dict(weights)
        change(broken)
        save_file(broken, tmp_path / "broken.safetensors")
        assert words in refusal(
            learn, tmp_path / "out", (data, data), *flags, f"--timer_weights={tmp_path / 'broken.safetensors'}"
        )
    assert "none.safetensors" in refusal(
        learn, tmp_path / "out", (data, data), *flags, f"--timer_weights={tmp_path / 'none.safetensors'}"
    )
    save_file(weights, tmp_path / "timer.safetensors")
    learn(tmp_path / "out", (data, data), *flags, f"--timer_weights={tmp_path / 'timer.safetensors'}")
    after = kept(tmp_path / "out")
    assert all(torch.equal(after[f"encoder.series.{name}"], x) for name, x in weights.items())
    assert load(tmp_path / "out" / "ckpt.pt").forecast([[math.sin(i / 3) for i in range(60)]]).shape == (1, 8)


@trials(60)
@given(
    n=st.integers(1, 60),
    known=st.integers(1, 60),
    gaps=st.floats(0, 1),
    level=st.floats(-1e3, 1e3),
    size=st.sampled_from([0, 1e-3, 1, 1e6]),
    seed=SEEDS,
)
def test_normalise_is_undone_by_what_it_returns(n, known, gaps, level, size, seed):
    rng = np.random.RandomState(seed)
    x = level + size * rng.randn(n)
    x[rng.rand(n) < gaps] = rng.choice([np.nan, np.inf, -np.inf])
    points, mean, deviation = modrwkv.normalise(torch.from_numpy(x), known)
    there = np.isfinite(x)
    assert points.shape == (2, n) and points.isfinite().all() and deviation > 0
    assert (
        (points[1].numpy() == there).all()
        and not points[0][~torch.from_numpy(there)].any()
        and points.abs().max() <= 10
    )
    first, scale = (
        x[:known][there[:known]],
        x[there].std() if size and there.sum() > 1 else 0,
    )  # of a constant, whatever rounding makes of it
    if len(first):
        assert mean == pytest.approx(first.mean(), rel=1e-9)
        assert deviation == pytest.approx((first.var() + (0.1 * scale or 1) ** 2) ** 0.5, rel=1e-3)
    mild = there & (np.abs(points[0].numpy()) < 9.9)
    assert np.allclose((points[0].numpy() * deviation + mean)[mild], x[mild], rtol=1e-5, atol=1e-5 * deviation)


def test_tables_and_columns(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("date,load,price\n2020-01-01,1,2.5\n\n2020-01-02,,-3e2\n")
    names, table = read_table(path)
    assert names == ["load", "price"] and np.array_equal(table, [[1, 2.5], [np.nan, -300]], equal_nan=True)
    assert read_series(path).tolist() == [2.5, -300] and np.isnan(read_series(f"{path}#load")[1])
    assert read_series([1, None, 3]).isnan().tolist() == [False, True, False]
    assert "no column x; its columns are date, load, price" in refusal(read_series, f"{path}#x")
    for content, words in [
        ("", "no rows"),
        ("a,b\n", "no rows"),
        ("a\nx\n", "no column of numbers"),
        ("a,b\n1,2\n3\n", "line 3, has 1 values, not 2"),
        ("a\n1\n2\noops\n", "line 4: 'oops' in column a"),
        (b"\xff\xfe\x00", "not a .csv"),
        ("1,2\n3,4\n", "no header"),
    ]:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        message = refusal(read_table, path)
        assert str(path) in message and words in message
    assert "No such file" in refusal(read_series, tmp_path / "none.csv")
    path.write_text(
        '\ufeffwhen;a;b;\nx;1;"1,5";\ny;NA;"2,5";\n', encoding="utf-8"
    )  # a program's semicolons, decimal commas, and one too many
    assert read_series(f"{path}#a").isnan().tolist() == [False, True]
    for column, words in (
        ("", "column 4 is empty; another is chosen by"),
        ("#b", "line 2: '1,5' in column b"),
        ("#when", "'x' in column when"),
    ):
        assert words in refusal(read_series, f"{path}{column}")
    assert "no numbers" in refusal(read_series, [None, math.nan])


# ---------------------------------------------------------------------------------------------- the model, generation


@torch.no_grad()
def test_pictures_stand_where_they_were_put(model):
    A, B, t1, t2 = picture(1, 5), picture(2, 2), text("first "), text("second")
    vectors = {id(s): adapted(model.adapter["image"], features(model.encoder["image"], [s[1]]))[0] for s in (A, B)}
    vectors |= {id(s): model.emb.weight[torch.tensor(s[1])] for s in (t1, t2)}
    before, after = [text("ab"), B], [A, text("c")]
    batches = [
        [before, segments, after]
        for segments in ([A, t1, B, t2], [B, t1, A, t2], [t1, A, B, t2], [t2, t1, B, A], [A, A, t1])
    ]
    for batch in [*batches, [[A], [B]]]:  # the last one has no text
        x, _, lengths, _ = model.fuse(batch)
        want = torch.cat([vectors[id(s)] for s in batch[1]])
        assert lengths[1] == len(want)
        assert distance(x[1, : lengths[1]], want) < 1e-12
        assert not x[1, lengths[1] :].any()
    assert "260" in refusal(model.fuse, [[("text", [260])]])  # beyond the vocabulary


@torch.no_grad()
def test_loss_is_the_mean_over_the_answers_tokens(model):
    one = [picture(1, 7), text("what?"), ("answer", [20, 21, 22]), text("more"), ("answer", [23])]
    two, three = [text("hello"), ("answer", [24, 25, 26, 27, 28, 29])], [text("no answer")]
    costs = []
    for segments in (one, two, three):
        logits, at = model([segments])[0][0].numpy(), 0
        for kind, data in segments:
            n = model.length([(kind, data)])
            for j in range(n if kind == "answer" else 0):
                z = logits[at + j - 1]
                costs.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[data[j]])
            at += n
    assert len(costs) == 10
    assert model.loss([one, two, three]).item() == pytest.approx(np.mean(costs), rel=1e-6)
    assert model.loss([one, two, three], count=4).item() == pytest.approx(np.sum(costs) / 4, rel=1e-6)
    assert model.loss([three]).item() == 0
    assert model.loss([one]).item() != pytest.approx(model.loss([two]).item(), rel=1e-3)


@trials(40)
@given(n=st.integers(2, 150), gaps=st.sampled_from([0, 0, 0.2]), seed=SEEDS)
@example(n=60, gaps=0, seed=0)
def test_a_window_learns_only_what_lies_ahead(model, n, gaps, seed):
    """Where a vector's targets are is found again in the series, behind all that the vector and the mean have seen."""
    rng = np.random.RandomState(seed % 2**32)
    x = torch.from_numpy(np.arange(n) + 0.01 * rng.rand(n))  # no two points are alike
    x[torch.from_numpy(rng.rand(n) < gaps)] = math.nan
    x[0], x[-1] = 0, n - 1
    for draw in (None, random.Random(seed)):
        [(kind, (points, targets))] = model.window(x, draw)
        assert (
            kind == "forecast" and points.shape == (2, 48) and targets.shape == (12, 12)
        )  # Conv1D (6, 4) leaves 12 vectors
        learned = (~targets.isnan()).any(1)
        sample = [(kind, (points, targets))]
        assert n_targets(model, [sample]) == learned.sum() and model.length(sample) == 12
        if draw is None:
            assert not learned[:-1].any() and learned[-1] == bool(x[-12:].isfinite().any() and n > 12)
        if gaps == 0 and n >= 60:  # value = (point - mean) / deviation with the same two for all: points are places
            place = lambda v: 47 * (v - points[0][0]) / (points[0][47] - points[0][0])
            for j, row in enumerate(targets):
                for i in range(12):
                    if not row[i].isnan() and abs(row[i]) < 9.9:
                        assert place(row[i]).item() == pytest.approx(
                            4 * j + 3 + i + 1, abs=0.5
                        )  # vector j ends on point 4 j + 3
            assert (draw is None) or learned[-1]
            assert not targets[learned].isnan().any()


def test_what_is_ahead_changes_nothing_that_a_forecast_is_made_from(model):
    """Points behind those whose mean is known may be anything: the inputs and how they are scaled stay the same."""
    x = torch.randn(90, generator=torch.Generator().manual_seed(0)).double().cumsum(0)
    for n in (90, 60):
        [(_, (points, targets))] = model.window(x[:n])
        other = torch.cat([x[: n - 12], 100 * torch.randn(12)])
        [(_, (same, changed))] = model.window(other)
        assert torch.equal(points, same) and not torch.equal(targets[-1], changed[-1])
        learned = model.backbone(model.fuse([[("series", points)]])[0])[0][:, -1]
        ahead = model.forecast([x[: n - 12]])[0]
        _, mean, deviation = modrwkv.normalise(x[max(0, n - 60) : n - 12], scale=x[: n - 12].std(correction=0))
        assert (
            distance(model.forecast_head(learned)[0] * deviation + mean, ahead) < 1e-5
        )  # as it is used is as it learns


def test_a_forecast_record_may_have_its_past_beside_it(model, tmp_path):
    (tmp_path / "x.csv").write_text("a\n1\n2\n")
    records = [{"series": "x.csv", "target": [3, 4]}, {"series": [1, 2], "target": [3, 4]}, {"target": [1, 2, 3, 4]}]
    for record in read_records(jsonl(tmp_path / "x.jsonl", *records)):
        [(kind, points)] = record_sample(model, record)
        assert kind == "forecast" and points.tolist() == [1, 2, 3, 4]


@torch.no_grad()
def test_the_loss_of_forecasts_and_answers_together(model):
    rng, x = random.Random(1), torch.randn(200, generator=torch.Generator().manual_seed(0)).double().cumsum(0)
    windows, words = [model.window(x, rng) for _ in range(3)], [text("what?"), ("answer", [20, 21, 22])]
    errors = []
    for [(_, (points, targets))] in windows:
        ahead = model.forecast_head(model.backbone(model.fuse([[("series", points)]])[0])[0])[0].numpy()
        for predicted, target in zip(ahead, targets.double().numpy()):
            there = ~np.isnan(target)
            if there.any():
                e = np.abs(predicted - target)[there]
                errors.append((np.where(e < 1, e**2 / 2, e - 0.5) / 2 + e / 2).mean())
    assert len(errors) == n_targets(model, windows) > 6
    assert model.loss(windows).item() == pytest.approx(np.mean(errors), rel=1e-6)
    answer = 3 * model.loss([words]).item()
    assert model.loss([words, *windows]).item() == pytest.approx(
        (answer + np.sum(errors)) / (3 + len(errors)), rel=1e-6
    )
    first = errors[: n_targets(model, windows[:1])]
    want = (answer / 3 + np.mean(first)) / 2
    assert model.loss([windows[0], words], reduction="sample").item() == pytest.approx(want, rel=1e-6)
    assert model.loss([windows[0], words], count=5).item() == pytest.approx((np.sum(first) + answer) / 5, rel=1e-6)


def test_a_forecast_is_in_the_units_of_its_series(model):
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).double().cumsum(0)
    y = model.forecast([x, x[:20], list(x)])
    assert y.shape == (3, 12) and distance(y[2], y[0]) < 1e-9 and distance(y[1], model.forecast([x[:20]])[0]) < 1e-6
    assert distance(model.forecast([1000 * x + 5e4])[0], 1000 * y[0] + 5e4) < 1e-6
    [(_, (points, _))] = model.window(torch.cat([x, torch.full((12,), math.nan)]).double())
    assert distance(model.forecast([x], 30)[0, :12], y[0]) < 1e-9  # further ones are made from the first
    assert distance(model.forecast([torch.cat([x, y[0]])])[0], model.forecast([x], 24)[0, 12:]) < 1e-9
    assert (model.forecast([torch.full((60,), 7.0)]) - 7).abs().max() < 20  # of a constant, nothing blows up
    fresh = ModRWKV(SMALL).forecast([x])[0]
    assert distance(fresh, x[-48:].mean().expand(12)) < 1e-9  # what has learned nothing gives the mean
    for refuse in (
        lambda: ModRWKV(dataclasses.replace(SMALL, series_encoder="none")).forecast([x]),
        lambda: ModRWKV(Config()).window(x),
    ):
        assert "series encoder" in refusal(refuse)


def assert_state_equal(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        for x, y in zip(a, b):
            assert distance(x, y) < 1e-6


@torch.no_grad()
@trials(12)
@given(T=st.integers(2, 120), cuts=st.sets(st.integers(1, 119), max_size=6), seed=SEEDS)
@example(T=40, cuts=set(range(1, 40)), seed=0)  # one token at a time
@example(T=110, cuts={96, 97, 105}, seed=0)
def test_any_split_is_the_full_pass(model, T, cuts, seed):
    tokens = torch.randint(257, (2, T), generator=torch.Generator().manual_seed(seed))
    full, full_state = model(tokens)
    assert full.std() > 0.3
    edges, state, logits = [0, *sorted(c for c in cuts if c < T), T], None, []
    for start, end in zip(edges, edges[1:]):
        z, state = model(tokens[:, start:end], state)
        logits.append(z)
    assert distance(torch.cat(logits, 1), full) < 1e-6
    assert_state_equal(state, full_state)


SEGMENT = st.tuples(st.sampled_from(["text", "answer", "image", "audio", "series"]), st.integers(1, 40))


def make_sample(plan, seed):
    """Segments of a plan [(kind, size)], a few tokens at its end."""
    rng = np.random.RandomState(seed % 2**32)
    signal = {"image": picture, "audio": sound, "series": series}
    make = lambda kind, n: (
        signal[kind](rng.randint(2**31), n) if kind in signal else (kind, rng.randint(0, 257, n).tolist())
    )
    return [make(kind, n) for kind, n in plan + [("text", 2)]]


@torch.no_grad()
@trials(12)
@given(plans=st.lists(st.lists(SEGMENT, max_size=4), min_size=2, max_size=4), seed=SEEDS)
@example(plans=[[], [("image", 20), ("text", 60), ("image", 9)], [("text", 1), ("image", 1)]], seed=0)
@example(plans=[[("audio", 1)], [("audio", 40), ("image", 2), ("audio", 3)], [("text", 50)]], seed=0)
def test_a_sample_in_a_batch_is_the_sample_alone(model, plans, seed):
    samples = [make_sample(plan, seed + i) for i, plan in enumerate(plans)]
    logits, state = model(samples)
    more = [make_sample([("text", 1 + i)], seed) for i in range(len(plans))]  # a second turn
    logits2, state2 = model(more, state)
    for i, segments in enumerate(samples):
        alone, alone_state = model([segments])
        n, own = model.length(segments), lambda state: [tuple(x[i : i + 1] for x in layer) for layer in state]
        assert alone.shape[1] == n
        assert distance(logits[i, :n], alone[0]) < 1e-6
        assert_state_equal(own(state), alone_state)
        both, both_state = model([segments + more[i]])
        assert distance(logits2[i, : both.shape[1] - n], both[0, n:]) < 1e-6
        assert_state_equal(own(state2), both_state)


@trials(8)
@given(plans=st.lists(st.lists(SEGMENT, max_size=4), min_size=2, max_size=4), seed=SEEDS)
@example(plans=[[("answer", 3), ("image", 20), ("answer", 9)], [("audio", 3), ("answer", 2), ("series", 9)]], seed=0)
def test_gradients_of_a_batch_are_the_sum_of_its_samples_gradients(model, plans, seed):
    """Against one sample at a time, where nothing is padded, and against the same batch made in another process."""
    samples = [make_sample(plan, seed + i) for i, plan in enumerate(plans)]
    samples.append(model.window(torch.arange(90).double().sin(), random.Random(seed)))
    parameters = dict(model.named_parameters())

    def gradients(loss):
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(parameters, found))

    batch = pickle.loads(pickle.dumps(model.collate(samples)))
    together, again = gradients(model.loss(samples, count=1)), gradients(model.loss(batch, count=1))
    alone = [gradients(model.loss([sample], count=1)) for sample in samples]
    for name, g in together.items():
        assert torch.equal(g, again[name])
        assert distance(g, sum(own[name] for own in alone)) < 1e-6
    assert len(batch.n_targets) == sum(n_targets(model, [sample]) for sample in samples)


class Operations(TorchDispatchMode):
    """Counts the operations that compute: each is a kernel on a GPU. Views and what numpy does are not counted."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not (operation.is_view or operation in (torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default)):
            self.names[str(operation.overloadpacket)] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.skipif(not modrwkv.has_kernel("cpu"), reason="the recurrence without kernel.cu takes more, by length")
def test_operations_do_not_grow_with_the_batch(digits, capsys):
    """Of a training step on data/digits with default settings, and of mixed samples; none waits for a GPU to say how many."""

    def count(model, samples):
        with Operations() as fuse:
            model.fuse(samples)
        with Operations() as forward:
            loss = model.loss(samples)
        with Operations() as backward:
            loss.backward()
        model.zero_grad()
        ask = {"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.index", "aten.is_nonzero"}
        assert not ask & set(fuse.names + forward.names + backward.names)
        return [sum(operations.names.values()) for operations in (fuse, forward, backward)]

    model = ModRWKV(Config())
    samples = [model.sample(record) for record in read_records(digits / "train.jsonl")[:64]]
    counts = count(model, samples)
    with capsys.disabled():
        print("\noperations at batch 64: {} in fuse, {} forward, {} backward".format(*counts))
    assert len(samples) == 64 and counts == count(model, samples[:8])
    assert counts[0] <= 30 and counts[1] <= 160 and counts[2] <= 320  # 482, 617 and 592 before there was a gather
    model = ModRWKV(dataclasses.replace(SMALL, scan="multi", n_layer=4))
    mixed = [
        [picture(i, 1 + i % 5), sound(i, 9 + i), series(i, 5 + i), text("a" * i), ("answer", [20] * (1 + i))]
        for i in range(16)
    ]
    mixed += [model.window(torch.arange(90).double().sin(), random.Random(i)) for i in range(4)]
    assert count(model, mixed) == count(model, mixed[-7:])


@torch.no_grad()
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-5), (torch.bfloat16, 0.03)])
def test_a_model_in_another_precision(dtype, tolerance):
    segments = [text("what is this?"), picture(1), text(" Assistant:")]
    model = randomise(ModRWKV(SMALL))
    exact = model([segments])[0]
    got, state = model.to(dtype)([segments])
    assert got.dtype == dtype and distance(got, exact) < tolerance
    assert all(S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for _, S, _ in state)


def answer(model, segments, state=None, **how):
    """(the pieces of one answer, the state after it)"""
    pieces, generator = [], generate_text(model, [segments], state, **how)
    while True:
        try:
            pieces += next(generator)
        except StopIteration as stop:
            return pieces, stop.value


def script(monkeypatch, tokens):
    """From now on the model gives these."""
    tokens = iter(tokens)
    monkeypatch.setattr(modrwkv, "pick", lambda *a: torch.tensor(next(tokens)))


@pytest.mark.parametrize("how", [{}, {"temperature": 3.0, "top_k": 1}, {"temperature": 3.0, "top_p": 1e-6}], ids=str)
@torch.no_grad()
def test_greedy_is_the_argmax_of_full_passes(model, how, monkeypatch):
    picked, pick = [], modrwkv.pick
    monkeypatch.setattr(modrwkv, "pick", lambda *a: picked.append(pick(*a)) or picked[-1])
    segments = [text("User: "), picture(3, 6), text("?\n\nAssistant:")]
    assert len(answer(model, segments, max_new_tokens=12, end=None, **how)[0]) == len(picked) == 12
    for i, token in enumerate(picked):
        so_far = [("text", torch.stack(picked[:i]).tolist())] if i else []
        assert token == model([segments + so_far])[0][0, -1].argmax()
    assert len(set(map(int, picked))) > 2


@pytest.mark.parametrize(
    "tokens,how,pieces,read",
    [
        (
            codes("a\nb\n\nc"),
            {},
            ["a", "", "\nb", "", ""],
            codes("a\nb\n\n"),
        ),  # what may be the start of the end is held back
        (codes("\n\n"), {}, ["", ""], codes("\n\n")),
        ([98, 257, 99], {}, ["a", ""], [98, 257]),
        (codes("a\n") + [0], {}, ["a", "", "\n"], codes("a\n") + [257]),
        ([0], {}, [""], [257]),
        (codes("aaa"), {"max_new_tokens": 3}, ["a", "a", "a"], codes("aaa") + [257]),
        (codes("a\n"), {"max_new_tokens": 2}, ["a", "\n"], codes("a\n") + [257]),
        (codes("a\n\nb") + [0], {"end": None}, ["a", "\n", "\n", "b", ""], codes("a\n\nb")),
        (codes("a\n\nb"), {"end": None, "max_new_tokens": 4}, ["a", "\n", "\n", "b"], codes("a\n\nb")),
        (
            codes("é中🙂") + [0],
            {},
            ["", "é", "", "", "中", "", "", "", "🙂", ""],
            codes("é中🙂") + [257],
        ),  # no character is split
        (codes(b"\xe4\xb8a") + [0], {}, ["", "", "\ufffda", ""], codes(b"\xe4\xb8a") + [257]),
        (
            codes("ab中"),
            {"max_new_tokens": 4},
            ["a", "b", "", "\ufffd"],
            codes("ab中")[:4] + [257],
        ),  # there is no more to wait for
    ],
)
@torch.no_grad()
def test_an_answer_its_end_and_the_state_after_it(model, monkeypatch, tokens, how, pieces, read):
    """Of tokens that the model gives; `read` is what the state has seen."""
    segments = [picture(1, 4), text("hello")]
    script(monkeypatch, tokens)
    got, state = answer(model, segments, **how)
    assert got == pieces
    assert_state_equal(state, model([segments + [("text", read)]])[1])
    script(monkeypatch, tokens)  # a chat goes on from there
    _, state = answer(model, [text("more")], state, **how)
    assert_state_equal(state, model([segments + [("text", read), text("more"), ("text", read)]])[1])


def test_end_of_a_batch(model, monkeypatch):
    script(monkeypatch, [98, 99, 0, 99, 100, 11, 100, 11])  # by turns the first and the second answer
    assert list(generate_text(model, [[text("x")], [text("yy")]])) == [["a", "b"], ["", "b"], ["", ""], ["", ""]]
    assert "max_new_tokens" in refusal(answer, model, [text("x")], max_new_tokens=0)


def test_end_inside_longer_tokens(tmp_path, monkeypatch):
    entries = [bytes([b]) for b in range(256)] + [b"\n\n", "。\n".encode(), b"a\n\nUser"]
    (tmp_path / "vocab").write_text("".join(f"{i + 1} {e!r} {len(e)}\n" for i, e in enumerate(entries)))
    model = ModRWKV(dataclasses.replace(SMALL, tokenizer=str(tmp_path / "vocab")), vocab_size=300)
    for tokens, pieces in (([258, 11], ["。", ""]), ([98, 257], ["a", ""]), ([99, 259], ["b", "a"])):
        script(monkeypatch, tokens)
        assert answer(model, [("text", [1])])[0] == pieces


P = [0.1, 0.5, 0.15, 0.25]
FIRST, TWO = [0, 1, 0, 0], [0, 2 / 3, 0, 1 / 3]
CHOICES = [
    ({}, P),
    ({"temperature": 0.5}, np.square(P) / np.square(P).sum()),
    ({"temperature": 2.0}, np.sqrt(P) / np.sqrt(P).sum()),
]
CHOICES += [({"temperature": 0.0}, FIRST), ({"temperature": 1e-9}, FIRST), ({"temperature": 5.0, "top_k": 1}, FIRST)]
CHOICES += [({"top_k": 2}, TWO), ({"top_k": 100}, P), ({"top_k": 3, "top_p": 0.7}, TWO)]
CHOICES += [
    ({"top_p": 0.0}, FIRST),
    ({"top_p": 0.4}, FIRST),
    ({"top_p": 0.6}, TWO),
    ({"top_p": 0.8}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
]


@pytest.mark.parametrize("how,want", CHOICES, ids=str)
def test_pick_has_the_right_distribution(how, want):
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "generator": torch.Generator().manual_seed(0)} | how
    logits = torch.tensor(P, dtype=torch.float64).log().float() + 3
    got = np.bincount([modrwkv.pick(logits, **how).item() for _ in range(1500)], minlength=len(P)) / 1500
    assert (got[np.array(want) == 0] == 0).all()
    assert abs(got - want).max() < 0.05  # nearly four standard deviations


# ---------------------------------------------------------------------------------------------- scanning, prompts, losses, freezing


def test_scan_orders_of_a_grid():
    span = range(10, 22)  # 3 rows of 4
    forward, backward, down, up = map(list, modrwkv.scan(span, range(12), 4))
    assert forward == list(span) and backward == forward[::-1] and up == down[::-1]
    assert np.array_equal(np.array(down).reshape(4, 3), np.arange(10, 22).reshape(3, 4).T)
    ends = Adapter(8, 8, 1, 3, 2).window_ends(12)  # 1, 3, 5, ...: the second and last column of each row
    assert list(ends) == [1, 3, 5, 7, 9, 11]
    assert list(modrwkv.scan(range(6), ends, 4)[2]) == [0, 2, 4, 1, 3, 5]
    assert list(modrwkv.scan(range(4), range(4), 4)[2]) == [0, 1, 2, 3]  # one row: down is forward


@pytest.mark.parametrize("kernel,stride", [(0, 1), (3, 2), (6, 2), (4, 3)])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_windows_end_where_the_adapter_says(kernel, stride, n):
    adapter = randomise(Adapter(4, 8, 8, kernel, stride)).double()
    x = torch.randn(n, 4, dtype=torch.double).requires_grad_()
    [y] = adapted(adapter, [x])
    ends = adapter.window_ends(n)
    assert len(ends) == len(y) == adapter.length(n)
    for vector, end in zip(y, ends):
        [g] = torch.autograd.grad(vector.sum(), x, retain_graph=True)
        assert g[end].any() and not g[end + 1 :].any()


def scanner(rwkv, scan, kernel=0, n_layer=5):
    config = dataclasses.replace(SMALL, rwkv=rwkv, scan=scan, n_layer=n_layer, patch_height=8, conv_kernel=kernel)
    return randomise(ModRWKV(config)).double()


SCANNERS = functools.cache(scanner)


@pytest.mark.parametrize("rwkv", [5, 6, 7])
@pytest.mark.parametrize("scan", ["uni", "bi", "multi"])
@torch.no_grad()
def test_layers_read_pictures_in_turns(rwkv, scan):
    """Against blocks that are given each sample by itself, its picture's vectors turned round before and back after."""
    model = SCANNERS(rwkv, scan)
    samples = [[text("a"), picture(1, 3), text("bc"), picture(2, 2), text("d")], [picture(3, 4), text("efg")]]
    logits, _ = model(samples)
    for got, segments in zip(logits, samples):
        x = model.fuse([segments])[0]
        v_first, at = None, 0
        grids = []
        for kind, data in segments:
            n = len(data) if kind == "text" else model.length([(kind, data)])
            if kind == "image":
                grids.append((at, n, data.shape[2] // 8))
            at += n
        for layer, block in enumerate(model.blocks):
            direction = {"uni": "f", "bi": "fb", "multi": "fbdu"}[scan]
            direction = direction[layer % len(direction)]

            def turned(x, back=False):
                x = x.clone()
                for at, n, columns in grids:
                    part = x[:, at : at + n]
                    if direction in "bu" and back:
                        part = part.flip(1)
                    if direction in "du":
                        shape = (columns, n // columns) if back else (n // columns, columns)
                        part = part.unflatten(1, shape).transpose(1, 2).flatten(1, 2)
                    if direction in "bu" and not back:
                        part = part.flip(1)
                    x[:, at : at + n] = part
                return x

            y, v, _ = block(turned(x), None if v_first is None else turned(v_first), (None, None, None), None)
            x = turned(y, back=True)
            if layer == 0:
                v_first = v
        assert distance(got[: x.shape[1]], model.head(model.ln_out(x))[0]) < 1e-9


@trials(15)
@given(
    rwkv=st.sampled_from([5, 6, 7]),
    scan=st.sampled_from(["uni", "bi", "multi"]),
    kernel=st.sampled_from([0, 3]),
    plans=st.lists(st.lists(st.sampled_from([1, 2, 3, -1, -3]), min_size=1, max_size=4), min_size=1, max_size=3),
    seed=SEEDS,
)
@torch.no_grad()
def test_prefill_and_decoding_are_the_full_pass(rwkv, scan, kernel, plans, seed):
    """A ragged batch with pictures anywhere, each sample cut between its segments, then token by token."""
    model = SCANNERS(rwkv, scan, kernel)
    samples = []
    for i, plan in enumerate(plans):
        samples.append(
            [picture(seed % 1000 + j, n) if n > 0 else text("xyz"[:-n]) for j, n in enumerate(plan)] + [text("end")]
        )
    batched, batch_state = model(samples)
    for i, segments in enumerate(samples):
        whole, state = model([segments])
        n = whole.shape[1]
        assert distance(batched[i, :n], whole[0]) < 1e-6
        for got, want in zip(batch_state, state):
            assert all(distance(x[i], y[0]) < 1e-6 for x, y in zip(got, want))
        parts, s = [], None
        for segment in segments[:-1]:
            z, s = model([[segment]], s)
            parts.append(z)
        for token in segments[-1][1]:
            z, s = model(torch.tensor([[token]]), s)
            parts.append(z)
        assert distance(torch.cat(parts, 1), whole) < 1e-6
        for got, want in zip(s, state):
            assert all(distance(x, y) < 1e-6 for x, y in zip(got, want))


@pytest.mark.parametrize(
    "style,want",
    [
        (
            "written",
            "User: Look:\n<image>\nWhat is it?\n\nAssistant:[ A cat.\n\n]User: Which colour?\n\nAssistant:[ Grey.\n\n]",
        ),
        (
            "first",
            "User: <image>\nLook:\n\nWhat is it?\n\nAssistant:[ A cat.\n\n]User: Which colour?\n\nAssistant:[ Grey.\n\n]",
        ),
        (
            "last",
            "User: Look:\n\nWhat is it?\n<image>\n\nAssistant:[ A cat.\n\n]User: Which colour?\n\nAssistant:[ Grey.\n\n]",
        ),
        (
            "sandwich",
            "User: Look:\n\nWhat is it?\nWhich colour?\n<image>\nLook:\n\nWhat is it?\n\nAssistant:[ A cat.\n\n]"
            "User: Which colour?\n\nAssistant:[ Grey.\n\n]",
        ),
    ],
)
def test_prompt_styles(style, want):
    turns = [("Look:\n<image>\nWhat is it?", "A cat."), ("Which colour?", "Grey.")]
    want = want.replace("Look:\n\nWhat", "Look:\nWhat")  # an empty line would end the turn
    segments = conversation(dataclasses.replace(SMALL, prompt_style=style), turns, iter([picture(0)]))
    assert spell(segments) == want


def test_prompt_styles_of_several_pictures_and_short_answers():
    config = lambda style: dataclasses.replace(SMALL, prompt_style=style)
    ask = lambda style, *turns: spell(
        conversation(config(style), [(q, None) for q in turns], iter([picture(i) for i in range(2)]))
    )
    short = "Answer the question using a single word or phrase."
    assert (
        ask("sandwich", f"<image>\nSame as <image>?\n{short}")
        == f"User: Same as ?\n<image>\n<image>\nSame as ?\n{short}\n\nAssistant:"
    )
    assert ask("first", "Same as <image> or <image>?") == "User: <image>\n<image>\nSame as  or ?\n\nAssistant:"
    assert ask("sandwich", "No picture?") == "User: No picture?\n\nAssistant:"


@pytest.mark.parametrize("rwkv", [6, 7])
@pytest.mark.parametrize("scan", ["uni", "multi"])
def test_blocks_that_run_twice_learn_the_same(rwkv, scan):
    """Activation checkpointing, with pictures that layers reorder, samples of unequal length and a forecast in one batch."""
    model = (
        randomise(ModRWKV(dataclasses.replace(SMALL, rwkv=rwkv, scan=scan, n_layer=4, adapter_scale=1)))
        .double()
        .train()
    )
    samples = [
        [text("ab"), picture(1, 4), ("answer", codes("cd"))],
        [("answer", codes("a longer one, without a picture"))],
    ]
    samples.append(
        model.window(torch.randn(90, generator=torch.Generator().manual_seed(1)).double(), random.Random(1))[:1]
    )
    found, sizes = [], []
    for model.checkpoint_activations in (False, True):
        kept = {}  # of storages, what autograd keeps between the passes
        keep = lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model.loss(samples)
        model.zero_grad()
        loss.backward()
        found.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            | {"loss": loss.detach()}
        )
        sizes.append(
            sum(kept.values())
            - sum(p.untyped_storage().nbytes() for p in model.parameters() if p.untyped_storage().data_ptr() in kept)
        )
    assert found[0].keys() == found[1].keys() and len(found[0]) > 100
    assert all(torch.equal(found[1][name], x) for name, x in found[0].items())
    assert sizes[1] < sizes[0] / 4


def test_loss_reductions_and_l2wrap(model):
    samples = [[text("ab"), ("answer", codes("cdef"))], [text("a"), ("answer", codes("b"))], [text("only")]]
    with torch.no_grad():
        logits, _ = model(samples)
    learned = ((logits[0, 1:5], "cdef"), (logits[1, 0:1], "b"))
    ce = [F.cross_entropy(z.float(), torch.tensor(codes(string)), reduction="none") for z, string in learned]
    assert model.loss(samples).item() == pytest.approx(torch.cat(ce).mean().item(), rel=1e-5)
    assert model.loss(samples, reduction="sample").item() == pytest.approx(
        (ce[0].mean() + ce[1].mean()).item() / 2, rel=1e-5
    )
    assert model.loss(samples, 7, "sample").item() == pytest.approx((ce[0].mean() + ce[1].mean()).item() / 7, rel=1e-5)
    largest = torch.cat([logits[0, 1:5], logits[1, 0:1]]).float().max(-1).values
    wrap = (model.loss(samples, l2wrap=0.1) - model.loss(samples)).item()
    assert wrap == pytest.approx((0.05 * largest**2).mean().item(), rel=1e-3)


@pytest.mark.parametrize(
    "names,frozen",
    [
        ("emb", ["emb.weight"]),
        ("blocks.0", ["blocks.0.att.r_k", "blocks.0.ln0.weight"]),
        ("adapter,head", ["adapter.image.conv.weight", "head.weight"]),
    ],
)
def test_freezing_by_name(names, frozen):
    model = ModRWKV(SMALL)
    modrwkv.freeze(model, "all", names)
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert set(frozen) <= still and all(any(n == x or n.startswith(x + ".") for x in names.split(",")) for n in still)
    assert "no parameter is called blocks.7" in refusal(modrwkv.freeze, model, "all", "blocks.7")
    assert "rwkv=4 is not one of 5, 6, 7" in refusal(ModRWKV, dataclasses.replace(SMALL, rwkv=4))


# ---------------------------------------------------------------------------------------------- checkpoints and flags


@pytest.fixture
def checkpoint(tmp_path):
    """(path, model) of a checkpoint of ours with an encoder and an adapter."""
    config = Config(n_layer=2, n_embd=48, head_size=16, template="v2", conv_kernel=4, conv_stride=3, image_trim=False)
    model = randomise(ModRWKV(config))
    save(tmp_path / "ckpt.pt", model, step=7)
    return tmp_path / "ckpt.pt", model


@torch.no_grad()
def test_saved_and_loaded_is_the_same(checkpoint, tmp_path):
    """By modrwkv alone and by data.released, against the saved model and BlinkDL's tensors; bad files are named."""
    path, model = checkpoint
    assert read_checkpoint(path)["step"] == 7 and os.listdir(tmp_path) == [path.name]
    assert load(path, template="v3").config == dataclasses.replace(model.config, template="v3")
    segments = [text("hi"), ("image", torch.zeros(3, 32, 40, dtype=torch.uint8)), text("?")]
    official, other, whole = weights_of(7, 2, 64), tmp_path / "x.pth", path.read_bytes()
    torch.save(official, other)
    for loader in (modrwkv.load, load):
        for again in (loader(path), loader(tmp_path)):
            assert again.config == model.config and not again.training
            assert torch.equal(again([segments])[0], model([segments])[0])
        assert all(torch.equal(x, official[name].view_as(x)) for name, x in loader(other).state_dict().items())
        for n in (10, len(whole) // 2):
            path.write_bytes(whole[:-n])
            assert str(path) in refusal(loader, path)
        path.write_bytes(whole)
        assert "cut short" in refusal(loader, jsonl(tmp_path / "x.pt", {}))
        assert "No such file" in refusal(loader, tmp_path / "none")
    torch.save({"llm.emb.weight": torch.ones(2, 2)}, other)
    assert "data.released" in refusal(modrwkv.load, other)


# the outline of a checkpoint of 2 steps that commit 6fbc9d2 wrote, "tensor 14 8" where it had one of that shape
EARLIER = """
eNrVWN1u6jgQfpXeZVfKiZIApfAAe7lXe7eqIpNMwIfEztoOlFa8+37jAKUHSpDIzRFCisfjL/PvmXwEtS6oCuYfAdWLaEtyuXLBPHCkrDZPyfjpJQiD
RaXztY3iqFLxBc8Fw0IK++120nc+uX0+7Tuf3jovnIveMnOmIH5XOLa9HOtejk0vh+jlWPZwbOM+huTMEk/JxXZ6fv7itOiDF7fhxW345e3Ty9un170+
WPda2HzFuNynnBonVE6XYXflfbS7h20jqvYuPN26pnX3cFYqe7udGCeuG9lRlqonspnjDi2Z7ZaWEERfU+xz61LKFYnien3ah0GuVSmXXMXMdo3Em4aB
yiqxI6R6ws8obkUwf+lgMivfya+cXpPCgivCYufI4kWO6qYSDgzBVpuqAKkxum5cZt2u8mQjHQTAhs2FAqFVEou8YpFLaazDStZiSRmpHPWV4ZVWBLJo
C6kvyZaMJPstfU1GcZVOxyeSdUYW1JEqrdcLkcNz0zSGjtrIdw3BZs9HOVYHw41SaCNcvrpC2crCrYI58A5iHClJ+nLEwUvrYP6PackbfXOS7PmwPokF
VQvROKCspYLtg7pqgk8iLMe2HMN5unGy7pzw70dgnbf9RzznZ2pOzsZhemsysVle3E8Hemb/uwiNZBiY9C6YQ7pcxfF7+3B0D9B3IAwwfhRg8ijA86MA
00cBXh4FmA3lziQeDCkZDGmwYE1GgyGNB0O6L359O3HV/dgByvN98nwvjZdlOphWL4NoNRtCqzQeQpY0GUSWwWI5HSyW0/Egmj1ch9OHC3E6WPymD5fk
dPYgwp77GCPqbGl021jfTHT9YlZQLnbBPI7QC1an3iOJYl4yPcbGghz3nH/E0SzEf/Yn3sQwCf1I0P+I2i6NQCPzl6gsup9avPmu5UQotSGRo136G60b
uiH0Oa0Ri+qTo5BlSYaUk1/IZWupODZVEBXSV1RkX2Xvdr2CrFocJq/78FLB+FzB9EzB9DdTMO1X73f23ygch5PwOZyGL+EMXQSuf9zbuHBxU+KKw/2E
ywW3Ako66jGKKSohShhqDwoHMh+pi5xD0rzuvaHOu+Za15CxrbNFy/J+Hb66jriHJe1nGfWzjPtZJr0sj2b1EZ3XswlGQUKNMXpz9IiyWa6pLGUuwcfx
M4rG4/Ek/DGOplOYOopHyeQsluKpP8SVCoQJTzQ/W+sySFDyLFj7WcrUNsOoU2+Dr0kbpqF3PbvtNTzUO+SmM0Iqnl8L4fijxVv002pV4TTm6OyCiBE5
KyTbCk88bCrpshJTKij8HDWY24Aqa57ivLl4NgXJkG3rz9htVsLySCsqhkVOHBXjeuE16WZlLDl7MpHnbEsY1q6E+cymfEX5utFSObA4uRFOamU/t91b
VmFi5jGxog1Vx9eM2FkkjJJqmRkfw53f2JxSieqY9drazFDR5gzMMcKTO38vSLdGNAeukgRylrIceUydvqUhej88W1CL1o/wmFWRMopttxWmbpujQLFP
YbGDNcXhXXE0+TKkBnWr+dVXwrA7ytHnay+XpMRHXvec+ueZn4Lr7Lw6eePmlWwOAUzsdliTzIZtMELSdzQralQXdlAMNis29CtbQRuZex2bFlIWbtfw
qqy0cKPUf1PgcgVpUcW67xz87QYz/+rgr/3+fzhhI0Q=
"""


def filled(outline, count, key=""):
    """A checkpoint of its outline: waves in the tensors' places."""
    if isinstance(outline, dict):
        return {name: filled(value, count, name) for name, value in outline.items()}
    if isinstance(outline, list):
        return [filled(value, count) for value in outline]
    if not str(outline).startswith("tensor"):
        return outline
    shape = torch.Size(map(int, outline.split()[1:]))
    wave = (next(count) + torch.arange(float(shape.numel()))).sin().view(shape)
    return wave**2 + 0.1 if key == "exp_avg_sq" else torch.tensor(2.0) if key == "step" else wave


def test_a_checkpoint_of_an_earlier_version_loads_and_resumes(tmp_path, monkeypatch):
    """Logits, the next step's loss and how far Muon and AdamW go in it, against that version's own figures."""
    monkeypatch.chdir(tmp_path)
    outline = ast.literal_eval(zlib.decompress(base64.b64decode(EARLIER)).decode())
    before = filled(outline, itertools.count())
    torch.save(before | {"rng": torch.get_rng_state()}, "ckpt.pt")
    jsonl(tmp_path / "x.jsonl", {"text": "\t\n\t\t\n" * 9})
    logits = load("ckpt.pt")(torch.tensor([[10, 11, 10, 3]]))[0][0, -1, :4]
    assert logits.tolist() == pytest.approx([-0.310445, -2.080261, 0.915801, 1.813763], abs=1e-5)
    said(train.main, "--out_dir=.", "--resume", "--max_steps=3")
    assert column(tmp_path, "loss") == pytest.approx([2.3925331], abs=1e-5)
    moved = {"head.weight": 0.0834495, "ln_out.weight": 0.0210200, "blocks.0.att.w0": 0.0525505}
    moved |= {"blocks.0.att.key.weight": 0.0123645}  # Muon's
    for name, size in moved.items():
        assert (kept(tmp_path)[name] - before["model"][name]).norm().item() == pytest.approx(size, rel=1e-4)


FULL = OSError(28, "No space left on device")
UNOPENED = RuntimeError("enforce fail: file not opened")  # torch's


@pytest.mark.parametrize(
    "broken,error", [("os.fsync", FULL), ("torch.save", FULL), ("torch.save", UNOPENED), ("os.replace", FULL)]
)
def test_a_failing_save_leaves_what_was_there(checkpoint, monkeypatch, broken, error):
    """The folder's bytes before and after."""
    path, model = checkpoint
    before = path.read_bytes()
    other = randomise(ModRWKV(model.config), seed=1)
    with monkeypatch.context() as m:
        m.setattr(broken, Mock(side_effect=error))
        message = refusal(save, path, other)
    assert f"{path}" in message and "is still there" in message and ("No space left" in message or error is UNOPENED)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    assert "nowhere" in refusal(save, path.parent / "nowhere" / "x.pt", other)
    save(path, other)
    assert path.read_bytes() != before


ONES = torch.ones(9, 8)
RWKV4 = dict.fromkeys(("emb.weight", "head.weight", "blocks.0.ffn.key.weight", "blocks.0.att.time_decay"), ONES)
FOREIGN = [([1, 2], "no model"), (ONES, "no model"), ({"state_dict": {}}, "elsewhere"), (RWKV4, "blocks.0.att.r_k")]
FOREIGN += [({"model": {"wte": ONES}, "config": {}}, "emb.weight"), ({"model": ONES, "config": {}}, "elsewhere")]


@pytest.mark.parametrize("content,reason", FOREIGN)
def test_files_that_are_no_checkpoints(tmp_path, content, reason):
    """Each is named, with the reason."""
    torch.save(content, tmp_path / "x.pt")
    message = refusal(load, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in message and reason in message


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path):
    """Files that make a folder when they are unpickled, as torch does where it trusts them."""
    Evil.path = str(tmp_path / "ran")
    torch.save({"model": {"emb.weight": Evil()}, "config": {}}, tmp_path / "torch.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"emb.weight": Evil()}))
    for name in ("torch.pt", "pickle.pt"):
        assert name in refusal(load, tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "torch.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


# fmt: off
FLA = [  # names of BlinkDL's and of flash-linear-attention's converter
    ("emb", "model.embeddings"), ("head", "lm_head"), ("ln_out", "model.norm"), ("blocks", "model.layers"),
    ("ln0", "pre_norm"), ("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("ln_x", "g_norm"), ("att", "attn"),
    ("receptance", "r_proj"), (r"(?<=att\.)key", "k_proj"), (r"(?<=att\.)value", "v_proj"), ("output", "o_proj"),
    ("([wavg])0", r"\1_lora.lora.2.bias"), ("([wavg])1", r"\1_lora.lora.0.weight"),
    ("([wavg])2", r"\1_lora.lora.2.weight"),
]
# fmt: on


def fla_names(weights):
    """An official RWKV-7 file as flash-linear-attention writes it."""
    z = {}
    for name, x in weights.items():
        if re.search(r"\.[wavg][12]$", name):
            x = x.T
        elif re.search(r"\.([wav]0|k_k|k_a|ffn\.x_k)$", name):
            x = x.flatten()
        for old, new in reversed(FLA):
            name = re.sub(rf"(?<![^.]){old}(?![^.])", new, name)
        z[name] = x.contiguous()
    return {name: x for name, x in z.items() if ".0.attn.v_lora" not in name}


def normal(*shape, seed=3):
    """Random numbers, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def mlp(C, scale, width, first, norm=True):
    """Random tensors of ModRWKV's adapter; `first`: what its mlp is called."""
    z = {f"{first}.0.weight": normal(scale * C, width) / width**0.5, f"{first}.0.bias": normal(scale * C)}
    z |= {f"{first}.2.weight": normal(C, scale * C) / (scale * C) ** 0.5, f"{first}.2.bias": normal(C)}
    return z | ({"pre_norm.weight": normal(C, seed=4), "pre_norm.bias": normal(C, seed=5)} if norm else {})


def under(prefix, z):
    return {prefix + name: x for name, x in z.items()}


def ones(*names):
    """Tensors of an encoder, which are left out."""
    return {name: torch.ones(2) for name in names}


def layer(x, z, name):
    return x @ z[f"{name}.weight"].T + z[f"{name}.bias"]


def norm(y, z, name):
    variance = y.var(1, correction=0, keepdim=True)
    return (y - y.mean(1, keepdim=True)) / (variance + 1e-5).sqrt() * z[f"{name}.weight"] + z[f"{name}.bias"]


def vision_adapter(z, x, first):
    """ModRWKV's equation 3 as its code has it."""
    y = layer(layer(x, z, f"{first}.0").clamp(min=0), z, f"{first}.2")
    return y + norm(y, z, "pre_norm")


def speech_adapter(z, x):
    """A Conv1D of kernel 3, stride 2, then ModRWKV's mlp."""
    x = torch.cat([torch.zeros(2, x.shape[1]), x, torch.zeros(2, x.shape[1])])
    windows = [sum(z["conv.weight"][:, :, j] @ x[i + j] for j in range(3)) for i in range(0, len(x) - 2, 2)]
    return layer(layer(torch.stack(windows) + z["conv.bias"], z, "proj.0").clamp(min=0), z, "proj.2")


def gated_adapter(z, x):
    """VisualRWKV 7.00's."""
    return norm((x / (1 + (-x @ z["gate.weight"].T).exp())) @ z["o_proj.weight"].T, z, "ln_v")


# fmt: off
C_, WIDTH, WORLD = 128, 24, "modality.world_encoder."
MLP, FLAT, WIDE = mlp(C_, 2, WIDTH, "mlp"), mlp(C_, 2, WIDTH, "proj"), mlp(C_, 4, WIDTH, "mlp")
SPEECH = mlp(C_, 2, 2 * C_, "proj", norm=False) | {"conv.weight": normal(2 * C_, WIDTH, 3), "conv.bias": normal(2 * C_)}
GATED = {"gate.weight": normal(WIDTH, WIDTH), "o_proj.weight": normal(C_, WIDTH)}
GATED |= {"ln_v.weight": normal(C_), "ln_v.bias": normal(C_, seed=4)}
PROJ = normal(C_, WIDTH)
V1, V3 = dict(template="v1", prompt_style="before"), dict(template="v3", prompt_style="tagged")
V2 = V1 | dict(template="v2")
SIGLIP, NONE = dict(image_encoder="siglip", conv_kernel=0, adapter_scale=2), dict(image_encoder="none")
CLIP = dict(image_encoder="clip", conv_kernel=0, adapter_kind="linear", prompt_style="sandwich", scan="bi", cls="last")
TOWERS = dict(image_encoder="dinov2+siglip+sam", conv_kernel=0, adapter_kind="gated", prompt_style="first")
TOWERS |= dict(encoder_width=WIDTH)
PLAIN = "User: <image>\nWhat?\n\nAssistant:[ This.\n\n]User: Why?\n\nAssistant:"
BEFORE = "<image>\x16User: What?\x17Assistant:[ This.\x17]User: Why?\x17Assistant:"
JULY = "<image>\x16User: What?\x17\x16Assistant:[ This.\x17]\x16User: Why?\x17\x16Assistant:"
AUGUST = "\x16User:{<image>}What?\x17\x16Assistant:[This.\x17]\x16User:Why?\x17\x16Assistant:"
SANDWICH = "User: What?\nWhy?\n<image>\nWhat?\n\nAssistant:[ This.\n\n]User: Why?\n\nAssistant:"
RELEASED = {  # layout: generation, its file of an official one's tensors, its config, its adapter's formula, its prompt
    "BlinkDL": (7, dict, NONE, None, PLAIN),
    "fla": (7, fla_names, NONE, None, PLAIN),
    "WorldRWKV, pictures": (7, lambda z: z | under(WORLD, under("adapter.", FLAT) | ones("model.x", "model.y.z")),
        SIGLIP | V1, lambda x: vision_adapter(FLAT, x, "proj"), BEFORE),
    "WorldRWKV, pictures, July 2025": (7, lambda z: z | under(WORLD + "adapter.", WIDE),
        SIGLIP | V2 | dict(adapter_scale=4), lambda x: vision_adapter(WIDE, x, "mlp"), JULY),
    "WorldRWKV, speech": (7, lambda z: z | under(WORLD, under("adapter.", SPEECH) | ones("model.x")),
        NONE | dict(audio_encoder="wavlm", adapter_scale=2) | V1, lambda x: speech_adapter(SPEECH, x), BEFORE),
    "WorldRWKV, August 2025": (7, lambda z: under("llm.", z) | under("proj.", MLP) | ones("encoder.model.x"),
        SIGLIP | V3, lambda x: vision_adapter(MLP, x, "mlp"), AUGUST),
    "WorldRWKV, Hugging Face": (7, lambda z: under("model.", under("proj.", MLP) | ones("encoder.x"))
        | {re.sub("^model", "model.llm", name): x for name, x in fla_names(z).items()},
        SIGLIP | V3, lambda x: vision_adapter(MLP, x, "mlp"), AUGUST),
    "VisualRWKV 6.0": (6, lambda z: under("rwkv.", z) | {"proj.weight": PROJ} | ones("vit.vision_model.x"),
        CLIP, lambda x: x @ PROJ.T, SANDWICH),
    "VisualRWKV 7.00": (7, lambda z: under("rwkv.", z) | under("proj.", GATED) | ones("vit.dino_featurizer.x"),
        TOWERS, lambda x: gated_adapter(GATED, x), PLAIN),
}
# fmt: on


class Pretrained(torch.nn.Module):
    """In the place of a pretrained encoder: pixels in rows of WIDTH are its features, on a grid of 3 columns."""

    pretrained, width, length = True, WIDTH, staticmethod(len)
    columns, collate = staticmethod(lambda data: 3), staticmethod(lambda batch: [torch.cat(batch)])

    def __init__(self, config):
        super().__init__()

    def forward(self, x):
        return x


class Whole(Pretrained):
    cls = True


@pytest.fixture
def pretrained(monkeypatch):
    def load_pixels(encoder, path):
        return torch.from_numpy(np.resize(np.asarray(Image.open(path), np.float32), (6, WIDTH)))

    monkeypatch.setitem(LOADERS, Pretrained, load_pixels)
    for kind, name in (("image", "siglip"), ("image", "clip"), ("audio", "wavlm")):
        monkeypatch.setitem(modrwkv.ENCODERS[kind], name, Pretrained)


def released(layout, path, n_layer=2):
    """(the path of a random file in a released layout, the official tensors in it)"""
    rwkv, names, *_ = RELEASED[layout]
    weights = official_weights(n_layer, C_, ranks=(16, 24, 8, 40)) if rwkv == 7 else weights_of(rwkv, n_layer, C_)
    torch.save(names(weights), path)
    return path, weights


@pytest.mark.parametrize("layout", RELEASED)
@torch.no_grad()
def test_released_layouts(layout, pretrained, official, official_before_7, tmp_path, capsys):
    """RELEASED's config, prompt and adapter, logits of the package `rwkv`; the same after conversion and back."""
    rwkv, _, config, formula, prompt = RELEASED[layout]
    path, weights = released(layout, tmp_path / "x.pth")
    ours = load(path)
    left_out = capsys.readouterr().err
    assert ("left out" in left_out) == any(x.shape == (2,) for x in torch.load(path).values())
    assert left_out.count("\n") <= 1
    assert ours.config == Config(**config, rwkv=rwkv, n_layer=2, n_embd=C_, tokenizer="rwkv_vocab_v20230424.txt")
    torch.save(weights, tmp_path / "official.pth")
    open_official = official_before_7 if rwkv < 7 else lambda path: official[0](path, "cpu fp32")
    tokens = torch.randint(300, (20,), generator=torch.Generator().manual_seed(7))
    assert_logits_agree(ours, open_official(str(tmp_path / "official")), tokens)
    if formula:
        [kind] = ours.adapter
        media = [normal(n, WIDTH) for n in (9, 4)]
        for x, got in zip(media, adapted(ours.adapter[kind], media)):
            assert distance(got, formula(x)) < 1e-5
        blind = load(path, template="v2", **{f"{kind}_encoder": "none"})
        language = {name for name in ours.state_dict() if not name.startswith("adapter.")}
        assert blind.config.template == "v2" and set(blind.state_dict()) == language

    asked = [("<image>\nWhat?", "This."), ("Why?", None)]
    segments = conversation(dataclasses.replace(ours.config, tokenizer="bytes"), asked, iter([picture(0)]))
    tags = {65530: text("{"), 65531: text("}")}
    assert (
        spell([tags.get(data[0], (kind, data)) if kind == "text" else (kind, data) for kind, data in segments])
        == prompt
    )

    convert(path, tmp_path / "ckpt.pt")
    again, want = load(tmp_path), ours.state_dict()
    assert again.config == ours.config and again.state_dict().keys() == want.keys()
    assert all(torch.equal(x, want[name]) for name, x in again.state_dict().items())
    capsys.readouterr()
    convert(tmp_path / "ckpt.pt", tmp_path / "y.pth")
    assert ("left out" in capsys.readouterr().err) == bool(formula)
    assert all(torch.equal(x, weights[name]) for name, x in torch.load(tmp_path / "y.pth").items())


SIZED = (
    "emb.weight embeddings.weight r_k time_faaaa .w1 .v1 [wv]_lora.lora.0.weight time_decay_w1 ffn.key.weight".split()
)
SIZED += ["(mlp|proj).2.weight"]
TELLING = "conv.bias", "gate.weight"  # without these it is another layout that the file does not fit


def shape_of(x):
    return [n for n in x.shape if n > 1]


@pytest.mark.parametrize("layout", ["ours", *RELEASED])
def test_checkpoints_that_do_not_fit(layout, pretrained, checkpoint, tmp_path, monkeypatch):
    """What is missing, too much or misshapen is named as the file names it."""
    path = checkpoint[0] if layout == "ours" else released(layout, tmp_path / "x.pth")[0]
    contents = torch.load(path)
    data = contents.get("model", contents)

    def message(changes):
        z = {name: x for name, x in (data | changes).items() if x is not None}
        content = contents | {"model": z} if layout == "ours" else z
        monkeypatch.setattr("data.released.read_any_file", lambda path: content)
        words = refusal(load, path)
        assert words.startswith(str(path))
        return words

    for i, (name, x) in enumerate(data.items()):
        sized = re.search(f"({'|'.join(SIZED)})$", name)
        if x.shape == (2,) or re.search(r"(blocks|layers)\.0\.", name) and not sized or ".0.att.v" in name:
            continue
        wrong = [None, 5, torch.cat([x, x], -1)]
        if x.dim() > 1:
            wrong += [y for y in (x.flatten(), x.mT.contiguous()) if shape_of(y) != shape_of(x)]
        for y in wrong if sized else wrong[i % len(wrong) :][:1]:
            words = message({name: y})
            other_name = name.replace("adapter.mlp", "adapter.proj") if "July" in layout else name  # in other files
            unsure = name.endswith(TELLING) or sized and torch.is_tensor(y) and y.dim() > 1
            assert name in words or other_name in words or unsure
    for name in (
        "foo",
        "blocks.0.ffn.s_emb.weight",
        "proj.more.weight",
        "blocks.1.att.qkv.weight",
        "adapter.image.extra",
    ):
        assert f"{name} is not expected" in message({name: torch.ones(3)})
    [head] = [name for name in data if name.endswith("head.weight")]
    if head != "head.weight":
        assert f"{head} is there twice, the other time as head.weight" in message({"head.weight": data[head]})


def test_several_pictures_before_a_turn_and_in_tags():
    """The segments written out."""

    def ask(style, *turns):
        media = iter([("image", "A"), ("image", "B")])
        return conversation(dataclasses.replace(SMALL, template="v1", prompt_style=style), turns, media)

    want = "<A><B>\x16User: Same as ?\x17Assistant:[ No.\x17]User: Why?\x17Assistant:"
    assert spell(ask("before", ("<image>Same as <image>?", "No."), ("Why?", None))) == want
    want = "\x16User: A?\x17Assistant:[ No.\x17]<A>User: B ?\x17Assistant:"
    assert spell(ask("before", ("A?", "No."), ("B <image>?", None))) == want
    tagged = ask("tagged", ("Is <image> like <image>?", None))
    start, end = ("text", [65530]), ("text", [65531])
    assert tagged[1:-1] == [start, ("image", "A"), end, start, ("image", "B"), end]


@pytest.mark.parametrize("cls", ["first", "last"])
@pytest.mark.parametrize("scan", ["bi", "multi"])
@torch.no_grad()
def test_the_cls_token_is_not_scanned(cls, scan, monkeypatch):
    """Against blocks that are given the patches in another order, and the rest where it is."""
    monkeypatch.setitem(modrwkv.ENCODERS["image"], "clip", Whole)
    config = dataclasses.replace(SMALL, image_encoder="clip", adapter_kind="linear", conv_kernel=0, n_layer=4)
    config = dataclasses.replace(config, scan=scan, cls=cls)
    model, x = randomise(ModRWKV(config)).double(), normal(7, WIDTH).double()  # the CLS token, two rows of 3 patches
    got, _ = model([[text("ab"), ("image", x), text("cd")]])
    whole, patches = model.adapter["image"].o_proj(x).split([1, 6])
    before, after = (model.emb(torch.tensor(codes(string))) for string in ("ab", "cd"))
    before, after = (torch.cat([before, whole]), after) if cls == "first" else (before, torch.cat([whole, after]))
    x, v_first = torch.cat([before, patches, after])[None], None
    turns = ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0])
    for block, turn in zip(model.blocks, (turns if scan == "multi" else turns[:2]) * 2):
        order = torch.tensor(
            [*range(len(before)), *(len(before) + i for i in turn), *range(len(before) + 6, x.shape[1])]
        )
        back = order.argsort()
        y, v, _ = block(x[:, order], None if v_first is None else v_first[:, order], (None, None, None), None)
        x, v_first = y[:, back], v[:, back] if v_first is None else v_first
    assert distance(got, model.head(model.ln_out(x))) < 1e-9
    config = dataclasses.replace(config, conv_kernel=2, conv_stride=2)  # windows end on it and on 1, 3, 5; or 0, 2, 4
    *_, orders = ModRWKV(config).double().fuse([[("image", normal(7, WIDTH).double())]])
    assert scan == "bi" or orders[2].tolist() == [[0, 2, 1, 3]]  # by columns: 3, 1, 5 behind it; or 0, 4, 2 before it


@pytest.mark.parametrize("kind,encoder", [("image", "clip"), ("audio", "microsoft/wavlm-large")])
def test_encoders_of_released_files_are_told_by_their_width(kind, encoder, tmp_path):
    """Those of the two that have 1,024 channels."""
    adapter = mlp(64, 2, 1024 if kind == "image" else 128, "proj", norm=kind == "image")
    if kind == "audio":
        adapter |= {"conv.weight": torch.ones(128, 1024, 3), "conv.bias": torch.ones(128)}
    torch.save(official_weights(1, 64) | under(WORLD + "adapter.", adapter), tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth")["config"][f"{kind}_encoder"] == encoder


def test_absent_towers(tmp_path):
    """Of VisualRWKV 7.00: named where a picture is asked about; text is answered."""
    model = load(released("VisualRWKV 7.00", tmp_path / "x.pth")[0], tokenizer="bytes")
    message = refusal(data_records.question, model, "What?", [("image", "x.png")])
    assert all(word in message for word in ("x.png", "SAM", "DINOv2-L", "SigLIP"))
    assert "User: What?" in spell(data_records.question(model, "What?"))


def hf_folder(folder, weights, shards=1, **config):
    """A folder as transformers writes it: config.json and model.safetensors, or parts of it and their index."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"norm_eps": 1e-5} | config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    place = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(place.values()):
        save_file({name: x for name, x in weights.items() if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def test_folders_of_safetensors(pretrained, tmp_path, monkeypatch):
    """Whole and in parts, against the tensors that were written; damaged ones are named."""
    weights = {name: x.bfloat16() for name, x in official_weights(2, C_).items()}
    export = RELEASED["WorldRWKV, Hugging Face"][1](weights)
    for i, (z, shards) in enumerate(itertools.product((fla_names(weights), export), (1, 3))):
        folder = hf_folder(tmp_path / f"{i}", z, shards)
        for path in [folder, *folder.glob("model.safetensors")]:
            own = load(path).state_dict()
            assert all(
                torch.equal(own[name], x.float())
                for name, x in weights.items()
                if ".0.att.v" not in name or "value" in name
            )
        if shards > 1:
            part = sorted(folder.glob("model-*"))[1]
            part.rename(folder / "gone")
            assert part.name in refusal(load, folder)
            shutil.copy(folder / "model-00001-of-00003.safetensors", part)
            message = refusal(load, folder)
            assert part.name in message and "is missing" in message
            for broken in ("{", "[]", '{"weight_map": {"a": 5}}', '{"weight_map": 5}'):
                (folder / "model.safetensors.index.json").write_text(broken)
                assert str(folder) in refusal(load, folder)
    assert "norm" in refusal(load, hf_folder(tmp_path / "eps", fla_names(weights), norm_eps=1e-6))
    assert "norm" in refusal(load, hf_folder(tmp_path / "heads", fla_names(official_weights(2, C_, N=32))))
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refusal(load, tmp_path / "empty")
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    assert "x.safetensors" in refusal(load, tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert 'pip install -e ".[pretrained]"' in refusal(load, tmp_path / "0")


@torch.no_grad()
def test_flash_linear_attention_reads_what_is_converted_and_the_other_way_round(tmp_path):
    """Against `rwkv7-hf`, a model of its own under the same names; converted by command."""
    rwkv7_hf = pytest.importorskip("rwkv7_hf")
    torch.save(official_weights(3, C_, ranks=(16, 24, 8, 40)), tmp_path / "x.pth")
    done = run(["-m", "data.released", tmp_path / "x.pth", tmp_path / "fla"], REPO)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(os.listdir(tmp_path / "fla")) == ["config.json", "model.safetensors"]
    theirs = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(tmp_path / "fla").eval()
    tokens = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(7))
    error = load(tmp_path / "x.pth")(tokens)[0] - theirs(tokens).logits
    assert error.abs()[:, 1:].max() < 1e-4  # the first token: see assert_logits_agree
    randomise(theirs, seed=5).save_pretrained(tmp_path / "saved")
    assert distance(load(tmp_path / "saved")(tokens)[0][:, 1:], theirs(tokens).logits[:, 1:]) < 1e-5


CHAINS = ["a.pth", "a.pt a.pth", "fla a.pth", "a.safetensors a.pt a.pth", "fla a.pt b.safetensors b.pt a.pth"]
CONVERSIONS = [
    (7, n_layer, dtype, chain)
    for n_layer, dtype in ((1, torch.float16), (2, torch.bfloat16), (3, torch.float32))
    for chain in CHAINS
]


@pytest.mark.parametrize(
    "rwkv,n_layer,dtype,chain", [*CONVERSIONS, *((n, 2, torch.bfloat16, CHAINS[1]) for n in (5, 6))]
)
def test_conversions_change_no_bit(rwkv, n_layer, dtype, chain, tmp_path):
    """The bits at the end of a chain of conversions against those at its start."""
    weights = official_weights(n_layer, 64, ranks=(16, 24, 8, 40)) if rwkv == 7 else weights_of(rwkv, n_layer, 64)
    weights = {name: x.to(dtype) for name, x in weights.items()}
    if rwkv == 7:  # as some have it, beside the rest in bfloat16
        weights["blocks.0.att.w0"] = weights["blocks.0.att.w0"].float()
        weights["blocks.0.att.w0"][0, 0, :3] = torch.tensor([math.nan, -0.0, 6e-8])
    torch.save(weights, tmp_path / "in.pth")
    steps = ["in.pth", *chain.split()]
    for source, target in itertools.pairwise(steps):
        convert(tmp_path / source, tmp_path / target)
    after = torch.load(tmp_path / "a.pth")
    assert after.keys() == {name for name in weights if not re.match(r"blocks\.0\.att\.v[012]", name)}  # unused there
    for name, x in after.items():
        assert x.dtype == weights[name].dtype and x.shape == weights[name].shape
        assert torch.equal(x.contiguous().view(torch.uint8), weights[name].contiguous().view(torch.uint8))
    for target in set(steps) - {"fla"}:
        assert f"{target} exists" in refusal(convert, tmp_path / "in.pth", tmp_path / target)
    if rwkv < 7:
        assert f"RWKV-{rwkv}" in refusal(convert, tmp_path / "in.pth", tmp_path / "fla")


def test_generate_yields_tokens_and_stops_where_it_is_told(model, monkeypatch):
    """Of tokens that the model gives: an end token, an answer of send(), and max_new_tokens each end a sample."""
    script(monkeypatch, [5, 6, 0, 7, 8, 9])  # by turns of both samples
    assert list(model.generate([[text("x")], [text("yy")]], max_new_tokens=3)) == [[5, 6], [0, 7], [None, 9]]
    script(monkeypatch, [5, 6, 7, 8])
    steps = model.generate([[text("x")], [text("yy")]])
    assert next(steps) == [5, 6] and steps.send([True, False]) == [None, 8]
    with pytest.raises(StopIteration):
        steps.send([False, True])


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_vocabulary_sizes_are_the_tokenizers(tokenizer):
    """ModRWKV's default, which needs no tokenizer, against the tokenizer itself."""
    size = len(ModRWKV(Config(n_layer=1, n_embd=64, tokenizer=tokenizer, image_encoder="none")).emb.weight)
    try:
        assert size == get_tokenizer(tokenizer).vocab_size
    except InputError:
        assert (tokenizer, size) == ("gpt2", 50257)  # its vocabulary could not be fetched


def test_a_released_file_is_sampled_from_as_the_flags_say(tmp_path, monkeypatch):
    """The config that an answer is generated with, against the flags; the rest is the file's."""
    path, _ = released("WorldRWKV, pictures", tmp_path / "x.pth")
    asked = Mock(side_effect=conversation)
    monkeypatch.setattr("data.records.conversation", asked)
    own = {"tokenizer": "bytes", "template": "v3", "prompt_style": "last", "image_encoder": "none"}
    flags = [f"--{name}={value}" for name, value in own.items()]
    said(sample.main, f"--out_dir={path}", "--prompt=Hi", "--max_new_tokens=2", *flags)
    config = dataclasses.asdict(asked.call_args.args[0])
    assert own.items() <= config.items() and config["adapter_scale"] == 2


@pytest.mark.parametrize("layout", ["fla", "WorldRWKV, pictures", "VisualRWKV 6.0"])
def test_training_starts_from_released_files(layout, pretrained, counting, tmp_path):
    """The config is the file's, its tensors move a little."""
    path, _ = released(layout, tmp_path / "x.pth")
    eyes = {"image_encoder": "patch"} if layout == "fla" else {}
    flags = [f"--rwkv={RELEASED[layout][0]}", *(f"--{name}={value}" for name, value in eyes.items()), "--max_steps=1"]
    own = "--n_embd=128", "--head_size=64", "--tokenizer=bytes"
    learn(tmp_path / "out", counting, f"--init_from={path}", *own, *flags)
    before, after = load(path, tokenizer="bytes", **eyes), load(tmp_path / "out")
    assert after.config == before.config
    names = [name for name in before.state_dict() if name.startswith("head" if eyes else ("head", "adapter"))]
    assert names and all(0 < distance(after.state_dict()[name], before.state_dict()[name]) < 0.5 for name in names)


# fmt: off
RIGHT = {
    "": {}, "--seed=-2": {"seed": -2}, "--seed 4 --beta1 1e-3": {"seed": 4, "beta1": 1e-3}, "--beta1=1": {"beta1": 1.0},
    "--data=": {"data": ""}, "--data='a=b c'": {"data": "a=b c"}, "--resume --seed=1": {"resume": True, "seed": 1},
    "--resume=1": {"resume": True}, "--resume yes": {"resume": True}, "--resume=False": {"resume": False},
}
WRONG = {  # no abbreviations: a typo must not set something
    "--seed=four": "--seed four", "--beta1=x": "--beta1 x", "--resume=maybe": "--resume maybe", "--seed": "--seed",
    "stray": "stray", "--sede=4": "--sede --seed", "--n_layers 4": "--n_layers --n_layer", "--qwertz": "--qwertz",
    "--see=4": "--see --seed",
}
# fmt: on


@pytest.mark.parametrize("line", RIGHT)
def test_flags(line):
    """The fields against those written out."""
    argv = [*shlex.split(line), "--n_layer=5", "--image_trim=no"]
    config, settings, names = sample.flags("about", Config, train.Train, argv=argv)
    assert settings == dataclasses.replace(train.Train(), **RIGHT[line])
    assert config == dataclasses.replace(Config(), n_layer=5, image_trim=False)
    assert names == {*RIGHT[line], "n_layer", "image_trim"}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_flags(capsys, line):
    """One line that names the flag and the one that may be meant."""
    with pytest.raises(SystemExit) as e:
        sample.flags("about", Config, train.Train, argv=line.split())
    message = capsys.readouterr().err
    assert e.value.code == 2 and all(word in message for word in WRONG[line].split()) and message.count("\n") == 1


def test_help_lists_every_flag(capsys):
    """Each field's own help and default."""
    odd = dataclasses.make_dataclass("Odd", [("rate", float, modrwkv.setting(0.5, "in % of something"))])
    with pytest.raises(SystemExit) as e:
        sample.flags("what it is about", Config, train.Train, odd, argv=["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert not e.value.code and "what it is about" in out
    for field in [field for cls in (Config, train.Train, odd) for field in dataclasses.fields(cls)]:
        assert f"--{field.name} " in out and f"{' '.join(field.metadata['help'].split())} [{field.default}]" in out


@pytest.mark.parametrize("name", train.PRESETS)
def test_presets_are_flags(name):
    """Against the same flags on a command line; one that is given counts."""
    want = sample.flags("", train.Train, Config, argv=[*train.PRESETS[name].split(), f"--data={name}", "--n_layer=9"])
    got = sample.flags("", train.Train, Config, argv=[f"--data={name}", "--n_layer=9"], presets=train.presets)
    assert got[:2] == want[:2] and got[2] == {"data", "n_layer"}


# ---------------------------------------------------------------------------------------------- data sets


ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}


def contents(folder):
    """{path in the folder: bytes} of its files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- pretrained encoders, against the library they come from


def save_encoder(family, folder):
    """Saves a tiny random encoder of a family, as transformers does."""
    import transformers as hf

    # fmt: off
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    vision = small | dict(intermediate_size=64, patch_size=8, image_size=32)
    both = dict(text_config=small | dict(vocab_size=64, intermediate_size=64), vision_config=vision)
    waves = small | dict(conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    waves |= dict(num_buckets=32, max_bucket_distance=64)
    large = waves | dict(feat_extract_norm="layer", do_stable_layer_norm=True)
    whisper = dict(vocab_size=64, num_mel_bins=16, d_model=16, encoder_layers=1, encoder_attention_heads=2)
    whisper |= dict(encoder_ffn_dim=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, pad_token_id=0)
    whisper |= dict(max_source_positions=100, max_target_positions=8, bos_token_id=1, eos_token_id=2)
    whisper |= dict(decoder_start_token_id=3, begin_suppress_tokens=None)
    square = dict(size={"height": 32, "width": 32})
    short = dict(size={"shortest_edge": 40}, crop_size=square["size"])
    dino, whisper_settings = small | dict(mlp_ratio=2), dict(feature_size=16, chunk_length=2)
    model, config, sizes, preparation, settings = {
        "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig, vision, hf.SiglipImageProcessorPil, square),
        "siglip, both towers":
            (hf.SiglipModel, hf.SiglipConfig, both, hf.SiglipImageProcessorPil, square | dict(resample=2)),
        "clip":
            (hf.CLIPVisionModel, hf.CLIPVisionConfig, vision | {"projection_dim": 16}, hf.CLIPImageProcessorPil, short),
        "dinov2":
            (hf.Dinov2Model, hf.Dinov2Config, dino | dict(patch_size=8, image_size=48), hf.BitImageProcessorPil, short),
        "dinov2, finer":
            (hf.Dinov2Model, hf.Dinov2Config, dino | dict(patch_size=4, image_size=32), hf.BitImageProcessorPil, short),
        "wavlm": (hf.WavLMModel, hf.WavLMConfig, waves, hf.Wav2Vec2FeatureExtractor, dict(do_normalize=False)),
        "wavlm, large": (hf.WavLMModel, hf.WavLMConfig, large, hf.Wav2Vec2FeatureExtractor, dict(do_normalize=True)),
        "whisper":
            (hf.WhisperModel, hf.WhisperConfig, whisper, hf.WhisperFeatureExtractor, whisper_settings),
    }[family]
    # fmt: on
    with torch.random.fork_rng():
        torch.manual_seed(len(family))
        randomise(model(config(**sizes))).save_pretrained(folder)
    preparation(**settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    pytest.importorskip("transformers")
    return functools.cache(lambda family: save_encoder(family, tmp_path_factory.mktemp("encoder")))


def encoded(encoder, media):
    """Features of one file, picture or sound."""
    return features(encoder, [load_media(encoder, media)])[0]


@pytest.mark.parametrize("family", ["siglip", "siglip, both towers", "clip", "dinov2"])
@torch.no_grad()
def test_pretrained_image_encoders(family, folders):
    """A batch of pictures of several sizes and modes, against the library's processor and model."""
    import transformers as hf

    folder = folders(family)
    encoder = modrwkv.read_pretrained("image", folder)
    kinds = {"siglip": hf.SiglipVisionModel, "clip": hf.CLIPVisionModel, "dinov2": hf.Dinov2Model}
    theirs = kinds[family.split(",")[0]].from_pretrained(folder, dtype=torch.float32)
    processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pictures = [noise(*size) for size in [(32, 32), (57, 40), (40, 90), (41, 300), (7, 9)]]
    pictures += [noise(50, 60).convert(mode) for mode in ("L", "P")]
    want = theirs(**processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")).last_hidden_state
    media = [load_media(encoder, picture) for picture in pictures]
    for x, got in zip(want, features(encoder.double(), media), strict=True):
        assert got.shape == (16 + encoder.cls, 32) and distance(got, x) < 1e-5
    assert encoder.width == 32 and encoder.cls == (family in ("clip", "dinov2")) and encoder.columns(media[0]) == 4
    assert {encoder.length(x) for x in media} == {16 + encoder.cls}


@torch.no_grad()
def test_several_image_encoders_side_by_side(folders):
    """Against each one's features, channel by channel, without the CLS token."""
    parts = [modrwkv.read_pretrained("image", folders(family)) for family in ("dinov2", "siglip")]
    both = modrwkv.read_pretrained("image", f"{folders('dinov2')}+{folders('siglip')}")
    pictures = noise(50, 40), noise(30, 90)
    for y, picture in zip(features(both, [load_media(both, x) for x in pictures]), pictures):
        dino, siglip = (encoded(part, picture) for part in parts)
        assert distance(y, torch.cat([dino[1:], siglip], 1)) < 1e-6
    assert (both.width, both.cls, both.length(None), both.columns(None)) == (64, False, 16, 4)
    message = refusal(modrwkv.read_pretrained, "image", f"{folders('dinov2, finer')}+{folders('siglip')}")
    assert "8 x 8" in message and "4 x 4" in message


def library_features(family, folder, x):
    """What the library makes of samples alone; of Whisper in parts of two seconds, without the silence behind them."""
    import transformers as hf

    prepare = hf.AutoFeatureExtractor.from_pretrained(folder)
    if family != "whisper":
        inputs = prepare(x.numpy(), sampling_rate=16000, return_tensors="pt")["input_values"]
        return hf.WavLMModel.from_pretrained(folder, dtype=torch.float32)(inputs).last_hidden_state[0]
    model, parts = hf.WhisperModel.from_pretrained(folder).get_encoder(), []
    for part in x.split(32000):
        inputs = prepare(part.numpy(), sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
        n = int(inputs["attention_mask"].sum()) // 2 + 1
        parts.append(model(inputs["input_features"]).last_hidden_state[0, :n])
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["wavlm", "wavlm, large", "whisper"])
@torch.no_grad()
def test_pretrained_audio_encoders(family, folders):
    """Sounds in a batch, against what the library makes of each alone."""
    encoder = modrwkv.read_pretrained("audio", folders(family))
    encoder.train()  # dropout and masks in time would show
    lengths = 400, 1000, 9000, 16000, 32000, 32161, 70000
    sounds = [torch.randn(n, generator=torch.Generator().manual_seed(n)) / 5 + 0.1 for n in lengths]
    media = [load_media(encoder, x) for x in sounds]
    for x, prepared, got in zip(sounds, media, features(encoder, media), strict=True):
        assert distance(got, library_features(family, folders(family), x)) < 1e-5
        assert len(got) == encoder.length(prepared)
    assert encoded(encoder, sounds[0][:9]).isfinite().all()  # shorter than the first feature's receptive field


def test_pretrained_encoders_are_frozen_and_not_stored(folders, tmp_path):
    """Their parameters have no gradient, follow the model's dtype, and are not in its state dict."""
    config = dataclasses.replace(SMALL, image_encoder=folders("dinov2"), audio_encoder=folders("wavlm"))
    model = randomise(ModRWKV(config)).train()
    names = [*model.state_dict(), *(name for name, _ in model.named_parameters())]
    assert not any(name.startswith(("encoder.image", "encoder.audio")) for name in names)
    assert "adapter.image.conv.weight" in names
    inner = model.encoder["image"].models[0]
    assert not inner.training and not any(p.requires_grad for p in inner.parameters())
    model.double()
    assert next(inner.parameters()).dtype == torch.float64
    noise(40, 50).save(tmp_path / "x.png")
    record = {"_at": "", "_folder": str(tmp_path), **talk("<image>?", "x", image="x.png")}
    model.loss([record_sample(model, record)]).backward()
    assert model.adapter["image"].conv.weight.grad.abs().max() > 0 and all(p.grad is None for p in inner.parameters())


def test_folders_that_hold_no_encoder(folders, tmp_path):
    """Each message begins with the flag and names what is wrong."""
    (tmp_path / "empty").mkdir()
    for kind, name, word in (
        ("image", str(tmp_path / "none"), "no such folder"),
        ("image", str(tmp_path / "empty"), "config.json"),
        ("audio", folders("siglip"), "is siglip"),
        ("image", folders("whisper"), "is whisper"),
        ("image", "patches", "no such folder"),
        ("image", f"{folders('siglip')}+nothing", "nothing"),
    ):
        message = refusal(ModRWKV, dataclasses.replace(SMALL, **{f"{kind}_encoder": name}))
        assert message.startswith(f"--{kind}_encoder={name}: ") and word in message and "dinov2" in message

    cut = Path(shutil.copytree(folders("clip"), tmp_path / "cut"))

    def message():
        words = refusal(modrwkv.read_pretrained, "image", str(cut))
        assert words.startswith(f"--image_encoder={cut}: ")
        return words

    weights, preparation = cut / "model.safetensors", cut / "preprocessor_config.json"
    tensors, content = modrwkv.read_safetensors(str(weights)), json.loads(preparation.read_text())
    changes = ({"size": None}, "no size"), ({"image_mean": None}, "no image_mean"), ({"crop_size": 24}, "not 24 x 24")
    for change, word in changes:
        preparation.write_text(json.dumps({k: v for k, v in (content | change).items() if v is not None}))
        assert word in message()
    preparation.write_text(json.dumps(content))
    kept = {name: x for name, x in tensors.items() if "layers.1.mlp.fc1" not in name}  # the library fills in noise
    modrwkv.write(str(weights), kept)
    assert "layers.1.mlp.fc1.bias and 1 more" in message()
    weights.write_bytes(weights.read_bytes()[:1000])
    assert message()


@torch.no_grad()
def test_preprocessor_configs_of_older_folders(folders, tmp_path):
    """Sizes as numbers and no rescale_factor, against the library; and a folder with a + in its name."""
    import transformers as hf

    folder = Path(shutil.copytree(folders("clip"), tmp_path / "c++"))
    file = folder / "preprocessor_config.json"
    kept = "do_center_crop", "do_normalize", "do_resize", "image_mean", "image_std", "resample"
    old = {name: value for name, value in json.loads(file.read_text()).items() if name in kept}
    file.write_text(json.dumps(old | {"crop_size": 32, "size": 40, "feature_extractor_type": "CLIPFeatureExtractor"}))
    inputs = hf.CLIPImageProcessorPil.from_pretrained(folder)([noise(57, 40)], return_tensors="pt")
    want = hf.CLIPVisionModel.from_pretrained(folder)(**inputs).last_hidden_state[0]
    assert distance(encoded(modrwkv.read_pretrained("image", str(folder)), noise(57, 40)), want) < 1e-5


def test_the_code_of_a_folder_is_not_run(tmp_path, monkeypatch):
    """Even if the library asked whether to, and the answer were yes."""
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}))
    code = "class Odd(transformers.PretrainedConfig):\n    model_type = 'odd'\n"
    (tmp_path / "odd.py").write_text(f"import transformers\nopen({str(tmp_path / 'ran')!r}, 'w')\n{code}")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert refusal(modrwkv.read_pretrained, "image", str(tmp_path)).startswith(f"--image_encoder={tmp_path}: ")
    assert not (tmp_path / "ran").exists()


def test_a_model_finds_its_encoder_again(folders, tmp_path, monkeypatch):
    """Trained with a cache of features and without, stored, loaded, moved: losses and logits against one another."""
    folder, moved = tmp_path / "eyes", tmp_path / "moved"
    shutil.copytree(folders("dinov2"), folder)
    for i in range(8):
        noise(40 + i, 50).save(tmp_path / f"{i}.png")
    data = (jsonl(tmp_path / "x.jsonl", *(talk("<image>\nWhich?", f"{i}", image=f"{i}.png") for i in range(8))),) * 2
    flags = f"--image_encoder={folder}", "--conv_kernel=0", "--batch_size=8", "--level_steps=0", "--warmup_steps=1"
    learn(tmp_path / "plain", data, *flags, "--max_steps=4")
    loaded = []
    monkeypatch.setitem(
        LOADERS, modrwkv.Vision, lambda encoder, path: loaded.append(path) or load_pretrained_picture(encoder, path)
    )
    for out, workers in (("cold", 1), ("warm", 0)):
        more = f"--feature_cache={tmp_path / 'cache'}", "--max_steps=4", f"--num_workers={workers}"
        learn(tmp_path / out, data, *flags, *more)
    assert len([path for path in loaded if path.endswith("0.png")]) == 1  # in both runs, training and scoring
    curves = [column(tmp_path / out, "loss") for out in ("plain", "cold", "warm")]
    assert curves[1] == curves[2] and curves[0] == pytest.approx(curves[1], rel=2e-3) and curves[0] != curves[1]
    assert not any("encoder." in name for name in kept(tmp_path / "plain"))

    [question] = [data_records.question(load(tmp_path / "plain"), "Which?", [("image", str(tmp_path / "0.png"))])]
    want, _ = load(tmp_path / "plain")([question])
    folder.rename(moved)
    assert f"--image_encoder={folder}" in refusal(load, tmp_path / "plain")
    got, _ = load(tmp_path / "plain", image_encoder=str(moved))([question])
    assert torch.equal(got, want)
    more = "--resume", "--max_steps=5"
    assert f"--image_encoder={folder}" in refusal(learn, tmp_path / "plain", data, *more)
    message = refusal(learn, tmp_path / "plain", data, *more, "--image_encoder=patch")
    assert "was trained with image_encoder" in message
    learn(tmp_path / "plain", data, *more, f"--image_encoder={moved}")
    assert len(column(tmp_path / "plain", "loss")) == 5 and load(tmp_path / "plain").config.image_encoder == str(moved)
    (tmp_path / "3.png").unlink()
    message = refusal(learn, tmp_path / "gone", data, *flags, f"--feature_cache={tmp_path}", f"--image_encoder={moved}")
    assert "x.jsonl, line 4: " in message and "3.png" in message


@torch.no_grad()
def test_features_are_used_only_while_they_are_true(folders, tmp_path):
    """Against the encoder itself; a checksum finds each changed bit."""
    encoder, cache, path = modrwkv.read_pretrained("image", folders("siglip")), tmp_path / "cache", tmp_path / "x.png"

    def cached(encoder=encoder):
        cache_features(encoder, [path, path], cache)
        return read_features(encoder, path, cache).vectors

    noise(40, 50).save(path)
    assert read_features(encoder, path, cache) is None
    first, true = cached(), encoded(encoder, path)
    assert first.dtype == torch.float16 and (first.float() - true).abs().max() <= true.abs().max() / 2000
    file, archive = Path(feature_file(encoder, path, cache)), io.BytesIO()
    right = file.read_bytes()
    np.savez(archive, np.ones(3))
    damaged = [b"", right[:100], right[:-7], b"something else", right[32:], archive.getvalue(), b"PK\x03\x04"]
    damaged += [right.replace(b"(16, 32)", shape) for shape in (b"(32, 16)", b"(9999999999, 32)")]
    damaged += [right[:i] + bytes([right[i] ^ 1]) + right[i + 1 :] for i in (0, 32, 40, 60, 200, len(right) - 1)]
    for content in damaged:
        file.write_bytes(content)
        assert read_features(encoder, path, cache) is None and not file.exists()
    assert torch.equal(cached(), first) and file.read_bytes() == right
    noise(41, 50).save(path)  # another picture by the same name
    assert read_features(encoder, path, cache) is None and not torch.equal(cached(), first)
    assert len([x for x in cache.rglob("*") if x.is_file()]) == 2 and not [*cache.rglob("*.*")]  # nothing partial

    copied = Path(shutil.copytree(folders("siglip"), tmp_path / "copied"))
    bare = modrwkv.read_pretrained("image", str(copied))
    cache_features(bare, [], cache)
    bare.models[0].to("meta")  # as in the processes that prepare batches
    assert fingerprint(bare) == fingerprint(encoder)  # wherever it lies
    for name, old, new in (("config.json", "gelu_pytorch_tanh", "relu"), ("preprocessor_config.json", "0.5", "0.4")):
        content = (copied / name).read_text()
        (copied / name).write_text(content.replace(old, new))
        assert old in content and fingerprint(modrwkv.read_pretrained("image", str(copied))) != fingerprint(encoder)
        (copied / name).write_text(content)
    big = modrwkv.read_pretrained("image", str(copied))
    big.models[0].post_layernorm.weight.data *= 1e6
    assert fingerprint(big) != fingerprint(encoder)
    assert cached(big).dtype == torch.float32 and cached(big).isfinite().all()  # beyond float16
    assert "--feature_cache" in refusal(cache_features, encoder, [path], file / "no")


def test_processes_write_the_same_features_at_once(tmp_path):
    """As the ranks of a run do, or two runs: each finds the bytes that one process alone writes."""
    fork, x = multiprocessing.get_context("fork"), torch.randn(50, 32)
    write_features(tmp_path / "right", x)
    gate, right = fork.Barrier(4), (tmp_path / "right").read_bytes()

    def write_and_read():
        for i in range(50):
            gate.wait(30)
            write_features(tmp_path / "ab" / f"{i}", x)
            assert (tmp_path / "ab" / f"{i}").read_bytes() == right

    processes = [fork.Process(target=write_and_read) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


@torch.no_grad()
def test_a_released_model_sees_through_its_encoder(folders, tmp_path):
    """WorldRWKV's flat layout and an encoder's folder: encoder, adapter and blocks one after another."""
    adapter = mlp(C_, 2, 32, "proj")
    torch.save(official_weights(2, C_) | under(WORLD + "adapter.", adapter), tmp_path / "x.pth")
    model = load(tmp_path / "x.pth", image_encoder=folders("siglip"), tokenizer="bytes")
    seen = encoded(modrwkv.read_pretrained("image", folders("siglip")), noise(30, 40))
    tokens = model.emb(torch.tensor([*codes("\x16"), 258, *codes(" What?\x17"), 259]))  # User: and Assistant:
    x, _ = model.backbone(torch.cat([vision_adapter(adapter, seen, "proj"), tokens])[None])
    got, _ = model([data_records.question(model, "What?", [("image", noise(30, 40))])])
    assert distance(got, model.head(x)) < 1e-5


# ---- data/<set>/prepare.py


def run(command, cwd, **how):
    """A command line of python's, in a process of its own."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=ENV, text=True, capture_output=True, timeout=300, **how)


def prepare(name, *args):
    """Runs data/<name>/prepare.py in this process."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        runpy.run_path(str(REPO / "data" / name / "prepare.py"), run_name="__main__")


def functions_of(name):
    return runpy.run_path(str(REPO / "data" / name / "prepare.py"))


def complains(words, name, *args):
    """prepare.py ends with one sentence that has these words."""
    with pytest.raises(SystemExit) as e:
        prepare(name, *args)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message and not [word for word in words if word not in message]


def parts(folder, *names):
    """The records of train.jsonl, val.jsonl, ..."""
    return [read_records(folder / f"{name}.jsonl") for name in names or ("train", "val")]


def everything(folder):
    return sum(parts(folder), [])


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    assert run([REPO / "data/digits/prepare.py", "--pictures=60", f"--out={folder}"], cwd=folder.parent).returncode == 0
    return folder


def published_arrow(folder, targets, name="data-00000-of-00001.arrow"):
    """A file of series as GIFT-Eval publishes them."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True, exist_ok=True)
    kind = pa.list_(pa.list_(pa.float32()) if isinstance(targets[0][0], list) else pa.float32())
    ids, n = [f"T{i}" for i in range(len(targets))], len(targets)
    table = pa.table({"item_id": ids, "start": [0] * n, "freq": ["H"] * n, "target": pa.array(targets, kind)})
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def hum(path, hz=283, rate=16000, n=800):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(2 * np.pi * hz * np.arange(n) / rate) / 2, rate)


@pytest.fixture(scope="session")
def voices(tmp_path_factory):
    """Recordings of three speakers who hum: digit d of speaker s is a tone of 200 + 150 d + 30 s Hz."""
    folder = tmp_path_factory.mktemp("voices")
    for s, d, i in itertools.product(range(3), range(10), range(2)):
        hum(folder / f"{d}_{'abc'[s]}_{i}.wav", 200 + 150 * d + 30 * s, 8000, 3200)
    return folder


# fmt: off
MADE = {  # data set: its flags, files, and how many records in train and val; whether it takes a seed
    "digits": ("--pictures=16", 1 + 16 + 1 + 1, (20, 1), True),
    "shapes": ("--pictures=16", 1 + 16 + 1 + 2, (48, 2), True),
    "morse": ("--sounds=48", 1 + 48 + 1 + 2, (48, 2), True),
    "same": ("--pairs=16", 1 + 32 + 1 + 2, (16, 1), True),
    "spoken_digits": ("VOICES --sounds=32", 1 + 32 + 1 + 2, (32, 2), True),
    "series": ("--series=6 --real=FOLDER/real.jsonl", 2, (6, 1), True),
    "gift_eval": ("FOLDER/real.jsonl --most=20", 2, (18, 2), True),
    "shakespeare": ("FOLDER/play.txt", 2, (1, 1), False),
    "llava": ("FOLDER/captions.json --val=4", 2, (8, 4), False),
}
# fmt: on


@pytest.mark.parametrize("name", MADE)
def test_data_sets_are_deterministic_and_their_parts_disjoint(name, voices, tmp_path):
    """Files and records counted; twice the same bytes, other ones by another seed; nothing is in both parts."""
    flags, n_files, n_records, seeded = MADE[name]
    wave = [float(i % 24) for i in range(400)]
    jsonl(tmp_path / "real.jsonl", *({"item_id": f"{i}", "target": [x + i % 7 for x in wave]} for i in range(30)))
    (tmp_path / "play.txt").write_text("ROMEO: Is the day so young?\n" * 20)
    captions = [talk("<image>\nDescribe it.", f"Thing {i}.", id=f"{i}", image=f"{i}.jpg") for i in range(12)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    for i in range(12):
        noise(8, 8 + i).save(tmp_path / f"{i}.jpg")
    args = flags.replace("VOICES", str(voices)).replace("FOLDER", str(tmp_path)).split()
    out = tmp_path / "out"
    prepare(name, *args, f"--out={out}")
    first, made = contents(out), parts(out)
    assert len(first) == n_files and tuple(map(len, made)) == n_records
    for key in ("id", "item_id"):
        ids = [r[key] for r in sum(made, []) if key in r]
        assert len(set(ids)) == len(ids)
    media = [{Path(path).read_bytes() for r in part for _, path in record_media(r)} for part in made]
    assert not media[0] & media[1]
    for r in sum(made, []):
        assert isinstance(r.get("task", ""), str) and r.get("level", 1) >= 1
    prepare(name, *args, f"--out={out}")
    assert contents(out) == first
    if seeded:
        prepare(name, *args, f"--out={out}", "--seed=2")
        other = contents(out)
        assert other.keys() == first.keys() and not [x for x in first if other[x] == first[x] and x != "val.jsonl"]


@pytest.fixture
def scanned(tmp_path, monkeypatch):
    """(scikit-learn's digits, {path under tmp_path: [number of each scan in it]}), filled as data is prepared."""
    real = sklearn.datasets.load_digits()
    used, pictures, save = [], {}, Image.Image.save

    class Scan(np.ndarray):
        @property
        def flat(self):
            used.append(self.number)
            return self.ravel()

    scans = [scan.view(Scan) for scan in real.images]
    for i, scan in enumerate(scans):
        scan.number = i

    def note(image, path, **how):
        pictures[os.path.relpath(path, tmp_path)] = used[:]
        used.clear()
        save(image, path, **how)

    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: SimpleNamespace(images=scans, target=real.target))
    monkeypatch.setattr(Image.Image, "save", note)
    return real, pictures


def test_digits_answers_are_true_and_writers_are_held_out(scanned, tmp_path):
    """Every answer again, from the labels of the scans that were drawn."""
    real, pictures = scanned
    prepare("digits", f"--out={tmp_path}", "--pictures=400")
    everyone = parts(tmp_path)
    printed = [r for r in sum(everyone, []) if "image" not in r]
    train_records, val = ([r for r in part if "image" in r] for part in everyone)
    assert [r["image"] for r in train_records + val] == list(pictures)
    seen, held_out = ({i for r in part for i in pictures[r["image"]]} for part in (train_records, val))
    assert max(seen) < 1415 <= min(held_out) and [*real.target[1415:1435]] == [*range(10)] * 2  # a form begins
    for r in train_records + val + printed:
        turns, drawn = record_turns(r), pictures.get(r.get("image"))
        numbers = [int(real.target[i]) for i in drawn] if drawn else [*map(int, turns[0][0].split("\n")[0])]
        number, n = "".join(map(str, numbers)), len(numbers)
        total = number[0] + ", ".join(f"+{x}={sum(numbers[: i + 1])}" for i, x in enumerate(numbers) if i)
        truths = {"What number|Read": number, "How many|Count": str(n), "sum|Add": total, "largest": str(max(numbers))}
        for question, truth in turns:
            assert [t for words, t in truths.items() if re.search(words, question)] == [truth]
        if not drawn:
            assert r["level"] == n >= 2 and r["id"].startswith("train") and len(turns) == 1
            continue
        assert r["level"] == n if r["task"] == "read" and len(turns) == 1 else r["level"] > n  # reading comes first
        with Image.open(tmp_path / r["image"]) as image:
            assert turns[0][0].startswith("<image>\n") and image.height == 56
            assert image.getpixel((0, 0)) == 255 and image.getextrema()[0] < 100  # black on white
    assert len(printed) == 100 and {r["task"] for r in printed} == {"count", "sum", "largest"}
    for part, n_turns in ((train_records, {1, 2}), (val, {1})):
        assert {len(record_turns(r)) for r in part} == n_turns
        assert {len(pictures[r["image"]]) for r in part} == {1, 2, 3, 4, 5}
        assert {r["task"] for r in part} == {"read", "count", "sum", "largest"}


def test_series_are_normalised_and_leave_out_benchmarks(tmp_path, capsys):
    """Lengths, mean and deviation; names of benchmarks, gaps and still series among real ones."""
    names = ["a", "ETTh1", "weather/T", "b_weather"]
    lines = [{"item_id": name, "target": [float(i % 24 + n) for i in range(400)]} for n, name in enumerate(names)]
    odd = {"item_id": "gap", "target": [1.0, None] * 300}, {"item_id": "still", "target": [3] * 300}
    real = jsonl(tmp_path / "real.jsonl", *lines, *odd)
    real_series = functions_of("series")["real_series"]
    assert [(name, len(x)) for _, name, x in real_series([str(real)])] == [("a", 400), ("b_weather", 400)]
    prepare("series", "--series=20", f"--real={real}", f"--out={tmp_path / 'x'}")
    train_records, val = parts(tmp_path / "x")
    assert len(train_records) == 20 and len(val) == 1
    for r in train_records:
        x = np.array(r["target"])
        assert 192 <= len(x) <= 1632 and abs(x.mean()) < 0.01 and x.std() == pytest.approx(1, abs=0.01)

    (tmp_path / "bad.jsonl").write_text('{"target": [1, 2]}\n{"item_id": 1}\n')
    (tmp_path / "empty").mkdir()
    for path, words in (("none.jsonl", "cannot read"), ("bad.jsonl", "line 2"), ("empty", "pyarrow|no .arrow files")):
        with pytest.raises(SystemExit, match=f"error: .*({words})"):
            real_series([str(tmp_path / path)])
    several = jsonl(tmp_path / "several.jsonl", {"target": [[*range(300)], [*range(300)]]})  # two variables
    assert len(real_series([str(several)])) == 2
    for folder in ("solar/H", "ett1/H", "LOOP_SEATTLE/D"):
        published_arrow(tmp_path / "gift" / folder, [[*map(float, range(300))]] * 2)
    assert [len(x) for *_, x in real_series([str(tmp_path / "gift")])] == [300, 300]


@pytest.mark.parametrize("content", [None, b"short", b"\xff\xfe" * 50], ids=["missing", "short", "not UTF-8"])
def test_shakespeare_from_a_bad_file(content, tmp_path):
    """One sentence that names the file."""
    if content is not None:
        (tmp_path / "play.txt").write_bytes(content)
    complains(["play.txt"], "shakespeare", tmp_path / "play.txt", f"--out={tmp_path}")
    assert not list(tmp_path.glob("*.jsonl"))


def colour_name(r, g, b):
    if max(r, g, b) < 100:
        return "black"
    if r > 150:
        return "yellow" if g > 120 else "red"
    return "blue" if b > 150 else "green"


def shape_name(ink):
    """By the part that it covers of its bounding box, pi / 4 if it is round; a triangle's centroid lies low."""
    rows, columns, at = ink.max(1), ink.max(0), np.arange(14)
    covered = ink.sum() / rows.sum() / columns.sum()
    if covered > 0.7:
        return "square" if covered > 0.9 else "circle"
    if (ink.sum(1) @ at / ink.sum() - rows @ at / rows.sum()) / rows.sum() > 0.1:
        return "triangle"
    return "star" if covered < 0.52 else "cross"


def look(path):
    """{(row, column): (colour, shape)} from the pixels of a picture alone."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB" and image.size == (48, 48)
        pixels = np.asarray(image).astype(int)
    things = {}
    for row, column in itertools.product(range(3), range(3)):
        cell = pixels[16 * row + 1 : 16 * row + 15, 16 * column + 1 : 16 * column + 15]
        contrast = np.abs(cell - cell[0, 0]).max(2)
        if contrast.max() >= 60:
            ink = contrast / contrast.max()  # how much of each pixel is covered
            things[row, column] = colour_name(*np.median(cell[ink > 0.8], 0)), shape_name(ink)
    return things


def solve(question, things):
    """The answer that the picture gives, and the cells that the question is about."""
    rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
    cells = {f"{down} {right}": (i, j) for i, down in enumerate(rows) for j, right in enumerate(columns)}
    sides = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

    def only(*thing):
        [cell] = [cell for cell, own in things.items() if own[-len(thing) :] == thing]  # unambiguous
        return cell

    def beyond(side, cell, other):
        return sum(step * (b - a) for step, a, b in zip(sides[side], cell, other))

    question = re.sub("(?<=s)es\\b", "", question.removeprefix("<image>\n"))  # crosses
    question = re.sub("(circle|square|triangle|star)s", r"\1", question)
    if m := re.fullmatch("What (colour|shape) is (.*)\\?", question):
        return things[cells[m[2]]][m[1] == "shape"], [cells[m[2]]]
    if m := re.fullmatch("Where is the (\\w+) (\\w+)\\?", question):
        here = only(*m.groups())
        return f"{rows[here[0]]} {columns[here[1]]}", [here]
    if m := re.fullmatch("How many (\\w+) (\\w+)\\?", question):
        like = [cell for cell, thing in things.items() if thing == m.groups()]
        return str(len(like)), like or [*things]
    if m := re.fullmatch("What is just (\\w+(?: of)?) the (\\w+) (\\w+)\\?", question):
        here = only(m[2], m[3])
        there = tuple(a + step for a, step in zip(here, sides[m[1]]))
        return things[there][1], [here, there]
    m = re.fullmatch("How many (\\w+) (\\w+) are (\\w+(?: of)?) the (\\w+)\\?", question)
    here = only(m[4])
    assert m[2] != m[4]
    like = [cell for cell, thing in things.items() if thing == (m[1], m[2])]
    return str(sum(beyond(m[3], here, cell) > 0 for cell in like)), [here, *like]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    prepare("shapes", "--pictures=400", f"--out={folder}")
    return folder


def test_shapes_answers_are_true_and_places_are_held_out(shapes):
    """Every answer again, from the pixels; and each question of val is about a thing where train never draws it."""
    drawn, about = defaultdict(set), []
    for name, n, n_turns, records in zip(("train", "val"), (3 * 400, 50), ({1, 2}, {1}), parts(shapes)):
        assert len(records) == n and {len(record_turns(r)) for r in records} == n_turns
        assert {r["task"] for r in records} == {"colour", "shape", "position", "count", "relation"}
        for r in records:
            [(_, path)] = record_media(r)
            things = look(path)
            drawn[name] |= set(things.items())
            assert 1 <= len(things) <= 5
            for question, answer in record_turns(r):
                truth, cells = solve(question, things)
                assert answer == truth, (path, question)
                about += [{(cell, things[cell]) for cell in cells}] if name == "val" else []
    assert all(things - drawn["train"] for things in about)
    assert 190 <= len(drawn["train"]) <= 200  # of 9 x 25
    never = drawn["val"] - drawn["train"]
    assert [len({thing[i] for _, thing in never}) for i in (0, 1)] == [5, 5] and len({cell for cell, _ in never}) == 9


def test_shapes_cannot_be_answered_without_the_picture(shapes):
    """The most frequent answer to each question text of one half of the records, tried on the other half."""
    turns = [(r["task"], *record_turns(r)[0]) for r in read_records(shapes / "train.jsonl")]
    answers = defaultdict(Counter)
    for task, question, answer in turns[::2]:
        answers[question][answer] += 1
        answers[task][answer] += 1
    right = [(answers.get(q) or answers[task]).most_common(1)[0][0] == answer for task, q, answer in turns[1::2]]
    assert np.mean(right) < 0.35


# ITU-R M.1677
ITU = """A .- B -... C -.-. D -.. E . F ..-. G --. H .... I .. J .--- K -.- L .-.. M -- N -. O --- P .--. Q --.- R .-.
S ... T - U ..- V ...- W .-- X -..- Y -.-- Z --.. 0 ----- 1 .---- 2 ..--- 3 ...-- 4 ....- 5 ..... 6 -.... 7 --...
8 ---.. 9 ----. ? ..--.. / -..-.""".split()


def copy_morse(x, rate):
    """(text, words a minute, tone in Hz) of samples without noise, from how long tones and silences are."""
    spectrum = np.abs(np.fft.rfft(x))
    loudness = np.convolve(x**2, np.hanning(rate // 80), "same")
    edges = np.flatnonzero(np.diff((loudness > 0.3 * loudness.max()).astype(int)))
    marks, gaps = np.diff(edges)[::2], np.diff(edges)[1::2]
    dot = np.median(marks[marks < 0.6 * marks.max()])  # of texts with dots and dashes
    text, letter = "", ""
    for mark, gap in zip(marks, [*gaps, 7 * dot]):
        letter += "-" if mark > 2 * dot else "."
        if gap > 2 * dot:
            text, letter = text + ITU[ITU.index(letter) - 1] + (" " if gap > 5 * dot else ""), ""
    return text.strip(), 1.2 * rate / dot, spectrum.argmax() * rate / len(x)


class Quiet(random.Random):
    def uniform(self, low, high):
        return -9 if high == -0.15 else 0.02 if high == 0.12 else super().uniform(low, high)  # no noise, a steady hand


def test_morse_sounds_and_records(tmp_path):
    """Sounds are copied by ear with ITU's code; lengths, texts and levels of records counted in its marks."""
    speeds, tones = [], []
    texts = ["THE QUICK BROWN FOX JUMPS OVER A LAZY DOG", "CQ DE K1AB/7", "0123456789?", "PARIS"] * 5
    for seed, text in enumerate(texts):
        got, speed, tone = copy_morse(functions_of("morse")["key"](text, Quiet(seed)), 4000)
        assert got == text
        speeds.append(speed)
        tones.append(tone)
    assert 9 < min(speeds) < 14 and 26 < max(speeds) < 33 and 395 < min(tones) < 480 and 820 < max(tones) < 905

    prepare("morse", "--sounds=240", f"--out={tmp_path}")
    made, code = parts(tmp_path), dict(zip(ITU[::2], ITU[1::2]))
    train_texts, val_texts = ({record_turns(r)[0][1] for r in part} for part in made)
    assert all(len(text) < 3 for text in train_texts & val_texts) and {*map(len, train_texts)} == set(range(1, 11))
    of_marks = sorted((sum(len(code.get(c, " ")) for c in record_turns(r)[0][1]), r["level"]) for r in made[0])
    levels = [level for _, level in of_marks]
    assert levels == sorted(levels) and set(levels) == set(range(1, max(levels) + 1)) and 7 < max(levels) < 11
    assert all((level == 1) == (marks <= 2) for marks, level in of_marks)  # E I T A N M are the first level
    for r in made[0][:50]:
        x, rate = soundfile.read(tmp_path / r["audio"])
        assert rate == 4000 and 0.15 < np.abs(x).max() <= 1


def test_same_asks_whether_what_is_heard_is_what_is_seen(scanned, tmp_path, monkeypatch):
    """The sounds are copied, the pictures' scans noted; a model is given both in the order of the question."""
    real, pictures = scanned
    monkeypatch.setattr(random, "Random", Quiet)
    prepare("same", f"--out={tmp_path}", "--pairs=320")
    made, answers, copied = parts(tmp_path), [], 0
    seen, held_out = ({i for r in part for i in pictures[r["image"]]} for part in made)
    assert [*map(len, made)] == [320, 20] and max(seen) < 1415 <= min(held_out)
    for r in sum(made, []):
        [(_, answer)] = record_turns(r)
        see, hear, same = re.fullmatch(r"(\d+), (\d+): (yes|no)", answer).groups()
        answers.append(same)
        assert see == "".join(str(real.target[i]) for i in pictures[r["image"]])
        assert r["level"] == len(see) == len(hear) <= 3 and sum(a != b for a, b in zip(see, hear)) == (same == "no")
        if set(hear) - {"0", "5"}:  # with dots and dashes
            x, rate = soundfile.read(tmp_path / r["audio"])
            assert copy_morse(x - x.mean(), rate)[0] == hear
            copied += 1
    assert copied > 250 and 0.4 < answers[:320].count("yes") / 320 < 0.6
    model = ModRWKV(SMALL)
    kinds = {tuple(kind for kind, _ in record_sample(model, r) if kind in modrwkv.MEDIA) for r in made[1]}
    assert kinds == {("image", "audio"), ("audio", "image")}


def test_spoken_digits_hold_one_speaker_out(voices, tmp_path):
    """The tones of val, one after another, are the last speaker's digits."""
    for more in ([], ["--held_out=c"]):
        prepare("spoken_digits", voices, "--sounds=160", f"--out={tmp_path}", *more)
        train_records, val = parts(tmp_path)
        assert {r["level"] for r in train_records} == {1, 2, 3, 4, 5, 6}
        for r in val:
            x, rate = soundfile.read(tmp_path / r["audio"])
            loudness = np.convolve(np.abs(x), np.ones(80), "same")
            edges, heard = np.flatnonzero(np.diff((loudness > 0.3 * loudness.max()).astype(int))), []
            for start, end in zip(edges[::2], edges[1::2]):
                hz = np.abs(np.fft.rfft(x[start:end])).argmax() * rate / (end - start)
                heard.append(str(round((hz - 260) / 150)))
            assert record_turns(r)[0][1] == " ".join(heard) and r["level"] == len(heard) <= 6
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/1_a_0.wav").write_bytes(b"RIFF")
    for args in ([tmp_path / "bad"], [tmp_path / "none"], [voices, "--held_out=nobody"]):
        complains([], "spoken_digits", *args, f"--out={tmp_path / 'b'}")
    assert not (tmp_path / "b").exists()


def test_spoken_digits_are_stretched_cut_and_equalised():
    """A tone's length and frequency, noise that steps from loud to faint, a filter's gain against its own draws."""
    data, g, x = (
        functions_of("spoken_digits"),
        np.random.default_rng(0),
        np.sin(2 * np.pi * 300 * np.arange(8000) / 8000),
    )
    for factor in (0.7, 1.0, 1.3):
        for y, hz in ((data["stretch"](x, factor), 300), (data["vary"](x, 1.2, factor), 360)):
            spectrum = np.abs(np.fft.rfft(y[400:-400] * np.hanning(len(y) - 800)))
            assert spectrum.argmax() * 8000 / (len(y) - 800) == pytest.approx(hz, rel=0.02)
            assert len(y) == pytest.approx(8000 * factor, rel=0.01)
        assert 0.9 < np.abs(data["stretch"](x, factor)[1000:-1000]).max() < 1.1  # the pieces fit
    steps = (2000, -60), (1000, -20), (1000, 0), (2000, -60)  # samples, dB
    x = np.concatenate([g.normal(size=n) * 10 ** (db / 20) for n, db in steps])
    for db, n in ((10, 1000), (40, 2000)):
        assert len(data["trim"](x, db)) == pytest.approx(n, abs=120)
    assert [len(data["trim"](y, db)) for y, db in ((x, 90), (np.zeros(50), 10), (x[:1], 10))] == [6000, 50, 1]
    x, rng = g.normal(size=2**14), random.Random(1)
    gain = 20 * np.log10(np.abs(np.fft.rfft(data["shape"](x, random.Random(1), 8)) / np.fft.rfft(x)))
    at, drawn = np.linspace(0, len(gain) - 1, 7), [rng.uniform(-8, 8) for _ in range(7)]
    assert gain[1:-1] == pytest.approx(np.interp(np.arange(len(gain)), at, drawn)[1:-1], abs=1e-6)


@pytest.fixture
def llava(tmp_path):
    """What LLaVA publishes, in small: 40 captions with their images.zip, and a mix with pictures in five folders."""
    names = [f"{i:09}" for i in range(40)]
    captions = [talk("<image>\nDescribe it.", f"Thing {x}.", id=x, image=f"{x[4:]}/{x}.jpg") for x in names]
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(captions))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
        for r in captions:
            z.writestr(r["image"], b"a picture")
    mix = []
    for place in ["coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K_2"]:
        (tmp_path / "mix" / place).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "mix" / place / f"{i}.jpg").write_bytes(b"a picture")
            mix += [talk("<image>\nWhat is it?", f"{place} {i}", id=f"{i}", image=f"{place}/{i}.jpg")] * 2
    asked = [f"<image>\nOne?\n{SHORT_ANSWER}", "1", "Two?", "2", "Three?", "3", "Four?"]
    mix += [talk(*asked, id="long", image="coco/train2017/0.jpg")]
    mix += [talk("No mark?", "none", "<image> and <image>?", "two", id="marks", image="gqa/images/0.jpg")]
    mix += [talk("How do I write <audio> and <image> in HTML?", "So: <audio>.", "", " ", id="html", model="")]
    odd = [{"from": "gpt", "value": "unasked"}, *talk("unanswered?")["conversations"], *talk("q", "a")["conversations"]]
    mix += [{"id": "odd", "conversations": odd}, talk("never answered", id="silent")]
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps(mix))
    return tmp_path


def test_llava_captions_from_the_published_zip(llava, tmp_path):
    """Ids, pictures and turns against those packed; the unpacked folder gives the same; bad files are named."""
    captions, out = llava / "blip_laion_cc_sbu_558k.json", f"--out={tmp_path / 'a'}"
    prepare("llava", captions, f"--images={llava / 'images.zip'}", "--val=4", out)
    made = parts(tmp_path / "a")
    assert [*map(len, made)] == [36, 4] and {r["id"] for r in sum(made, [])} == {f"{i:09}" for i in range(40)}
    for r in sum(made, []):
        [(kind, path)] = record_media(r)
        assert Path(path).read_bytes() == b"a picture" and path.endswith(f"{r['id']}.jpg")
        assert record_turns(r) == [("<image>\nDescribe it.", f"Thing {r['id']}.")]
    prepare("llava", captions, f"--images={tmp_path / 'a/images'}", "--val=4", out)
    assert parts(tmp_path / "a") == made
    out = f"--out={tmp_path / 'b'}"
    (tmp_path / "cut.zip").write_bytes((llava / "images.zip").read_bytes()[:-40])
    complains(["cut.zip", "cut short"], "llava", captions, f"--images={tmp_path / 'cut.zip'}", out)
    (tmp_path / "no.json").write_text('[{"image": "x.jpg"}]')
    complains(["no.json, record 1", "conversations"], "llava", tmp_path / "no.json", out)
    complains(["none.json"], "llava", tmp_path / "none.json", out)
    assert not list((tmp_path / "b").glob("*.jsonl"))


def test_llava_mix_is_mended_and_what_is_missing_is_named(llava, tmp_path, capsys):
    """The turns that are left of odd conversations, written out."""
    out, mix = tmp_path / "out", llava / "mix"
    args = "llava", llava / "llava_v1_5_mix665k.json", f"--images={mix}", "--val=5", f"--out={out}"
    prepare(*args)
    assert ", 2 of them text alone\nleft out: 6 turns without an answer, 0 records" in capsys.readouterr().out

    def turns_of(name):
        return record_turns(next(r for r in everything(out) if r["id"] == name))

    short = f"\n{SHORT_ANSWER}"
    marks = [("No mark?", "none"), ("<image> and <image >?", "two")]
    assert len(everything(out)) == 84 and not [r for r in everything(out) if r["id"] == "silent"]
    assert turns_of("long") == [(f"<image>\nOne?{short}", "1"), ("Two?", "2"), ("Three?", "3")]
    assert turns_of("marks") == marks and turns_of("odd") == [("q", "a")]
    assert turns_of("html") == [("How do I write <audio > and <image > in HTML?", "So: <audio>.")]
    train_files, val_files = ({r["image"] for r in part if r["image"]} for part in parts(out))
    assert not train_files & val_files and len(train_files | val_files) == 40
    prepare(*args, "--max_rounds=2", "--skip_text")
    assert len(everything(out)) == 83 and all(r["image"] for r in everything(out))
    assert turns_of("long-2") == [(f"<image>\nThree?{short}", "3")] and turns_of("marks") == marks
    prepare(*args, "--max_rounds=1", "--skip_text")
    records = everything(out)
    assert turns_of("marks") == [("<image>\nNo mark?", "none")] and turns_of("marks-1") == marks[1:]
    for i in range(2):
        (mix / f"ocr_vqa/images/{i}.jpg").unlink()
    complains(["2 of 40 pictures", "ocr_vqa/images/0.jpg", "--skip_missing"], *args)
    assert everything(out) == records  # what was there stays
    prepare(*args, "--skip_missing")
    assert "4 records whose picture is missing" in capsys.readouterr().out and len(everything(out)) == 80


def packed(folder, archive, *names):
    with tarfile.open(archive, "w:gz") as tar:
        for name in names:
            tar.add(folder / name, name)
    return archive


def librispeech(folder):
    """(its folder, its archives, {part: [(id, task, text)]}) of a data set of two utterances a part, as published."""
    spoken = {"train": [], "val": [], "test": []}
    tasks = (
        ("train-clean-100", "19-198"),
        ("train-other-500", "20-205"),
        ("dev-clean", "84-121"),
        ("test-other", "36-13"),
    )
    for task, chapter in tasks:
        place, part = folder / "LibriSpeech" / task / chapter.replace("-", "/"), task.split("-")[0]
        for i in range(2):
            hum(place / f"{chapter}-000{i}.flac")
            spoken["val" if part == "dev" else part].append((f"{chapter}-000{i}", task, f"don't stop {task}"))
        lines = [f"{chapter}-000{i} DON'T STOP {task.upper()}\n" for i in range(2)]
        (place / f"{chapter}.trans.txt").write_text("".join(lines))
    (folder / "LibriSpeech/SPEAKERS.TXT").write_text("19 | F | train-clean-100 | 25.19 | Kara Shallenberg\n")
    archives = [packed(folder, folder / f"{task}.tar.gz", f"LibriSpeech/{task}") for task, _ in tasks]
    return folder / "LibriSpeech", archives, spoken


def aishell(folder):
    """The same of AISHELL, where each speaker is packed, and each has a sound without a transcript."""
    spoken, lines, place = {}, [], folder / "data_aishell"
    (place / "transcript").mkdir(parents=True)
    (place / "wav").mkdir()
    for part, task, speaker in (("train", "train", "S0002"), ("val", "dev", "S0724"), ("test", "test", "S0764")):
        for i in range(3):
            hum(folder / f"plain/{task}/{speaker}/BAC009{speaker}W012{i}.wav")
        spoken[part] = [(f"BAC009{speaker}W012{i}", task, f"而对楼市成交{speaker}") for i in range(2)]
        lines += [f"BAC009{speaker}W012{i} 而 对 楼市 成交 {speaker}\n" for i in range(2)]
        packed(folder / "plain", place / f"wav/{speaker}.tar.gz", f"{task}/{speaker}")
    (place / "transcript/aishell_transcript_v0.8.txt").write_text("".join(lines), encoding="utf-8")
    return place, [packed(folder, folder / "data_aishell.tgz", "data_aishell")], spoken


def transcripts(folder):
    """{part: [(id, task, transcript)]} of a data set of speech, each with its sound."""
    found = {}
    for part, records in zip(("train", "val", "test"), parts(folder, "train", "val", "test")):
        for r in records:
            [(question, text)], [(kind, path)] = record_turns(r), record_media(r)
            assert (question, kind, Path(path).stem) == ("<audio>", "audio", r["id"]) and len(
                read_sound(path, 16000)
            ) == 800
            found.setdefault(part, []).append((r["id"], r["task"], text))
    return found


@pytest.mark.parametrize("make,words", [(librispeech, "trans.txt"), (aishell, "aishell_transcript_v0.8.txt")])
def test_speech_from_folders_and_archives(make, words, tmp_path, capsys):
    """Ids, parts and transcripts against those that were packed; what is cut short or missing is named."""
    name, (folder, archives, spoken) = make.__name__, make(tmp_path / "published")
    plain, out = tmp_path / "published/plain", [f"--out={tmp_path / x}" for x in "abcdef"]
    prepare(name, *archives, out[0])
    assert ("3 sounds that the transcript does not know" in capsys.readouterr().out) == (name == "aishell")
    prepare(name, folder, out[1])
    if plain.exists():  # each speaker unpacked, beside the archive
        shutil.copytree(plain, folder / "wav", dirs_exist_ok=True)
    prepare(name, folder, out[2])
    assert not (tmp_path / "c/wav").exists()
    assert transcripts(tmp_path / "a") == transcripts(tmp_path / "b") == transcripts(tmp_path / "c") == spoken

    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archives[0].read_bytes()[:-200])
    (tmp_path / "empty").mkdir()
    complains(["cut.tar.gz", "cut short"], name, cut, out[3])
    complains(["none.tar.gz"], name, tmp_path / "none.tar.gz", out[3])
    complains([words], name, tmp_path / "empty", out[3])
    assert not list((tmp_path / "d").iterdir())
    gone = next(path for path in folder.rglob("*") if path.stem == spoken["val"][1][0])
    gone.unlink()
    n = sum(map(len, spoken.values()))
    complains([f"1 of {n} sounds", gone.name, "--skip_missing"], name, folder, out[4])
    prepare(name, folder, "--skip_missing", out[4])
    assert transcripts(tmp_path / "e") == spoken | {"val": spoken["val"][:1]}


def test_gift_eval_folders_become_series(tmp_path, capsys):
    """Points, pieces and parts against what was written; each data set has its own level."""
    gift, out = tmp_path / "gift", tmp_path / "out"

    def wave(n, k):
        return [round(math.sin(i / 7) * k + k, 3) for i in range(n)]

    published_arrow(gift / "solar/H", [wave(300, k) for k in range(1, 31)])
    published_arrow(gift / "solar/H", [wave(300, k) for k in range(1, 31)], "cache-1318815c7ce7bc45.arrow")  # a copy
    published_arrow(gift / "long/D", [[None, *wave(2000, 40)]])
    published_arrow(gift / "two/T", [[wave(250, 50), wave(250, 51)]] * 25)  # two variables a record
    published_arrow(gift / "short/D", [wave(100, 60), [7.0] * 400])
    for own in "ett1/15T ett2/W electricity/H jena_weather/10T LOOP_SEATTLE/5T SZ_TAXI/15T traffic_hourly".split():
        published_arrow(gift / own, [wave(300, 99)])
    prepare("gift_eval", gift, "--length=1000", f"--out={out}")
    words = capsys.readouterr().out
    assert "LOOP_SEATTLE, SZ_TAXI, electricity, ett1, ett2, jena_weather, traffic" in words
    assert "2 left out as too short" in words

    def strength(r):
        return round(max(x for x in r["target"] if x is not None) / 2)

    train_records, val = parts(out)
    assert Counter(map(strength, train_records + val)) == Counter(range(1, 31)) | {40: 3, 50: 25, 51: 25}
    pieces = [r["target"] for r in everything(out) if strength(r) == 40]
    assert [len(x) for x in pieces] == [667] * 3 and sum(pieces, []) == [None, *wave(2000, 40)]
    assert next(r for r in train_records if strength(r) == 7)["target"] == wave(300, 7)
    sides = [*map(strength, val)]  # every 20th of 56 records, with all its variables and pieces
    assert len(set(sides)) == 3 + 1 and sides.count(50) == sides.count(51) == 1
    prepare("gift_eval", gift, "--most=10", f"--out={out}")
    assert len(everything(out)) == 10 + 2 + 10
    broken = gift / "solar/H/data-00000-of-00001.arrow"
    broken.write_bytes(broken.read_bytes()[:700])
    complains([str(broken)], "gift_eval", gift, f"--out={tmp_path / 'none'}")
    complains(["too few"], "gift_eval", gift / "short", f"--out={tmp_path / 'none'}")
    assert not list((tmp_path / "none").glob("*.jsonl"))


@pytest.mark.parametrize("name", ["llava", "librispeech", "aishell", "gift_eval", "spoken_digits"])
def test_data_sets_made_from_files_of_ones_own_say_so(name, monkeypatch, capfd):
    """The message names the command that says from which."""
    monkeypatch.setattr(os.path, "exists", lambda path: False)  # as if it were not made yet
    assert f"python data/{name}/prepare.py --help" in refusal(train.find_data, name, "")
    assert "the following arguments are required" in capfd.readouterr().err


README = (REPO / "data" / "llava" / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
README = README.split("## The papers' recipes")[1].split("\n## ")[0].splitlines()
RECIPES = [shlex.split(line.split("train.py")[1]) for line in README if line.startswith("torchrun")]
# fmt: off
PUBLISHED = {  # samples in the published data or in the papers' runs, and their learning rate: highest, last
    "see1": (595_375, 1e-3, 0), "see2": (665_298 - 40_688, 2e-5, 0), "hear1": (281_241, 1e-4, 1e-4),
    "hear2": (281_241, 1e-4, 5e-5), "forecast": (441_725, 1e-4, 0), "look1": (576_000, 1e-3, 1e-5),
    "look2": (1_280_000, 2e-5, 2e-5),
}
# fmt: on


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe[-1])
def test_recipes_of_the_readme_are_the_papers(recipe):
    """Number of samples and learning rates against PUBLISHED."""
    s, config, names = sample.flags("about", train.Train, Config, argv=recipe)
    assert len(names) == len(recipe)
    n, highest, last = PUBLISHED[s.out_dir]
    assert abs(s.max_steps * s.batch_size - n) < s.batch_size
    rates = [train.learning_rate(step, s) for step in range(s.max_steps)]
    assert max(rates) == pytest.approx(highest, rel=1e-5) and rates[-1] == pytest.approx(last, abs=1e-12)
    assert rates[0] == pytest.approx(
        highest / max(1, s.warmup_steps), rel=1e-5
    )  # from the first step on, or warming up


def test_commands_of_the_readme_are_complete():
    """One recipe for each published run; each flag of a prepare.py is one that it has."""
    lines = [shlex.split(line, comments=True)[1:] for line in README if line.startswith("python data/")]
    assert len(lines) == 7 and [f"--out_dir={name}" for name in PUBLISHED] == [recipe[-1] for recipe in RECIPES]
    for script, *args in lines:
        code = (REPO / script).read_text(encoding="utf-8")
        assert all(f'"{arg.split("=")[0]}"' in code for arg in args if arg.startswith("--"))


def test_two_stages_by_the_flags_of_the_readme(llava, tmp_path):
    """VisualRWKV's on a tiny RWKV-6, at another size and with a PatchEncoder: which tensors each stage changes."""
    model = randomise(ModRWKV(Config(rwkv=6, n_layer=2, n_embd=64, head_size=32, image_encoder="none"), vocab_size=300))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    vocabulary = "".join(f"{b + 1} {bytes([b])!r} 1\n" for b in range(256)) + r"261 '\n\n' 2"
    (tmp_path / "vocab.txt").write_text(vocabulary)
    for path in llava.rglob("*.jpg"):
        noise(32, 32).save(path)
    mix = llava / "llava_v1_5_mix665k.json", f"--images={llava / 'mix'}"
    prepare("llava", *mix, "--val=3", "--max_rounds=2", f"--out={tmp_path / 'x'}")
    others = {"data": tmp_path / "x", "tokenizer": tmp_path / "vocab.txt", "init_from": tmp_path / "x.pth"}
    others |= {"image_encoder": "patch", "max_steps": 2, "batch_size": 4, "dtype": "float32"}
    weights = [torch.load(others["init_from"])]
    for recipe in RECIPES[-2:]:
        flags = dict(flag.lstrip("-").split("=", 1) for flag in recipe)
        out = tmp_path / flags["out_dir"]
        flags |= {name: value for name, value in others.items() if name in flags} | {"out_dir": out}
        said(train.main, *(f"--{name}={value}" for name, value in flags.items()), "--eval_samples=1", "--device=cpu")
        ckpt = torch.load(out / "ckpt.pt")
        weights, others["init_from"] = [*weights, ckpt["model"]], out / "ckpt.pt"
        assert {"prompt_style": flags["prompt_style"], "scan": "bi", "rwkv": 6}.items() <= ckpt["config"].items()
        assert len({group["lr"] for group in ckpt["optimizer"]["param_groups"]}) == 1  # the decays' is the others'
    start, one, two = weights
    assert all(torch.equal(one[name], x) for name, x in start.items())  # stage 1 leaves the language model as it is
    assert [name for name in start if torch.equal(two[name], one[name])] == ["emb.weight"]  # frozen in stage 2
    assert not [name for name in one if name.startswith("adapter.image") and torch.equal(two[name], one[name])]


def test_data_from_any_folder_of_train_and_val(counting, tmp_path):
    """The paths written out."""
    for name in ("train", "val"):
        shutil.copy(counting[0], tmp_path / f"{name}.jsonl")
    train_file, val_file = (str(tmp_path / f"{name}.jsonl") for name in ("train", "val"))
    assert train.find_data(str(tmp_path), "") == ([train_file], [val_file])
    assert train.find_data(f"{tmp_path},{counting[0]}", "x.jsonl") == ([train_file, str(counting[0])], ["x.jsonl"])


# ---------------------------------------------------------------------------------------------- train.py


@pytest.fixture
def echo(monkeypatch):
    """In the place of a model: a sample is its record's id, or numbers, as many as the text has characters."""

    def record_sample(model, record):
        return record["id"] if "conversations" in record else [("answer", list(range(len(record["text"]))))]

    monkeypatch.setattr(train, "record_sample", record_sample)


class Echo(torch.nn.Module):
    """In the place of a model."""

    encoder = torch.nn.ModuleDict()

    def collate(self, samples):
        return samples


def drawn(batches, *steps):
    """What a single process draws."""
    return [i for step in range(*steps) for i in batches[step][0]]


def batches(levels, **settings):
    rng = random.Random(0)
    records = [talk("q" * rng.randint(1, 50), "a", id=i, level=level) for i, level in enumerate(levels)]
    return train.Batches(records, train.Train(**dict(batch_size=8, level_steps=0) | settings), Echo())


W = train.Batches.BUCKET  # as many batches of 8 are an epoch of 8 * W records


def test_an_epoch_holds_each_record_once(echo):
    b = batches([1] * 8 * W)
    first = drawn(b, W)
    assert sorted(first) == sorted(drawn(b, W, 2 * W)) == list(range(8 * W))
    assert first != drawn(b, W, 2 * W) and first != drawn(batches([1] * 8 * W, seed=2), W)
    lengths = [sorted(b.lengths[i] for i in first[8 * step : 8 * step + 8]) for step in range(W)]
    assert sum(sorted(lengths), []) == sorted(sum(lengths, []))  # like lengths share a batch
    assert sorted(lengths) != lengths  # but the short ones do not come first
    b = batches([1] * 16 * W)
    assert set(drawn(b, W)) != set(drawn(b, 2 * W, 3 * W))  # each epoch has an order of its own
    b = batches([1] * 40)  # an epoch ends in the middle of a batch
    assert Counter(drawn(b, 5 * W)) == {i: W for i in range(40)}
    assert set(Counter(drawn(b, W)).values()) == {W // 5, W // 5 + 1} and len(set(drawn(b, W))) == 40


def test_curriculum(echo):
    levels = [n % 5 + 1 for n in range(8 * W)]
    b = batches(levels, level_steps=2 * W)
    for top in range(1, 6):
        assert {levels[i] for i in drawn(b, 2 * W * (top - 1), 2 * W * top)} == set(range(1, top + 1))
    assert sorted(drawn(b, 10 * W, 11 * W)) == list(range(8 * W))  # from here on epochs
    assert {levels[i] for i in drawn(batches(levels), W)} == {1, 2, 3, 4, 5}  # without one
    assert drawn(batches([5] * 20, level_steps=16), 1)  # all too hard: then all are ready
    b = batches([1, 2] * 4 * W, level_steps=2 * W)
    for i, record in enumerate(b.records):
        record["_folder"] = "ab"[i < 6 * W]  # a fourth of the records is in a
        b.levels[i] = 1 + (i >= 6 * W and i % 8 != 0)  # of which few are ready
    first = drawn(b, 2 * W)
    assert (
        all(b.levels[i] == 1 for i in first) and sum(i >= 6 * W for i in first) == len(first) // 4
    )  # who waits keeps a place for its own


def test_long_texts_are_cut(echo):
    make = lambda: train.Batches(
        [{"text": "x" * n} for n in (40, 20)], train.Train(batch_size=8, ctx_len=32, level_steps=0), Echo()
    )
    windows = [ids for [(_, ids)] in drawn(make(), 64)]
    assert {tuple(ids) for ids in windows} == {tuple(range(start, start + 33)) for start in range(8)} | {
        tuple(range(20))
    }
    assert [ids for [(_, ids)] in drawn(make(), 63, 64)] == windows[-8:]


def test_held_out_text_is_predicted_once_throughout(model):
    texts = ["abc " * 33, "x", "hello"]
    windows = list(held_out_samples(model, [{"text": t} for t in texts], 32))
    assert all(len(sample) == 1 and len(sample[0][1]) <= 33 for sample in windows)
    predicted = [i for [(_, ids)] in windows for i in ids[1:]]
    assert predicted == [i for t in texts for i in codes(t)[1:] + [0]]
    assert n_targets(model, windows) == len(predicted)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            dict(schedule="wsd", warmup_steps=10, decay_fraction=0.4, lr_final=0.2),
            {0: 0.1, 9: 1, 10: 1, 59: 1, 79: 0.6, 99: 0.2},
        ),
        (dict(schedule="wsd", warmup_steps=0, decay_fraction=1.0), {0: 0.99, 49: 0.5, 99: 0}),
        (
            dict(schedule="cosine", max_steps=1100, warmup_steps=100),
            {0: 0.01, 99: 1, 349: (2 + 2**0.5) / 4, 599: 0.5, 1099: 0},
        ),
        (
            dict(schedule="cosine", max_steps=200, warmup_steps=0, lr_final=0.5),
            {49: 0.5 + (2 + 2**0.5) / 8, 99: 0.75, 199: 0.5},
        ),
        (dict(schedule="constant", warmup_steps=10, lr_final=0.2), {0: 0.1, 4: 0.5, 9: 1, 50: 1, 99: 1}),
        (dict(schedule="constant", warmup_steps=0), {0: 1, 99: 1}),
    ],
)
def test_learning_rate(flags, expected):
    settings = train.Train(**dict(learning_rate=1.0, max_steps=100) | flags)
    assert {step: train.learning_rate(step, settings) for step in expected} == pytest.approx(expected, abs=1e-9)


TINY = ("--n_layer=2", "--n_embd=64", "--head_size=32", "--batch_size=8", "--device=cpu", "--dtype=float32")
kept = lambda out, key="model": read_checkpoint(out / "ckpt.pt")[key]
log = lambda out: [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
column = lambda out, key: [x[key] for x in log(out) if key in x]


def said(main, *args):
    """What main(args) prints, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(list(map(str, args)))
    return out.getvalue()


def learn(out, data, *flags):
    """Trains a tiny model on (records, held-out records), and returns what was said."""
    return said(train.main, *TINY, f"--data={data[0]}", f"--val_data={data[1]}", f"--out_dir={out}", *flags)


def bars(path, n):
    """A picture of n black bars on white."""
    image = Image.new("L", (64, 32), "white")
    for i in range(n):
        ImageDraw.Draw(image).rectangle((4 + 7 * i, 6, 7 + 7 * i, 26), fill="black")
    return stored(image, path)


@pytest.fixture(scope="session")
def counting(tmp_path_factory):
    """Records that can be learned by heart in part: how many bars, and is that even; and a text, which takes no time to score."""
    folder = tmp_path_factory.mktemp("counting")
    records = []
    for n, word in enumerate("one two three four five six seven eight".split(), 1):
        bars(folder / f"{n}.png", n)
        records.append(talk("<image>\nHow many?", word, "Loud?", word.upper(), image=f"{n}.png", task="read"))
        records.append(talk("<image>\nEven?", "no" if n % 2 else "yes", image=f"{n}.png", task="even"))
    return jsonl(folder / "a.jsonl", *records), jsonl(folder / "text.jsonl", {"text": "nothing to answer"})


@pytest.fixture(scope="session")
def trained(counting, tmp_path_factory):
    """(out_dir, what was said, the model) of a run on `counting`."""
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = ("--max_steps=100", "--learning_rate=4e-3", "--warmup_steps=10", "--eval_interval=50", "--eval_samples=5")
    words = learn(out, (counting[0], counting[0]), *flags)
    return out, words, load(out / "ckpt.pt")


def test_a_run_leaves_its_log_checkpoint_and_curve(trained):
    out = trained[0]
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "log.jsonl", "loss.png"]
    assert [x["step"] for x in log(out) if "val_loss" in x] == [50, 100]
    assert [x["step"] for x in log(out) if "loss" in x] == list(range(1, 101))
    for x in [x for x in log(out) if "loss" in x]:
        assert x.keys() == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
        assert all(math.isfinite(value) for value in x.values()) and x["tokens"] > 0 and x["grad_norm"] > 0
    curve = column(out, "loss")
    assert sum(curve[-5:]) < 0.3 * sum(curve[:5])
    with Image.open(out / "loss.png") as image:
        assert image.format == "PNG" and image.getextrema()[0][0] < 255


def test_a_run_scores_what_was_held_out(trained, counting):
    out, words, model = trained
    with torch.no_grad():  # in one batch: batches of answers of unequal length must not be averaged
        loss = model.loss([record_sample(model, r) for r in read_records(counting[0])]).item()
    assert column(out, "val_loss")[-1] == pytest.approx(loss, abs=1e-5)
    assert f"\nheld-out loss {column(out, 'val_loss')[-1]:.4f}\n" in words
    *table, scores = said(sample.main, f"--out_dir={out}", f"--eval={counting[0]}").splitlines()
    scores = json.loads(scores)
    tasks = scores.pop("tasks")
    assert scores == {key: column(out, key)[-1] for key in ("n", "exact", "chars", "majority")} and scores["n"] == 24
    assert table == words.splitlines()[-len(table) - 2 : -2]  # the same in both
    [line] = [x for x in table if x.startswith("read ")]
    assert line.split()[1:4] == ["16", f"{100 * tasks['read']['exact']:.1f}", "%"]


@pytest.mark.parametrize("table,rows", [("data", 4), ("prompt", 3), ("scan", 3), ("adapter", 3), ("conv", 4)])
def test_a_table_runs_each_row_with_three_seeds(table, rows, tmp_path, monkeypatch, capsys):
    """The runs themselves are played by a function: it notes its flags, leaves a log, and fails once."""
    commands, fail = [], ["_2"]

    def play(command, env, stdout, stderr):
        flags = dict(flag[2:].split("=", 1) for flag in command[2:])
        commands.append(flags)
        assert command[1] == str(REPO / "train.py") and env["OMP_NUM_THREADS"] == "1"
        out = Path(flags["out_dir"])
        broken = fail and flags["out_dir"].endswith(fail[0])
        score = {
            "n": 9,
            "exact": 0.1 * int(flags["seed"]) + 0.01 * len(flags.get("scan", "")),
            "tasks": {"read": {"exact": 0.5}},
        }
        if table == "adapter":  # series are not answers
            score = {"n": 0, "exact": 0.0, "tasks": {}, "val_loss": int(flags["seed"]) / int(flags["adapter_scale"])}
        steps = [
            {"step": n, "loss": 1.0, "seconds": 5.0 + 3.2 * n + (n == 4)} for n in range(7)
        ]  # the evaluation behind one step is none of its time
        torch.save({"train": {"batch_size": 64, "max_steps": 7}}, out / "ckpt.pt")
        (out / "log.jsonl").write_text(
            "{" if broken else "".join(json.dumps(x) + "\n" for x in (*steps, {"step": 7, **score}))
        )
        return SimpleNamespace(returncode=int(bool(broken)))

    monkeypatch.setattr(ablate.subprocess, "run", play)
    argv = [table, "--data=x.jsonl", f"--out_dir={tmp_path}", "--max_steps=7", "--seed=9"]
    assert "_2 did not finish" in refusal(ablate.main, argv) and "said.txt" in refusal(ablate.main, argv)
    fail.clear()
    done = sum((folder / "log.jsonl").read_text() != "{" for folder in tmp_path.iterdir())
    commands.clear(), capsys.readouterr()
    ablate.main(argv)
    assert len(commands) == 3 * rows - done  # what was done stays done
    assert any(flags["resume"] == "True" for flags in commands)  # what was broken goes on
    assert all(flags["max_steps"] == "7" for flags in commands)
    assert len({flags["out_dir"] for flags in commands}) == len(commands) and {flags["seed"] for flags in commands} <= {
        "1",
        "2",
        "3",
    }
    head, line, *lines = capsys.readouterr().out.splitlines()[-rows - 2 :]
    assert head == (
        "| x.jsonl | loss | ms a sample |"
        if table == "adapter"
        else "| % exact on x.jsonl | all | read | ms a sample |"
    )
    assert line == "|---" * (head.count("|") - 1) + "|"
    for text, row in zip(lines, ablate.ABLATIONS[table], strict=True):
        loss = f"{2 / row['adapter_scale']:.4f} ± {1 / row['adapter_scale']:.4f}" if table == "adapter" else ""
        score = loss or f"{20 + len(row.get('scan', '')):.1f} ± 10.0 | 50.0 ± 0.0"
        assert text == f"| {', '.join(f'{name} {value}' for name, value in row.items())} | {score} | 50.0 ± 0.0 |"
    with pytest.raises(SystemExit):
        ablate.main(["x"])
    assert "invalid choice: 'x'" in capsys.readouterr().err


@pytest.fixture(scope="session")
def forecaster(tmp_path_factory):
    """(out_dir, folder) of a tiny model that has learned to go on with a sine."""
    folder = tmp_path_factory.mktemp("series")
    wave = lambda phase, n=200: [math.sin(i / 3 + phase) + 5 for i in range(n)]
    data = (
        jsonl(folder / "train.jsonl", *({"target": wave(phase)} for phase in range(20))),
        jsonl(folder / "val.jsonl", {"target": wave(0.5)}),
    )
    flags = (
        "--series_encoder=wavenet",
        "--image_encoder=none",
        "--series_kernel=4",
        "--series_stride=4",
        "--lookback=48",
        "--horizon=8",
    )
    words = learn(
        folder / "out", data, *flags, "--max_steps=120", "--learning_rate=5e-3", "--warmup_steps=10", "--level_steps=0"
    )
    (folder / "x.csv").write_text("t,a,b\n" + "".join(f"{i},{10 * y},{y}\n" for i, y in enumerate(wave(0.2, 100))))
    return folder, words, wave


def test_one_model_sees_hears_and_forecasts(tmp_path):
    """Three data sets learned at once; then a picture, a sound and a series in one question, each of which the answer depends on."""
    numbers, tones, wave = (
        "one two three".split(),
        dict(low=300, high=2000),
        lambda phase, n=200: [math.sin(i / 3 + phase) + 5 for i in range(n)],
    )
    for n, number in enumerate(numbers):
        bars(tmp_path / f"{number}.png", 2 * n + 1)
    for tone, hertz in tones.items():
        soundfile.write(
            tmp_path / f"{tone}.wav",
            0.5 * np.sin(2 * np.pi * hertz * np.arange(4800) / 16000) + 1e-3 * pixels(1, 4800),
            16000,
        )
    seen = [talk("<image>\nHow many?", number, image=f"{number}.png", task="see") for number in numbers]
    heard = [talk("<audio>", tone, audio=f"{tone}.wav", task="hear") for tone in tones]
    ahead = [{"target": wave(phase)} for phase in range(5)]
    both = [
        talk(
            "<series><image><audio>\nBoth?",
            f"{number} {tone}",
            image=f"{number}.png",
            audio=f"{tone}.wav",
            series=wave(i, 48),
            task="both",
        )
        for i, (number, tone) in enumerate(itertools.product(numbers, tones))
    ]
    files = [
        jsonl(tmp_path / f"{name}.jsonl", *records)
        for name, records in dict(seen=seen, heard=heard, ahead=ahead, both=both).items()
    ]
    encoders = (
        "--audio_encoder=mel",
        "--series_encoder=wavenet",
        "--encoder_width=32",
        "--series_kernel=4",
        "--series_stride=4",
    )
    data, out = (",".join(map(str, files)), jsonl(tmp_path / "val.jsonl", *both, *seen, *heard)), tmp_path / "out"
    learn(
        out,
        data,
        *encoders,
        "--lookback=48",
        "--horizon=8",
        "--max_steps=200",
        "--warmup_steps=10",
        "--level_steps=0",
        "--batch_size=16",
    )
    assert {task: score["exact"] for task, score in log(out)[-1]["tasks"].items()} == dict(both=1, hear=1, see=1)
    model, files = (
        load(out),
        lambda number, tone: (
            ("image", tmp_path / f"{number}.png"),
            ("audio", tmp_path / f"{tone}.wav"),
            ("series", wave(1, 48)),
        ),
    )
    assert (model.forecast([wave(0.2, 100)])[0] - torch.tensor(wave(0.2, 108)[100:])).abs().mean() < 0.3
    asked = (
        files("one", "low"),
        files("two", "low"),
        files("one", "high"),
        (*files("one", "low")[:2], ("series", wave(2, 48))),
    )
    logits = [
        model([data_records.question(model, "<series><image><audio>\nBoth?", media)])[0][0, -1] for media in asked
    ]
    assert all(distance(other, logits[0]) > 1e-4 for other in logits[1:])
    (tmp_path / "x.csv").write_text("y\n" + "".join(f"{y}\n" for y in wave(1, 48)))
    asked = [
        f"--out_dir={out}",
        *(
            f"--{kind}={tmp_path / name}"
            for kind, name in dict(image="three.png", audio="high.wav", series="x.csv").items()
        ),
    ]
    assert said(sample.main, *asked, "--prompt=<series><image><audio>\nBoth?").strip() == "three high"


def test_a_model_learns_to_forecast(forecaster):
    folder, words, wave = forecaster
    assert "held-out loss 0.0" in words and "--series=NUMBERS.csv" in words.splitlines()[-1]
    y = load(folder / "out" / "ckpt.pt").forecast([wave(0.2, 100)])[0]
    assert (y - torch.tensor(wave(0.2, 108)[100:])).abs().mean() < 0.25
    said(
        sample.main,
        f"--out_dir={folder / 'out'}",
        f"--series={folder / 'x.csv'},{folder / 'x.csv'}#a",
        f"--plot={folder / 'x.png'}",
    )
    b, a = said(
        sample.main, f"--out_dir={folder / 'out'}", f"--series={folder / 'x.csv'},{folder / 'x.csv'}#a"
    ).splitlines()
    assert [float(x) for x in b.split()[1:]] == pytest.approx(y.tolist(), rel=1e-4)
    assert [float(x) for x in a.split()[1:]] == pytest.approx((10 * y).tolist(), rel=1e-4)
    with Image.open(folder / "x.png") as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_series_settings_that_cannot_be():
    changes = (
        ({"series_stride": 9}, "series_kernel=6"),
        ({"series_kernel": 60}, "48 vectors"),
        ({"series_encoder": "x"}, "none, wavenet, timer"),
    )
    for change, words in changes:
        assert words in refusal(ModRWKV, dataclasses.replace(SMALL, **change))


def test_word_and_character_errors():
    pairs = [("Four zero, seven!", "four zero seven"), ("one too", "one two three"), ("a b", "b"), ("anything", "...")]
    got = data_scores.errors(
        pairs
    )  # 7 words: one substituted, one missing, one too many; of 24 characters w, three, and an a
    assert got == {"wer": 3 / 7, "cer": pytest.approx(7 / 25), "substitutions": 1, "deletions": 1, "insertions": 1}
    assert data_scores.errors([("x", "?!")])["wer"] == 1 and data_scores.errors([("a", "!")]) == {}
    record = talk("<audio>", "one two three", audio="x.wav", task="speech")
    scores = data_scores.score([record, talk("q", "a", task="other")], ["one too", "a"])
    assert scores["tasks"]["speech"]["wer"] == 2 / 3 and "wer" not in scores["tasks"]["other"]


def test_the_benchmark_is_every_window_of_the_test_split(forecaster):
    folder, _, wave = forecaster
    rng = np.random.RandomState(0)
    x = np.stack([10 * np.array(wave(1, 400)), rng.randn(400).cumsum()], 1)
    (folder / "data.csv").write_text(
        "date,a,b\n" + "".join(f"d{i},{a!r},{b!r}\n" for i, (a, b) in enumerate(x.tolist()))
    )
    scores = json.loads(
        said(sample.main, f"--out_dir={folder / 'out'}", f"--eval={folder / 'data.csv'}").splitlines()[-1]
    )
    model = load(folder / "out" / "ckpt.pt")
    z = (x - x[:280].mean(0)) / x[:280].std(0)
    windows = [z[i : i + 56, c] for c in range(2) for i in range(320 - 48, 400 - 56 + 1)]
    assert scores["windows"] == len(windows) == 146
    naive = {
        "repeat the last point": lambda w: w[47],
        "repeat the last 24": lambda w: w[24:32],
        "mean of the lookback": lambda w: w[:48].mean(),
    }
    for name, guess in naive.items():
        assert scores[name]["mse"] == pytest.approx(np.mean([(w[48:] - guess(w)) ** 2 for w in windows]), rel=1e-6)
        assert scores[name]["mae"] == pytest.approx(np.mean([np.abs(w[48:] - guess(w)) for w in windows]), rel=1e-6)
    ahead = model.forecast([torch.from_numpy(w[:48]) for w in windows], scale=1.0).numpy()
    assert scores["mse"] == pytest.approx(np.mean([(w[48:] - y) ** 2 for w, y in zip(windows, ahead)]), rel=1e-4)
    (folder / "short.csv").write_text("a\n" + "1\n2\n" * 10)
    assert "too few" in refusal(sample.main, [f"--out_dir={folder / 'out'}", f"--eval={folder / 'short.csv'}"])


ETT = REPO.parent / "shared/data/ett/ETTh1.csv"


@pytest.mark.skipif(not ETT.exists(), reason="ETTh1.csv is not at hand")
def test_the_naive_forecasts_of_etth1_are_those_that_are_published():
    scores = json.loads(
        said(lambda argv: print(json.dumps(data_scores.benchmark(Naive(), str(ETT), 1024))), "").splitlines()[-1]
    )
    assert scores["windows"] == 7 * 2785
    known = {"repeat the last point": 1.2944, "repeat the last 24": 0.5122, "mean of the lookback": 0.7217}
    assert {name: round(scores[name]["mse"], 4) for name in known} == known


class Naive:
    config, encoder = Config(), {"series"}
    forecast = staticmethod(lambda x, scale: x[:, -1:].expand(-1, 96))


def test_the_last_line_names_the_next_command(trained, counting):
    out, words, model = trained
    command = shlex.split(words.splitlines()[-1])
    assert command[:3] == ["python", "sample.py", f"--out_dir={out}"]
    question = data_records.question(
        model, "<image>\nHow many?", [("image", counting[0].parent / "1.png")]
    )  # of the first held-out record
    assert said(sample.main, *command[2:]).strip() == "".join(answer(model, question)[0]).strip()


def test_what_to_ask_next(tmp_path):
    at = lambda **record: dict(record, _folder=os.path.join(os.getcwd(), "x"))
    assert (
        data_records.sample_command(at(text="a")).startswith("--raw ")
        and data_records.sample_command(at(target=[1, 2])) == "--series=NUMBERS.csv"
    )
    assert data_records.sample_command(at(**talk("<audio>", "a", audio="y z.wav"))) == "--audio='x/y z.wav'"
    two = talk(
        "<image> and <audio><image>: what's that?",
        "a",
        "<image>?",
        "b",
        image=["1.png", "2.png", "3.png"],
        audio="a.wav",
    )
    assert shlex.split(data_records.sample_command(at(**two))) == [
        "--image=x/1.png,x/2.png",
        "--audio=x/a.wav",
        "--prompt=<image> and <audio><image>: what's that?",
    ]
    assert (
        data_records.sample_command(at(**talk("<series>\nUp?", "a", series=[1, 2])))
        == "--series=NUMBERS.csv --prompt='Up?'"
    )


def test_a_second_run_does_not_touch_the_first(trained, counting):
    out = trained[0]
    before = contents(out)
    message = refusal(train.main, [*TINY, f"--data={counting[0]}", "--max_steps=1", f"--out_dir={out}"])
    assert "ckpt.pt" in message and "--resume" in message and "--out_dir" in message
    assert "100 steps" in refusal(train.main, ["--resume", f"--out_dir={out}"])
    assert contents(out) == before


def test_a_language_model_is_given_the_eyes_that_suit_the_data(trained, counting, tmp_path, monkeypatch):
    """Those of a model that sees already stay as they are."""
    suited = ["image_encoder", "image_height", "patch_height", "conv_kernel", "prompt_style", "n_layer"]
    flags = "--image_height=16 --patch_height=16 --conv_kernel=0 --prompt_style=last --n_layer=7"
    monkeypatch.setattr(train, "presets", lambda data: flags)
    save(tmp_path / "lm.pt", ModRWKV(Config(n_layer=1, n_embd=64, image_encoder="none")))
    small = lambda out: [getattr(load(tmp_path / out).config, name) for name in suited]
    learn(
        tmp_path / "a",
        counting,
        f"--init_from={tmp_path / 'lm.pt'}",
        "--n_layer=1",
        "--head_size=64",
        "--conv_kernel=2",
        "--max_steps=1",
    )
    assert small("a") == ["patch", 16, 16, 2, "last", 1]
    learn(tmp_path / "b", counting, f"--init_from={trained[0] / 'ckpt.pt'}", "--max_steps=1")
    assert small("b") == [getattr(trained[2].config, name) for name in suited] != small("a")


@pytest.mark.parametrize("phase", ["adapter", "all"])
def test_phases(phase, counting, trained, tmp_path):
    """What a phase trains, from the weights and with the batch that it should begin with."""
    learn(
        tmp_path,
        counting,
        f"--init_from={trained[0] / 'ckpt.pt'}",
        f"--phase={phase}",
        "--warmup_steps=0",
        "--max_steps=3",
    )
    before, after = kept(trained[0]), kept(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if phase == "all" or name.startswith(("encoder.", "adapter."))}
    [first] = train.Batches(read_records(counting[0]), train.Train(batch_size=8), trained[2])[0]
    assert column(tmp_path, "loss")[0] == pytest.approx(trained[2].loss(first).item(), rel=1e-5)


def test_another_seed_is_another_model(counting, tmp_path):
    for seed in "12":
        learn(tmp_path / seed, (counting[1], counting[1]), "--max_steps=1", f"--seed={seed}")
    assert distance(kept(tmp_path / "1")["head.weight"], kept(tmp_path / "2")["head.weight"]) > 0.5


def test_the_gradient_is_clipped(counting, tmp_path):
    """As AdamW's first average shows, a tenth of the first gradient."""
    learn(tmp_path, (counting[1], counting[1]), "--max_steps=1", "--grad_clip=0.5")
    averages = [x["exp_avg"].norm().item() for x in kept(tmp_path, "optimizer")["state"].values()]
    assert column(tmp_path, "grad_norm")[0] > 0.5 and math.hypot(*averages) == pytest.approx(0.05, rel=1e-4)


def test_every_twentieth_record_is_held_out(tmp_path):
    data = jsonl(tmp_path / "a.jsonl", *({"text": f"text {i}"} for i in range(21)))
    words = said(train.main, *TINY, f"--data={data}", f"--out_dir={tmp_path}", "--max_steps=1")
    assert " 19 records to learn from" in words and " 2 held out" in words


def test_bfloat16_trains_like_float32(counting, tmp_path):
    for dtype in ("float32", "bfloat16"):
        learn(tmp_path / dtype, counting, f"--dtype={dtype}", "--max_steps=6", "--warmup_steps=3")
        assert {x.dtype for x in kept(tmp_path / dtype).values()} == {torch.float32}
    one, other = (column(tmp_path / dtype, "loss") for dtype in ("float32", "bfloat16"))
    assert one != other and one == pytest.approx(other, rel=0.02)


PLAY = "".join(f"ROMEO:\nLine {i} of a play, naïve — and so it goes.\n\n" for i in range(120))


def test_text_alone(tmp_path):
    """As a user does it, in a copy of the repository, for --data=shakespeare is prepared beside train.py."""
    folder, out = tmp_path / "data/shakespeare", tmp_path / "plays"
    folder.mkdir(parents=True)
    for path in (*REPO.glob("*.py"), *REPO.glob("*.cu"), *REPO.glob("data/*.py"), REPO / "data/shakespeare/prepare.py"):
        shutil.copy(path, tmp_path / path.relative_to(REPO))
    (folder / "tinyshakespeare.txt").write_text(PLAY, encoding="utf-8")  # so nothing is downloaded
    flags = (
        "--data=shakespeare",
        "--out_dir=plays",
        "--max_steps=30",
        "--ctx_len=32",
        "--warmup_steps=5",
        "--learning_rate=5e-3",
    )
    result = run(["train.py", *TINY, *flags], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    [first], [last] = (read_records(folder / f"{name}.jsonl") for name in ("train", "val"))
    assert first["text"] + last["text"] == PLAY and len(first["text"]) == int(0.9 * len(PLAY))
    curve = column(out, "loss")
    assert len(curve) == 30 and sum(curve[-5:]) < 0.7 * sum(curve[:5])
    assert not [name for name in kept(out) if name.startswith(("encoder.", "adapter."))]
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command == ["python", "sample.py", "--out_dir=plays", "--raw", "--temperature=0.8"]
    went_on = run([*command[1:-1], "--prompt=ROMEO:\nLine", "--max_new_tokens=40"], cwd=tmp_path)
    prompt = ("text", get_tokenizer("bytes").encode("ROMEO:\nLine"))
    assert went_on.stdout == "".join(answer(load(out / "ckpt.pt"), [prompt], max_new_tokens=40, end=None)[0]) + "\n"


@pytest.fixture(scope="session")
def whole(digits):
    """(out_dir, data, flags but for save_interval) of a run that nobody interrupts; two records take little time to score."""
    two = digits.parent / "two.jsonl"
    jsonl(two, *(r | {"image": str(digits / r["image"])} for r in read_records(digits / "val.jsonl")[:2]))
    data, flags = (
        (digits / "train.jsonl", two),
        ("--max_steps=30", "--grad_accum=2", "--level_steps=8", "--warmup_steps=5"),
    )
    flags += ("--lr_final=1e-4", "--eval_interval=12", "--optimizer=muon")  # and AdamW for the rest
    learn(digits.parent / "whole", data, *flags, "--save_interval=5")
    return digits.parent / "whole", data, flags


def stop_at(step, how, out, *flags):
    """Starts train.py and sends it a signal as soon as the log of `out` says that `step` is done; returns what it has said."""
    command = [sys.executable, str(REPO / "train.py"), *flags, f"--out_dir={out}"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    process = subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed
    )
    try:
        done = 0
        while done < step and process.poll() is None:
            time.sleep(0.002)
            if (out / "log.jsonl").exists():
                lines = (out / "log.jsonl").read_text().split("\n")[:-1]  # the last one is not whole yet
                done = json.loads(lines[-1])["step"] if lines else 0
        process.send_signal(how)
        words, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[how], (
        words
    )  # or it ended by itself
    return words


def assert_same_run(a, b):
    for key in ("step", "loss", "val_loss", "exact"):
        assert column(a, key) == column(b, key)  # to the last bit, and each step once
    a, b = kept(a), kept(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_interrupted_before_the_first_checkpoint(whole, tmp_path):
    out, data = tmp_path / "out", whole[1]
    words = stop_at(
        3, signal.SIGINT, out, *TINY, f"--data={data[0]}", f"--val_data={data[1]}", *whole[2], "--save_interval=25"
    )
    assert "Traceback" not in words and "--resume" not in words  # no advice that cannot be followed
    assert str(out / "ckpt.pt") in refusal(train.main, ["--resume", f"--out_dir={out}"])
    learn(out, data, *whole[2], "--save_interval=25")  # afresh, and what the log said is forgotten
    assert_same_run(out, whole[0])


def test_interrupted_killed_and_resumed(whole, tmp_path):
    out, data = tmp_path / "out", whole[1]
    words = stop_at(
        7, signal.SIGINT, out, *TINY, f"--data={data[0]}", f"--val_data={data[1]}", *whole[2], "--save_interval=5"
    )
    assert "Traceback" not in words and f"--out_dir={out} --resume" in words
    stop_at(18, signal.SIGKILL, out, "--resume")
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # a line that the kill tore
    (out / "ckpt.pt.partial").write_bytes(b"half a checkpoint")
    assert re.search(r"from step (15|20|25)\b", said(train.main, "--resume", f"--out_dir={out}"))
    assert_same_run(out, whole[0])
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "log.jsonl", "loss.png"]


def test_resume_keeps_the_settings_and_refuses_another_model(whole, tmp_path):
    out = tmp_path / "more"
    shutil.copytree(whole[0], out)
    assert "n_embd=64" in refusal(train.main, ["--resume", f"--out_dir={out}", "--n_embd=128"]) and contents(
        out
    ) == contents(whole[0])
    said(train.main, "--resume", f"--out_dir={out}", "--max_steps=33")
    assert column(out, "loss")[:30] == column(whole[0], "loss") and len(column(out, "loss")) == 33
    old, new = kept(whole[0], "train"), kept(out, "train")
    assert {key for key in old if old[key] != new[key]} == {"resume", "out_dir", "max_steps"}


def test_a_run_that_was_killed_while_it_was_scored_is_scored(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    *steps, _ = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(steps) + '{"step": 30, "val')
    said(train.main, "--resume", f"--out_dir={out}")
    assert_same_run(out, whole[0])
    assert "30 steps" in refusal(train.main, ["--resume", f"--out_dir={out}"])


def test_the_learning_rate_of_a_run(whole):
    """As the log says it, and as the optimizer's last step was made."""
    peak, final = 2e-3, 1e-4
    expected = (
        [peak * n / 5 for n in range(1, 6)]
        + [peak] * 10
        + [final + (peak - final) * (1 - n / 15) for n in range(1, 16)]
    )
    assert column(whole[0], "lr") == pytest.approx(expected, rel=1e-9)
    rates = [group["lr"] for group in kept(whole[0], "optimizer")["param_groups"]]
    assert rates == pytest.approx([final, 2 * final, final, final], rel=1e-9)


def complaint(result):
    """The line with which a failed run ended."""
    assert result.returncode != 0 and "Traceback" not in result.stderr and result.stderr.count("error: ") == 1
    *_, last = result.stderr.splitlines()
    assert last.startswith("error: "), result.stderr
    return last


def test_disk_full(counting, tmp_path):
    """Much as it is when a file may hold so many bytes only (Python ignores SIGXFSZ)."""
    out, limit = tmp_path / "out", lambda size: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    learn(out, counting, "--max_steps=2")
    before = contents(out)["ckpt.pt"]
    message = complaint(
        run(
            [REPO / "train.py", "--resume", "--max_steps=4", "--num_workers=0"], cwd=tmp_path, preexec_fn=limit(200_000)
        )
    )
    assert "ckpt.pt" in message and re.search("disk|space|large", message)
    assert contents(out)["ckpt.pt"] == before and len(before) > 500_000 and not list(out.glob("*.partial"))
    said(train.main, "--resume", "--max_steps=3", f"--out_dir={out}")  # with room again it goes on
    assert len(column(out, "loss")) == 3
    flags = [*TINY, f"--data={counting[0]}", f"--val_data={counting[1]}", "--out_dir=other", "--num_workers=0"]
    assert "log.jsonl" in complaint(run([REPO / "train.py", *flags], cwd=tmp_path, preexec_fn=limit(100)))


@pytest.fixture(scope="session")
def unequal(tmp_path_factory):
    """(out_dir, data, flags) of a run of one process without micro-batches. Its answers have 1 or 40 characters, with
    pictures, without, and text, all in sequences of any length, so that a batch has some of each."""
    folder = tmp_path_factory.mktemp("unequal")
    rng, records = random.Random(0), []
    for i in range(48):
        letter, question = chr(97 + i % 8), "x" * rng.randint(1, 80)
        answer = letter * rng.choice((1, 40))
        bars(folder / f"{i}.png", i % 8 + 1)
        seen, plain = (
            talk(f"<image>{question}", answer, image=f"{i}.png"),
            {"text": letter * len(question), "conversations": None},
        )
        records.append(rng.choice((seen, talk(question, answer), talk(question, answer), plain)))
    (folder / "a.json").write_text(json.dumps(records))
    data = folder / "a.json", jsonl(folder / "val.jsonl", *records[:3], {"text": "hold me"})
    flags = ("--batch_size=16", "--max_steps=20", "--warmup_steps=4")
    learn(folder / "out", data, *flags)
    return folder / "out", data, flags


def assert_equal_runs(a, b):
    for key, tolerance in dict(
        loss={"abs": 1e-5}, val_loss={"abs": 1e-5}, grad_norm={"rel": 1e-4}, tokens={"abs": 0}
    ).items():
        assert column(a, key) == pytest.approx(column(b, key), **tolerance) and column(a, key)


def micro_batches(path, rank, world, grad_accum):
    settings = train.Train(batch_size=16, grad_accum=grad_accum)
    b = train.Batches(read_records(path), settings, ModRWKV(Config(n_layer=1, n_embd=64)), rank, world)
    return [b[step] for step in range(12)]


def test_micro_batches_change_nothing(unequal, tmp_path):
    out, data, flags = unequal
    counts = [[len(batch.n_targets) for batch in micro] for micro in micro_batches(data[0], 0, 1, 4)]
    assert max(max(c) / min(c) for c in counts) > 3  # a mean of their means would be another loss
    learn(tmp_path, data, *flags, "--grad_accum=4")
    assert_equal_runs(tmp_path, out)


def two_processes(out, data, *flags):
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        REPO / "train.py",
        *TINY,
        "--grad_accum=2",
        *flags,
    ]
    result = run([*command, f"--data={data[0]}", f"--val_data={data[1]}", f"--out_dir={out}"], cwd=out.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes") == result.stdout.count("held-out loss") == 1  # one process speaks


@pytest.mark.parametrize("eps", [1e-18, 1e-6])
@pytest.mark.parametrize("how", ["--shard=False", "--shard"])
def test_two_processes_change_nothing(how, eps, unequal, tmp_path):
    """Whether each has all the weights or its part of them. With the default epsilon AdamW makes a whole step of a gradient that rounds
    to nothing, in a direction of chance: so each tensor is compared with a larger one, and all of them together with both."""
    one, data, flags = unequal
    pictured = lambda batch: "image" in batch.media
    seen = [[list(map(pictured, micro)) for micro in micro_batches(data[0], rank, 2, 2)] for rank in (0, 1)]
    assert any(a[-1] != b[-1] for a, b in zip(*seen))  # one process without a picture while the other has some
    assert [True, False] in seen[0] + seen[1]  # and pictures that only a micro-batch before the exchange has seen
    if eps != train.Train.adam_eps:
        flags, one = (*flags, f"--adam_eps={eps}"), tmp_path / "one"
        learn(one, data, *flags)
    two_processes(tmp_path / "two", data, *flags, how)
    assert_equal_runs(tmp_path / "two", one)
    two, one = kept(tmp_path / "two"), kept(one)
    assert distance(*(torch.cat([model[name].flatten() for name in one]) for model in (two, one))) < 1e-4
    assert eps == train.Train.adam_eps or all(distance(two[name], one[name]) < 2e-4 for name in one)


@pytest.mark.parametrize("phase, optimizer", [("all", "adamw"), ("all", "muon"), ("adapter", "adamw")])
def test_one_process_goes_on_with_shards_and_two_with_the_whole(phase, optimizer, unequal, tmp_path):
    """Muon rounds its steps to bfloat16."""
    _, data, flags = unequal
    flags = (*flags, "--schedule=constant", "--checkpoint_activations", f"--optimizer={optimizer}")
    if phase == "adapter":  # of a model that says something: as it starts, its blocks pass nothing on
        save(tmp_path / "lm.pt", randomise(ModRWKV(Config(n_layer=2, n_embd=64, head_size=32, image_encoder="none"))))
        flags = (*flags, "--phase=adapter", f"--init_from={tmp_path / 'lm.pt'}", "--image_encoder=patch")
    assert "several processes" in refusal(learn, tmp_path / "no", data, "--shard")
    learn(tmp_path / "whole", data, *flags)
    if phase == "all":
        two_processes(tmp_path / "parts", data, *flags, "--max_steps=8", "--shard")
        learn(tmp_path / "parts", data, *flags, "--resume")
    else:
        learn(tmp_path / "parts", data, *flags, "--max_steps=8")
        two_processes(tmp_path / "parts", data, *flags, "--resume", "--shard")
    for key in ("loss", "grad_norm"):
        assert column(tmp_path / "parts", key) == pytest.approx(
            column(tmp_path / "whole", key), rel=5e-3 if optimizer == "muon" else 1e-4
        )
    if optimizer == "adamw":
        assert column(tmp_path / "parts", "val_loss")[-1] == pytest.approx(
            column(tmp_path / "whole", "val_loss")[-1], abs=1e-5
        )


def same_log(a, b):
    """Whether two runs have the same losses, gradients and scores to the last bit."""
    return all(column(a, key) == column(b, key) for key in ("step", "loss", "grad_norm", "tokens", "val_loss"))


def test_the_trial_of_memory_changes_nothing(unequal, tmp_path, monkeypatch):
    """Against a run without it, bit for bit; and it takes the longest records of all, not of the first batches."""
    out, data, flags = unequal
    seen = []
    longest = train.Batches.longest

    def recorded(batches):
        seen.append(longest(batches).lengths.tolist())
        return longest(batches)

    monkeypatch.setattr(train.Batches, "longest", recorded)
    said_memory = learn(tmp_path / "with", data, *flags)
    monkeypatch.setattr(train, "try_longest", lambda *_: "no trial")
    learn(tmp_path / "without", data, *flags)
    assert same_log(tmp_path / "with", tmp_path / "without")
    assert re.search(r"memory: .* [0-9.]+ GiB", said_memory)
    batches = train.Batches(read_records(data[0]), train.Train(batch_size=16), load(out))
    lengths = [n for step in range(12) for n in batches[step][0].lengths.tolist()]
    assert len(seen) == 1 and len(seen[0]) == 16 and max(seen[0]) == max(lengths)


@pytest.mark.parametrize("calls", [0, 1, 4], ids=["in the trial", "in the first step", "in a later step"])
def test_running_out_of_memory_is_one_sentence(calls, counting, tmp_path, monkeypatch):
    """As torch raises it on a GPU, and what the CPU's allocator says."""
    loss = ModRWKV.loss
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        left = [calls]

        def fails(*args, **more):
            left[0] -= 1
            if left[0] < 0:
                raise error
            return loss(*args, **more)

        monkeypatch.setattr(ModRWKV, "loss", fails)
        message = refusal(learn, tmp_path / type(error).__name__, counting, "--max_steps=9")
        assert all(flag in message for flag in ("--grad_accum", "--batch_size", "--checkpoint_activations", "--shard"))


@pytest.mark.parametrize("flag, size", [("", 2), ("--eval_batch_size=3", 3)])
def test_evaluation_takes_micro_batches_of_the_training(flag, size, counting, tmp_path, monkeypatch):
    """Counted where samples become batches, of the loss and of generation alike; autocast is the training's."""
    sizes, dtypes = [], set()
    collate, backbone = ModRWKV.collate, ModRWKV.backbone

    def collated(model, samples):
        if isinstance(samples, list) and not model.training:
            sizes.append(len(samples))
        return collate(model, samples)

    def cast(model, x, *args, **more):
        y = backbone(model, x, *args, **more)
        dtypes.add((model.training, model.head(y[0]).dtype))
        return y

    monkeypatch.setattr(ModRWKV, "collate", collated)
    monkeypatch.setattr(ModRWKV, "backbone", cast)
    flags = ("--max_steps=1", "--grad_accum=4", "--dtype=bfloat16", "--num_workers=0", *flag.split())
    learn(tmp_path, (counting[0], counting[0]), *flags)
    assert max(sizes) == size and dtypes == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_workers_change_nothing_and_name_the_record(counting, tmp_path):
    """Against batches prepared in the process itself, bit for bit; and killed between, against both."""
    flags = ("--max_steps=9", "--save_interval=4", "--eval_interval=5", "--grad_accum=2")
    for n in (0, 2):
        learn(tmp_path / f"{n}", counting, *flags, f"--num_workers={n}")
    assert same_log(tmp_path / "0", tmp_path / "2")
    learn(tmp_path / "begun", counting, "--max_steps=4", "--grad_accum=2", "--schedule=constant", "--num_workers=2")
    for n in (0, 2):
        shutil.copytree(tmp_path / "begun", tmp_path / f"on{n}")
        said(train.main, "--resume", f"--out_dir={tmp_path / f'on{n}'}", "--max_steps=9", f"--num_workers={n}")
    assert same_log(tmp_path / "on0", tmp_path / "on2")
    bad = jsonl(tmp_path / "bad.jsonl", talk("<image>?", "a", image="gone.png"), talk("?", "a"))
    message = refusal(learn, tmp_path / "bad", (bad, counting[1]), "--max_steps=9", "--num_workers=2")
    assert "bad.jsonl, line 1" in message and "gone.png" in message


def test_compiled_blocks_learn_the_same(digits, tmp_path, monkeypatch):
    """Against eager blocks; the compilations of a run with all lengths of data/digits are counted, not their speed."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend="aot_eager", **how)
    )
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    data, flags = (
        (digits / "train.jsonl", digits / "train.jsonl"),
        ("--n_layer=4", "--max_steps=24", "--eval_interval=8", "--eval_samples=4"),
    )
    learn(tmp_path / "eager", data, *flags)
    learn(tmp_path / "compiled", data, *flags, "--compile", "--save_interval=12")
    assert 1 <= counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    assert column(tmp_path / "compiled", "loss") == pytest.approx(column(tmp_path / "eager", "loss"), rel=1e-4)
    assert kept(tmp_path / "compiled").keys() == kept(tmp_path / "eager").keys()
    said(train.main, "--resume", f"--out_dir={tmp_path / 'compiled'}", "--max_steps=26")
    torch._dynamo.reset()


def test_presets_and_settings_are_shown(counting, tmp_path, capsys):
    """A preset belongs to its data set, however the folder is spelled; --help shows the values that a run will have."""
    folder = REPO / "data" / "shapes"
    spelled = {train.presets(name) for name in ("shapes", str(folder), f"{folder}/", os.path.relpath(folder))}
    assert spelled == {train.PRESETS["shapes"]} and train.presets("mine.jsonl") == ""
    for flags in (["--data=shapes"], ["--data=digits,shapes", "--n_layer=3"]):
        with pytest.raises(SystemExit):
            train.main([*flags, "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert "[4000]" in words and "so many steps; 0: all at once [100]" in words.replace("each so", "so")
    s, config, given = sample.flags(
        "", train.Train, Config, argv=["--data=shapes", "--n_layer=5"], presets=train.presets
    )
    assert (s.max_steps, config.n_layer, config.prompt_style, given) == (4000, 5, "last", {"data", "n_layer"})
    words = learn(tmp_path, counting, "--max_steps=1")
    [line] = [line for line in words.splitlines() if line.startswith("settings: ")]
    assert "--n_embd=64" in line and "--max_steps=1" in line and "--seed" not in line


def test_a_text_file_trains_without_encoders(tmp_path):
    """Its last twentieth is held out."""
    text = "".join(f"{i} is a number. " for i in range(200))
    (tmp_path / "my.txt").write_text(text)
    words = said(train.main, *TINY, f"--data={tmp_path / 'my.txt'}", "--max_steps=2", f"--out_dir={tmp_path / 'out'}")
    model = load(tmp_path / "out")
    assert len(model.encoder) == 0 and model.config.image_encoder == "none"
    records, val = data_records.read_data([str(tmp_path / "my.txt")], [])
    assert records[0]["text"] + val[0]["text"] == text and len(val[0]["text"]) == len(text) // 20
    assert "1 records to learn from" in words and "--raw" in words


# ---------------------------------------------------------------------------------------------- sample.py


def test_score():
    records = [
        talk("q", "12", "q", " 12 ", task="read"),
        talk("q", "7", task="read"),
        talk("q", "yes", "q", "no", task="even"),
    ]
    result = data_scores.score(records, ["12", "1", "9", "yes", "nope"])
    tasks = result.pop("tasks")
    assert tasks["read"] == {"n": 3, "exact": 1 / 3, "chars": 3 / 5, "majority": 2 / 3}
    assert tasks["even"] == {"n": 2, "exact": 1 / 2, "chars": 5 / 7, "majority": 1 / 2}
    assert result == {"n": 5, "exact": 2 / 5, "chars": 8 / 12, "majority": 2 / 5}
    assert data_scores.score([talk("q", "abc")], [""])["tasks"] == {
        "all": {"n": 1, "exact": 0, "chars": 0, "majority": 1}
    }


@pytest.mark.parametrize("how", [{}, dict(temperature=1.0, top_k=9, top_p=0.9, seed=3)], ids=str)
def test_eval_answers_each_question(how, trained, counting):
    """In batches as one by one and without `ask`; later turns see the true earlier answers."""
    out, _, model = trained
    records, answers, how = read_records(counting[0]), [], how | {"max_new_tokens": 30}
    for r in records:
        turns = record_turns(r)
        for i in range(len(turns)):
            segments = data_records.segments(model, turns[:i] + [(turns[i][0], None)], record_media(r))
            answers.append("".join(answer(model, segments, **how)[0]).strip())
    assert len(set(answers)) > 2 and sample.ask(model, records, 7, **how) == answers
    assert (sample.ask(model, records, 7, **how | {"seed": 4}) != answers) == ("seed" in how)
    printed = said(
        sample.main,
        f"--out_dir={out}",
        f"--eval={counting[0]}",
        "--batch_size=7",
        *(f"--{k}={v}" for k, v in how.items()),
    )
    assert json.loads(printed.splitlines()[-1]) == data_scores.score(records, answers)


def test_chat_keeps_the_state(trained, counting, monkeypatch):
    """Two questions against one pass over the whole conversation, and against --chat, where an error ends nothing."""
    out, _, model = trained
    chat = sample.Chat(out, device="cpu")
    forgotten = chat.ask("Loud?", max_new_tokens=30)
    for n in range(1, 9):
        path = counting[0].parent / f"{n}.png"
        chat.reset()
        first = chat.ask("<image> How many?", image=path, max_new_tokens=30)
        second = chat.ask("Loud?", max_new_tokens=30)
        if second != forgotten:
            break
    assert second != forgotten  # or the test would not see the state
    turns = [("<image> How many?", first), ("Loud?", second)]
    [end] = get_tokenizer("bytes").encode("\n\n")
    *read, (_, ids) = data_records.segments(model, turns, [("image", path)])
    assert ids[-1] == end
    with torch.no_grad():
        _, whole = model([[*read, ("answer", ids)]])
    for x, y in zip(itertools.chain(*chat.state), itertools.chain(*whole), strict=True):
        assert distance(x, y) < 1e-5

    lines = f"<{path}> How many?\n<gone.png>?\nLoud?\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    printed = said(sample.main, f"--out_dir={out}", "--chat", "--max_new_tokens=30")
    assert printed.split("> ")[-4:] == [f"{first}\n", "", f"{second}\n", ""]


def test_chat_shows_the_media_of_its_flags_until_a_question_is_answered(trained, counting, monkeypatch, capsys):
    """As with the prompt given by a flag."""
    path = counting[0].parent / "3.png"
    line = [f"--out_dir={trained[0]}", f"--image={path}", "--max_new_tokens=30"]
    answered = said(sample.main, *line, "--prompt=How many?")
    monkeypatch.setattr(sys, "stdin", io.StringIO("<gone.png>?\nHow many?\n"))
    assert said(sample.main, *line, "--chat").endswith(f"> > {answered}> ")
    assert "gone.png" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert said(sample.main, *line, "--chat", "--prompt=How many?").endswith(f"\n{answered}> ")


@pytest.mark.parametrize("how", [{}, dict(temperature=1.0, top_k=9, top_p=0.9, seed=3)], ids=str)
def test_chat_answers_as_the_command_line_does(how, trained, counting):
    """Against the tokens of model.generate, decoded here."""
    out, _, model = trained
    path, how = str(counting[0].parent / "5.png"), how | {"max_new_tokens": 30}
    flags = [f"--out_dir={out}", *(f"--{name}={value}" for name, value in how.items())]
    seed = {"seed": 1} | how
    for prompt, raw in (("How many?", False), ("User: ", True)):
        media = {} if raw else {"image": path}
        if raw:
            segments = [("text", get_tokenizer("bytes").encode(prompt))]
        else:
            segments = data_records.question(model, prompt, [("image", path)])
        tokens = [token for [token] in model.generate([segments], **seed)]
        written = get_tokenizer("bytes").decode(tokens).decode(errors="replace")
        want = written if raw else written.split("\n\n")[0].lstrip()
        chat = sample.Chat(out, device="cpu")
        assert chat.ask(prompt, **media, raw=raw, **how) == want
        chat.reset()
        pieces = chat.ask(prompt, **media, raw=raw, stream=True, **how)
        pieces = list(pieces)
        assert "".join(pieces) == want and all(pieces)
        shown = [f"--{kind}={file}" for kind, file in media.items()]
        assert said(sample.main, *flags, f"--prompt={prompt}", f"--raw={raw}", *shown) == want + "\n"


@pytest.fixture(scope="session")
def small_chat(tmp_path_factory):
    """A Chat with a small random model that takes pictures, sound and series."""
    path = tmp_path_factory.mktemp("small") / "small.pt"
    save(path, randomise(ModRWKV(SMALL)))
    return sample.Chat(path, device="cpu")


def test_chat_reads_a_conversation_as_its_template_has_it(small_chat, tmp_path, monkeypatch):
    """Two turns with given answers against one pass over the text written out; spaces go at the beginning alone."""
    save(tmp_path / "x.pt", small_chat.model)
    chat = sample.Chat(tmp_path / "x.pt", device="cpu", template="v1")
    script(monkeypatch, codes("  a b\x17 c\x17"))
    assert list(chat.ask("Hi", stream=True)) == ["a", " ", "b"] and chat.ask("Ho") == "c"
    written = "\x16User: Hi\x17Assistant:  a b\x17User: Ho\x17Assistant: c\x17"
    with torch.no_grad():
        _, state = chat.model(torch.tensor([get_tokenizer("bytes").encode(written)]))
    for x, y in zip(itertools.chain(*chat.state), itertools.chain(*state), strict=True):
        assert distance(x, y) < 1e-5


def test_chat_takes_files_and_arrays(small_chat, tmp_path):
    """The same picture, sound or series as a file, as what Pillow or soundfile read of it, as array, tensor or list."""
    x = pixels(1, 20, 30, 3)
    picture = Image.fromarray(x)
    picture.save(tmp_path / "x.png")
    same = {"image": [tmp_path / "x.png", str(tmp_path / "x.png"), picture, x, torch.from_numpy(x)]}
    gray = pixels(2, 20, 30)
    clear = np.dstack([x, 255 - gray])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    tone = np.float32(np.sin(np.arange(4000) / 5) / 2)
    soundfile.write(tmp_path / "x.wav", tone, 16000, "FLOAT")
    same["audio"] = [tmp_path / "x.wav", tone, torch.from_numpy(tone), tone.tolist()]
    points = [math.sin(i / 3) for i in range(60)]
    (tmp_path / "x.csv").write_text("y\n" + "".join("NA\n" if i == 7 else f"{y}\n" for i, y in enumerate(points)))
    points[7] = None
    same["series"] = [str(tmp_path / "x.csv"), points, tuple(points), np.array(points, np.float64)]
    same = list(same.items()) + [("image", [tmp_path / "clear.png", clear]), ("image", [gray, np.dstack([gray] * 3)])]
    blank = {"image": np.zeros_like(x), "audio": np.zeros_like(tone), "series": [1.0, 2.0]}
    for kind, forms in same:
        states = []
        for form in (*forms, [forms[-1]], blank[kind]):
            small_chat.reset()
            small_chat.ask("What?", **{kind: form}, max_new_tokens=2)
            states.append(torch.cat([x.flatten() for x in itertools.chain(*small_chat.state)]))
        *states, other = states
        assert all(distance(state, states[0]) < 1e-5 for state in states) and distance(other, states[0]) > 1e-3
    small_chat.reset()
    several = small_chat.ask("<image> or <image>?", image=[picture, gray], audio=[tone, tone], max_new_tokens=5)
    media = [("image", picture), ("audio", tone), ("image", Image.fromarray(gray)), ("audio", tone)]
    segments = data_records.question(small_chat.model, "<audio>\n<audio>\n<image> or <image>?", media)
    assert several == "".join(answer(small_chat.model, segments, max_new_tokens=5)[0]).lstrip()


def test_chat_forecasts_in_the_units_of_a_series(small_chat, tmp_path):
    """Against model.forecast."""
    points = [100 + 30 * math.sin(i / 3) for i in range(60)]
    (tmp_path / "x.csv").write_text("a,b\n" + "".join(f"{y},{-y}\n" for y in points))
    want = small_chat.model.forecast([points])[0].tolist()
    state = small_chat.state
    for series in (points, np.array(points), f"{tmp_path / 'x.csv'}#a"):
        assert small_chat.forecast(series) == pytest.approx(want) and len(want) == SMALL.horizon
    assert small_chat.forecast(points, 30) == pytest.approx(small_chat.model.forecast([points], 30)[0].tolist())
    assert small_chat.state is state
    assert "horizon=0" in refusal(small_chat.forecast, points, 0)
    for wrong in ([1.0, "x"], np.zeros((3, 4)), None, [], [math.nan], np.array(["x"])):
        assert "series" in refusal(small_chat.forecast, wrong)
    assert "gone.csv" in refusal(small_chat.forecast, "gone.csv")


def test_info(trained, tmp_path):
    """Against the model's own counts and settings, and with an encoder that is not here."""
    out, _, model = trained
    first, parameters, run, changed, same = said(sample.main, f"--out_dir={out}", "--info").splitlines()
    assert str(out) in first and "RWKV-7" in first and "2 layers x 64" in first and first.endswith("takes text, image")
    counts = [p.numel() for p in model.parameters()]
    language = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in LANGUAGE_PARTS)
    assert [int(n.replace(",", "")) for n in re.findall(r"[\d,]+\d", parameters)] == [language, sum(counts) - language]
    assert run.startswith("trained: 100 steps of 8 samples of ")
    assert changed.split(": ")[1].split() == ["--n_embd=64", "--head_size=32"]
    assert {*changed.split(": ")[1].split(), *same.split(": ")[1].split()} == {
        f"--{name}={value}" for name, value in dataclasses.asdict(model.config).items()
    }
    contents = read_checkpoint(out)
    contents["config"] |= {"image_encoder": "not/here", "audio_encoder": "mel"}
    torch.save({"model": contents["model"], "config": contents["config"]}, tmp_path / "x.pt")
    first, _, changed, _ = said(sample.main, f"--out_dir={tmp_path / 'x.pt'}", "--info", "--template=v3").splitlines()
    assert first.endswith("takes text, image, audio") and "--image_encoder=not/here --audio_encoder=mel" in changed
    assert "--template=v3" in changed
    path, _ = released("WorldRWKV, pictures", tmp_path / "x.pth")
    lines = said(sample.main, f"--out_dir={path}", "--info").splitlines()
    assert lines[0].endswith("takes text, image") and "--image_encoder=siglip" in lines[2] and len(lines) == 4


LANGUAGE_PARTS = {"emb", "blocks", "ln_out", "head"}


def test_an_answer_is_streamed(trained, monkeypatch):
    screen, flushed = io.StringIO(), []
    monkeypatch.setattr(screen, "flush", lambda: flushed.append(screen.getvalue()))
    with contextlib.redirect_stdout(screen):
        sample.main([f"--out_dir={trained[0]}", "--prompt=How many?", "--max_new_tokens=30", "--temperature=2"])
    assert len(set(flushed)) > 3


# ---------------------------------------------------------------------------------------------- what the user gets wrong


CUT = stored(noise(40, 40), io.BytesIO(), format="PNG").getvalue()[:2000]


@pytest.mark.parametrize(
    "reader,name,contents",
    [
        (read_records, "x.jsonl", [b"", b"\n\n", b'{"text": "\xff"}\n']),
        (read_records, "x.json", [b"[]", b"{}", b"[{"]),
        (get_tokenizer, "vocabulary", [b"\x80\x02\xff" * 100]),
        (lambda path: load_media(WHOLE, path), "x.png", [b"", b"no picture", CUT]),
        (load, "x.pt", [b"", b"no checkpoint"]),
    ],
)
def test_files_that_cannot_be_read(reader, name, contents, tmp_path):
    paths = [tmp_path, tmp_path / f"missing-{name}"]
    for i, content in enumerate(contents):
        paths.append(tmp_path / f"{i}-{name}")
        paths[-1].write_bytes(content)
    for path in paths:
        assert str(path) in refusal(reader, str(path))


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    """A folder of pictures that are not what they should be, and of good.jsonl with its picture."""
    folder = tmp_path_factory.mktemp("odd")
    jsonl(folder / "good.jsonl", talk("<image>\nHow many?", "one", image="good.png"))
    jsonl(folder / "texts.jsonl", {"text": "no question"})
    bars(folder / "good.png", 1)
    (folder / "cut.png").write_bytes(CUT)
    stored(noise(400, 400), folder / "huge.png")
    return folder


@pytest.mark.parametrize("name", ["gone.png", "good.jsonl", "cut.png", "huge.png", "no record"])
def test_bad_records(name, odd, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # from twice that on, Pillow takes a picture for an attack
    good, bad = (talk("<image>\nHow many?", "one", image=str(odd / x)) for x in ("good.png", name))
    path = jsonl(tmp_path / "bad.jsonl", good, good, bad if "." in name else {"id": 1}, good)
    trains = [*TINY, f"--data={path}", f"--val_data={odd / 'texts.jsonl'}", f"--out_dir={tmp_path / 'out'}"]
    for main, args in (
        (train.main, trains),
        (sample.main, [f"--out_dir={trained[0]}", f"--eval={path}", "--max_new_tokens=3"]),
    ):
        message = refusal(main, args)
        assert f"{path}, line 3" in message and (name in message or name == "no record")
    assert not (tmp_path / "out/ckpt.pt").exists()


COUNTED = "max_steps batch_size grad_accum ctx_len eval_interval eval_samples save_interval n_layer n_embd head_size "
COUNTED += "image_height patch_height patch_width encoder_width conv_stride adapter_scale"
OF_TRAIN = {f"--{name}=0": f"{name}=0" for name in COUNTED.split()}
OF_TRAIN |= {
    "--data=nothing": "--data=nothing digits shakespeare",
    "--data=no/thing": "--data=no/thing",
    "--data=no.jsonl": "no.jsonl",
}
OF_TRAIN |= {"--val_data=no.jsonl": "no.jsonl", "--init_from=no.pt": "no.pt", "--init_from=good.jsonl": "good.jsonl"}
OF_TRAIN |= {
    "--out_dir=good.jsonl": "good.jsonl",
    "--resume": "ckpt.pt",
    "--device=foo": "foo",
    "--tokenizer=foo": "foo gpt2",
}
OF_TRAIN |= {
    "--phase=foo": "--phase=foo adapter",
    "--schedule=foo": "--schedule=foo cosine",
    "--dtype=foo": "--dtype=foo bfloat16",
}
OF_TRAIN |= {
    "--template=foo": "template=foo v3",
    "--image_encoder=foo": "image_encoder=foo patch",
    "--head_size=48": "head_size=48 64",
}
OF_TRAIN |= {f"--{size}": size for size in ("image_height=40", "patch_height=20", "patch_width=6")}
OF_TRAIN |= {"--grad_accum=3": "--batch_size=8 --grad_accum=3", "--learning_rate=1e30": "loss --learning_rate"}
OF_TRAIN |= {"--image_encoder=none": "good.jsonl line good.png"}


@pytest.mark.parametrize("flag", OF_TRAIN)
def test_bad_flags_of_train(flag, odd, tmp_path, monkeypatch):
    monkeypatch.chdir(odd)
    defaults = [
        "--data=good.jsonl",
        "--val_data=texts.jsonl",
        f"--out_dir={tmp_path}",
        "--max_steps=5",
        "--warmup_steps=0",
    ]
    message = refusal(train.main, [*TINY, *defaults, flag])
    assert not [word for word in OF_TRAIN[flag].split() if word not in message]


OF_SAMPLE = {
    "--out_dir=nowhere": "nowhere train.py",
    "--out_dir=.": "ckpt.pt train.py",
    "--out_dir=good.jsonl": "good.jsonl",
}
OF_SAMPLE |= {"": "--prompt --chat --eval", "--prompt=Hi --device=foo": "foo", "--prompt=Hi --tokenizer=foo": "foo"}
OF_SAMPLE |= {"--prompt=<image><image> --image=good.png": "<image>", "--prompt=Hi --image=gone.png": "gone.png"}
OF_SAMPLE |= {
    "--eval=no.jsonl": "no.jsonl",
    "--eval=texts.jsonl": "texts.jsonl",
    "--eval=good.jsonl --batch_size=0": "batch_size",
}
OF_SAMPLE |= {f"--eval=good.jsonl {other}": "--eval" for other in ("--prompt=Hi", "--image=good.png", "--chat")}
OF_SAMPLE |= {"--raw --image=good.png": "--raw", "--raw --chat": "--raw", "--info --eval=good.jsonl": "--info --eval"}
OF_SAMPLE |= {"--prompt=Hi --temperature=-1": "temperature=-1", "--series=good.png": "good.png"}


@pytest.mark.parametrize("line", OF_SAMPLE)
def test_bad_flags_of_sample(line, odd, trained, monkeypatch):
    monkeypatch.chdir(odd)
    message = refusal(sample.main, [f"--out_dir={trained[0]}", *line.split()])
    assert not [word for word in OF_SAMPLE[line].split() if word not in message]


NO_MEDIA = {
    "image": [5, b"x", "gone.png", "x.wav", {"path": "x.png"}, 0.5, [], [[1, 2], [3]], np.zeros((4, 4, 3))],
    "audio": [5, b"x", "gone.wav", "x.png", {"array": []}, [], np.zeros((2, 9)), np.zeros(9, np.int16), [math.nan]],
    "series": [5, object(), b"x", "gone.csv", "x.png", {"a": 1}, [], np.zeros((2, 9)), np.array(["x"]), [None]],
}
NO_MEDIA["image"] += [np.zeros((4, 4, 2), np.uint8), np.zeros((3, 9, 9), np.uint8), np.zeros((0, 4), np.uint8)]
NO_MEDIA["image"] += [torch.zeros(4, 4), np.zeros((1, 4, 4, 3), np.uint8), np.zeros((4, 4), bool), io.BytesIO(b"x")]


@pytest.mark.parametrize("kind", NO_MEDIA)
def test_media_that_are_none(kind, small_chat, tmp_path, monkeypatch):
    """One sentence each, alone or beside a good one, and the state is as it was."""
    monkeypatch.chdir(tmp_path)
    bars(tmp_path / "x.png", 1)
    soundfile.write(tmp_path / "x.wav", np.zeros(999), 16000)
    good = {"image": "x.png", "audio": "x.wav", "series": [1.0, 2.0]}[kind]
    taken = {"image": "a picture is", "audio": "a sound is", "series": "a series "}[kind]
    small_chat.ask("Hi", max_new_tokens=2)
    state = small_chat.state
    for wrong in NO_MEDIA[kind]:
        for media in (wrong, [wrong, good], [good, wrong]):
            message = refusal(small_chat.ask, "What?", **{kind: media}, max_new_tokens=2)
            assert (wrong if isinstance(wrong, str) else taken) in message and len(message) < 250
    assert small_chat.state is state


def test_questions_that_cannot_be_answered(small_chat, trained, monkeypatch):
    """One sentence each, before the first piece is asked for, and the state is as it was."""
    x = pixels(1, 20, 30)
    small_chat.ask("Hi", max_new_tokens=2)
    state = small_chat.state
    wrong = [
        ("2 <image>", dict(prompt="<image><image><image>", image=x)),
        ("1 <audio>", dict(prompt="<audio>", image=x)),
        ("string", dict(prompt=None)),
        ("string", dict(prompt=["Hi"])),
        ("prompt", dict(prompt="  ")),
        ("raw", dict(prompt="Hi", raw=True, image=x)),
        ("temperature", dict(prompt="Hi", temperature=-1)),
        ("max_new_tokens", dict(prompt="Hi", max_new_tokens=0)),
        ("top_k", dict(prompt="Hi", top_k=-1)),
    ]
    for words, question in wrong:
        assert words in refusal(small_chat.ask, **question) and words in refusal(
            small_chat.ask, **question, stream=True
        )
    with pytest.raises(TypeError, match="media"):
        small_chat.ask("What?", media="x.png")
    for media in ("x.png", ["x.png"], [("picture", "x.png")]):
        assert "pairs (kind, path)" in refusal(data_records.question, small_chat.model, "What?", media)
    pieces = small_chat.ask("What?", max_new_tokens=30, temperature=2.0, stream=True)
    next(pieces)
    assert small_chat.state is state  # it was not given to its end
    del pieces
    monkeypatch.setattr(modrwkv, "pick", Mock(side_effect=[torch.tensor(66), torch.tensor(67), MemoryError]))
    with pytest.raises(MemoryError):
        small_chat.ask("What?")
    assert small_chat.state is state
    deaf = sample.Chat(trained[0], device="cpu")
    for sound in (np.zeros(999, np.float32), "x.wav"):
        assert "no audio encoder" in refusal(deaf.ask, "What?", audio=sound)
    assert "series encoder" in refusal(deaf.forecast, [1.0, 2.0])
    for path, words in (("nowhere", "nowhere"), (".", "ckpt.pt")):
        assert words in refusal(sample.Chat, path)
    assert "foo" in refusal(sample.Chat, trained[0], device="foo")


def test_errors_as_the_user_sees_them(odd):
    assert "good.jsonl" in complaint(run([REPO / "sample.py", "--out_dir=good.jsonl", "--prompt=Hi"], cwd=odd))


# ---------------------------------------------------------------------------------------------- a pretend GPU
# Tensors that say they are on "cuda" or "mps" while their numbers are computed on the CPU, with gradients, optimizers and autocast.
# What a GPU refuses raises: tensors of both devices in one operation, the CPU's random generator, float64 on mps.

# Of torch's autocast_mode.h what is used here; and the operations whose result the host needs
AUTOCAST_TO_HALF = set("mm addmm bmm baddbmm mv convolution".split())
AUTOCAST_TO_FLOAT = set("exp log log10 pow rsqrt sum cumsum softplus linalg_vector_norm smooth_l1_loss".split())
AUTOCAST_TO_FLOAT |= set("_softmax _log_softmax nll_loss_forward native_layer_norm native_group_norm".split())
WAITS = set("_local_scalar_dense equal nonzero masked_select _unique2 unique_dim".split())


def each(function, x):
    """x with every leaf of its lists, tuples and dicts replaced by function(leaf); torch's tree_map takes three times as long."""
    if isinstance(x, list | tuple):
        return type(x)([each(function, y) for y in x])
    return {name: each(function, y) for name, y in x.items()} if isinstance(x, dict) else function(x)


class GpuTensor(torch.Tensor):
    """A tensor that holds its `numbers` on the CPU; torch itself believes it to be on meta:0, a device without numbers."""

    @staticmethod
    def __new__(cls, gpu, numbers):
        layout = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype)
        x = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), **layout, device="meta:0")
        x.gpu, x.numbers = gpu, numbers
        return x

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device(self.gpu.kind, 0))
    is_cuda = property(lambda self: self.gpu.kind == "cuda")
    is_mps = property(lambda self: self.gpu.kind == "mps")
    is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        raise RuntimeError(f"{operation}: the pretend GPU of this tensor is no more")

    def __repr__(self):
        return f"{self.numbers}, device='{self.device}'"

    def __reduce_ex__(self, protocol):  # as torch.save stores it
        self.gpu.waits["save"] += 1
        return self.numbers.__reduce_ex__(protocol)

    def tolist(self):
        self.gpu.waits["tolist"] += 1
        return self.numbers.tolist()

    def numpy(self):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")


class PretendGpu(TorchDispatchMode):
    """Computes what is on the pretend device `kind`; `waits` counts, by the reason, how often the host had to wait for it."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.half, self.generators, self.waits = kind, False, {}, Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = operation.__name__.split(".")[0], dict(kwargs or {})
        inputs = []
        each(inputs.append, (args, kwargs))
        mine = [x for x in inputs if isinstance(x, GpuTensor)]
        on_cpu = [x for x in inputs if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
        here = bool(mine)
        if kwargs.get("device"):
            here = self.is_here(torch.device(kwargs["device"]))
            kwargs["device"] = torch.device("cpu") if here else kwargs["device"]
        self.count(name, args, kwargs, inputs, on_cpu, here)
        if mine and name not in ("copy_", "_to_copy"):
            self.refuse_both_devices(name, args, on_cpu)
        if here and any(isinstance(x, torch._C.Generator) and x._cdata not in self.generators for x in inputs):
            raise RuntimeError(f"{name}: Expected a '{self.kind}' device type for generator but found 'cpu'")
        if name == "_fused_sdp_choice":
            return 0  # attention by plain operations: what the CPU would choose is for CPU tensors
        known, dtype = {id(x.numbers): x for x in mine}, self.cast(name, inputs)

        def unwrap(x):
            x = x.numbers if isinstance(x, GpuTensor) else x
            return x.to(dtype) if dtype and isinstance(x, torch.Tensor) and x.is_floating_point() else x

        def wrap(x):
            if not isinstance(x, torch.Tensor) or id(x) in known:  # what is changed in place stays the same tensor
                return known.get(id(x), x)
            if self.kind == "mps" and x.dtype == torch.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
                )
            return GpuTensor(self, x)

        made = operation(*each(unwrap, args), **each(unwrap, kwargs))
        return each(wrap, made) if here else made

    def is_here(self, device):
        """What torch itself makes beside a GpuTensor, it makes on meta:0."""
        if device.type == self.kind and device.index:
            raise RuntimeError(f"{device}: invalid device ordinal")
        return device.type == self.kind or device == torch.device("meta", 0)

    def count(self, name, args, kwargs, inputs, on_cpu, here):
        """Counts what the host waits for: copies, results that it needs, and masks, of which it needs how many are true."""
        mine = any(isinstance(x, GpuTensor) for x in inputs)
        if name in ("copy_", "_to_copy"):
            up = isinstance(args[0], GpuTensor) if name == "copy_" else here
            if up and on_cpu and not kwargs.get("non_blocking", args[2:] == (True,)):
                self.waits["copy to the GPU"] += 1
            if mine and not up:
                self.waits["copy to the CPU"] += 1
        elif mine and name in WAITS:
            self.waits[name] += 1
        elif mine and name.startswith("index"):
            masks = [x for x in inputs[1:] if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
            self.waits["mask"] += len(masks)
            self.waits["copy to the GPU"] += sum(x.dim() > 0 for x in on_cpu)

    def refuse_both_devices(self, name, args, on_cpu):
        """Only single numbers, and the indices of a tensor that is here, may be on the CPU."""
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        wrong = [x for x in on_cpu if x.dim() and not any(x is index for index in indices)]
        if wrong:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found {self.kind}:0 and cpu, {tuple(wrong[0].shape)}"
            )

    def cast(self, name, inputs):
        """The dtype in which an operation has to run, where not in its inputs'. In a backward pass what was saved was not yet cast."""
        floats = {x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()}
        backward = torch._C._current_graph_task_id() != -1 and len(floats) > 1
        to_float = AUTOCAST_TO_FLOAT if self.half else ()
        to_half = AUTOCAST_TO_HALF if self.half or backward else ()
        if torch.float64 in floats:
            return None
        if name.startswith("wkv7") or name in to_float or backward and name.endswith("norm_backward"):
            return torch.float32  # wkv7: the CPU's part of kernel.cu has no other
        if name.removesuffix("_backward") in to_half:
            return torch.get_autocast_dtype(self.kind) if self.half else min(floats, key=lambda dtype: dtype.itemsize)
        return None


CUDA = dict(is_available=True, is_initialized=False, device_count=1, current_device=0, is_bf16_supported=True)
CUDA |= dict(
    get_device_name="pretend",
    mem_get_info=(2**34, 2**34),
    memory_reserved=0,
    memory_allocated=0,
    max_memory_allocated=2**30,
)
CUDA |= dict(_lazy_init=None, synchronize=None, empty_cache=None, reset_peak_memory_stats=None, manual_seed_all=None)


def forget_kernels():
    """What was compiled is looked for again, and what is missing is said again."""
    modrwkv.kernel.cache_clear()
    modrwkv.warn_slow.cache_clear()


@contextlib.contextmanager
def pretend_gpu(kind="cuda", kernel=True, capability=(8, 0)):
    """Inside there is a GPU, for threads and libraries, too; torch.compile does nothing. kernel: whether kernel.cu can be compiled for it."""
    gpu, to, run, set_autocast = PretendGpu(kind), torch.Tensor.to, threading.Thread.run, torch.set_autocast_enabled

    def with_index(x):  # for which torch would ask the driver
        return torch.device(kind, 0) if isinstance(x, str | torch.device) and str(x) == kind else x

    def to_device(self, *args, **how):
        return to(self, *map(with_index, args), **{name: with_index(x) for name, x in how.items()})

    def run_thread(self):
        with gpu:
            run(self)

    def set_autocast_enabled(device, on):
        set_autocast(device, on)
        gpu.half = on if device == kind else gpu.half

    def casts(convolution):  # it compares dtypes before it is an operation
        def function(x, weight, bias=None, *more):
            half = torch.get_autocast_dtype(kind)
            inputs = [z.to(half) if gpu.half and z is not None else z for z in (x, weight, bias)]
            return convolution(*inputs, *more)

        return function

    class Generator(torch._C.Generator):
        def __new__(cls, device="cpu"):
            generator = super().__new__(cls, "cpu")
            if torch.device(device).type == kind:
                gpu.generators[generator._cdata] = generator
            return generator

    with pytest.MonkeyPatch.context() as m:
        for name, value in CUDA.items() if kind == "cuda" else ():
            m.setattr(torch.cuda, name, lambda *args, value=value, **how: value)
        m.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        m.setattr(torch.cuda, "set_device", lambda device: torch.cuda._utils._get_device_index(device))
        m.setattr(torch.version, "cuda", "13.0" if kind == "cuda" else None)
        m.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
        m.setattr(torch, "Generator", Generator)
        m.setattr(torch, "compile", lambda function=None, **how: function)
        m.setattr(torch, "set_autocast_enabled", set_autocast_enabled)
        for name in ("conv1d", "conv2d"):
            m.setattr(F, name, casts(getattr(F, name)))
        m.setattr(torch.Tensor, "to", to_device, raising=False)
        m.setattr(threading.Thread, "run", run_thread)
        m.setattr(torch._C, "_InferenceMode", lambda on: torch.no_grad())  # which takes no tensors of a class like this
        m.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)  # Module.to makes new parameters
        m.setattr(torch.utils._foreach_utils, "_foreach_supported_types", [torch.Tensor, torch.nn.Parameter, GpuTensor])
        if kernel:
            m.setattr(modrwkv, "compile_for_gpu", modrwkv.compile_for_cpu)
        forget_kernels()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy of one on the CPU
        try:
            with gpu:
                yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            forget_kernels()


def test_the_pretend_gpu_refuses_what_a_gpu_refuses():
    """As torch does on CUDA; and is gone afterwards."""
    before = torch.cuda.is_available, torch.Tensor.to, torch.Generator, F.conv1d, modrwkv.compile_for_gpu
    with pretend_gpu():
        x, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
        assert (x.device, x.is_cuda, x.cpu().is_cuda) == (torch.device("cuda:0"), True, False)
        numbers_and_indices = (x + torch.tensor(2.0))[torch.tensor([0, 1])]  # from the CPU are taken
        assert numbers_and_indices.tolist() == [3, 3]
        for wrong in (
            lambda: x + on_cpu,
            lambda: torch.cat([x, on_cpu]),
            lambda: on_cpu.mul_(x),
            lambda: on_cpu[x.long()],
            lambda: x.index_put_((torch.tensor([0, 1]),), on_cpu[:2]),
            lambda: torch.multinomial(x, 1, generator=torch.Generator()),
            lambda: torch.empty(1, device="cuda:1"),
        ):
            with pytest.raises(RuntimeError, match="same device|device type|ordinal"):
                wrong()
        with pytest.raises(ValueError, match="index"):
            torch.cuda.set_device(torch.device("cuda"))
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
    with pretend_gpu("mps"), pytest.raises(TypeError, match="float64"):
        torch.ones(3, device="mps").double()
    assert before == (torch.cuda.is_available, torch.Tensor.to, torch.Generator, F.conv1d, modrwkv.compile_for_gpu)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_pretend_gpu_computes_what_the_cpu_computes(kind, tmp_path):
    """Three steps of AdamW and Muon from the same weights, gradients clipped; the checkpoint of each is the CPU's."""

    def steps(device, path):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv1d(3, 8, 3), torch.nn.LayerNorm(6), torch.nn.GELU(), torch.nn.Linear(6, 4)
        ).to(device)
        optimizers = [torch.optim.AdamW(net.parameters(), fused=True), torch.optim.Muon([net[3].weight])]
        for _ in range(3):
            net(torch.randn(5, 3, 8).to(device)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            for optimizer in optimizers:
                optimizer.step()
            found = [x.grad.cpu() for x in net.parameters()] + [x.detach().cpu() for x in net.parameters()]
            net.zero_grad()
        torch.save((net.state_dict(), [optimizer.state_dict() for optimizer in optimizers]), path)
        return found

    want = steps("cpu", tmp_path / "cpu.pt")
    with pretend_gpu(kind):
        got = steps(kind, tmp_path / "gpu.pt")
    assert all(map(torch.equal, got, want))
    stored = [
        tree_leaves(torch.load(tmp_path / name, map_location="cpu", weights_only=True)) for name in ("gpu.pt", "cpu.pt")
    ]
    got, want = ([x for x in leaves if isinstance(x, torch.Tensor)] for leaves in stored)
    assert all(map(torch.equal, got, want)) and {type(x) for x in got} == {torch.Tensor}
    assert len(got) == len(want) == 6 + 6 * 3 + 1  # weights, AdamW's moments and steps, Muon's momentum


def test_the_pretend_gpu_casts_under_autocast_as_cuda():
    """As torch's documentation lists it: matrix products in bfloat16, norms, softmax and sums in float32, gradients as the weights."""
    net = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    with pretend_gpu():
        net.to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            half = net(torch.ones(2, 4, device="cuda"))
            full = net[1](half.repeat(1, 2)), half.softmax(-1), half.sum(), half.exp()
            with torch.autocast("cuda", enabled=False):
                assert (net[2].weight @ net[2].weight.mT).dtype == torch.float32
        assert half.dtype == torch.bfloat16 and {x.dtype for x in full} == {torch.float32}
        half.sum().backward()
        assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
        with pytest.raises(RuntimeError, match="dtype"):
            half @ net[2].weight


def test_the_pretend_gpu_counts_what_the_host_waits_for():
    """What torch.cuda.set_sync_debug_mode warns of; not a copy with non_blocking."""
    with pretend_gpu() as gpu:
        x = torch.ones(3, device="cuda").add_(1).clamp(max=2)
        x.copy_(torch.zeros(3), non_blocking=True)
        assert not +gpu.waits
        x.sum().item(), float(x[0]), bool(x.any())
        x.tolist(), x.cpu(), x[x > 1], x.nonzero(), x[torch.tensor([1])], torch.tensor([1], device="cuda:0")
    copies = {"copy to the CPU": 1, "copy to the GPU": 2}
    assert +gpu.waits == {"_local_scalar_dense": 3, "tolist": 1, "mask": 1, "nonzero": 1} | copies


SHORT = "--n_layer=2 --n_embd=64 --head_size=32 --encoder_width=32 --image_encoder=none --series_kernel=4".split()
SHORT += "--series_stride=4 --lookback=24 --horizon=8 --level_steps=0 --warmup_steps=1 --schedule=constant".split()
SHORT += "--batch_size=4 --max_steps=2 --dtype=float32 --adam_eps=1e-6 --num_workers=0".split()


@pytest.fixture(scope="session")
def senses(tmp_path_factory):
    """A folder with a few records of each kind: image, audio, series, text and quiet (nothing is asked) .jsonl; x.csv; and
    ckpt.pt, a language model that has learned to be brief."""
    folder = tmp_path_factory.mktemp("senses")
    wave = [math.sin(i / 3) + 5 for i in range(300)]
    for n in range(4):
        bars(folder / f"{n}.png", n + 1)
        soundfile.write(folder / f"{n}.wav", 0.5 * np.sin(np.arange(3200 + 160 * n) * n / 5) + 0.01, 16000)
    records = {
        "image": [talk("<image>\nHow many?", str(n), "Many?", "no", image=f"{n}.png") for n in range(4)],
        "audio": [talk("<audio>", "low", audio=f"{n}.wav") for n in range(4)],
        "series": [{"target": wave[n : n + 60]} for n in range(4)],
        "quiet": [{"text": "there is nothing to answer"}],
        "text": [{"text": "what"}] + [talk("Up?", "no")] * 8,
    }
    records["series"] += [talk("<series>\nUp?", "yes", series=wave[:24])] * 4
    for kind in records:
        jsonl(folder / f"{kind}.jsonl", *records[kind])
    (folder / "x.csv").write_text("y\n" + "".join(f"{y}\n" for y in wave))
    line = *SHORT, f"--data={folder / 'text.jsonl'}", f"--out_dir={folder}", "--device=cpu", "--rwkv=6"
    said(train.main, *line, "--max_steps=10", "--learning_rate=1e-2")
    return folder


ASKED = {  # by the kind of data: one prompt, or a forecast; what the chat is told; what else is scored
    "image": (("--image=0.png", "--prompt=How many?"), "<1.png> How many?", "image.jsonl"),
    "audio": (("--audio=0.wav", "--temperature=1", "--top_k=9"), "<1.wav>", "audio.jsonl"),
    "series": (("--series=x.csv", "--horizon=20"), "<x.csv> Up?", "x.csv"),
    "text": (("--raw", "--prompt=what", "--temperature=1", "--top_p=0.9"), "Up?", "text.jsonl"),
}


def train_resume_and_ask(device, kind, out, *flags):
    """What is logged and printed when a user does that on a device, in the folder of `senses`."""
    line = (*SHORT, f"--device={device}", f"--out_dir={out}", f"--data={kind}.jsonl", f"--val_data={kind}.jsonl")
    line += tuple(flag.format(device=device) for flag in flags)
    said(train.main, *line)
    said(train.main, *line, "--resume", "--max_steps=3")
    prompt, told, file = ASKED[kind]
    ask = f"--out_dir={out}", f"--device={device}", "--max_new_tokens=4"
    printed = [said(sample.main, *ask, *prompt), said(sample.main, *ask, f"--eval={file}")]
    with patch("builtins.input", side_effect=[told, "And now?", ""]):
        printed.append(said(sample.main, *ask, "--chat"))
    return {key: column(out, key) for key in ("loss", "grad_norm", "val_loss")}, printed


PINNED = pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # torch's data loader is not taken in


@PINNED
@pytest.mark.parametrize(
    "device, kind, encoder, flags",
    [
        ("cuda", "image", "patch", "--optimizer=muon --scan=bi --grad_accum=2 --num_workers=1"),
        ("mps", "image", "siglip", "--phase=adapter --init_from=ckpt.pt"),
        ("cuda", "image", "dinov2", "--rwkv=5 --scan=multi --n_layer=4 --cls=last --feature_cache=of_{device}"),
        ("cuda", "audio", "mel", "--rwkv=6 --dtype=bfloat16 --checkpoint_activations"),
        ("cuda", "audio", "whisper", "--phase=adapter --init_from=ckpt.pt --grad_accum=2 --dtype=bfloat16"),
        ("mps", "audio", "wavlm", "--optimizer=muon --feature_cache=of_{device}"),
        ("cuda", "series", "wavenet", "--optimizer=muon --loss_reduction=sample --dtype=bfloat16"),
        ("mps", "series", "timer", "--series_kernel=0 --timer_weights=timer.safetensors --rwkv=5"),
        ("cuda", "text", "none", "--rwkv=5 --l2wrap=0.01 --grad_accum=2 --dtype=bfloat16"),
        ("mps", "text", "none", "--head_size=16"),
    ],
)
def test_a_gpu_trains_resumes_and_answers_as_the_cpu_does(
    device, kind, encoder, flags, senses, folders, tmp_path, monkeypatch
):
    """From the first flag to the score, the checkpoint, --resume, one prompt (or a forecast), --eval and --chat. In bfloat16 within what its
    rounding does to three steps, as a GPU does not round where a CPU does."""
    monkeypatch.chdir(senses)
    for name, value in dict(width=16, PATCH=4, LAYERS=2, HEADS=2, HIDDEN=24).items():
        monkeypatch.setattr(Timer, name, value)
    modrwkv.write("timer.safetensors", randomise(Timer(Config()), 5).state_dict())
    encoder = folders(encoder) if encoder in modrwkv.HUB else encoder
    flags = (*flags.split(), *([] if kind == "text" else [f"--{kind}_encoder={encoder}"]))
    want, printed = train_resume_and_ask("cpu", kind, tmp_path / "cpu", *flags)
    with pretend_gpu(device):
        got, printed_too = train_resume_and_ask(device, kind, tmp_path / "gpu", *flags)
    half = "--dtype=bfloat16" in flags
    for key, rounding in dict(loss=0.03, val_loss=0.03, grad_norm=0.1).items():
        assert got[key] == pytest.approx(want[key], rel=rounding if half else 1e-5) and len(set(want[key])) >= 2
    number = re.compile(r"\d+\.\d+")
    for line, line_too in zip(printed, printed_too, strict=True) if not half else ():
        assert number.sub("#", line_too) == number.sub("#", line)
        assert [*map(float, number.findall(line_too))] == pytest.approx([*map(float, number.findall(line))], rel=1e-4)


@PINNED
@pytest.mark.parametrize(
    "device, programs, reason",
    [
        ("cpu", {}, "there is no C++ compiler; install g++ or clang++"),
        ("cpu", {"g++": "exit 1"}, "cannot compile kernel.cu"),
        ("cuda", {}, "there is no nvcc; pip install"),
        ("cuda", {"nvcc": "exit 1"}, "nvcc cannot compile kernel.cu"),
        ("mps", {}, "not for mps"),
    ],
)
def test_a_machine_without_the_kernel_trains_and_says_why_it_is_slower(
    device, programs, reason, senses, tmp_path, monkeypatch, capsys
):
    """In one line, once; its losses are those of the machine that has it. programs: shell scripts, all that PATH holds."""
    line = *SHORT, f"--data={senses / 'text.jsonl'}", f"--val_data={senses / 'text.jsonl'}"
    said(train.main, *line, "--device=cpu", f"--out_dir={tmp_path / 'fast'}")
    (tmp_path / "bin").mkdir()
    for name, script in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name, value in dict(PATH=tmp_path / "bin", XDG_CACHE_HOME=tmp_path, CUDA_HOME=tmp_path, CXX="").items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setitem(sys.modules, "nvidia", None)  # where pip puts another nvcc
    forget_kernels()
    capsys.readouterr()
    with pretend_gpu(device, kernel=False) if device != "cpu" else contextlib.nullcontext():
        said(train.main, *line, f"--device={device}", f"--out_dir={tmp_path / 'slow'}")
    forget_kernels()
    slower = [line for line in capsys.readouterr().err.splitlines() if "several times slower" in line]
    assert len(slower) == 1 and reason in slower[0]
    for key in ("loss", "grad_norm", "val_loss"):
        assert column(tmp_path / "slow", key) == pytest.approx(column(tmp_path / "fast", key), rel=1e-4)


@PINNED
@pytest.mark.parametrize("device, head_size", [("cpu", 48), ("cpu", 8), ("cuda", 8)])
def test_head_sizes_that_the_kernel_lacks_train(device, head_size, senses, tmp_path, capsys):
    """In PyTorch's operations, as the one line says."""
    data = f"--data={senses / 'text.jsonl'}", f"--val_data={senses / 'text.jsonl'}", f"--out_dir={tmp_path}"
    forget_kernels()
    with pretend_gpu(device) if device != "cpu" else contextlib.nullcontext():
        said(train.main, *SHORT, *data, f"--device={device}", f"--head_size={head_size}", "--n_embd=48")
    losses = column(tmp_path, "loss")
    assert len(losses) == 2 and losses[1] < losses[0]
    assert f"not {head_size}\n" in capsys.readouterr().err


@PINNED
@pytest.mark.parametrize("capability, dtype, skipped", [((8, 0), "bfloat16", 0), ((7, 5), "float16", 3)])
def test_a_gpu_trains_in_the_precision_that_it_has(capability, dtype, skipped, senses, tmp_path):
    """bfloat16 from Ampere on. Before, float16 and its scale of gradients, which is halved at steps in which they overflow, and kept by a
    checkpoint; the first gradient that does not is float32's."""
    data = jsonl(tmp_path / "up.jsonl", *[talk("Up?", "no")] * 4)
    line = *SHORT, f"--data={data}", f"--val_data={senses / 'quiet.jsonl'}"
    said(train.main, *line, "--device=cpu", f"--out_dir={tmp_path / 'cpu'}")
    with pretend_gpu(capability=capability):
        out = f"--out_dir={tmp_path / 'gpu'}"
        words = said(train.main, *line, out, "--device=cuda", "--dtype=auto", "--max_steps=4")
        said(train.main, out, "--resume", "--max_steps=5")
    assert f"cuda:0, {dtype}" in words
    norms, losses = column(tmp_path / "gpu", "grad_norm"), column(tmp_path / "gpu", "loss")
    assert [math.isfinite(x) for x in norms] == [False] * skipped + [True] * (5 - skipped)
    assert norms[skipped] == pytest.approx(column(tmp_path / "cpu", "grad_norm")[0], rel=0.02)
    assert losses[: skipped + 1] == pytest.approx(column(tmp_path / "cpu", "loss")[:1] * (skipped + 1), rel=0.02)
    assert losses[skipped + 1] < 0.8 * losses[0]
    assert kept(tmp_path / "gpu", "scaler").get("scale") == (65536 / 2**skipped if skipped else None)


@PINNED
def test_a_training_step_waits_for_the_gpu_only_where_it_logs(senses, tmp_path):
    """Four steps more are no wait more; with a line in the log for each step there is one for each."""
    data = ",".join(str(senses / f"{kind}.jsonl") for kind in ("image", "audio", "series", "text"))
    line = *SHORT, f"--data={data}", f"--val_data={senses / 'quiet.jsonl'}", "--dtype=bfloat16", "--device=cuda"
    line += "--image_encoder=patch", "--audio_encoder=mel", "--series_encoder=wavenet", "--scan=bi", "--n_layer=1"

    def waits(steps, interval):
        out = f"--out_dir={tmp_path / f'{steps} {interval}'}"
        with pretend_gpu() as gpu:
            said(train.main, *line, out, f"--max_steps={steps}", f"--log_interval={interval}")
        return gpu.waits

    rarely = waits(12, 100)
    assert rarely == waits(8, 100)  # in eight steps each record comes once
    assert waits(12, 1) - rarely == {"tolist": 11}


def test_batches_may_be_on_the_gpu_already(model, folders):
    """FSDP2 moves what a module is given to its device, as it does it; both kinds of encoders."""
    from torch.distributed.utils import _to_kwargs

    pretrained = dict(image_encoder=folders("dinov2"), audio_encoder=folders("whisper"))
    frozen = randomise(ModRWKV(dataclasses.replace(SMALL, **pretrained)))
    eyes, ears = torch.from_numpy(pixels(1, 3, 32, 32)), torch.from_numpy(pixels(2, 9000)) / 255
    samples = {
        copy.deepcopy(model).float(): [
            [picture(0), sound(1), series(2), ("answer", codes("abc"))],
            [("forecast", (series(3, 48)[1], torch.ones(12, 12)))],
        ],
        frozen: [[("image", [eyes]), ("audio", ears), ("answer", codes("abc"))]],
    }
    for net, batch in samples.items():
        want = net.loss(batch).item()
        with pretend_gpu():
            net.to("cuda")
            for given in (batch, net.collate(batch)):
                [[moved]], _ = _to_kwargs((given,), {}, torch.device("cuda", 0), False)
                assert net.loss(moved).item() == pytest.approx(want, rel=1e-5)
