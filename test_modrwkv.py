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
    """(path, model) of a checkpoint of ours, adapter and encoder in it."""
    model = randomise(
        ModRWKV(
            Config(n_layer=2, n_embd=48, head_size=16, template="v2", conv_kernel=4, conv_stride=3, image_trim=False)
        )
    )
    save(tmp_path / "ckpt.pt", model, step=7)
    return tmp_path / "ckpt.pt", model


@torch.no_grad()
def test_saved_and_loaded_is_the_same(checkpoint):
    path, model = checkpoint
    again = load(path)
    assert again.config == model.config and not again.training
    segments = [text("hi"), ("image", torch.zeros(3, 32, 40, dtype=torch.uint8)), text("?")]
    assert torch.equal(again([segments])[0], model([segments])[0])
    assert read_checkpoint(path)["step"] == 7
    assert os.listdir(path.parent) == [path.name]
    assert load(path, template="v3").config == dataclasses.replace(model.config, template="v3")
    for n in (10, len(path.read_bytes()) // 2):
        path.write_bytes(path.read_bytes()[:-n])
        assert str(path) in refusal(load, path)


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
    """Its logits, the next step's loss and what that step learns, by Muon and AdamW, against that version's own figures."""
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


FULL, UNOPENED = (
    OSError(28, "No space left on device"),
    RuntimeError("enforce fail: file not opened"),
)  # the second is torch's


@pytest.mark.parametrize(
    "broken,error", [("os.fsync", FULL), ("torch.save", FULL), ("torch.save", UNOPENED), ("os.replace", FULL)]
)
def test_a_failing_save_leaves_what_was_there(checkpoint, monkeypatch, broken, error):
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


RWKV4 = {
    name: torch.ones(9, 8)
    for name in ("emb.weight", "head.weight", "blocks.0.ffn.key.weight", "blocks.0.att.time_decay")
}
ELSEWHERE = [
    ([1, 2], "no model"),
    (torch.ones(3), "no model"),
    ({"state_dict": {}}, "elsewhere"),
    (RWKV4, "blocks.0.att.r_k"),
]
ELSEWHERE += [
    ({"model": {"wte": torch.ones(2, 2)}, "config": {}}, "emb.weight"),
    ({"model": torch.ones(2), "config": {}}, "elsewhere"),
]


@pytest.mark.parametrize("content,reason", ELSEWHERE)
def test_checkpoints_from_elsewhere(tmp_path, content, reason):
    torch.save(content, tmp_path / "x.pt")
    message = refusal(load, tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in message and reason in message


SIZED = [
    "emb.weight",
    "blocks.0.att.r_k",
    "blocks.0.att.w1",
    "blocks.0.ffn.key.weight",
]  # where a model's sizes are read off
NARROW = ["blocks.0.att.g1", "blocks.0.att.a1", "blocks.1.att.v1"]
MATRICES = ["head.weight", "blocks.1.att.w2", "blocks.1.ffn.value.weight", "adapter.image.mlp.0.weight"]
VECTORS = ["blocks.0.att.x_r", "blocks.0.att.ln_x.weight", "ln_out.bias"]
LOST = [
    "head.weight",
    "blocks.0.ln0.weight",
    "blocks.0.att.a1",
    "blocks.0.att.g2",
    "blocks.1.att.v1",
    "blocks.1.att.v0",
]
LOST += ["blocks.1.att.key.weight", "adapter.image.conv.weight", "encoder.image.proj.bias"]
ADDED = [
    "blocks.0.att.time_decay",
    "blocks.1.att.qkv.weight",
    "blocks.0.ffn.s_emb.weight",
    "adapter.image.extra",
    "foo",
]
CHANGES = {
    "missing": (lambda x: None, SIZED + LOST),
    "too much": (lambda x: torch.ones(3), ADDED),
    "longer": (lambda x: torch.cat([x, x], -1), MATRICES + VECTORS),
    "transposed": (lambda x: x.mT.contiguous(), MATRICES),
    "flat": (lambda x: x.flatten(), SIZED + NARROW),
    "a number": (lambda x: 5, SIZED),
}


@pytest.mark.parametrize("change,name", [(change, name) for change, (_, names) in CHANGES.items() for name in names])
def test_checkpoint_with_a_wrong_tensor(checkpoint, change, name):
    path, _ = checkpoint
    data = torch.load(path)
    data["model"][name] = CHANGES[change][0](data["model"].get(name))
    if data["model"][name] is None:
        del data["model"][name]
    torch.save(data, path)
    message = refusal(load, path)
    assert str(path) in message and name in message


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path):
    Evil.path = str(tmp_path / "ran")
    torch.save({"model": {"emb.weight": Evil()}, "config": {}}, tmp_path / "torch.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"emb.weight": Evil()}))
    for name in ("torch.pt", "pickle.pt"):
        assert name in refusal(load, tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "torch.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


def fla_names(weights):
    """An official RWKV-7 file as flash-linear-attention writes it: the table of its converter, spelled out."""
    z = {"model.embeddings.weight": weights["emb.weight"], "lm_head.weight": weights["head.weight"]}
    z |= {f"model.norm.{s}": weights[f"ln_out.{s}"] for s in ("weight", "bias")}
    for name, x in weights.items():
        if not (at := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.*)", name)):
            continue
        i, part, rest = at.groups()
        if part in ("ln0", "ln1", "ln2"):
            part = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}[part]
        elif part == "ffn":
            x = x.flatten() if rest == "x_k" else x
        elif i == "0" and rest in ("v0", "v1", "v2"):
            continue
        elif re.fullmatch("[wavg][012]", rest):
            x = x.flatten() if rest[1] == "0" else x.T
            part, rest = "attn", f"{rest[0]}_lora.lora." + {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[rest[1]]
        else:
            long = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}
            head, _, tail = rest.partition(".")
            part, rest, x = (
                "attn",
                f"{long.get(head, head)}.{tail}".rstrip("."),
                x.flatten() if head in ("k_k", "k_a") else x,
            )
        z[f"model.layers.{i}.{part}.{rest}"] = x.contiguous()
    return z


def mlp(C, scale, width, first, norm=True, seed=3):
    """Random tensors of ModRWKV's adapter; `first`: what its mlp is called."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g) / shape[-1] ** 0.5
    z = {
        f"{first}.0.weight": normal(scale * C, width),
        f"{first}.0.bias": normal(scale * C),
        f"{first}.2.weight": normal(C, scale * C),
    }
    return (
        z
        | {f"{first}.2.bias": normal(C)}
        | ({"pre_norm.weight": normal(C), "pre_norm.bias": normal(C)} if norm else {})
    )


under = lambda prefix, z: {prefix + name: x for name, x in z.items()}
ones = lambda *names: {name: torch.ones(2) for name in names}
layer = lambda x, z, name: x @ z[f"{name}.weight"].T + z[f"{name}.bias"]
norm = lambda y, weight, bias: (
    (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * weight + bias
)


def vision_adapter(z, x, first):
    y = layer(layer(x, z, f"{first}.0").clamp(min=0), z, f"{first}.2")
    return y + norm(y, z["pre_norm.weight"], z["pre_norm.bias"])


def speech_adapter(z, x):
    x = torch.cat([torch.zeros(2, x.shape[1]), x, torch.zeros(2, x.shape[1])])
    x = (
        torch.stack([sum(z["conv.weight"][:, :, j] @ x[i + j] for j in range(3)) for i in range(0, len(x) - 2, 2)])
        + z["conv.bias"]
    )
    return layer(layer(x, z, "proj.0").clamp(min=0), z, "proj.2")


C_, WIDTH = 128, 24
V1, V2, V3 = (
    dict(template="v1", prompt_style="before"),
    dict(template="v2", prompt_style="before"),
    dict(template="v3", prompt_style="tagged"),
)
SIGLIP, MLP = dict(image_encoder="siglip", conv_kernel=0), mlp(C_, 2, WIDTH, "mlp")
SPEECH = under(
    "adapter.",
    mlp(C_, 2, 2 * C_, "proj", norm=False)
    | {"conv.weight": torch.randn(2 * C_, WIDTH, 3), "conv.bias": torch.randn(2 * C_)},
)
GATED = {
    "gate.weight": torch.randn(WIDTH, WIDTH),
    "o_proj.weight": torch.randn(C_, WIDTH),
    "ln_v.weight": torch.randn(C_),
    "ln_v.bias": torch.randn(C_),
}
FLAT, PROJ, FOUR = mlp(C_, 2, WIDTH, "proj"), torch.randn(C_, WIDTH), mlp(C_, 4, WIDTH, "mlp")
RELEASED = {  # layout: generation, the file of an official one's tensors, what the config says, and the adapter's formula
    "BlinkDL": (7, dict, dict(image_encoder="none"), None),
    "fla": (7, fla_names, dict(image_encoder="none"), None),
    "WorldRWKV, pictures": (
        7,
        lambda z: z | under("modality.world_encoder.", under("adapter.", FLAT) | ones("model.x", "model.y.z")),
        SIGLIP | V1 | dict(adapter_scale=2),
        lambda x: vision_adapter(FLAT, x, "proj"),
    ),
    "WorldRWKV, pictures, July 2025": (
        7,
        lambda z: z | under("modality.world_encoder.adapter.", FOUR),
        SIGLIP | V2 | dict(adapter_scale=4),
        lambda x: vision_adapter(FOUR, x, "mlp"),
    ),
    "WorldRWKV, speech": (
        7,
        lambda z: z | under("modality.world_encoder.", SPEECH | ones("model.x")),
        dict(image_encoder="none", audio_encoder="wavlm", adapter_scale=2) | V1,
        lambda x: speech_adapter({name[8:]: y for name, y in SPEECH.items()}, x),
    ),
    "WorldRWKV, August 2025": (
        7,
        lambda z: under("llm.", z) | under("proj.", MLP) | ones("encoder.model.x"),
        SIGLIP | V3 | dict(adapter_scale=2),
        lambda x: vision_adapter(MLP, x, "mlp"),
    ),
    "WorldRWKV, Hugging Face": (
        7,
        lambda z: (
            {re.sub("^model", "model.llm", name): x for name, x in fla_names(z).items()}
            | under("model.", under("proj.", MLP) | ones("encoder.x"))
        ),
        SIGLIP | V3 | dict(adapter_scale=2),
        lambda x: vision_adapter(MLP, x, "mlp"),
    ),
    "VisualRWKV 6.0": (
        6,
        lambda z: under("rwkv.", z) | {"proj.weight": PROJ} | ones("vit.vision_model.x"),
        dict(
            image_encoder="clip", conv_kernel=0, adapter_kind="linear", prompt_style="sandwich", scan="bi", cls="last"
        ),
        lambda x: x @ PROJ.T,
    ),
    "VisualRWKV 7.00": (
        7,
        lambda z: under("rwkv.", z) | under("proj.", GATED) | ones("vit.dino_featurizer.x"),
        dict(
            image_encoder="dinov2+siglip+sam",
            conv_kernel=0,
            adapter_kind="gated",
            prompt_style="first",
            encoder_width=WIDTH,
        ),
        lambda x: norm(
            (x / (1 + (-x @ GATED["gate.weight"].T).exp())) @ GATED["o_proj.weight"].T,
            GATED["ln_v.weight"],
            GATED["ln_v.bias"],
        ),
    ),
}


class Pretrained(torch.nn.Module):
    """A pretrained encoder's place: no weights of its own in a checkpoint; pixels in rows of WIDTH are its vectors."""

    pretrained, width = True, WIDTH

    def __init__(self, config):
        super().__init__()

    def length(self, data):
        return len(data)

    def columns(self, data):
        return 3

    def collate(self, batch):
        return [torch.cat(batch)]

    def forward(self, x):
        return x


class Whole(Pretrained):
    cls = True


@pytest.fixture
def pretrained(monkeypatch):
    def load_pixels(encoder, path):
        return torch.from_numpy(np.resize(np.asarray(Image.open(path), np.float32), (6, WIDTH)))

    for encoder in (Pretrained, Whole):
        monkeypatch.setitem(LOADERS, encoder, load_pixels)
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
    rwkv, _, config, formula = RELEASED[layout]
    path, weights = released(layout, tmp_path / "x.pth")
    ours = load(path)
    said = capsys.readouterr().err
    assert ("left out" in said) == any(x.shape == (2,) for x in torch.load(path).values()) and said.count("\n") <= 1
    assert ours.config == Config(**config, rwkv=rwkv, n_layer=2, n_embd=C_, tokenizer="rwkv_vocab_v20230424.txt")
    torch.save(weights, tmp_path / "official.pth")
    theirs = (
        official[0](str(tmp_path / "official"), "cpu fp32")
        if rwkv == 7
        else official_before_7(str(tmp_path / "official"))
    )
    assert_logits_agree(ours, theirs, torch.randint(300, (20,), generator=torch.Generator().manual_seed(7)))
    if formula:
        [kind] = ours.adapter
        signals = [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (9, 4)]
        for x, got in zip(signals, adapted(ours.adapter[kind], signals)):
            assert distance(got, formula(x)) < 1e-5
        blind = load(path, template="v2", **{f"{kind}_encoder": "none"})
        assert blind.config.template == "v2" and set(blind.state_dict()) == {
            name for name in ours.state_dict() if not name.startswith("adapter.")
        }


TELLING = (
    "r_k",
    "time_faaaa",
    ".v1",
    "v_lora.lora.0.weight",
    "ffn.key.weight",
)  # sizes are read off them: what does not fit to one is named then
TELLING += ("conv.bias", "gate.weight")  # and without these, it is another layout that the file does not fit


@pytest.mark.parametrize("layout", RELEASED)
def test_released_files_that_do_not_fit(layout, pretrained, tmp_path, monkeypatch):
    """What is missing, too much or misshapen is called as the file calls it."""
    path, _ = released(layout, tmp_path / "x.pth")
    data = torch.load(path)

    def message(**more):
        monkeypatch.setattr(
            "data.released.read_any_file", lambda path: {name: x for name, x in (data | more).items() if x is not None}
        )
        words = refusal(load, path)
        assert words.startswith(str(path))
        return words

    kinds = itertools.cycle((lambda x: None, lambda x: 5, lambda x: torch.ones(*x.shape[:-1], x.shape[-1] + 1)))
    for name, x in data.items():
        if x.shape != (2,) and ".0." not in name.replace("mlp.0", "").replace(
            "proj.0", ""
        ):  # an encoder's are left out
            alike = (
                name.replace("adapter.mlp", "adapter.proj") if "July" in layout else name
            )  # both were its name, at times
            words = message(**{name: next(kinds)(x)})
            assert name in words or alike in words or name.endswith(TELLING)
    for more in ("foo", "blocks.0.ffn.s_emb.weight", "proj.more.weight", "blocks.1.att.qkv.weight"):
        assert f"{more} is not expected" in message(**{more: torch.ones(3)})
    [head] = [name for name in data if name.endswith("head.weight")]
    if head != "head.weight":
        assert f"{head} is there twice, the other time as head.weight" in message(**{"head.weight": data[head]})


QUESTION = [("<image>\nWhat?", "This."), ("Why?", None)]
RELEASED_PROMPTS = {
    "BlinkDL": "User: <image>\nWhat?\n\nAssistant:[ This.\n\n]User: Why?\n\nAssistant:",
    "WorldRWKV, pictures": "<image>\x16User: What?\x17Assistant:[ This.\x17]User: Why?\x17Assistant:",
    "WorldRWKV, pictures, July 2025": "<image>\x16User: What?\x17\x16Assistant:[ This.\x17]\x16User: Why?\x17\x16Assistant:",
    "WorldRWKV, August 2025": "\x16User:{<image>}What?\x17\x16Assistant:[This.\x17]\x16User:Why?\x17\x16Assistant:",
    "VisualRWKV 6.0": "User: What?\nWhy?\n<image>\nWhat?\n\nAssistant:[ This.\n\n]User: Why?\n\nAssistant:",
    "VisualRWKV 7.00": "User: <image>\nWhat?\n\nAssistant:[ This.\n\n]User: Why?\n\nAssistant:",
}


@pytest.mark.parametrize("layout", RELEASED_PROMPTS)
def test_released_models_are_asked_as_they_were_trained(layout, pretrained, tmp_path):
    config = dataclasses.replace(load(released(layout, tmp_path / "x.pth")[0]).config, tokenizer="bytes")
    tags = {(65530,): ("text", codes("{")), (65531,): ("text", codes("}"))}
    segments = [
        tags.get(tuple(data), (kind, data)) if kind == "text" else (kind, data)
        for kind, data in conversation(config, QUESTION, iter([picture(0)]))
    ]
    assert spell(segments) == RELEASED_PROMPTS[layout]


def test_where_several_pictures_go_before_a_turn_and_in_tags():
    ask = lambda style, *turns: conversation(
        dataclasses.replace(SMALL, template="v1", prompt_style=style), turns, iter([("image", "A"), ("image", "B")])
    )
    want = "<A><B>\x16User: Same as ?\x17Assistant:[ No.\x17]User: Why?\x17Assistant:"
    assert spell(ask("before", ("<image>Same as <image>?", "No."), ("Why?", None))) == want
    assert (
        spell(ask("before", ("A?", "No."), ("B <image>?", None)))
        == "\x16User: A?\x17Assistant:[ No.\x17]<A>User: B ?\x17Assistant:"
    )
    kinds = [
        (kind, data) if kind == "image" or data[0] > 9999 else kind
        for kind, data in ask("tagged", ("Is <image> like <image>?", None))
    ]
    open, close = ("text", [65530]), ("text", [65531])
    assert kinds == ["text", open, ("image", "A"), close, open, ("image", "B"), close, "text"]


@pytest.mark.parametrize("cls", ["first", "last"])
@pytest.mark.parametrize("scan", ["bi", "multi"])
@torch.no_grad()
def test_the_vector_of_the_whole_picture_is_not_scanned(cls, scan, monkeypatch):
    """Against blocks that are given the patches turned round, and the other vectors where they are."""
    monkeypatch.setitem(modrwkv.ENCODERS["image"], "clip", Whole)
    config = dataclasses.replace(
        SMALL, image_encoder="clip", adapter_kind="linear", conv_kernel=0, n_layer=4, scan=scan, cls=cls
    )
    model = randomise(ModRWKV(config)).double()
    vectors = torch.randn(
        7, WIDTH, generator=torch.Generator().manual_seed(1)
    ).double()  # the whole picture, then two rows of three patches
    got, _ = model([[text("ab"), ("image", vectors), text("cd")]])
    whole, patches = (model.adapter["image"].o_proj(x) for x in vectors.split([1, 6]))
    before, after = (model.emb(torch.tensor(codes(string))) for string in ("ab", "cd"))
    before, after = (torch.cat([before, whole]), after) if cls == "first" else (before, torch.cat([whole, after]))
    x, v_first = torch.cat([before, patches, after])[None], None
    turns = ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0])
    for block, turn in zip(model.blocks, (turns if scan == "multi" else turns[:2]) * 2):
        order = [*range(len(before)), *(len(before) + i for i in turn), *range(len(before) + 6, x.shape[1])]
        y, v, _ = block(x[:, order], None if v_first is None else v_first[:, order], (None, None, None), None)
        x = torch.empty_like(x)
        x[:, order] = y
        if v_first is None:
            v_first = torch.empty_like(v)
            v_first[:, order] = v
    assert distance(got, model.head(model.ln_out(x))) < 1e-9
    config = dataclasses.replace(
        config, conv_kernel=2, conv_stride=2
    )  # windows end on the whole picture and the patches 1, 3, 5; or on 0, 2, 4 and it
    *_, orders = ModRWKV(config).double().fuse([[("image", vectors)]])
    assert scan == "bi" or orders[2].tolist() == [
        [0, 2, 1, 3]
    ]  # by columns: the patches 3, 1, 5 behind it; or 0, 4, 2 before it


@pytest.mark.parametrize("kind,encoder", [("image", "clip"), ("audio", "microsoft/wavlm-large")])
def test_encoders_of_released_files_are_told_by_their_width(kind, encoder, tmp_path):
    adapter = mlp(64, 2, 1024 if kind == "image" else 128, "proj", norm=kind == "image")
    adapter |= {"conv.weight": torch.ones(128, 1024, 3), "conv.bias": torch.ones(128)} if kind == "audio" else {}
    torch.save(official_weights(1, 64) | under("modality.world_encoder.adapter.", adapter), tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth")["config"][f"{kind}_encoder"] == encoder


def test_towers_that_are_not_here(tmp_path):
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


def test_folders_of_safetensors(pretrained, tmp_path):
    weights = {name: x.bfloat16() for name, x in official_weights(2, C_).items()}
    want = {
        name: x.float() for name, x in weights.items() if not name.startswith("blocks.0.att.v") or name[-1] not in "012"
    }
    export = RELEASED["WorldRWKV, Hugging Face"][1](weights)
    for i, (z, shards) in enumerate(itertools.product((fla_names(weights), export), (1, 3))):
        folder = hf_folder(tmp_path / f"{i}", z, shards)
        for path in [folder, *folder.glob("model.safetensors")]:
            own = load(path).state_dict()
            assert all(torch.equal(own[name], x) for name, x in want.items())
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


def test_without_safetensors_a_word_of_what_to_install(tmp_path, monkeypatch):
    folder = hf_folder(tmp_path / "x", fla_names(official_weights(1, 64)))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert 'pip install -e ".[pretrained]"' in refusal(load, folder)


@torch.no_grad()
def test_flash_linear_attention_reads_what_is_converted_and_the_other_way_round(tmp_path):
    """Against `rwkv7-hf`, a model of its own under the same names."""
    rwkv7_hf = pytest.importorskip("rwkv7_hf")
    torch.save(official_weights(3, C_, ranks=(16, 24, 8, 40)), tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "fla")
    theirs = rwkv7_hf.RWKV7ForCausalLM.from_pretrained(tmp_path / "fla").eval()
    tokens = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(7))
    assert (load(tmp_path / "x.pth")(tokens)[0] - theirs(tokens).logits).abs()[
        :, 1:
    ].max() < 1e-4  # the first token: see assert_logits_agree
    randomise(theirs, seed=5).save_pretrained(tmp_path / "saved")
    assert distance(load(tmp_path / "saved")(tokens)[0][:, 1:], theirs(tokens).logits[:, 1:]) < 1e-5


bits = lambda x: x.contiguous().view(torch.uint8)
CHAINS = ["a.pth", "a.pt a.pth", "fla a.pth", "a.safetensors a.pt a.pth", "fla a.pt b.safetensors b.pt a.pth"]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("n_layer,dtype", [(1, torch.float16), (2, torch.bfloat16), (3, torch.float32)])
def test_conversions_change_no_bit(chain, n_layer, dtype, tmp_path):
    weights = {name: x.to(dtype) for name, x in official_weights(n_layer, 64, ranks=(16, 24, 8, 40)).items()}
    weights["blocks.0.att.w0"][0, 0, :3] = torch.tensor([math.nan, -0.0, 6e-8])
    weights["blocks.0.att.w0"] = weights["blocks.0.att.w0"].float()  # as some have it, beside the rest in bfloat16
    torch.save(weights, tmp_path / "in.pth")
    steps = ["in.pth", *chain.split()]
    for source, target in itertools.pairwise(steps):
        convert(tmp_path / source, tmp_path / target)
    after = torch.load(tmp_path / "a.pth")
    assert set(after) == {
        name for name in weights if not re.match(r"blocks\.0\.att\.v[012]", name)
    }  # which are unused there
    assert all(
        x.dtype == weights[name].dtype and x.shape == weights[name].shape and torch.equal(bits(x), bits(weights[name]))
        for name, x in after.items()
    )
    assert all(
        f"{target} exists" in refusal(convert, tmp_path / "in.pth", tmp_path / target)
        for target in steps
        if target != "fla"
    )


def test_convert_by_command(tmp_path):
    torch.save(official_weights(1, 64), tmp_path / "in.pth")
    done = run(["-m", "data.released", tmp_path / "in.pth", tmp_path / "fla"], REPO)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(os.listdir(tmp_path / "fla")) == ["config.json", "model.safetensors"]


@torch.no_grad()
def test_modrwkv_alone_loads_its_own_and_blinkdls_checkpoints(tmp_path):
    """modrwkv.load, against data.released.load; it names that one for other layouts."""
    save(tmp_path / "ckpt.pt", randomise(ModRWKV(SMALL)))
    torch.save(weights_of(7, 2, 64), tmp_path / "x.pth")
    for path in (tmp_path, tmp_path / "ckpt.pt", tmp_path / "x.pth"):
        ours, other = modrwkv.load(path), load(path)
        assert ours.config == other.config and not ours.training
        assert all(torch.equal(x, other.state_dict()[name]) for name, x in ours.state_dict().items())
    torch.save({"llm.emb.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
    assert "data.released" in refusal(modrwkv.load, tmp_path / "other.pth")
    assert "cut short" in refusal(modrwkv.load, jsonl(tmp_path / "x.pt", {}))
    assert "No such file" in refusal(modrwkv.load, tmp_path / "none")


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
    config = Config(n_layer=1, n_embd=64, tokenizer=tokenizer, image_encoder="none")
    size = len(ModRWKV(config).emb.weight)
    try:
        assert size == get_tokenizer(tokenizer).vocab_size
    except InputError:
        assert (tokenizer, size) == ("gpt2", 50257)  # its vocabulary could not be fetched


@pytest.mark.parametrize("rwkv", [5, 6])
def test_earlier_generations_convert_to_ours_and_back(rwkv, tmp_path):
    weights = {name: x.bfloat16() for name, x in weights_of(rwkv, 2, 64).items()}
    torch.save(weights, tmp_path / "in.pth")
    for source, target in itertools.pairwise(("in.pth", "a.pt", "b.pth")):
        convert(tmp_path / source, tmp_path / target)
    after = torch.load(tmp_path / "b.pth")
    assert after.keys() == weights.keys() and all(torch.equal(x, weights[name]) for name, x in after.items())
    assert f"RWKV-{rwkv}" in refusal(convert, tmp_path / "in.pth", tmp_path / "fla")


@pytest.mark.parametrize("layout", [layout for layout in RELEASED if RELEASED[layout][3]])
def test_released_models_convert_to_ours(layout, pretrained, tmp_path, capsys):
    path, weights = released(layout, tmp_path / "x.pth")
    convert(path, tmp_path / "ckpt.pt")
    want, got = load(path), load(tmp_path)  # a folder of ours
    assert got.config == want.config
    assert all(torch.equal(x, got.state_dict()[name]) for name, x in want.state_dict().items()) and len(
        got.state_dict()
    ) == len(want.state_dict())
    capsys.readouterr()
    convert(tmp_path / "ckpt.pt", tmp_path / "y.pth")
    assert "left out" in capsys.readouterr().err
    assert all(torch.equal(x, weights[name]) for name, x in torch.load(tmp_path / "y.pth").items())


def test_a_released_file_is_sampled_from_as_the_flags_say(tmp_path, monkeypatch):
    path, _ = released("WorldRWKV, pictures", tmp_path / "x.pth")
    asked = Mock(side_effect=conversation)
    monkeypatch.setattr("data.records.conversation", asked)
    own = {"tokenizer": "bytes", "template": "v3", "prompt_style": "last", "image_encoder": "none"}
    said(
        sample.main,
        f"--out_dir={path}",
        "--prompt=Hi",
        "--max_new_tokens=2",
        *(f"--{name}={value}" for name, value in own.items()),
    )
    config = dataclasses.asdict(asked.call_args.args[0])
    assert own.items() <= config.items() and config["adapter_scale"] == 2


@pytest.mark.parametrize("layout", ["fla", "WorldRWKV, pictures", "VisualRWKV 6.0"])
def test_training_starts_from_released_files(layout, pretrained, counting, tmp_path):
    path, _ = released(layout, tmp_path / "x.pth")
    eyes = {"image_encoder": "patch"} if layout == "fla" else {}
    own = (
        "--n_embd=128",
        "--head_size=64",
        f"--rwkv={RELEASED[layout][0]}",
        "--tokenizer=bytes",
        *(f"--{name}={value}" for name, value in eyes.items()),
    )
    learn(tmp_path / "out", counting, f"--init_from={path}", *own, "--max_steps=1")
    before, after = load(path, tokenizer="bytes", **eyes), load(tmp_path / "out")
    assert after.config == before.config
    names = [name for name in before.state_dict() if name.startswith("head" if eyes else ("head", "adapter"))]
    assert names and all(0 < distance(after.state_dict()[name], before.state_dict()[name]) < 0.5 for name in names)


RIGHT = {
    "": {},
    "--seed=-2": {"seed": -2},
    "--seed 4 --beta1 1e-3": {"seed": 4, "beta1": 1e-3},
    "--beta1=1": {"beta1": 1.0},
}
RIGHT |= {
    "--data=": {"data": ""},
    "--data='a=b c'": {"data": "a=b c"},
    "--resume --seed=1": {"resume": True, "seed": 1},
}
RIGHT |= {"--resume=1": {"resume": True}, "--resume yes": {"resume": True}, "--resume=False": {"resume": False}}


@pytest.mark.parametrize("line", RIGHT)
def test_flags(line):
    config, settings, names = sample.flags(
        "about", Config, train.Train, argv=[*shlex.split(line), "--n_layer=5", "--image_trim=no"]
    )
    assert settings == dataclasses.replace(train.Train(), **RIGHT[line])
    assert config == dataclasses.replace(Config(), n_layer=5, image_trim=False)
    assert names == {*RIGHT[line], "n_layer", "image_trim"}


WRONG = {
    "--seed=four": "--seed four",
    "--beta1=x": "--beta1 x",
    "--resume=maybe": "--resume maybe",
    "--seed": "--seed",
    "stray": "stray",
}
WRONG |= {"--sede=4": "--sede --seed", "--n_layers 4": "--n_layers --n_layer", "--qwertz": "--qwertz"}
WRONG |= {"--see=4": "--see --seed"}  # no abbreviations: a typo must not set something


@pytest.mark.parametrize("line", WRONG)
def test_wrong_flags(capsys, line):
    with pytest.raises(SystemExit) as e:
        sample.flags("about", Config, train.Train, argv=line.split())
    message = capsys.readouterr().err
    assert e.value.code == 2 and all(word in message for word in WRONG[line].split()) and message.count("\n") == 1


def test_help_lists_every_flag(capsys):
    odd = dataclasses.make_dataclass("Odd", [("rate", float, modrwkv.setting(0.5, "in % of something"))])
    with pytest.raises(SystemExit) as e:
        sample.flags("what it is about", Config, train.Train, odd, argv=["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert not e.value.code and "what it is about" in out
    for field in [field for cls in (Config, train.Train, odd) for field in dataclasses.fields(cls)]:
        assert (
            f"--{field.name} " in out
            and " ".join(field.metadata["help"].split()) in out
            and f"[{field.default}]" in out
        )


# ---------------------------------------------------------------------------------------------- data sets


ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}
contents = lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- pretrained encoders, against the library they come from


def folder_of(family, folder):
    """A folder with a tiny random encoder of a family, as transformers writes it."""
    import transformers as hf

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    seen = small | dict(intermediate_size=64, patch_size=8)
    waves = small | dict(
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_buckets=32,
        max_bucket_distance=64,
    )
    stable = dict(feat_extract_norm="layer", do_stable_layer_norm=True)
    ears = dict(
        vocab_size=64,
        num_mel_bins=16,
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
    )
    ears |= dict(
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_source_positions=100,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
    )
    ears |= dict(eos_token_id=2, decoder_start_token_id=3, begin_suppress_tokens=None)
    short = dict(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    model, preparation = {
        "siglip": (
            lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**seen, image_size=32)),
            lambda: hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        ),
        "siglip, both towers": (
            lambda: hf.SiglipModel(
                hf.SiglipConfig(
                    text_config=small | dict(vocab_size=64, intermediate_size=64),
                    vision_config=seen | dict(image_size=32),
                )
            ),
            lambda: hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=2),
        ),
        "clip": (
            lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**seen, image_size=32, projection_dim=16)),
            lambda: hf.CLIPImageProcessorPil(**short),
        ),
        "dinov2": (
            lambda: hf.Dinov2Model(hf.Dinov2Config(**small, patch_size=8, image_size=48, mlp_ratio=2)),
            lambda: hf.BitImageProcessorPil(**short),
        ),
        "dinov2, finer": (
            lambda: hf.Dinov2Model(hf.Dinov2Config(**small, patch_size=4, image_size=32, mlp_ratio=2)),
            lambda: hf.BitImageProcessorPil(**short),
        ),
        "wavlm": (
            lambda: hf.WavLMModel(hf.WavLMConfig(**waves)),
            lambda: hf.Wav2Vec2FeatureExtractor(do_normalize=False),
        ),
        "wavlm, large": (
            lambda: hf.WavLMModel(hf.WavLMConfig(**waves, **stable)),
            lambda: hf.Wav2Vec2FeatureExtractor(do_normalize=True),
        ),
        "whisper": (
            lambda: hf.WhisperModel(hf.WhisperConfig(**ears)),
            lambda: hf.WhisperFeatureExtractor(feature_size=16, chunk_length=2),
        ),
    }[family]
    with torch.random.fork_rng():
        torch.manual_seed(len(family))
        randomise(model()).save_pretrained(folder)
    preparation().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    pytest.importorskip("transformers")
    return functools.cache(lambda family: folder_of(family, tmp_path_factory.mktemp("encoder")))


SIZES = [(32, 32), (57, 40), (40, 90), (41, 300), (7, 9)]


@pytest.mark.parametrize("family", ["siglip", "siglip, both towers", "clip", "dinov2"])
@torch.no_grad()
def test_pretrained_eyes_see_what_the_library_sees(family, folders):
    import transformers as hf

    folder = folders(family)
    encoder = modrwkv.read_pretrained("image", folder)
    kinds = {"siglip": hf.SiglipVisionModel, "clip": hf.CLIPVisionModel, "dinov2": hf.Dinov2Model}
    theirs = kinds[family.split(",")[0]].from_pretrained(folder, dtype=torch.float32)
    processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pictures = [noise(*size) for size in SIZES] + [noise(50, 60).convert(mode) for mode in ("L", "P")]
    want = theirs(**processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")).last_hidden_state
    signals = [load_media(encoder, picture) for picture in pictures]
    for x, got in zip(want, features(encoder.double(), signals), strict=True):
        assert got.shape == (16 + encoder.cls, 32) and distance(got, x) < 1e-5
    assert encoder.width == 32 and encoder.cls == (family in ("clip", "dinov2")) and encoder.columns(signals[0]) == 4
    assert {encoder.length(x) for x in signals} == {16 + encoder.cls}


@torch.no_grad()
def test_several_eyes_side_by_side(folders):
    parts = [modrwkv.read_pretrained("image", folders(family)) for family in ("dinov2", "siglip")]
    both = modrwkv.read_pretrained("image", f"{folders('dinov2')}+{folders('siglip')}")
    got = features(both, [load_media(both, noise(50, 40)), load_media(both, noise(30, 90))])
    for y, size in zip(got, ((50, 40), (30, 90))):
        dino, siglip = (features(part, [load_media(part, noise(*size))])[0] for part in parts)
        assert distance(y, torch.cat([dino[1:], siglip], 1)) < 1e-6
    assert (both.width, both.cls, both.length(None), both.columns(None)) == (64, False, 16, 4)
    message = refusal(modrwkv.read_pretrained, "image", f"{folders('dinov2, finer')}+{folders('siglip')}")
    assert "8 x 8" in message and "4 x 4" in message


def whisper_alone(folder, x):
    """What the library makes of samples, part by part of two seconds, without what it hears in the silence behind them."""
    import transformers as hf

    prepare, model, found = (
        hf.WhisperFeatureExtractor.from_pretrained(folder),
        hf.WhisperModel.from_pretrained(folder).get_encoder(),
        [],
    )
    for start in range(0, len(x), 32000):
        inputs = prepare(
            x[start : start + 32000].numpy(), sampling_rate=16000, return_attention_mask=True, return_tensors="pt"
        )
        n = int(inputs["attention_mask"].sum()) // 2 + 1
        found.append(model(inputs["input_features"]).last_hidden_state[0, :n])
    return torch.cat(found)


def wavlm_alone(folder, x):
    import transformers as hf

    inputs = hf.AutoFeatureExtractor.from_pretrained(folder)(x.numpy(), sampling_rate=16000, return_tensors="pt")
    return hf.WavLMModel.from_pretrained(folder, dtype=torch.float32)(inputs["input_values"]).last_hidden_state[0]


@pytest.mark.parametrize("family", ["wavlm", "wavlm, large", "whisper"])
@torch.no_grad()
def test_pretrained_ears_hear_in_a_batch_what_the_library_hears_alone(family, folders):
    encoder = modrwkv.read_pretrained("audio", folders(family))
    encoder.train()  # dropout and masks in time would show
    sounds = [
        torch.randn(n, generator=torch.Generator().manual_seed(n)) / 5 + 0.1
        for n in (400, 1000, 9000, 16000, 32000, 32161, 70000)
    ]
    signals = [load_media(encoder, x) for x in sounds]
    alone = whisper_alone if family == "whisper" else wavlm_alone
    for x, prepared, got in zip(sounds, signals, features(encoder, signals), strict=True):
        assert distance(got, alone(folders(family), x)) < 1e-5
        assert len(got) == encoder.length(prepared)
    assert (
        features(encoder, [load_media(encoder, sounds[0][:9])])[0].isfinite().all()
    )  # shorter than what the first vector sees


def test_pretrained_ears_count_as_published(folders):
    """Frames of WavLM and positions of Whisper by [1]'s code."""
    wavlm = modrwkv.read_pretrained("audio", folders("wavlm"))
    assert [wavlm.length(torch.zeros(n)) for n in (400, 1000, 9000, 16000, 480000)] == [1, 2, 27, 49, 1499]
    whisper = modrwkv.read_pretrained("audio", folders("whisper"))
    whisper.window = 480000
    assert [whisper.length(torch.zeros(n)) for n in (160, 161, 1000, 16000, 480000, 480160)] == [
        1,
        2,
        4,
        51,
        1500,
        1501,
    ]


def test_pretrained_encoders_stay_as_they_are(folders, tmp_path):
    model = randomise(
        ModRWKV(dataclasses.replace(SMALL, image_encoder=folders("dinov2"), audio_encoder=folders("wavlm")))
    ).train()
    names = [*model.state_dict(), *(name for name, _ in model.named_parameters())]
    assert (
        not any(name.startswith(("encoder.image", "encoder.audio")) for name in names)
        and "adapter.image.conv.weight" in names
    )
    inner = model.encoder["image"].models[0]
    assert not inner.training and not any(p.requires_grad for p in inner.parameters())
    model.double()
    assert next(inner.parameters()).dtype == torch.float64  # and so it is moved to another device
    noise(40, 50).save(tmp_path / "x.png")
    model.loss(
        [record_sample(model, {"_at": "", "_folder": str(tmp_path), **talk("<image>?", "x", image="x.png")})]
    ).backward()
    assert model.adapter["image"].conv.weight.grad.abs().max() > 0 and all(p.grad is None for p in inner.parameters())


def test_folders_that_hold_no_encoder(folders, tmp_path):
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
    weights, preparation = cut / "model.safetensors", cut / "preprocessor_config.json"
    whole, said = modrwkv.read_safetensors(str(weights)), json.loads(preparation.read_text())
    for change, word in (
        ({"size": None}, "no size"),
        ({"image_mean": None}, "no image_mean"),
        ({"crop_size": 24}, "32 x 32, not 24 x 24"),
    ):
        preparation.write_text(json.dumps({k: v for k, v in (said | change).items() if v is not None}))
        message = refusal(modrwkv.read_pretrained, "image", str(cut))
        assert message.startswith(f"--image_encoder={cut}: ") and word in message
    preparation.write_text(json.dumps(said))
    modrwkv.write(
        str(weights), {name: x for name, x in whole.items() if "layers.1.mlp.fc1" not in name}
    )  # the library fills these with noise
    message = refusal(modrwkv.read_pretrained, "image", str(cut))
    assert message.startswith(f"--image_encoder={cut}: ") and "layers.1.mlp.fc1.bias and 1 more" in message
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(cut) in refusal(modrwkv.read_pretrained, "image", str(cut))


@torch.no_grad()
def test_preparations_as_older_folders_have_them(folders, tmp_path):
    """Sizes as numbers and no rescale_factor; and a folder with a + in its name."""
    import transformers as hf

    folder = Path(shutil.copytree(folders("clip"), tmp_path / "c++"))
    said = json.loads((folder / "preprocessor_config.json").read_text())
    old = {
        name: said[name]
        for name in ("do_center_crop", "do_normalize", "do_resize", "image_mean", "image_std", "resample")
    }
    old |= {"crop_size": 32, "size": 40, "feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    encoder, processor = modrwkv.read_pretrained("image", str(folder)), hf.CLIPImageProcessorPil.from_pretrained(folder)
    want = hf.CLIPVisionModel.from_pretrained(folder)(
        **processor([noise(57, 40)], return_tensors="pt")
    ).last_hidden_state[0]
    assert distance(features(encoder, [load_media(encoder, noise(57, 40))])[0], want) < 1e-5


def test_the_code_of_a_folder_is_not_run(tmp_path, monkeypatch):
    """Even if the library asked whether to, and the answer were yes."""
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}))
    code = f"import transformers\nopen({str(tmp_path / 'ran')!r}, 'w')\nclass Odd(transformers.PretrainedConfig):\n    model_type = 'odd'\n"
    (tmp_path / "odd.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert refusal(modrwkv.read_pretrained, "image", str(tmp_path)).startswith(f"--image_encoder={tmp_path}: ")
    assert not (tmp_path / "ran").exists()


def test_a_model_finds_its_encoder_again(folders, tmp_path, monkeypatch):
    """Trained with a cache of features and without, stored, loaded, moved."""
    shutil.copytree(folders("dinov2"), tmp_path / "eyes")
    for i in range(8):
        noise(40 + i, 50).save(tmp_path / f"{i}.png")
    data = jsonl(tmp_path / "x.jsonl", *(talk("<image>\nWhich?", f"{i}", image=f"{i}.png") for i in range(8)))
    flags = (
        f"--image_encoder={tmp_path / 'eyes'}",
        "--conv_kernel=0",
        "--max_steps=4",
        "--batch_size=8",
        "--level_steps=0",
        "--warmup_steps=1",
        "--num_workers=0",
    )
    learn(tmp_path / "plain", (data, data), *flags)
    loaded = []
    monkeypatch.setitem(
        LOADERS, modrwkv.Vision, lambda encoder, path: loaded.append(path) or load_pretrained_picture(encoder, path)
    )
    for out in ("cold", "warm"):
        learn(tmp_path / out, (data, data), *flags, f"--feature_cache={tmp_path / 'cache'}")
    assert len([path for path in loaded if path.endswith("0.png")]) == 1  # in both runs, training and scoring
    curves = [column(tmp_path / out, "loss") for out in ("plain", "cold", "warm")]
    assert curves[1] == curves[2] and curves[0] == pytest.approx(curves[1], rel=2e-3) and curves[0] != curves[1]
    assert not any("encoder." in name for name in kept(tmp_path / "plain"))
    [question] = [data_records.question(load(tmp_path / "plain"), "Which?", [("image", str(tmp_path / "0.png"))])]
    want, _ = load(tmp_path / "plain")([question])
    (tmp_path / "eyes").rename(tmp_path / "moved")
    message = refusal(load, tmp_path / "plain")
    assert f"--image_encoder={tmp_path / 'eyes'}" in message
    got, _ = load(tmp_path / "plain", image_encoder=str(tmp_path / "moved"))([question])
    assert torch.equal(got, want)
    more = "--resume", "--max_steps=5"
    assert f"--image_encoder={tmp_path / 'eyes'}" in refusal(learn, tmp_path / "plain", (data, data), *more)
    assert "was trained with image_encoder" in refusal(
        learn, tmp_path / "plain", (data, data), *more, "--image_encoder=patch"
    )
    learn(tmp_path / "plain", (data, data), *more, f"--image_encoder={tmp_path / 'moved'}")
    assert len(column(tmp_path / "plain", "loss")) == 5 and load(tmp_path / "plain").config.image_encoder == str(
        tmp_path / "moved"
    )


@torch.no_grad()
def test_features_are_used_only_while_they_are_true(folders, tmp_path):
    """Against the encoder itself; a checksum finds each changed bit."""
    encoder, cache, path = modrwkv.read_pretrained("image", folders("siglip")), tmp_path / "cache", tmp_path / "x.png"

    def encoded(encoder=encoder):
        cache_features(encoder, [path, path], cache)
        return read_features(encoder, path, cache).vectors

    noise(40, 50).save(path)
    assert read_features(encoder, path, cache) is None
    first, [true] = encoded(), features(encoder, [load_media(encoder, path)])
    assert first.dtype == torch.float16 and (first.float() - true).abs().max() <= true.abs().max() / 2000
    file = Path(feature_file(encoder, path, cache))
    right, archive = file.read_bytes(), io.BytesIO()
    np.savez(archive, np.ones(3))
    damaged = [b"", right[:100], right[:-7], b"something else", right[32:], archive.getvalue(), b"PK\x03\x04"]
    damaged += [right.replace(b"(16, 32)", shape) for shape in (b"(32, 16)", b"(9999999999, 32)")]
    damaged += [right[:i] + bytes([right[i] ^ 1]) + right[i + 1 :] for i in (0, 32, 40, 60, 200, len(right) - 1)]
    for content in damaged:
        file.write_bytes(content)
        assert read_features(encoder, path, cache) is None and not file.exists()
    assert torch.equal(encoded(), first) and file.read_bytes() == right
    noise(41, 50).save(path)  # another picture by the same name
    assert read_features(encoder, path, cache) is None and not torch.equal(encoded(), first)
    assert len([*cache.rglob("*.*")]) == 0 and len([x for x in cache.rglob("*") if x.is_file()]) == 2  # nothing partial

    copied = Path(shutil.copytree(folders("siglip"), tmp_path / "copied"))
    anew = lambda: modrwkv.read_pretrained("image", str(copied))
    assert fingerprint(anew()) == fingerprint(encoder)  # wherever it lies
    for name, old, new in (("config.json", "gelu_pytorch_tanh", "relu"), ("preprocessor_config.json", "0.5", "0.4")):
        content = (copied / name).read_text()
        (copied / name).write_text(content.replace(old, new))
        assert old in content and fingerprint(anew()) != fingerprint(encoder)
        (copied / name).write_text(content)
    big = anew()
    big.models[0].post_layernorm.weight.data *= 1e6
    assert fingerprint(big) != fingerprint(encoder)
    assert encoded(big).dtype == torch.float32 and encoded(big).isfinite().all()  # beyond float16
    assert "--feature_cache" in refusal(cache_features, encoder, [path], file / "no")


def test_processes_write_the_same_features_at_once(tmp_path):
    """As the ranks of a run, or two runs, do."""
    fork, file, x = multiprocessing.get_context("fork"), tmp_path / "ab" / "abcd", torch.randn(50, 32)
    write_features(tmp_path / "right", x)
    gate, right = fork.Barrier(4), (tmp_path / "right").read_bytes()

    def write_and_read():
        for i in range(50):
            gate.wait(30)
            write_features(f"{file}{i}", x)
            assert Path(f"{file}{i}").read_bytes() == right

    processes = [fork.Process(target=write_and_read) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


@torch.no_grad()
def test_a_released_model_sees_through_its_encoder(folders, tmp_path):
    """WorldRWKV's flat layout, with the encoder's folder named by the user; the language model's own logits are compared elsewhere."""
    adapter = mlp(C_, 2, 32, "proj")
    torch.save(official_weights(2, C_) | under("modality.world_encoder.adapter.", adapter), tmp_path / "x.pth")
    model = load(tmp_path / "x.pth", image_encoder=folders("siglip"), tokenizer="bytes")
    encoder = modrwkv.read_pretrained("image", folders("siglip"))
    [seen] = features(encoder, [load_media(encoder, noise(30, 40))])
    y = layer(torch.relu(layer(seen, adapter, "proj.0")), adapter, "proj.2")
    y = y + norm(y, adapter["pre_norm.weight"], adapter["pre_norm.bias"])
    tokens = model.emb(torch.tensor([*codes("\x16"), 258, *codes(" What?\x17"), 259]))  # User: and Assistant:
    x, _ = model.backbone(torch.cat([y, tokens])[None])
    got, _ = model([data_records.question(model, "What?", [("image", noise(30, 40))])])
    assert distance(got, model.head(x)) < 1e-5


def run(command, cwd, **how):
    """A command line of python's, in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=ENV, text=True, capture_output=True, timeout=300, **how
    )


def prepare(monkeypatch, name, *args):
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
    runpy.run_path(str(REPO / "data" / name / "prepare.py"), run_name="__main__")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    assert run([REPO / "data/digits/prepare.py", "--pictures=60", f"--out={folder}"], cwd=folder.parent).returncode == 0
    return folder


def test_digits_are_a_function_of_the_seed(digits, tmp_path, monkeypatch):
    first = contents(digits)
    assert len(first) == 2 + 60 + 6
    prepare(monkeypatch, "digits", f"--out={tmp_path}", "--pictures=60")
    assert contents(tmp_path) == first
    prepare(
        monkeypatch, "digits", f"--out={tmp_path}", "--pictures=60", "--seed=2"
    )  # into the same folder: nothing old stays
    other = contents(tmp_path)
    assert other.keys() == first.keys() and not [name for name in first if other[name] == first[name]]


@pytest.fixture
def scanned(tmp_path, monkeypatch):
    """(scikit-learn's digits, {path under tmp_path: [number of each scan in that picture]}), which fills as data is prepared:
    a stand-in for load_digits hands out the scans and notes which ones become a picture."""
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


def test_digits_answers_are_true_and_writers_are_held_out(scanned, tmp_path, monkeypatch):
    real, pictures = scanned
    prepare(monkeypatch, "digits", f"--out={tmp_path}", "--pictures=400")
    parts = [read_records(tmp_path / f"{name}.jsonl") for name in ("train", "val")]
    printed = [r for part in parts for r in part if "image" not in r]
    parts = [[r for r in part if "image" in r] for part in parts]
    assert [r["image"] for part in parts for r in part] == list(pictures)
    seen, held_out = ({i for r in part for i in pictures[r["image"]]} for part in parts)
    assert (
        max(seen) < 1415 <= min(held_out) and [*real.target[1415:1435]] == [*range(10)] * 2
    )  # where a writer's form begins
    for r in itertools.chain(*parts, printed):
        [(first, _), *_] = record_turns(r)
        digits = (
            [int(real.target[i]) for i in pictures[r["image"]]] if "image" in r else [*map(int, first.split("\n")[0])]
        )
        number = "".join(map(str, digits))
        total = number[0] + ", ".join(f"+{x}={sum(digits[: i + 1])}" for i, x in enumerate(digits) if i)
        truths = {
            "What number|Read": number,
            "How many|Count": str(len(digits)),
            "sum|Add": total,
            "largest": str(max(digits)),
        }
        turns = record_turns(r)
        for question, truth in turns:
            assert [t for words, t in truths.items() if re.search(words, question)] == [truth]
        reading = r["task"] == "read" and len(turns) == 1
        if "image" not in r:
            assert r["level"] == len(digits) >= 2 and r["id"].startswith("train") and len(turns) == 1
            continue
        assert r["level"] == len(digits) if reading else r["level"] > len(digits)  # the curriculum reads first
        with Image.open(tmp_path / r["image"]) as image:
            assert turns[0][0].startswith("<image>\n") and image.height == 56
            assert image.getpixel((0, 0)) == 255 and image.getextrema()[0] < 100  # black on white
    assert len(printed) == 100 and {r["task"] for r in printed} == {"count", "sum", "largest"}
    assert [{len(record_turns(r)) for r in part} for part in parts] == [
        {1, 2},
        {1},
    ]  # one question about a picture, or two
    for part in parts:
        assert {len(pictures[r["image"]]) for r in part} == {1, 2, 3, 4, 5} and len({r["id"] for r in part}) == len(
            part
        )
        assert {r["task"] for r in part} == {"read", "count", "sum", "largest"}


def test_series_are_a_function_of_the_seed_and_know_no_benchmark(tmp_path, monkeypatch):
    names = ["a", "ETTh1", "weather/T", "b_weather"]
    lines = [
        {"item_id": name, "freq": "H", "target": [float(i % 24 + n) for i in range(400)]}
        for n, name in enumerate(names)
    ]
    real = jsonl(
        tmp_path / "real.jsonl",
        *lines,
        {"item_id": "gap", "target": [1.0, None] * 300},
        {"item_id": "still", "target": [3] * 300},
    )
    found = runpy.run_path(str(REPO / "data/series/prepare.py"))["real_series"]([str(real)])
    assert [name for _, name, _ in found] == ["a", "b_weather"] and [len(x) for *_, x in found] == [400, 400]
    prepare(monkeypatch, "series", "--series=20", f"--real={real}", f"--out={tmp_path / 'x'}")
    first = contents(tmp_path / "x")
    prepare(monkeypatch, "series", "--series=20", f"--real={real}", f"--out={tmp_path / 'x'}")
    assert contents(tmp_path / "x") == first
    train, val = (read_records(tmp_path / "x" / f"{name}.jsonl") for name in ("train", "val"))
    assert len(train) == 20 and len(val) == 1
    for r in train:
        x = np.array(r["target"])
        assert 192 <= len(x) <= 1632 and abs(x.mean()) < 0.01 and x.std() == pytest.approx(1, abs=0.01)


def test_series_from_arrow_folders_and_bad_files(tmp_path):
    real_series = runpy.run_path(str(REPO / "data/series/prepare.py"))["real_series"]
    (tmp_path / "bad.jsonl").write_text('{"target": [1, 2]}\n{"item_id": 1}\n')
    (tmp_path / "empty").mkdir()
    for path, words in (("none.jsonl", "cannot read"), ("bad.jsonl", "line 2"), ("empty", "pyarrow|no .arrow files")):
        with pytest.raises(SystemExit, match=f"error: .*({words})"):
            real_series([str(tmp_path / path)])
    pa = pytest.importorskip("pyarrow")
    for folder in ("gift/solar/H", "gift/ett1/H", "gift/LOOP_SEATTLE/D"):
        (tmp_path / folder).mkdir(parents=True)
        table = pa.table({"item_id": ["u", "v"], "freq": ["H", "H"], "target": [[*map(float, range(300))]] * 2})
        with (
            pa.OSFile(str(tmp_path / folder / "data.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
    assert [len(x) for *_, x in real_series([str(tmp_path / "gift")])] == [300, 300]
    several = jsonl(tmp_path / "several.jsonl", {"target": [[*range(300)], [*range(300)]]})  # a record of two variables
    assert len(real_series([str(several)])) == 2


@pytest.mark.parametrize("content", [None, b"short", b"\xff\xfe" * 50], ids=["missing", "short", "not UTF-8"])
def test_shakespeare_from_a_bad_file(content, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "play.txt").write_bytes(content)
    with pytest.raises(SystemExit, match="^error: .*play.txt"):
        prepare(monkeypatch, "shakespeare", tmp_path / "play.txt", f"--out={tmp_path}")
    assert not list(tmp_path.glob("*.jsonl"))


def outline(shape):
    """Points evenly spread over a shape of area 1 around its centroid, from its geometry."""
    y, x = (np.mgrid[:60, :60] + 0.5) / 30 - 1
    if shape == "star":
        turn = np.radians(
            np.abs((np.degrees(np.arctan2(x, -y)) + 36) % 72 - 36)
        )  # from the nearest tip, which is at (1, 0)
        notch = 0.39 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
        inside = (notch[0] - 1) * np.hypot(x, y) * np.sin(turn) - notch[1] * (np.hypot(x, y) * np.cos(turn) - 1) > 0
    else:
        triangle = (y < 0.5) & (abs(x) < (y + 1) / np.sqrt(3))
        inside = {
            "circle": x**2 + y**2 < 1,
            "square": x < 2,
            "triangle": triangle,
            "cross": np.minimum(abs(x), abs(y)) < 1 / 3,
        }[shape]
    points = np.stack([y[inside], x[inside]])
    return (points - points.mean(1, keepdims=True)) / np.sqrt(inside.mean() * 4)


OUTLINES = {shape: outline(shape) for shape in ("circle", "square", "triangle", "star", "cross")}


def look(path):
    """{(row, column): (colour, shape)} from the pixels of a picture alone."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB" and image.size == (48, 48)
        pixels = np.asarray(image).astype(int)
    things = {}
    for row in range(3):
        for column in range(3):
            cell = pixels[16 * row + 1 : 16 * row + 15, 16 * column + 1 : 16 * column + 15]
            far = np.abs(cell - cell[0, 0]).max(2)
            if far.max() < 60:
                continue
            r, g, b = np.median(cell[far > 0.8 * far.max()], 0)
            colour = (
                "black"
                if max(r, g, b) < 100
                else "yellow"
                if r > 150 and g > 120
                else "red"
                if r > 150
                else "blue"
                if b > 150
                else "green"
            )
            ink = far / far.max()  # how much of each pixel is covered
            centre = [[(ink * at).sum() / ink.sum()] for at in np.mgrid[:14, :14] + 0.5]

            def misfit(shape):
                y, x = (OUTLINES[shape] * np.sqrt(ink.sum()) + centre).astype(int).clip(0, 13)
                covered = np.bincount(14 * y + x, minlength=196) / len(x) * ink.sum()
                return np.abs(covered - ink.ravel()).sum()

            things[row, column] = colour, min(OUTLINES, key=misfit)
    return things


def solve(question, things):
    """The answer that the picture gives, and the cells that the question is about."""
    cells = {
        f"{down} {right}": (i, j)
        for i, down in enumerate(("top", "middle", "bottom"))
        for j, right in enumerate(("left", "centre", "right"))
    }

    def only(test):
        [cell] = [cell for cell, thing in things.items() if test(thing)]  # unambiguous
        return cell

    def side(name, cell, other):
        return {
            "left of": cell[1] - other[1],
            "right of": other[1] - cell[1],
            "above": cell[0] - other[0],
            "below": other[0] - cell[0],
        }[name]

    question = re.sub("(?<=s)es\\b", "", question.removeprefix("<image>\n"))  # crosses
    question = re.sub("(circle|square|triangle|star)s", r"\1", question)
    if m := re.fullmatch("What (colour|shape) is (.*)\\?", question):
        if m[2] in cells:
            return things[cells[m[2]]][m[1] == "shape"], [cells[m[2]]]
    if m := re.fullmatch("Where is the (\\w+) (\\w+)\\?", question):
        here = only(lambda thing: thing == m.groups())
        return {cell: name for name, cell in cells.items()}[here], [here]
    if m := re.fullmatch("How many (\\w+) (\\w+)\\?", question):
        like = [cell for cell, thing in things.items() if thing == m.groups()]
        return str(len(like)), like or [*things]
    if m := re.fullmatch("What is just (\\w+(?: of)?) the (\\w+) (\\w+)\\?", question):
        here = only(lambda thing: thing == (m[2], m[3]))
        [there] = [
            cell for cell in things if side(m[1], here, cell) == 1 and sum(a != b for a, b in zip(here, cell)) == 1
        ]
        return things[there][1], [here, there]
    if m := re.fullmatch("How many (\\w+) (\\w+) are (\\w+(?: of)?) the (\\w+)\\?", question):
        here = only(lambda thing: thing[1] == m[4])
        assert m[2] != m[4]
        like = [cell for cell, thing in things.items() if thing == (m[1], m[2])]
        return str(sum(side(m[3], here, cell) > 0 for cell in like)), [here, *like]
    raise AssertionError(question)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    assert run([REPO / "data/shapes/prepare.py", "--pictures=400", f"--out={folder}"], cwd=folder).returncode == 0
    return folder


def test_shapes_are_a_function_of_the_seed(shapes, tmp_path, monkeypatch):
    first = contents(shapes)
    assert len(first) == 2 + 400 + 50
    prepare(monkeypatch, "shapes", "--pictures=400", f"--out={tmp_path}")
    assert contents(tmp_path) == first
    prepare(
        monkeypatch, "shapes", "--pictures=400", "--seed=2", f"--out={tmp_path}"
    )  # into the same folder: nothing old stays
    other = contents(tmp_path)
    assert (
        other.keys() == first.keys()
        and other["train.jsonl"] != first["train.jsonl"]
        and other["val.jsonl"] != first["val.jsonl"]
    )


def test_shapes_answers_are_true_and_places_are_held_out(shapes):
    """Every answer again, from the pixels; and each question of val is about a thing where train never draws it."""
    drawn, about, names = defaultdict(set), [], {"train": 3 * 400, "val": 50}
    for name, n in names.items():
        records = read_records(shapes / f"{name}.jsonl")
        assert len(records) == n and len({r["id"] for r in records}) == n
        assert {len(r["conversations"]) for r in records} == ({2, 4} if name == "train" else {2})
        assert {r["task"] for r in records} == {"colour", "shape", "position", "count", "relation"}
        for r in records:
            [(_, path)] = record_media(r)
            things = look(path)
            drawn[name] |= set(things.items())
            assert 1 <= len(things) <= 5 and r["level"] >= 1
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
    answers, by_task = defaultdict(Counter), defaultdict(Counter)
    for task, question, answer in turns[::2]:
        answers[question][answer] += 1
        by_task[task][answer] += 1
    right = [
        (answers.get(question) or by_task[task]).most_common(1)[0][0] == answer
        for task, question, answer in turns[1::2]
    ]
    assert np.mean(right) < 0.35


ITU = """A .- B -... C -.-. D -.. E . F ..-. G --. H .... I .. J .--- K -.- L .-.. M -- N -. O --- P .--. Q --.- R .-. S ... T - U ..- V ...-
W .-- X -..- Y -.-- Z --.. 0 ----- 1 .---- 2 ..--- 3 ...-- 4 ....- 5 ..... 6 -.... 7 --... 8 ---.. 9 ----. ? ..--.. / -..-.""".split()


def copy_morse(x, rate):
    """(the text, words a minute, the tone in Hz) of samples without noise, from how long the tone and the silences are."""
    spectrum = np.abs(np.fft.rfft(x))
    loudness = np.convolve(x**2, np.hanning(rate // 80), "same")
    on = loudness > 0.3 * loudness.max()
    edges = np.flatnonzero(np.diff(on.astype(int)))
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


def test_morse_is_what_the_text_says():
    key = runpy.run_path(str(REPO / "data/morse/prepare.py"))["key"]
    speeds, tones = [], []
    for seed, text in enumerate(
        ["THE QUICK BROWN FOX JUMPS OVER A LAZY DOG", "CQ DE K1AB/7", "0123456789?", "PARIS"] * 5
    ):
        got, speed, tone = copy_morse(key(text, Quiet(seed)), 4000)
        assert got == text
        speeds.append(speed), tones.append(tone)
    assert 9 < min(speeds) < 14 and 26 < max(speeds) < 33 and 395 < min(tones) < 480 and 820 < max(tones) < 905


def test_morse_records(tmp_path, monkeypatch):
    prepare(monkeypatch, "morse", "--sounds=240", f"--out={tmp_path}")
    first = contents(tmp_path)
    prepare(monkeypatch, "morse", "--sounds=240", f"--out={tmp_path}")
    assert contents(tmp_path) == first and len(first) == 2 + 240 + 10
    train, val = (read_records(tmp_path / f"{name}.jsonl") for name in ("train", "val"))
    texts = [{r["conversations"][1]["value"] for r in part} for part in (train, val)]
    assert all(len(text) < 3 for text in texts[0] & texts[1]) and {len(text) for text in texts[0]} == set(range(1, 11))
    code = dict(zip(ITU[::2], ITU[1::2]))
    marks = lambda r: sum(len(code.get(c, " ")) for c in r["conversations"][1]["value"])
    levels = [r["level"] for r in sorted(train, key=marks)]
    assert levels == sorted(levels) and set(levels) == set(range(1, max(levels) + 1)) and 7 < max(levels) < 11
    assert all((r["level"] == 1) == (marks(r) <= 2) for r in train)  # E I T A N M have the first level to themselves
    for r in train[:50]:
        x, rate = soundfile.read(tmp_path / r["audio"])
        assert rate == 4000 and 0.15 < np.abs(x).max() <= 1


def test_same_asks_whether_what_is_heard_is_what_is_seen(scanned, tmp_path, monkeypatch):
    """The sounds are copied, the pictures' scans noted; a model sees and hears both, in the order of the question."""
    real, pictures = scanned
    monkeypatch.setattr(random, "Random", Quiet)
    prepare(monkeypatch, "same", f"--out={tmp_path}", "--pairs=320")
    parts, copied = [read_records(tmp_path / f"{name}.jsonl") for name in ("train", "val")], 0
    seen, held_out = ({i for r in part for i in pictures[r["image"]]} for part in parts)
    assert [*map(len, parts)] == [320, 20] and max(seen) < 1415 <= min(held_out)
    for r in itertools.chain(*parts):
        [(_, answer)] = record_turns(r)
        see, hear, same = re.fullmatch(r"(\d+), (\d+): (yes|no)", answer).groups()
        assert (
            see == "".join(str(real.target[i]) for i in pictures[r["image"]])
            and r["level"] == len(see) == len(hear) <= 3
        )
        assert sum(a != b for a, b in zip(see, hear)) == (same == "no")
        if set(hear) - {"0", "5"}:  # with dots and dashes
            x, rate = soundfile.read(tmp_path / r["audio"])
            assert copy_morse(x - x.mean(), rate)[0] == hear
            copied += 1
    answers = [record_turns(r)[0][1].split(": ")[1] for r in parts[0]]
    assert copied > 250 and 0.4 < answers.count("yes") / 320 < 0.6
    model = ModRWKV(SMALL)
    kinds = {tuple(kind for kind, _ in record_sample(model, r) if kind in modrwkv.MEDIA) for r in parts[1]}
    assert kinds == {("image", "audio"), ("audio", "image")}


@pytest.fixture(scope="session")
def voices(tmp_path_factory):
    """Recordings of three speakers who hum: digit d of speaker s is a tone of 200 + 150 d + 30 s Hz."""
    folder = tmp_path_factory.mktemp("voices")
    for s, d, i in itertools.product(range(3), range(10), range(2)):
        x = np.sin(2 * np.pi * (200 + 150 * d + 30 * s) * np.arange(3200) / 8000)
        soundfile.write(folder / f"{d}_{'abc'[s]}_{i}.wav", x / 2, 8000)
    return folder


def test_spoken_digits_hold_one_speaker_out(voices, tmp_path, monkeypatch):
    prepare(monkeypatch, "spoken_digits", voices, "--sounds=160", f"--out={tmp_path}")
    first = contents(tmp_path)
    prepare(
        monkeypatch, "spoken_digits", voices, "--sounds=160", f"--out={tmp_path}", "--held_out=c"
    )  # the last one is held out by default
    assert contents(tmp_path) == first and len(first) == 2 + 160 + 10
    for r in read_records(tmp_path / "val.jsonl"):  # as recorded: the tones of speaker c, one after another
        x, rate = soundfile.read(tmp_path / r["audio"])
        loud = np.convolve(np.abs(x), np.ones(80), "same") > 0.3 * np.convolve(np.abs(x), np.ones(80), "same").max()
        edges = np.flatnonzero(np.diff(loud.astype(int)))
        heard = []
        for start, end in zip(edges[::2], edges[1::2]):
            hz = np.abs(np.fft.rfft(x[start:end])).argmax() * rate / (end - start)
            heard.append(str(round((hz - 260) / 150)))
        assert r["conversations"][1]["value"] == " ".join(heard) and r["level"] == len(heard) <= 6
    assert {r["level"] for r in read_records(tmp_path / "train.jsonl")} == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.3])
def test_spoken_digits_are_stretched_at_their_pitch(factor):
    data = runpy.run_path(str(REPO / "data/spoken_digits/prepare.py"))
    x = np.sin(2 * np.pi * 300 * np.arange(8000) / 8000)
    hz = lambda y: np.abs(np.fft.rfft(y[400:-400] * np.hanning(len(y) - 800))).argmax() * 8000 / (len(y) - 800)
    y, z = data["stretch"](x, factor), data["vary"](x, 1.2, factor)
    assert len(y) == pytest.approx(8000 * factor, rel=0.01) == len(z)
    assert hz(y) == pytest.approx(300, rel=0.02) and hz(z) == pytest.approx(360, rel=0.02)
    assert 0.9 < np.abs(y[1000:-1000]).max() < 1.1  # the pieces fit


def test_spoken_digits_are_cut_and_coloured():
    data, g = runpy.run_path(str(REPO / "data/spoken_digits/prepare.py")), np.random.default_rng(0)
    x = np.concatenate(
        [g.normal(size=n) * 10 ** (db / 20) for n, db in ((2000, -60), (1000, -20), (1000, 0), (2000, -60))]
    )
    assert len(data["trim"](x, 10)) == pytest.approx(1000, abs=120) and len(data["trim"](x, 40)) == pytest.approx(
        2000, abs=120
    )
    assert (
        len(data["trim"](x, 90)) == 6000
        and len(data["trim"](np.zeros(50), 10)) == 50
        and len(data["trim"](x[:1], 10)) == 1
    )
    x = g.normal(size=2**14)
    gain = 20 * np.log10(np.abs(np.fft.rfft(data["shape"](x, random.Random(1), 8)) / np.fft.rfft(x)))
    rng = random.Random(1)
    at = np.linspace(0, len(gain) - 1, 7)
    assert gain[1:-1] == pytest.approx(
        np.interp(np.arange(len(gain)), at, [rng.uniform(-8, 8) for _ in range(7)])[1:-1], abs=1e-6
    )


def test_spoken_digits_from_a_bad_folder(voices, tmp_path, monkeypatch):
    (tmp_path / "1_a_0.wav").write_bytes(b"RIFF")
    for args in ([tmp_path], [tmp_path / "none"], [voices, "--held_out=nobody"]):
        with pytest.raises(SystemExit, match="^error: .*"):
            prepare(monkeypatch, "spoken_digits", *args, f"--out={tmp_path}")
    assert not list(tmp_path.glob("*.jsonl"))


def complains(monkeypatch, words, name, *args):
    """The one sentence by which prepare.py ends, which has these words."""
    with pytest.raises(SystemExit) as e:
        prepare(monkeypatch, name, *args)
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message and not [word for word in words if word not in message]


pairs = lambda path: [(r.get("image"), *record_turns(r)) for r in read_records(path)]
everything = lambda folder: read_records(folder / "train.jsonl") + read_records(folder / "val.jsonl")


@pytest.fixture
def llava(tmp_path):
    """A small imitation of what LLaVA publishes: 40 captions with their images.zip, and a mix whose pictures lie in five folders."""
    captions = [
        talk("<image>\nDescribe it.", f"Thing {i}.", id=f"{i:09}", image=f"{i:05}/{i:09}.jpg") for i in range(40)
    ]
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(captions))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
        for r in captions:
            z.writestr(r["image"], b"a picture")
    places = ["coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K_2"]
    mix = []
    for place in places:
        (tmp_path / "mix" / place).mkdir(parents=True)
        for i in range(8):
            (tmp_path / "mix" / place / f"{i}.jpg").write_bytes(b"a picture")
            mix += [
                talk("<image>\nWhat is it?", f"{place} {i}", id=f"{i}", image=f"{place}/{i}.jpg") for _ in range(2)
            ]  # two conversations each
    short = f"\n{SHORT_ANSWER}"
    mix += [
        talk(f"<image>\nOne?{short}", "1", "Two?", "2", "Three?", "3", "Four?", id="long", image="coco/train2017/0.jpg")
    ]
    mix += [talk("No mark?", "none", "<image> and <image>?", "two", id="marks", image="gqa/images/0.jpg")]
    mix += [
        talk("How do I write <audio> and <image> in HTML?", "So: <audio>.", "", " ", id="html", model="")
    ]  # an empty answer
    mix += [
        {
            "id": "odd",
            "conversations": [
                {"from": "gpt", "value": "unasked"},
                *talk("unanswered?")["conversations"],
                *talk("q", "a")["conversations"],
            ],
        }
    ]
    mix += [talk("never answered", id="silent")]
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps(mix))
    return tmp_path


def test_llava_pairs_from_the_published_zip(llava, tmp_path, monkeypatch):
    args = ("llava", llava / "blip_laion_cc_sbu_558k.json", f"--images={llava / 'images.zip'}", "--val=4")
    prepare(monkeypatch, *args, f"--out={tmp_path / 'a'}")
    parts = [read_records(tmp_path / "a" / f"{name}.jsonl") for name in ("train", "val")]
    assert [len(part) for part in parts] == [36, 4]
    assert {r["id"] for part in parts for r in part} == {f"{i:09}" for i in range(40)}
    for r in sum(parts, []):
        [(kind, path)] = record_media(r)
        assert Path(path).read_bytes() == b"a picture" and path.endswith(f"{r['id']}.jpg")
        assert record_turns(r) == [("<image>\nDescribe it.", f"Thing {int(r['id'])}.")]
    first = {name: (tmp_path / "a" / name).read_bytes() for name in ("train.jsonl", "val.jsonl")}
    prepare(
        monkeypatch,
        "llava",
        llava / "blip_laion_cc_sbu_558k.json",
        f"--images={tmp_path / 'a/images'}",
        "--val=4",
        f"--out={tmp_path / 'a'}",
    )
    assert first == {name: (tmp_path / "a" / name).read_bytes() for name in first}
    (tmp_path / "cut.zip").write_bytes((llava / "images.zip").read_bytes()[:-40])
    complains(
        monkeypatch,
        ["cut.zip", "cut short"],
        "llava",
        args[1],
        f"--images={tmp_path / 'cut.zip'}",
        f"--out={tmp_path / 'b'}",
    )
    (tmp_path / "no.json").write_text('[{"image": "x.jpg"}]')
    complains(
        monkeypatch, ["no.json, record 1", "conversations"], "llava", tmp_path / "no.json", f"--out={tmp_path / 'b'}"
    )
    complains(monkeypatch, ["none.json"], "llava", tmp_path / "none.json", f"--out={tmp_path / 'b'}")
    assert not list((tmp_path / "b").glob("*.jsonl"))


def test_llava_mix_is_mended_and_what_is_missing_is_named(llava, tmp_path, monkeypatch, capsys):
    args = (
        "llava",
        llava / "llava_v1_5_mix665k.json",
        f"--images={llava / 'mix'}",
        "--val=5",
        f"--out={tmp_path / 'out'}",
    )
    prepare(monkeypatch, *args)
    assert ", 2 of them text alone\nleft out: 6 turns without an answer, 0 records" in capsys.readouterr().out
    records = everything(tmp_path / "out")
    of = lambda name: record_turns(next(r for r in records if r["id"] == name))
    short = f"\n{SHORT_ANSWER}"
    assert len(records) == 84 and not [r for r in records if r["id"] == "silent"]
    assert of("long") == [(f"<image>\nOne?{short}", "1"), ("Two?", "2"), ("Three?", "3")]
    assert of("marks") == [("No mark?", "none"), ("<image> and <image >?", "two")]
    assert of("html") == [("How do I write <audio > and <image > in HTML?", "So: <audio>.")] and of("odd") == [
        ("q", "a")
    ]
    places = [
        {r["image"] for r in read_records(tmp_path / "out" / f"{name}.jsonl") if r["image"]}
        for name in ("train", "val")
    ]
    assert not places[0] & places[1] and len(places[0] | places[1]) == 40  # no picture of val is known from train
    prepare(monkeypatch, *args, "--max_rounds=2", "--skip_text")
    records = everything(tmp_path / "out")
    assert len(records) == 83 and all(r["image"] for r in records)
    assert of("long-2") == [(f"<image>\nThree?{short}", "3")] and of("marks") == [
        ("No mark?", "none"),
        ("<image> and <image >?", "two"),
    ]
    prepare(monkeypatch, *args, "--max_rounds=1", "--skip_text")
    records = everything(tmp_path / "out")
    assert of("marks") == [("<image>\nNo mark?", "none")] and of("marks-1") == [("<image> and <image >?", "two")]
    for i in range(2):
        (llava / f"mix/ocr_vqa/images/{i}.jpg").unlink()
    complains(monkeypatch, ["2 of 40 pictures", "ocr_vqa/images/0.jpg", "--skip_missing"], *args)
    assert everything(tmp_path / "out") == records  # what was there stays
    prepare(monkeypatch, *args, "--skip_missing")
    assert "4 records whose picture is missing" in capsys.readouterr().out and len(everything(tmp_path / "out")) == 80


def hum(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sin(np.arange(800) / 9) / 2, 16000)


def packed(folder, archive, *names):
    with tarfile.open(archive, "w:gz") as tar:
        for name in names:
            tar.add(folder / name, name)
    return archive


def transcripts(folder, name):
    """[(id, task, transcript)] of a data set of speech, each with its sound."""
    found = []
    for r in read_records(folder / f"{name}.jsonl"):
        [(question, text)], [(kind, path)] = record_turns(r), record_media(r)
        assert (
            question == "<audio>"
            and kind == "audio"
            and Path(path).stem == r["id"]
            and len(read_sound(path, 16000)) == 800
        )
        found.append((r["id"], r["task"], text))
    return found


@pytest.fixture
def libri(tmp_path):
    for part, speaker, chapter in (
        ("train-clean-100", 19, 198),
        ("train-other-500", 20, 205),
        ("dev-clean", 84, 121123),
        ("test-other", 367, 130732),
    ):
        folder = tmp_path / "LibriSpeech" / part / str(speaker) / str(chapter)
        for i in range(2):
            hum(folder / f"{speaker}-{chapter}-{i:04}.flac")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text(
            "".join(f"{speaker}-{chapter}-{i:04} DON'T STOP {part.upper()}\n" for i in range(2))
        )
    (tmp_path / "LibriSpeech/SPEAKERS.TXT").write_text("19 | F | train-clean-100 | 25.19 | Kara Shallenberg\n")
    return tmp_path


def test_librispeech_from_folders_and_archives(libri, tmp_path, monkeypatch):
    prepare(monkeypatch, "librispeech", libri / "LibriSpeech", f"--out={tmp_path / 'a'}")
    assert transcripts(tmp_path / "a", "train") == [
        (f"{chapter}-000{i}", part, f"don't stop {part}")
        for chapter, part in (("19-198", "train-clean-100"), ("20-205", "train-other-500"))
        for i in range(2)
    ]
    assert {task for _, task, _ in transcripts(tmp_path / "a", "val")} == {"dev-clean"}
    assert {task for _, task, _ in transcripts(tmp_path / "a", "test")} == {"test-other"}
    parts = ["train-clean-100", "train-other-500", "dev-clean", "test-other"]
    archives = [packed(libri, tmp_path / f"{part}.tar.gz", f"LibriSpeech/{part}") for part in parts]
    prepare(monkeypatch, "librispeech", *archives, f"--out={tmp_path / 'b'}")
    for name in ("train", "val", "test"):
        assert transcripts(tmp_path / "b", name) == transcripts(tmp_path / "a", name)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archives[0].read_bytes()[:-200])
    complains(monkeypatch, ["cut.tar.gz", "cut short"], "librispeech", cut, f"--out={tmp_path / 'c'}")
    complains(monkeypatch, ["none.tar.gz"], "librispeech", tmp_path / "none.tar.gz", f"--out={tmp_path / 'c'}")
    complains(monkeypatch, ["trans.txt"], "librispeech", tmp_path / "c", f"--out={tmp_path / 'c'}")
    assert not list((tmp_path / "c").iterdir())
    gone = next((libri / "LibriSpeech").rglob("84-*-0001.flac"))
    gone.unlink()
    complains(
        monkeypatch,
        ["1 of 8 sounds", str(gone), "--skip_missing"],
        "librispeech",
        libri / "LibriSpeech",
        f"--out={tmp_path / 'c'}",
    )
    prepare(monkeypatch, "librispeech", libri / "LibriSpeech", "--skip_missing", f"--out={tmp_path / 'c'}")
    assert len(transcripts(tmp_path / "c", "val")) == 1 and len(transcripts(tmp_path / "c", "train")) == 4


@pytest.fixture
def aishell(tmp_path):
    """As published: the transcript, and an archive for each speaker."""
    folder, lines = tmp_path / "data_aishell", []
    (folder / "transcript").mkdir(parents=True), (folder / "wav").mkdir()
    for part, speaker in (("train", "S0002"), ("dev", "S0724"), ("test", "S0764")):
        for i in range(3):
            hum(tmp_path / f"plain/{part}/{speaker}/BAC009{speaker}W012{i}.wav")
            lines.append(
                f"BAC009{speaker}W012{i} 而 对 楼市 成交 {speaker}\n" if i < 2 else ""
            )  # there are sounds without a transcript
        packed(tmp_path / "plain", folder / f"wav/{speaker}.tar.gz", f"{part}/{speaker}")
    (folder / "transcript/aishell_transcript_v0.8.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_aishell_from_its_folder_and_archive(aishell, tmp_path, monkeypatch, capsys):
    archive = packed(aishell, tmp_path / "data_aishell.tgz", "data_aishell")
    prepare(monkeypatch, "aishell", archive, f"--out={tmp_path / 'a'}")
    assert "3 sounds that the transcript does not know" in capsys.readouterr().out
    for name, part, speaker in (("train", "train", "S0002"), ("val", "dev", "S0724"), ("test", "test", "S0764")):
        assert transcripts(tmp_path / "a", name) == [
            (f"BAC009{speaker}W012{i}", part, f"而对楼市成交{speaker}") for i in range(2)
        ]
    prepare(monkeypatch, "aishell", aishell / "data_aishell", f"--out={tmp_path / 'b'}")  # its speakers still packed
    shutil.copytree(tmp_path / "plain", aishell / "data_aishell/wav", dirs_exist_ok=True)
    prepare(monkeypatch, "aishell", aishell / "data_aishell", f"--out={tmp_path / 'c'}")  # and unpacked
    assert not (tmp_path / "c/wav").exists()
    for name, place in itertools.product(("train", "val", "test"), "bc"):
        assert transcripts(tmp_path / place, name) == transcripts(tmp_path / "a", name)
    (aishell / "data_aishell/wav/dev/S0724/BAC009S0724W0121.wav").unlink()
    complains(
        monkeypatch,
        ["1 of 6 sounds", "BAC009S0724W0121.wav"],
        "aishell",
        aishell / "data_aishell",
        f"--out={tmp_path / 'd'}",
    )
    prepare(monkeypatch, "aishell", aishell / "data_aishell", "--skip_missing", f"--out={tmp_path / 'd'}")
    assert len(transcripts(tmp_path / "d", "val")) == 1
    (tmp_path / "cut.tgz").write_bytes(archive.read_bytes()[:-200])
    complains(monkeypatch, ["cut.tgz", "cut short"], "aishell", tmp_path / "cut.tgz", f"--out={tmp_path / 'e'}")
    complains(monkeypatch, ["aishell_transcript_v0.8.txt"], "aishell", tmp_path / "plain", f"--out={tmp_path / 'e'}")
    assert not list((tmp_path / "e").iterdir())


def test_gift_eval_folders_become_series(tmp_path, monkeypatch, capsys):
    pa = pytest.importorskip("pyarrow")

    def published(folder, targets, name="data-00000-of-00001.arrow"):
        (tmp_path / "gift" / folder).mkdir(parents=True, exist_ok=True)
        kind = pa.list_(pa.list_(pa.float32()) if isinstance(targets[0][0], list) else pa.float32())
        ids = [f"T{i}" for i in range(len(targets))]
        table = pa.table(
            {"item_id": ids, "start": [0] * len(ids), "freq": ["H"] * len(ids), "target": pa.array(targets, kind)}
        )
        with (
            pa.OSFile(str(tmp_path / "gift" / folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table)
        (tmp_path / "gift" / folder / "state.json").write_text("{}")

    wave = lambda n, k: [round(math.sin(i / 7) * k + k, 3) for i in range(n)]
    published("solar/H", [wave(300, k) for k in range(1, 31)])
    published(
        "solar/H", [wave(300, k) for k in range(1, 31)], "cache-1318815c7ce7bc45.arrow"
    )  # as some are published beside their data
    published("long/D", [[None, *wave(2000, 40)]])
    published("two/T", [[wave(250, 50), wave(250, 51)]] * 25)  # two variables a record
    published("short/D", [wave(100, 60), [7.0] * 400])
    for own in (
        "ett1/15T",
        "ett2/W",
        "electricity/H",
        "jena_weather/10T",
        "LOOP_SEATTLE/5T",
        "SZ_TAXI/15T",
        "traffic_hourly",
    ):
        published(own, [wave(300, 99)])
    prepare(monkeypatch, "gift_eval", tmp_path / "gift", "--length=1000", f"--out={tmp_path / 'out'}")
    said = capsys.readouterr().out
    assert (
        "LOOP_SEATTLE, SZ_TAXI, electricity, ett1, ett2, jena_weather, traffic" in said
        and "2 left out as too short" in said
    )
    train, val = (read_records(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "val"))
    strength = lambda r: round(max(x for x in r["target"] if x is not None) / 2)
    assert Counter(map(strength, train + val)) == Counter(range(1, 31)) | {40: 3, 50: 25, 51: 25}
    [*long] = [r["target"] for r in train + val if strength(r) == 40]
    assert [len(x) for x in long] == [667] * 3 and sum(long, []) == [None, *wave(2000, 40)]
    assert next(r for r in train if strength(r) == 7)["target"] == wave(300, 7)
    [sides] = {tuple(map(strength, val))}
    assert (
        len(set(sides)) == 3 + 1 and sides.count(50) == sides.count(51) == 1
    )  # every 20th of 56 records, with all its variables and pieces
    first = contents(tmp_path / "out")
    prepare(monkeypatch, "gift_eval", tmp_path / "gift", "--length=1000", f"--out={tmp_path / 'out'}")
    assert contents(tmp_path / "out") == first
    prepare(monkeypatch, "gift_eval", tmp_path / "gift", "--most=10", f"--out={tmp_path / 'out'}")
    assert len(everything(tmp_path / "out")) == 10 + 2 + 10
    broken = tmp_path / "gift/solar/H/data-00000-of-00001.arrow"
    broken.write_bytes(broken.read_bytes()[:700])
    complains(monkeypatch, [str(broken)], "gift_eval", tmp_path / "gift", f"--out={tmp_path / 'none'}")
    complains(monkeypatch, ["too few"], "gift_eval", tmp_path / "gift/short", f"--out={tmp_path / 'none'}")
    assert not list((tmp_path / "none").glob("*.jsonl"))


@pytest.mark.parametrize("name", ["llava", "librispeech", "aishell", "gift_eval", "spoken_digits"])
def test_data_that_is_made_from_files_of_ones_own_says_so(name, tmp_path, monkeypatch, capfd):
    shutil.copytree(
        REPO / "data",
        tmp_path / "data",
        ignore=lambda _, names: [n for n in names if Path(n).suffix == ".jsonl" or n in ("train", "val")],
    )
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    assert f"python data/{name}/prepare.py --help" in refusal(train.find_data, name, "")
    assert "the following arguments are required" in capfd.readouterr().err


README = (REPO / "data" / "llava" / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
README = README.split("## The papers' recipes")[1].split("\n## ")[0]
RECIPES = [shlex.split(line.split("train.py")[1]) for line in README.splitlines() if line.startswith("torchrun")]
PUBLISHED = {  # samples in the published data or in the papers' runs, and their learning rate: highest, last
    "see1": (595_375, 1e-3, 0), "see2": (665_298 - 40_688, 2e-5, 0), "hear1": (281_241, 1e-4, 1e-4), "hear2": (281_241, 1e-4, 5e-5),
    "forecast": (441_725, 1e-4, 0), "look1": (576_000, 1e-3, 1e-5), "look2": (1_280_000, 2e-5, 2e-5),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe[-1])
def test_recipes_of_the_readme_say_what_the_papers_do(recipe):
    s, config, names = sample.flags("about", train.Train, Config, argv=recipe)
    assert len(names) == len(recipe)
    n, highest, last = PUBLISHED[s.out_dir]
    assert abs(s.max_steps * s.batch_size - n) < s.batch_size
    rates = [train.learning_rate(step, s) for step in range(s.max_steps)]
    assert max(rates) == pytest.approx(highest, rel=1e-5) and rates[-1] == pytest.approx(last, abs=1e-12)
    assert rates[0] == pytest.approx(
        highest / max(1, s.warmup_steps), rel=1e-5
    )  # from the first step on, unless it warms up


def test_commands_of_the_readme_are_all_there():
    lines = [line for line in README.splitlines() if line.startswith("python data/")]
    assert len(lines) == 7 and [f"--out_dir={name}" for name in PUBLISHED] == [recipe[-1] for recipe in RECIPES]
    for line in lines:
        script, *args = shlex.split(line, comments=True)[1:]
        assert all(
            f'"{arg.split("=")[0]}"' in (REPO / script).read_text(encoding="utf-8")
            for arg in args
            if arg.startswith("--")
        )


@pytest.fixture(scope="session")
def rwkv6(tmp_path_factory):
    """A tiny RWKV-6 in the official layout, and a vocabulary of single bytes in that of RWKV World."""
    folder = tmp_path_factory.mktemp("rwkv6")
    model = randomise(ModRWKV(Config(rwkv=6, n_layer=2, n_embd=64, head_size=32, image_encoder="none"), vocab_size=300))
    torch.save(model.state_dict(), folder / "x.pth")
    (folder / "vocab.txt").write_text("".join(f"{b + 1} {bytes([b])!r} 1\n" for b in range(256)) + r"261 '\n\n' 2")
    return folder


def test_two_stages_by_the_flags_of_the_readme(llava, rwkv6, tmp_path, monkeypatch):
    """VisualRWKV's, at another size and with patches for eyes."""
    for path in llava.rglob("*.jpg"):
        noise(32, 32).save(path)
    prepare(
        monkeypatch,
        "llava",
        llava / "llava_v1_5_mix665k.json",
        f"--images={llava / 'mix'}",
        "--val=3",
        "--max_rounds=2",
        f"--out={tmp_path / 'x'}",
    )
    others = {
        "data": tmp_path / "x",
        "image_encoder": "patch",
        "tokenizer": rwkv6 / "vocab.txt",
        "max_steps": 2,
        "batch_size": 4,
        "dtype": "float32",
    }
    others |= {"init_from": rwkv6 / "x.pth"}
    weights = [torch.load(others["init_from"])]
    for recipe in RECIPES[-2:]:
        flags = dict(flag.lstrip("-").split("=", 1) for flag in recipe)
        out = tmp_path / flags["out_dir"]
        flags |= {name: value for name, value in others.items() if name in flags} | {"out_dir": out}
        said(train.main, *(f"--{name}={value}" for name, value in flags.items()), "--eval_samples=1", "--device=cpu")
        ckpt = torch.load(out / "ckpt.pt")
        weights, others["init_from"] = [*weights, ckpt["model"]], out / "ckpt.pt"
        assert (
            ckpt["config"]["prompt_style"] == flags["prompt_style"]
            and ckpt["config"]["scan"] == "bi"
            and ckpt["config"]["rwkv"] == 6
        )
        assert len({group["lr"] for group in ckpt["optimizer"]["param_groups"]}) == 1  # the decays' is the others'
    start, one, two = weights
    assert all(torch.equal(one[name], x) for name, x in start.items())  # stage 1 leaves the language model as it is
    assert [name for name in start if torch.equal(two[name], one[name])] == [
        "emb.weight"
    ]  # stage 2 leaves the embedding
    assert not [name for name in one if name.startswith("adapter.image") and torch.equal(two[name], one[name])]


def test_data_from_any_folder_of_train_and_val(counting, tmp_path):
    for name in ("train", "val"):
        shutil.copy(counting[0], tmp_path / f"{name}.jsonl")
    assert train.find_data(str(tmp_path), "") == ([str(tmp_path / "train.jsonl")], [str(tmp_path / "val.jsonl")])
    assert train.find_data(f"{tmp_path},{counting[0]}", "x.jsonl") == (
        [str(tmp_path / "train.jsonl"), str(counting[0])],
        ["x.jsonl"],
    )


# ---------------------------------------------------------------------------------------------- train.py


class Echo(torch.nn.Module):
    """In the place of a model."""

    encoder = torch.nn.ModuleDict()

    def collate(self, samples):
        return samples


@pytest.fixture
def batches(monkeypatch):
    """Makes Batches of records: a sample is its record's id, or of a text as many numbers as it has characters."""

    def record_sample(model, record):
        return record["id"] if "conversations" in record else [("answer", list(range(len(record["text"]))))]

    def make(levels, records=None, **settings):
        rng = random.Random(0)
        records = records or [talk("q" * rng.randint(1, 50), "a", id=i, level=x) for i, x in enumerate(levels)]
        return train.Batches(records, train.Train(**dict(batch_size=8, level_steps=0) | settings), Echo())

    monkeypatch.setattr(train, "record_sample", record_sample)
    return make


def drawn(batches, *steps):
    """What a single process draws."""
    return [i for step in range(*steps) for i in batches[step][0]]


W = train.Batches.BUCKET  # as many batches of 8 are an epoch of 8 * W records


def test_an_epoch_holds_each_record_once(batches):
    """Against counts; like lengths share a batch, in no order of length."""
    b = batches([1] * 8 * W)
    first = drawn(b, W)
    assert sorted(first) == sorted(drawn(b, W, 2 * W)) == list(range(8 * W))
    assert first != drawn(b, W, 2 * W) and first != drawn(batches([1] * 8 * W, seed=2), W)
    lengths = [sorted(b.lengths[i] for i in first[8 * step : 8 * step + 8]) for step in range(W)]
    assert sum(sorted(lengths), []) == sorted(sum(lengths, [])) and sorted(lengths) != lengths
    b = batches([1] * 16 * W)
    assert set(drawn(b, W)) != set(drawn(b, 2 * W, 3 * W))  # each epoch has an order of its own
    b = batches([1] * 40)  # an epoch ends in the middle of a batch
    assert Counter(drawn(b, 5 * W)) == {i: W for i in range(40)}
    assert set(Counter(drawn(b, W)).values()) == {W // 5, W // 5 + 1} and len(set(drawn(b, W))) == 40


def test_curriculum(batches):
    """Against the levels that may be drawn at each step; each folder keeps its share."""
    levels = [n % 5 + 1 for n in range(8 * W)]
    b = batches(levels, level_steps=2 * W)
    for top in range(1, 6):
        assert {levels[i] for i in drawn(b, 2 * W * (top - 1), 2 * W * top)} == set(range(1, top + 1))
    assert sorted(drawn(b, 10 * W, 11 * W)) == list(range(8 * W))  # from here on epochs
    assert {levels[i] for i in drawn(batches(levels), W)} == {1, 2, 3, 4, 5}  # without one
    assert drawn(batches([5] * 20, level_steps=16), 1)  # all too hard: then all are ready
    b = batches([1, 2] * 4 * W, level_steps=2 * W)
    for i, record in enumerate(b.records):
        record["_folder"] = "ab"[i < 6 * W]  # a fourth of the records is in a, of which few are ready
        b.levels[i] = 1 + (i >= 6 * W and i % 8 != 0)
    first = drawn(b, 2 * W)
    assert {b.levels[i] for i in first} == {1} and sum(i >= 6 * W for i in first) == len(first) // 4


def test_long_texts_are_cut_into_random_windows(batches):
    """Against every window that there is."""
    texts = [{"text": "x" * n} for n in (40, 20)]
    windows = [tuple(ids) for [(_, ids)] in drawn(batches([], texts, ctx_len=32), 64)]
    assert set(windows) == {tuple(range(start, start + 33)) for start in range(8)} | {tuple(range(20))}
    again = drawn(batches([], texts, ctx_len=32), 63, 64)
    assert [tuple(ids) for [(_, ids)] in again] == windows[-8:]


def test_held_out_text_is_predicted_once_throughout(model):
    """Against the tokens of each text but its first."""
    texts = ["abc " * 33, "x", "hello"]
    windows = list(held_out_samples(model, [{"text": t} for t in texts], 32))
    assert all(len(sample) == 1 and len(sample[0][1]) <= 33 for sample in windows)
    predicted = [i for [(_, ids)] in windows for i in ids[1:]]
    assert predicted == [i for t in texts for i in codes(t)[1:] + [0]]
    assert n_targets(model, windows) == len(predicted)


# fmt: off
@pytest.mark.parametrize("schedule, flags, expected", [
    ("wsd", dict(warmup_steps=10, decay_fraction=0.4, lr_final=0.2), {0: 0.1, 9: 1, 10: 1, 59: 1, 79: 0.6, 99: 0.2}),
    ("wsd", dict(warmup_steps=0, decay_fraction=1.0), {0: 0.99, 49: 0.5, 99: 0}),
    ("cosine", dict(max_steps=1100, warmup_steps=100), {0: 0.01, 99: 1, 349: (2 + 2**0.5) / 4, 599: 0.5, 1099: 0}),
    ("cosine", dict(max_steps=200, warmup_steps=0, lr_final=0.5), {49: 0.5 + (2 + 2**0.5) / 8, 99: 0.75, 199: 0.5}),
    ("constant", dict(warmup_steps=10, lr_final=0.2), {0: 0.1, 4: 0.5, 9: 1, 50: 1, 99: 1}),
    ("constant", dict(warmup_steps=0), {0: 1, 99: 1}),
])
# fmt: on
def test_learning_rate(schedule, flags, expected):
    """Against the schedules' formulas, at their corners."""
    settings = train.Train(schedule=schedule, learning_rate=1.0, **dict(max_steps=100) | flags)
    assert {step: train.learning_rate(step, settings) for step in expected} == pytest.approx(expected, abs=1e-9)


TINY = ("--n_layer=2", "--n_embd=64", "--head_size=32", "--batch_size=8", "--device=cpu", "--dtype=float32")


def kept(out, key="model"):
    """A part of the checkpoint of a run."""
    return read_checkpoint(out / "ckpt.pt")[key]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def column(out, key):
    """The values of a key in the log of a run."""
    return [x[key] for x in log(out) if key in x]


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


def wave(phase, n=200):
    """A sine."""
    return [math.sin(i / 3 + phase) + 5 for i in range(n)]


def csv(path, head, *columns):
    """Writes a table, and returns its path."""
    path.write_text(f"{head}\n" + "".join(",".join(map(str, row)) + "\n" for row in zip(*columns)))
    return path


@pytest.fixture(scope="session")
def counting(tmp_path_factory):
    """Records that can be learned by heart in part: how many bars, and is that even; and a text, quickly scored."""
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
    """Against the files, steps and keys that the README names."""
    out = trained[0]
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "log.jsonl", "loss.png"]
    steps = [x for x in log(out) if "loss" in x]
    assert [x["step"] for x in log(out) if "val_loss" in x] == [50, 100]
    assert [x["step"] for x in steps] == list(range(1, 101))
    for x in steps:
        assert x.keys() == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
        assert all(math.isfinite(value) for value in x.values()) and x["tokens"] > 0 and x["grad_norm"] > 0
    curve = column(out, "loss")
    assert sum(curve[-5:]) < 0.3 * sum(curve[:5])
    with Image.open(out / "loss.png") as image:
        assert image.format == "PNG" and image.getextrema()[0][0] < 255


def test_a_run_scores_what_was_held_out(trained, counting):
    """Against one batch of all: batches of answers of unequal length must not be averaged; and sample.py --eval."""
    out, words, model = trained
    with torch.no_grad():
        loss = model.loss([record_sample(model, r) for r in read_records(counting[0])]).item()
    assert column(out, "val_loss")[-1] == pytest.approx(loss, abs=1e-5)
    assert f"\nheld-out loss {column(out, 'val_loss')[-1]:.4f}\n" in words
    *table, scores = said(sample.main, f"--out_dir={out}", f"--eval={counting[0]}").splitlines()
    scores = json.loads(scores)
    tasks = scores.pop("tasks")
    assert scores == {key: column(out, key)[-1] for key in ("n", "exact", "chars", "majority")} and scores["n"] == 24
    assert table == words.splitlines()[-len(table) - 2 : -2]
    [line] = [x for x in table if x.startswith("read ")]
    assert line.split()[1:4] == ["16", f"{100 * tasks['read']['exact']:.1f}", "%"]


@pytest.mark.parametrize("table,rows", [("data", 4), ("prompt", 3), ("scan", 3), ("adapter", 3), ("conv", 4)])
def test_ablation_runs_each_row_with_three_seeds(table, rows, tmp_path, monkeypatch, capsys):
    """Against means and deviations by hand; a function plays the runs: it logs, and fails once."""
    commands, fail = [], ["_2"]

    def play(command, env, stdout, stderr):
        flags = dict(flag[2:].split("=", 1) for flag in command[2:])
        commands.append(flags)
        assert command[1] == str(REPO / "train.py") and env["OMP_NUM_THREADS"] == "1"
        out, seed = Path(flags["out_dir"]), int(flags["seed"])
        broken = bool(fail) and flags["out_dir"].endswith(fail[0])
        exact = 0.1 * seed + 0.01 * len(flags.get("scan", ""))
        score = {"n": 9, "exact": exact, "tasks": {"read": {"exact": 0.5}}}
        if table == "adapter":  # series are not answers
            score = {"n": 0, "exact": 0.0, "tasks": {}, "val_loss": seed / int(flags["adapter_scale"])}
        # the evaluation behind one step is none of its time
        steps = [{"step": n, "loss": 1.0, "seconds": 5.0 + 3.2 * n + (n == 4)} for n in range(7)]
        torch.save({"train": {"batch_size": 64, "max_steps": 7}}, out / "ckpt.pt")
        jsonl(out / "log.jsonl", *steps, {"step": 7, **score})
        if broken:
            (out / "log.jsonl").write_text("{")
        return SimpleNamespace(returncode=int(broken))

    monkeypatch.setattr(ablate.subprocess, "run", play)
    argv = [table, "--data=x.jsonl", f"--out_dir={tmp_path}", "--max_steps=7", "--seed=9"]
    assert "_2 did not finish" in refusal(ablate.main, argv) and "said.txt" in refusal(ablate.main, argv)
    fail.clear()
    done = sum((folder / "log.jsonl").read_text() != "{" for folder in tmp_path.iterdir())
    commands.clear()
    capsys.readouterr()
    ablate.main(argv)
    assert len(commands) == 3 * rows - done == len({flags["out_dir"] for flags in commands})  # what is done stays
    assert any(flags["resume"] == "True" for flags in commands)  # what was broken goes on
    assert {flags["max_steps"] for flags in commands} == {"7"} and {flags["seed"] for flags in commands} <= set("123")
    head, line, *lines = capsys.readouterr().out.splitlines()[-rows - 2 :]
    columns = "x.jsonl | loss" if table == "adapter" else "% exact on x.jsonl | all | read"
    assert head == f"| {columns} | ms a sample |" and line == "|---" * (head.count("|") - 1) + "|"
    for text, row in zip(lines, ablate.ABLATIONS[table], strict=True):
        score = f"{20 + len(row.get('scan', '')):.1f} ± 10.0 | 50.0 ± 0.0"
        if table == "adapter":
            score = f"{2 / row['adapter_scale']:.4f} ± {1 / row['adapter_scale']:.4f}"
        assert text == f"| {', '.join(f'{name} {value}' for name, value in row.items())} | {score} | 50.0 ± 0.0 |"
    with pytest.raises(SystemExit):
        ablate.main(["x"])
    assert "invalid choice: 'x'" in capsys.readouterr().err


FORECAST = "--series_encoder=wavenet --series_kernel=4 --series_stride=4 --lookback=48 --horizon=8".split()
FORECAST += "--level_steps=0 --warmup_steps=10".split()


@pytest.fixture(scope="session")
def forecaster(tmp_path_factory):
    """(out_dir, what was said, x.csv, model) of a tiny model that has learned to go on with a sine."""
    folder = tmp_path_factory.mktemp("series")
    data = jsonl(folder / "train.jsonl", *({"target": wave(phase)} for phase in range(20)))
    val = jsonl(folder / "val.jsonl", {"target": wave(0.5)})
    flags = ("--image_encoder=none", "--max_steps=120", "--learning_rate=5e-3")
    words = learn(folder / "out", (data, val), *FORECAST, *flags)
    y = wave(0.2, 100)
    table = csv(folder / "x.csv", "t,a,b", range(100), [10 * x for x in y], y)
    return folder / "out", words, table, load(folder / "out")


def test_one_model_sees_hears_and_forecasts(tmp_path):
    """Three data sets learned at once, then all in one question, each of which the answer depends on."""
    numbers, tones = ("one", "two", "three"), {"low": 300, "high": 2000}
    for n, number in enumerate(numbers):
        bars(tmp_path / f"{number}.png", 2 * n + 1)
    for tone, hertz in tones.items():
        y = 0.5 * np.sin(2 * np.pi * hertz * np.arange(4800) / 16000) + 1e-3 * pixels(1, 4800)
        soundfile.write(tmp_path / f"{tone}.wav", y, 16000)
    prompt, both = "<series><image><audio>\nBoth?", []
    for i, (number, tone) in enumerate(itertools.product(numbers, tones)):
        files = dict(image=f"{number}.png", audio=f"{tone}.wav", series=wave(i, 48))
        both.append(talk(prompt, f"{number} {tone}", **files, task="both"))
    seen = [talk("<image>\nHow many?", number, image=f"{number}.png", task="see") for number in numbers]
    heard = [talk("<audio>", tone, audio=f"{tone}.wav", task="hear") for tone in tones]
    ahead = [{"target": wave(phase)} for phase in range(5)]
    parts = enumerate((seen, heard, ahead, both))
    data = ",".join(str(jsonl(tmp_path / f"{i}.jsonl", *records)) for i, records in parts)
    out, val = tmp_path / "out", jsonl(tmp_path / "val.jsonl", *both, *seen, *heard)
    flags = ("--audio_encoder=mel", "--encoder_width=32", "--max_steps=200", "--batch_size=16")
    learn(out, (data, val), *FORECAST, *flags)
    assert {task: score["exact"] for task, score in log(out)[-1]["tasks"].items()} == dict(both=1, hear=1, see=1)
    model = load(out)
    assert (model.forecast([wave(0.2, 100)])[0] - torch.tensor(wave(0.2, 108)[100:])).abs().mean() < 0.3
    logits = []
    for number, tone, phase in (("one", "low", 1), ("two", "low", 1), ("one", "high", 1), ("one", "low", 2)):
        files = [("image", tmp_path / f"{number}.png"), ("audio", tmp_path / f"{tone}.wav")]
        asked = data_records.question(model, prompt, [*files, ("series", wave(phase, 48))])
        logits.append(model([asked])[0][0, -1])
    assert all(distance(other, logits[0]) > 1e-4 for other in logits[1:])
    files = dict(image=tmp_path / "three.png", audio=tmp_path / "high.wav")
    files["series"] = csv(tmp_path / "x.csv", "y", wave(1, 48))
    asked = [f"--{kind}={path}" for kind, path in files.items()]
    assert said(sample.main, f"--out_dir={out}", *asked, f"--prompt={prompt}").strip() == "three high"


def test_a_model_learns_to_forecast(forecaster, tmp_path):
    """Against the sine itself; sample.py prints model.forecast in each column's units."""
    out, words, table, model = forecaster
    assert "held-out loss 0.0" in words and "--series=NUMBERS.csv" in words.splitlines()[-1]
    y = model.forecast([wave(0.2, 100)])[0]
    assert (y - torch.tensor(wave(0.2, 108)[100:])).abs().mean() < 0.25
    printed = said(sample.main, f"--out_dir={out}", f"--series={table},{table}#a", f"--plot={tmp_path / 'x.png'}")
    b, a = ([float(x) for x in line.split()[1:]] for line in printed.splitlines())
    assert b == pytest.approx(y.tolist(), rel=1e-4) and a == pytest.approx((10 * y).tolist(), rel=1e-4)
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_word_and_character_errors():
    """7 words: one substituted, one missing, one too many; of 25 characters w, three, and an a."""
    pairs = [("Four zero, seven!", "four zero seven"), ("one too", "one two three"), ("a b", "b"), ("anything", "...")]
    counts = {"substitutions": 1, "deletions": 1, "insertions": 1}
    assert data_scores.errors(pairs) == {"wer": 3 / 7, "cer": pytest.approx(7 / 25), **counts}
    assert data_scores.errors([("x", "?!")])["wer"] == 1 and data_scores.errors([("a", "!")]) == {}
    record = talk("<audio>", "one two three", audio="x.wav", task="speech")
    scores = data_scores.score([record, talk("q", "a", task="other")], ["one too", "a"])
    assert scores["tasks"]["speech"]["wer"] == 2 / 3 and "wer" not in scores["tasks"]["other"]


def test_the_benchmark_is_every_window_of_the_test_split(forecaster, tmp_path):
    """Against numpy, window by window."""
    out, _, _, model = forecaster
    x = np.stack([10 * np.array(wave(1, 400)), np.random.RandomState(0).randn(400).cumsum()], 1)
    table = csv(tmp_path / "data.csv", "date,a,b", [f"d{i}" for i in range(400)], *x.T.tolist())
    scores = json.loads(said(sample.main, f"--out_dir={out}", f"--eval={table}").splitlines()[-1])
    z = (x - x[:280].mean(0)) / x[:280].std(0)
    windows = np.stack([z[i : i + 56, c] for c in range(2) for i in range(320 - 48, 400 - 56 + 1)])
    assert scores["windows"] == len(windows) == 146
    guesses = {
        "repeat the last point": windows[:, 47:48],
        "repeat the last 24": windows[:, 24:32],
        "mean of the lookback": windows[:, :48].mean(1, keepdims=True),
    }
    for name, guess in guesses.items():
        error = windows[:, 48:] - guess
        assert scores[name] == pytest.approx({"mse": (error**2).mean(), "mae": np.abs(error).mean()}, rel=1e-6)
    ahead = model.forecast([torch.from_numpy(w[:48]) for w in windows], scale=1.0).numpy()
    assert scores["mse"] == pytest.approx(np.mean((windows[:, 48:] - ahead) ** 2), rel=1e-4)
    short = csv(tmp_path / "short.csv", "a", [1, 2] * 10)
    assert "too few" in refusal(sample.main, [f"--out_dir={out}", f"--eval={short}"])


ETT = REPO.parent / "shared/data/ett/ETTh1.csv"


@pytest.mark.skipif(not ETT.exists(), reason="ETTh1.csv is not at hand")
def test_naive_forecasts_of_etth1():
    """Against the published mean squared errors."""
    forecast = Mock(side_effect=lambda x, scale: x[:, -1:].expand(-1, 96))
    naive = SimpleNamespace(config=Config(), encoder={"series"}, forecast=forecast)
    scores = data_scores.benchmark(naive, str(ETT), 1024)
    published = {"repeat the last point": 1.2944, "repeat the last 24": 0.5122, "mean of the lookback": 0.7217}
    assert {name: round(scores[name]["mse"], 4) for name in published} == published
    assert scores["windows"] == 7 * 2785


def test_the_last_line_names_the_next_command(trained, counting):
    """Against the answer to the first held-out record."""
    out, words, model = trained
    command = shlex.split(words.splitlines()[-1])
    assert command[:3] == ["python", "sample.py", f"--out_dir={out}"]
    question = data_records.question(model, "<image>\nHow many?", [("image", counting[0].parent / "1.png")])
    assert said(sample.main, *command[2:]).strip() == "".join(answer(model, question)[0]).strip()


# fmt: off
@pytest.mark.parametrize("record, flags", [
    (dict(text="a"), ["--raw", "--temperature=0.8"]),
    (dict(target=[1, 2]), ["--series=NUMBERS.csv"]),
    (talk("<audio>", "a", audio="y z.wav"), ["--audio=x/y z.wav"]),
    (talk("<series>\nUp?", "a", series=[1, 2]), ["--series=NUMBERS.csv", "--prompt=Up?"]),
    (talk("<image> and <audio><image>: what's that?", "a", "<image>?", "b", image=["1", "2", "3"], audio="a"),
     ["--image=x/1,x/2", "--audio=x/a", "--prompt=<image> and <audio><image>: what's that?"]),
])
# fmt: on
def test_sample_command(record, flags):
    """Against what a shell makes of it."""
    record = dict(record, _folder=os.path.join(os.getcwd(), "x"))
    assert shlex.split(data_records.sample_command(record)) == flags


def test_a_second_run_does_not_touch_the_first(trained, counting):
    """Against the files before."""
    out = trained[0]
    before = contents(out)
    message = refusal(train.main, [*TINY, f"--data={counting[0]}", "--max_steps=1", f"--out_dir={out}"])
    assert "ckpt.pt" in message and "--resume" in message and "--out_dir" in message
    assert "100 steps" in refusal(train.main, ["--resume", f"--out_dir={out}"])
    assert contents(out) == before


def test_a_language_model_is_given_the_encoder_of_the_presets(trained, counting, tmp_path, monkeypatch):
    """Against the presets; the encoder of a model that sees already stays as it is."""
    names = ["image_encoder", "image_height", "patch_height", "conv_kernel", "prompt_style", "n_layer"]
    flags = "--image_height=16 --patch_height=16 --conv_kernel=0 --prompt_style=last --n_layer=7"
    monkeypatch.setattr(train, "presets", lambda data: flags)
    save(tmp_path / "lm.pt", ModRWKV(Config(n_layer=1, n_embd=64, image_encoder="none")))
    found = []
    seeing = "--n_layer=2", "--head_size=32"
    blind = "--n_layer=1", "--head_size=64", "--conv_kernel=2"
    for path, more in ((tmp_path / "lm.pt", blind), (trained[0], seeing)):
        out = tmp_path / str(len(found))
        learn(out, (counting[0], counting[1]), f"--init_from={path}", *more, "--max_steps=1")
        found.append([getattr(load(out).config, name) for name in names])
    assert found == [["patch", 16, 16, 2, "last", 1], [getattr(trained[2].config, name) for name in names]]
    assert found[0] != found[1]


@pytest.mark.parametrize("phase", ["adapter", "all"])
def test_phases(phase, counting, trained, tmp_path):
    """Which tensors a phase changes; the first loss is that of the model it starts from, on the first batch."""
    flags = (f"--init_from={trained[0] / 'ckpt.pt'}", f"--phase={phase}", "--warmup_steps=0", "--max_steps=3")
    learn(tmp_path, counting, *flags)
    before, after = kept(trained[0]), kept(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if phase == "all" or name.startswith(("encoder.", "adapter."))}
    [first] = train.Batches(read_records(counting[0]), train.Train(batch_size=8), trained[2])[0]
    assert column(tmp_path, "loss")[0] == pytest.approx(trained[2].loss(first).item(), rel=1e-5)


def test_seed_and_gradient_clipping(counting, tmp_path):
    """Another seed is another model; AdamW's first average is a tenth of the first gradient, clipped."""
    for seed in "12":
        learn(tmp_path / seed, (counting[1], counting[1]), "--max_steps=1", f"--seed={seed}", "--grad_clip=0.5")
    assert distance(kept(tmp_path / "1")["head.weight"], kept(tmp_path / "2")["head.weight"]) > 0.5
    averages = [x["exp_avg"].norm().item() for x in kept(tmp_path / "1", "optimizer")["state"].values()]
    assert column(tmp_path / "1", "grad_norm")[0] > 0.5 and math.hypot(*averages) == pytest.approx(0.05, rel=1e-4)


def test_text_alone(tmp_path):
    """As a user does it, in a copy of the repository, for --data=shakespeare is prepared beside train.py."""
    play = "".join(f"ROMEO:\nLine {i} of a play, naïve — and so it goes.\n\n" for i in range(120))
    folder, out = tmp_path / "data/shakespeare", tmp_path / "plays"
    folder.mkdir(parents=True)
    for path in (*REPO.glob("*.py"), *REPO.glob("*.cu"), *REPO.glob("data/*.py"), REPO / "data/shakespeare/prepare.py"):
        shutil.copy(path, tmp_path / path.relative_to(REPO))
    (folder / "tinyshakespeare.txt").write_text(play, encoding="utf-8")  # so nothing is downloaded
    flags = "--data=shakespeare --out_dir=plays --max_steps=30 --ctx_len=32 --warmup_steps=5 --learning_rate=5e-3"
    result = run(["train.py", *TINY, *flags.split()], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    [first], [last] = (read_records(folder / f"{name}.jsonl") for name in ("train", "val"))
    assert first["text"] + last["text"] == play and len(first["text"]) == int(0.9 * len(play))
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
    """(out_dir, flags but for out_dir and save_interval) of a run that nobody interrupts; two records are held out."""
    two = digits.parent / "two.jsonl"
    jsonl(two, *(r | {"image": str(digits / r["image"])} for r in read_records(digits / "val.jsonl")[:2]))
    flags = "--max_steps=30 --grad_accum=2 --level_steps=8 --warmup_steps=5 --lr_final=1e-4 --eval_interval=12"
    flags = (*TINY, f"--data={digits / 'train.jsonl'}", f"--val_data={two}", *flags.split(), "--optimizer=muon")
    out = digits.parent / "whole"
    said(train.main, *flags, f"--out_dir={out}", "--save_interval=5")
    return out, flags


def stop_at(step, how, out, *flags):
    """Sends train.py a signal as soon as the log of `out` says that `step` is done; returns what it has said."""
    command = [sys.executable, str(REPO / "train.py"), *flags, f"--out_dir={out}"]

    def heed():  # what a shell starts in the background ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed
    ) as process:
        done = 0
        while done < step and process.poll() is None:
            time.sleep(0.002)
            if (out / "log.jsonl").exists():
                lines = (out / "log.jsonl").read_text().split("\n")[:-1]  # the last one is not whole yet
                done = json.loads(lines[-1])["step"] if lines else 0
        process.send_signal(how)
        words, _ = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[how], words
    return words


def same_log(a, b):
    """Whether two runs have the same losses, gradients and scores to the last bit, and each step once."""
    return all(column(a, key) == column(b, key) for key in ("step", "loss", "grad_norm", "tokens", "val_loss", "exact"))


def assert_same_run(a, b):
    assert same_log(a, b)
    a, b = kept(a), kept(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_interrupted_before_the_first_checkpoint(whole, tmp_path):
    """Against the uninterrupted run: begun afresh, and what the log said is forgotten."""
    out = tmp_path / "out"
    words = stop_at(3, signal.SIGINT, out, *whole[1], "--save_interval=25")
    assert "Traceback" not in words and "--resume" not in words  # no advice that cannot be followed
    assert str(out / "ckpt.pt") in refusal(train.main, ["--resume", f"--out_dir={out}"])
    said(train.main, *whole[1], f"--out_dir={out}", "--save_interval=25")
    assert_same_run(out, whole[0])


def test_interrupted_killed_and_resumed(whole, tmp_path):
    """Against the uninterrupted run; the kill tears a line of the log and leaves half a checkpoint."""
    out = tmp_path / "out"
    words = stop_at(7, signal.SIGINT, out, *whole[1], "--save_interval=5")
    assert "Traceback" not in words and f"--out_dir={out} --resume" in words
    stop_at(18, signal.SIGKILL, out, "--resume")
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    (out / "ckpt.pt.partial").write_bytes(b"half a checkpoint")
    assert re.search(r"from step (15|20|25)\b", said(train.main, "--resume", f"--out_dir={out}"))
    assert_same_run(out, whole[0])
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "log.jsonl", "loss.png"]


def test_resume_scores_again_and_goes_on_with_the_same_settings(whole, tmp_path):
    """Killed while it was scored a run is scored; it refuses another model, and takes more steps."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    assert "n_embd=64" in refusal(train.main, ["--resume", f"--out_dir={out}", "--n_embd=128"])
    assert contents(out) == contents(whole[0])
    *steps, _ = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(steps) + '{"step": 30, "val')
    said(train.main, "--resume", f"--out_dir={out}")
    assert_same_run(out, whole[0])
    assert "30 steps" in refusal(train.main, ["--resume", f"--out_dir={out}"])
    said(train.main, "--resume", f"--out_dir={out}", "--max_steps=33")
    assert column(out, "loss")[:30] == column(whole[0], "loss") and len(column(out, "loss")) == 33
    old, new = kept(whole[0], "train"), kept(out, "train")
    assert {key for key in old if old[key] != new[key]} == {"resume", "out_dir", "max_steps"}


def test_the_learning_rate_of_a_run(whole):
    """Against wsd's formula: as the log says it, and as the optimizer's last step was made."""
    peak, final = 2e-3, 1e-4
    expected = [peak * n / 5 for n in range(1, 6)] + [peak] * 10
    expected += [final + (peak - final) * (1 - n / 15) for n in range(1, 16)]
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
    out = tmp_path / "out"

    def limited(size, *flags):
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        return complaint(run([REPO / "train.py", "--num_workers=0", *flags], cwd=tmp_path, preexec_fn=limit))

    learn(out, counting, "--max_steps=2")
    before = contents(out)["ckpt.pt"]
    message = limited(200_000, "--resume", "--max_steps=4")
    assert "ckpt.pt" in message and re.search("disk|space|large", message)
    assert contents(out)["ckpt.pt"] == before and len(before) > 500_000 and not list(out.glob("*.partial"))
    said(train.main, "--resume", "--max_steps=3", f"--out_dir={out}")  # with room again it goes on
    assert len(column(out, "loss")) == 3
    data = f"--data={counting[0]}", f"--val_data={counting[1]}"
    assert "log.jsonl" in limited(100, *TINY, *data, "--out_dir=other")


@pytest.fixture(scope="session")
def unequal(tmp_path_factory):
    """(out_dir, data, flags, what was said) of a run of one process without micro-batches. Its answers have 1 or 40
    characters, with pictures, without, and text, all in sequences of any length: a batch has some of each. With the
    default epsilon AdamW makes a whole step of a gradient that rounds to nothing, in a direction of chance."""
    folder = tmp_path_factory.mktemp("unequal")
    rng, records = random.Random(0), []
    for i in range(48):
        letter, question = chr(97 + i % 8), "x" * rng.randint(1, 80)
        answer = letter * rng.choice((1, 40))
        bars(folder / f"{i}.png", i % 8 + 1)
        seen = talk(f"<image>{question}", answer, image=f"{i}.png")
        plain = {"text": letter * len(question), "conversations": None}
        records.append(rng.choice((seen, talk(question, answer), talk(question, answer), plain)))
    (folder / "a.json").write_text(json.dumps(records))
    data = folder / "a.json", jsonl(folder / "val.jsonl", *records[:3], {"text": "hold me"})
    flags = ("--batch_size=16", "--max_steps=20", "--warmup_steps=4", "--adam_eps=1e-6")
    return folder / "out", data, flags, learn(folder / "out", data, *flags)


def assert_equal_runs(a, b):
    assert column(a, "tokens") == column(b, "tokens")
    for key, tolerance in dict(loss={"abs": 1e-5}, val_loss={"abs": 1e-5}, grad_norm={"rel": 1e-4}).items():
        assert column(a, key) == pytest.approx(column(b, key), **tolerance) and column(a, key)


def micro_batches(path, rank, world, grad_accum):
    settings = train.Train(batch_size=16, grad_accum=grad_accum)
    b = train.Batches(read_records(path), settings, ModRWKV(Config(n_layer=1, n_embd=64)), rank, world)
    return [b[step] for step in range(12)]


def test_micro_batches_change_nothing(unequal, tmp_path):
    """Against the run without; a mean of their means would be another loss."""
    out, data, flags, _ = unequal
    counts = [[len(batch.n_targets) for batch in micro] for micro in micro_batches(data[0], 0, 1, 4)]
    assert max(max(c) / min(c) for c in counts) > 3
    learn(tmp_path, data, *flags, "--grad_accum=4")
    assert_equal_runs(tmp_path, out)


def two_processes(out, data, *flags):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", REPO / "train.py")
    data = f"--data={data[0]}", f"--val_data={data[1]}", f"--out_dir={out}"
    result = run([*torchrun, *TINY, "--grad_accum=2", *flags, *data], cwd=out.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes") == result.stdout.count("held-out loss") == 1  # one process speaks


@pytest.mark.parametrize("how", ["--shard=False", "--shard"])
def test_two_processes_change_nothing(how, unequal, tmp_path):
    """Against one process, tensor by tensor, whether each has all the weights or its part of them."""
    one, data, flags, _ = unequal
    seen = []
    for rank in (0, 1):
        seen.append([["image" in batch.media for batch in x] for x in micro_batches(data[0], rank, 2, 2)])
    assert any(a[-1] != b[-1] for a, b in zip(*seen))  # one process without a picture while the other has some
    assert [True, False] in seen[0] + seen[1]  # and pictures that only a micro-batch before the exchange has seen
    two_processes(tmp_path / "two", data, *flags, how)
    assert_equal_runs(tmp_path / "two", one)
    two, one = kept(tmp_path / "two"), kept(one)
    assert distance(*(torch.cat([model[name].flatten() for name in one]) for model in (two, one))) < 1e-4
    assert all(distance(two[name], one[name]) < 2e-4 for name in one)


@pytest.mark.parametrize("phase, optimizer", [("all", "muon"), ("all", "adamw"), ("adapter", "adamw")])
def test_one_process_goes_on_with_shards_and_two_with_the_whole(phase, optimizer, unequal, tmp_path):
    """Against one run of one process. Muon rounds its steps to bfloat16."""
    data, out, flags = unequal[1], tmp_path / "parts", unequal[2]
    flags += ("--schedule=constant", "--warmup_steps=10", "--checkpoint_activations", f"--optimizer={optimizer}")
    if phase == "adapter":  # of a model that says something: as it starts, its blocks pass nothing on
        save(tmp_path / "lm.pt", randomise(ModRWKV(Config(n_layer=2, n_embd=64, head_size=32, image_encoder="none"))))
        flags += ("--phase=adapter", f"--init_from={tmp_path / 'lm.pt'}", "--image_encoder=patch")
    assert "several processes" in refusal(learn, tmp_path / "no", data, "--shard")
    learn(tmp_path / "whole", data, *flags, "--max_steps=10")
    if phase == "all":
        two_processes(out, data, *flags, "--max_steps=5", "--shard")
        learn(out, data, *flags, "--max_steps=10", "--resume")
    else:
        learn(out, data, *flags, "--max_steps=5")
        two_processes(out, data, *flags, "--max_steps=10", "--resume", "--shard")
    rel = 5e-3 if optimizer == "muon" else 1e-4
    for key in ("loss", "grad_norm"):
        assert column(out, key) == pytest.approx(column(tmp_path / "whole", key), rel=rel)
    if optimizer == "adamw":
        assert column(out, "val_loss")[-1] == pytest.approx(column(tmp_path / "whole", "val_loss")[-1], abs=1e-5)


def test_the_trial_of_memory_changes_nothing(unequal, tmp_path, monkeypatch):
    """Against a run without it, bit for bit; it takes the longest records of all, not of the first batches."""
    out, data, flags, words = unequal
    assert re.search(r"memory: .* [0-9.]+ GiB", words)
    trial = Mock(return_value="no trial")
    monkeypatch.setattr(train, "try_longest", trial)
    learn(tmp_path, data, *flags)
    assert same_log(tmp_path, out)
    [[_, batches, *_], _] = trial.call_args
    longest = batches.longest().lengths.tolist()
    assert len(longest) == 16 and max(longest) == max(max(batches[step][0].lengths.tolist()) for step in range(12))


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
CANNOT_ALLOCATE = RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("calls, error", [(0, OUT_OF_MEMORY), (1, CANNOT_ALLOCATE), (4, OUT_OF_MEMORY)])
def test_running_out_of_memory_is_one_sentence(calls, error, counting, tmp_path, monkeypatch):
    """In the trial, the first step and a later one: as torch raises it on a GPU, and as the CPU's allocator does."""
    loss, done = ModRWKV.loss, []

    def fails(*args, **more):
        done.append(1)
        if len(done) > calls:
            raise error
        return loss(*args, **more)

    monkeypatch.setattr(ModRWKV, "loss", fails)
    message = refusal(learn, tmp_path, counting, "--max_steps=9")
    assert all(flag in message for flag in ("--grad_accum", "--batch_size", "--checkpoint_activations", "--shard"))


@pytest.mark.parametrize("flag, size", [("--eval_batch_size=0", 2), ("--eval_batch_size=3", 3)])
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
    flags = ("--max_steps=1", "--grad_accum=4", "--dtype=bfloat16", "--num_workers=0", flag)
    learn(tmp_path, (counting[0], counting[0]), *flags)
    assert max(sizes) == size and dtypes == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {x.dtype for x in kept(tmp_path).values()} == {torch.float32}


def test_workers_change_nothing_and_name_the_record(counting, tmp_path):
    """Resumed with two workers, against one run that prepares its batches itself, bit for bit."""
    flags = ("--grad_accum=2", "--schedule=constant", "--eval_interval=4")
    learn(tmp_path / "0", counting, *flags, "--max_steps=9", "--num_workers=0")
    learn(tmp_path / "2", counting, *flags, "--max_steps=4", "--num_workers=2")
    said(train.main, "--resume", f"--out_dir={tmp_path / '2'}", "--max_steps=9")
    assert same_log(tmp_path / "0", tmp_path / "2")
    bad = jsonl(tmp_path / "bad.jsonl", talk("<image>?", "a", image="gone.png"), talk("?", "a"))
    message = refusal(learn, tmp_path / "bad", (bad, counting[1]), "--max_steps=9", "--num_workers=2")
    assert "bad.jsonl, line 1" in message and "gone.png" in message


def test_compiled_blocks_learn_the_same(digits, tmp_path, monkeypatch):
    """Against eager blocks; the compilations of a run with all lengths of data/digits are counted, not their speed."""
    compile_module, counters = torch.nn.Module.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_module, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    data = digits / "train.jsonl", jsonl(tmp_path / "text.jsonl", {"text": "nothing to answer"})
    flags = ("--max_steps=10", "--eval_interval=5", "--level_steps=0", "--num_workers=0", "--schedule=constant")
    learn(tmp_path / "eager", data, *flags)
    learn(tmp_path / "compiled", data, *flags, "--compile")
    assert 1 <= counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    assert column(tmp_path / "compiled", "loss") == pytest.approx(column(tmp_path / "eager", "loss"), rel=1e-4)
    assert kept(tmp_path / "compiled").keys() == kept(tmp_path / "eager").keys()
    said(train.main, "--resume", f"--out_dir={tmp_path / 'compiled'}", "--max_steps=11")
    torch._dynamo.reset()


def test_presets_and_settings_are_shown(counting, tmp_path, capsys):
    """Against PRESETS, however the folder is spelled; --help shows the values that a run will have."""
    folder = REPO / "data" / "shapes"
    spelled = {train.presets(name) for name in ("shapes", str(folder), f"{folder}/", os.path.relpath(folder))}
    assert spelled == {train.PRESETS["shapes"]} and train.presets("mine.jsonl") == ""
    for flags in (["--data=shapes"], ["--data=digits,shapes", "--n_layer=3"], ["--data=spoken_digits,shapes"]):
        with pytest.raises(SystemExit):
            train.main([*flags, "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert "optimizer steps [4000]" in words and "each so many steps; 0: all at once [100]" in words
    argv = ["--data=shapes", "--n_layer=5"]
    s, config, given = sample.flags("", train.Train, Config, argv=argv, presets=train.presets)
    assert (s.max_steps, config.n_layer, config.prompt_style, given) == (4000, 5, "last", {"data", "n_layer"})
    words = learn(tmp_path, counting, "--max_steps=1")
    [line] = [line for line in words.splitlines() if line.startswith("settings: ")]
    assert "--n_embd=64" in line and "--max_steps=1" in line and "--seed" not in line


def test_records_held_out_by_default(tmp_path):
    """Every twentieth record; the last twentieth of a text, on which a model without encoders trains."""
    records, val = data_records.read_data([jsonl(tmp_path / "a.jsonl", *({"text": f"{i}"} for i in range(21)))], [])
    assert len(records) == 19 and [record["text"] for record in val] == ["0", "20"]
    path, text = tmp_path / "my.txt", "".join(f"{i} is a number. " for i in range(200))
    path.write_text(text)
    words = said(train.main, *TINY, f"--data={path}", "--max_steps=2", f"--out_dir={tmp_path / 'out'}")
    model = load(tmp_path / "out")
    assert len(model.encoder) == 0 and model.config.image_encoder == "none"
    records, val = data_records.read_data([str(path)], [])
    assert records[0]["text"] + val[0]["text"] == text and len(val[0]["text"]) == len(text) // 20
    assert "1 records to learn from" in words and " 1 held out" in words and "--raw" in words


# ---------------------------------------------------------------------------------------------- sample.py


def test_score():
    """Against counts by hand."""
    read, even = dict(task="read"), dict(task="even")
    records = [talk("q", "12", "q", " 12 ", **read), talk("q", "7", **read), talk("q", "yes", "q", "no", **even)]
    assert data_scores.score(records, ["12", "1", "9", "yes", "nope"]) == {
        "n": 5, "exact": 2 / 5, "chars": 8 / 12, "majority": 2 / 5,
        "tasks": {
            "read": {"n": 3, "exact": 1 / 3, "chars": 3 / 5, "majority": 2 / 3},
            "even": {"n": 2, "exact": 1 / 2, "chars": 5 / 7, "majority": 1 / 2},
        },
    }  # fmt: skip
    nothing = {"all": {"n": 1, "exact": 0, "chars": 0, "majority": 1}}
    assert data_scores.score([talk("q", "abc")], [""])["tasks"] == nothing


SAMPLINGS = [{"max_new_tokens": 30}, dict(max_new_tokens=30, temperature=1.0, top_k=9, top_p=0.9, seed=3)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_eval_answers_each_question(sampling, trained, counting):
    """In batches as one by one and without `ask`; later turns see the true earlier answers."""
    out, _, model = trained
    records, answers = read_records(counting[0]), []
    for r in records:
        turns = record_turns(r)
        for i in range(len(turns)):
            segments = data_records.segments(model, turns[:i] + [(turns[i][0], None)], record_media(r))
            answers.append("".join(answer(model, segments, **sampling)[0]).strip())
    assert len(set(answers)) > 2 and sample.ask(model, records, 7, **sampling) == answers
    assert (sample.ask(model, records, 7, **sampling | {"seed": 4}) != answers) == ("seed" in sampling)
    flags = [f"--{k}={v}" for k, v in sampling.items()]
    printed = said(sample.main, f"--out_dir={out}", f"--eval={counting[0]}", "--batch_size=7", *flags)
    assert json.loads(printed.splitlines()[-1]) == data_scores.score(records, answers)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("raw", [False, True])
def test_chat_answers_as_the_command_line_does(raw, sampling, trained, counting):
    """Against the tokens of model.generate, decoded here."""
    out, _, model = trained
    path, prompt = str(counting[0].parent / "5.png"), "User: " if raw else "How many?"
    segments, media, flags = data_records.question(model, prompt, [("image", path)]), {"image": path}, ["--raw=no"]
    if raw:
        segments, media, flags = [("text", get_tokenizer("bytes").encode(prompt))], {}, ["--raw"]
    tokens = [token for [token] in model.generate([segments], **{"seed": 1} | sampling)]
    written = get_tokenizer("bytes").decode(tokens).decode(errors="replace")
    want = written if raw else written.split("\n\n")[0].lstrip()
    chat = sample.Chat(out, device="cpu")
    assert chat.ask(prompt, **media, raw=raw, **sampling) == want
    chat.reset()
    pieces = list(chat.ask(prompt, **media, raw=raw, stream=True, **sampling))
    assert "".join(pieces) == want and all(pieces)
    flags += [f"--{name}={value}" for name, value in (media | sampling).items()]
    assert said(sample.main, f"--out_dir={out}", f"--prompt={prompt}", *flags) == want + "\n"


def test_chat_session(trained, counting, monkeypatch, capsys):
    """Against Chat.ask: the state is kept between turns, an error ends nothing, the flags' media are shown once."""
    chat, line = sample.Chat(trained[0], device="cpu"), [f"--out_dir={trained[0]}", "--max_new_tokens=30"]
    forgotten, second, paths = chat.ask("Loud?", max_new_tokens=30), None, iter(range(1, 9))
    while second in (None, forgotten):  # or the test would not see the state
        path = counting[0].parent / f"{next(paths)}.png"
        chat.reset()
        first = chat.ask("<image> How many?", image=path, max_new_tokens=30)
        second = chat.ask("Loud?", max_new_tokens=30)
    sessions = [
        ([], f"<{path}> How many?\n<gone.png>?\nLoud?\n\n", f"> {first}\n> > {second}\n> "),
        ([f"--image={path}"], "<gone.png>?\n<image> How many?\nLoud?\n", f"> > {first}\n> {second}\n> "),
        ([f"--image={path}", "--prompt=<image> How many?"], "", f"\n{first}\n> "),
    ]
    for flags, typed, want in sessions:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert said(sample.main, *line, "--chat", *flags).endswith(want)
        assert ("gone.png" in capsys.readouterr().err) == ("gone.png" in typed)


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
    x, gray = pixels(1, 20, 30, 3), pixels(2, 20, 30)
    picture, clear = Image.fromarray(x), np.dstack([x, 255 - gray])
    file = stored(picture, tmp_path / "x.png")
    tone = np.float32(np.sin(np.arange(4000) / 5) / 2)
    soundfile.write(tmp_path / "x.wav", tone, 16000, "FLOAT")
    points = [None if i == 7 else y for i, y in enumerate(wave(0, 60))]
    table = csv(tmp_path / "x.csv", "y", ["NA" if y is None else y for y in points])
    same = [
        ("image", [file, str(file), picture, x, torch.from_numpy(x)]),
        ("image", [stored(Image.fromarray(clear), tmp_path / "clear.png"), clear]),
        ("image", [gray, np.dstack([gray] * 3)]),
        ("audio", [tmp_path / "x.wav", tone, torch.from_numpy(tone), tone.tolist()]),
        ("series", [str(table), points, tuple(points), np.array(points, np.float64)]),
    ]
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
    points = [20 * y for y in wave(0, 60)]
    table = csv(tmp_path / "x.csv", "a,b", points, range(60))
    want = small_chat.model.forecast([points])[0].tolist()
    state = small_chat.state
    for series in (points, np.array(points), f"{table}#a"):
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
    others = sum(p.numel() for part in (model.encoder, model.adapter) for p in part.parameters())
    language = sum(p.numel() for p in model.parameters()) - others
    assert [int(n.replace(",", "")) for n in re.findall(r"[\d,]+\d", parameters)] == [language, others]
    assert run.startswith("trained: 100 steps of 8 samples of ")
    changed, same = (line.split(": ")[1].split() for line in (changed, same))
    assert changed == ["--n_embd=64", "--head_size=32"]
    assert {*changed, *same} == {f"--{name}={value}" for name, value in dataclasses.asdict(model.config).items()}
    contents = read_checkpoint(out)
    contents["config"] |= {"image_encoder": "not/here", "audio_encoder": "mel"}
    torch.save({"model": contents["model"], "config": contents["config"]}, tmp_path / "x.pt")
    flags = "--info", "--template=v3", "--image_encoder=nor/there"
    first, _, changed, _ = said(sample.main, f"--out_dir={tmp_path / 'x.pt'}", *flags).splitlines()
    assert first.endswith("takes text, image, audio") and "--template=v3" in changed
    assert "--image_encoder=nor/there --audio_encoder=mel" in changed
    path, _ = released("WorldRWKV, pictures", tmp_path / "x.pth")
    lines = said(sample.main, f"--out_dir={path}", "--info").splitlines()
    assert lines[0].endswith("takes text, image") and "--image_encoder=siglip" in lines[2] and len(lines) == 4


def test_an_answer_is_streamed(trained, monkeypatch):
    """Against what the screen holds at each flush."""
    screen, flushed = io.StringIO(), []
    monkeypatch.setattr(screen, "flush", lambda: flushed.append(screen.getvalue()))
    with contextlib.redirect_stdout(screen):
        sample.main([f"--out_dir={trained[0]}", "--prompt=How many?", "--max_new_tokens=30", "--temperature=2"])
    assert len(set(flushed)) > 3


# ---------------------------------------------------------------------------------------------- what the user gets wrong


CUT = stored(noise(40, 40), io.BytesIO(), format="PNG").getvalue()[:2000]


# fmt: off
@pytest.mark.parametrize("reader, name, contents", [
    (read_records, "x.jsonl", [b"", b"\n\n", b'{"text": "\xff"}\n']),
    (read_records, "x.json", [b"[]", b"{}", b"[{"]),
    (get_tokenizer, "vocabulary", [b"\x80\x02\xff" * 100]),
    (functools.partial(load_media, WHOLE), "x.png", [b"", b"no picture", CUT]),
    (load, "x.pt", [b"", b"no checkpoint"]),
])
# fmt: on
def test_files_that_cannot_be_read(reader, name, contents, tmp_path):
    """One sentence that names the file; a folder and a file that is missing, too."""
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
    """One sentence with file, line and picture, of train.py and sample.py alike."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # from twice that on, Pillow takes a picture for an attack
    good, bad = (talk("<image>\nHow many?", "one", image=str(odd / x)) for x in ("good.png", name))
    path, out = tmp_path / "bad.jsonl", tmp_path / "out"
    jsonl(path, good, good, bad if "." in name else {"id": 1}, good)
    trains = [*TINY, f"--data={path}", f"--val_data={odd / 'texts.jsonl'}", f"--out_dir={out}"]
    asks = [f"--out_dir={trained[0]}", f"--eval={path}", "--max_new_tokens=3"]
    for message in (refusal(train.main, trains), refusal(sample.main, asks)):
        assert f"{path}, line 3" in message and (name in message or name == "no record")
    assert not (out / "ckpt.pt").exists()


COUNTED = "max_steps batch_size grad_accum ctx_len eval_interval eval_samples save_interval n_layer n_embd head_size "
COUNTED += "image_height patch_height patch_width encoder_width conv_stride adapter_scale"
BAD_FLAGS = {f"train --{name}=0": f"{name}=0" for name in COUNTED.split()}
# fmt: off
BAD_FLAGS |= {  # script and flags: words of the message
    "train --data=nothing": "--data=nothing digits shakespeare", "train --data=no/thing": "--data=no/thing",
    "train --data=no.jsonl": "no.jsonl", "train --val_data=no.jsonl": "no.jsonl",
    "train --init_from=no.pt": "no.pt", "train --init_from=good.jsonl": "good.jsonl",
    "train --out_dir=good.jsonl": "good.jsonl", "train --resume": "ckpt.pt", "train --device=foo": "foo",
    "train --tokenizer=foo": "foo gpt2", "train --phase=foo": "phase=foo adapter",
    "train --schedule=foo": "schedule=foo cosine", "train --dtype=foo": "dtype=foo bfloat16",
    "train --template=foo": "template=foo v3", "train --image_encoder=foo": "image_encoder=foo patch",
    "train --head_size=48": "head_size=48 64", "train --image_height=40": "image_height=40",
    "train --patch_height=20": "patch_height=20", "train --patch_width=6": "patch_width=6",
    "train --grad_accum=3": "--batch_size=8 --grad_accum=3", "train --learning_rate=1e30": "loss --learning_rate",
    "train --image_encoder=none": "good.jsonl line good.png", "train --series_encoder=x": "none, wavenet, timer",
    "train --series_encoder=wavenet --series_kernel=6 --series_stride=9": "series_kernel=6",
    "train --series_encoder=wavenet --series_kernel=60 --lookback=48": "48 vectors",
    "sample --out_dir=nowhere": "nowhere train.py", "sample --out_dir=.": "ckpt.pt train.py",
    "sample --out_dir=good.jsonl": "good.jsonl", "sample": "--prompt --chat --eval",
    "sample --prompt=Hi --device=foo": "foo", "sample --prompt=Hi --tokenizer=foo": "foo",
    "sample --prompt=<image><image> --image=good.png": "<image>", "sample --prompt=Hi --image=gone.png": "gone.png",
    "sample --eval=no.jsonl": "no.jsonl", "sample --eval=texts.jsonl": "texts.jsonl",
    "sample --eval=good.jsonl --batch_size=0": "batch_size", "sample --eval=good.jsonl --prompt=Hi": "--eval",
    "sample --eval=good.jsonl --image=good.png": "--eval", "sample --eval=good.jsonl --chat": "--eval",
    "sample --raw --image=good.png": "--raw", "sample --raw --chat": "--raw",
    "sample --info --eval=good.jsonl": "--info --eval", "sample --prompt=Hi --temperature=-1": "temperature=-1",
    "sample --series=good.png": "good.png",
}
# fmt: on


@pytest.mark.parametrize("line", BAD_FLAGS)
def test_bad_flags(line, odd, trained, tmp_path, monkeypatch):
    """One sentence that holds the flag and what would be right."""
    monkeypatch.chdir(odd)
    script, *flags = line.split()
    main, defaults = sample.main, [f"--out_dir={trained[0]}"]
    if script == "train":
        data = "--data=good.jsonl", "--val_data=texts.jsonl", f"--out_dir={tmp_path}"
        main, defaults = train.main, [*TINY, *data, "--max_steps=5", "--warmup_steps=0"]
    message = refusal(main, [*defaults, *flags])
    assert not [word for word in BAD_FLAGS[line].split() if word not in message]


# fmt: off
NO_MEDIA = {
    "image": [
        5, b"x", "gone.png", "x.wav", {"path": "x.png"}, 0.5, [], [[1, 2], [3]], np.zeros((4, 4, 3)), torch.zeros(4, 4),
        np.zeros((4, 4, 2), np.uint8), np.zeros((3, 9, 9), np.uint8), np.zeros((0, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8), np.zeros((4, 4), bool), io.BytesIO(b"x"),
    ],
    "audio": [5, b"x", "gone.wav", "x.png", {"array": []}, [], np.zeros((2, 9)), np.zeros(9, np.int16), [math.nan]],
    "series": [5, object(), b"x", "gone.csv", "x.png", {"a": 1}, [], np.zeros((2, 9)), np.array(["x"]), [None]],
}
# fmt: on


@pytest.mark.parametrize("kind, good", [("image", "x.png"), ("audio", "x.wav"), ("series", [1.0, 2.0])])
def test_media_that_are_none(kind, good, small_chat, tmp_path, monkeypatch):
    """One sentence each, alone or beside a good one, and the state is as it was."""
    monkeypatch.chdir(tmp_path)
    bars(tmp_path / "x.png", 1)
    soundfile.write(tmp_path / "x.wav", np.zeros(999), 16000)
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
    # fmt: off
    for words, question in [
        ("2 <image>", dict(prompt="<image><image><image>", image=x)), ("1 <audio>", dict(prompt="<audio>", image=x)),
        ("string", dict(prompt=None)), ("string", dict(prompt=["Hi"])), ("prompt", dict(prompt="  ")),
        ("raw", dict(prompt="Hi", raw=True, image=x)), ("temperature", dict(prompt="Hi", temperature=-1)),
        ("max_new_tokens", dict(prompt="Hi", max_new_tokens=0)), ("top_k", dict(prompt="Hi", top_k=-1)),
    ]:
        for stream in (False, True):
            assert words in refusal(small_chat.ask, **question, stream=stream)
    # fmt: on
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
    assert "nowhere" in refusal(sample.Chat, "nowhere") and "ckpt.pt" in refusal(sample.Chat, ".")
    assert "foo" in refusal(sample.Chat, trained[0], device="foo")


def test_errors_as_the_user_sees_them(odd):
    """One line on stderr, without a traceback."""
    assert "good.jsonl" in complaint(run([REPO / "sample.py", "--out_dir=good.jsonl", "--prompt=Hi"], cwd=odd))


# ---------------------------------------------------------------------------------------------- a pretend GPU
# Tensors that say they are on "cuda" or "mps" while their numbers are computed on the CPU. What a GPU refuses raises:
# tensors of both devices in one operation, the CPU's random generator, float64 on mps.

# Of torch's autocast_mode.h what is used here; and the operations whose result the host needs
AUTOCAST_TO_HALF = set("mm addmm bmm baddbmm mv convolution".split())
AUTOCAST_TO_FLOAT = set("exp log log10 pow rsqrt sum cumsum softplus linalg_vector_norm smooth_l1_loss".split())
AUTOCAST_TO_FLOAT |= set("_softmax _log_softmax nll_loss_forward native_layer_norm native_group_norm".split())
WAITS = set("_local_scalar_dense equal nonzero masked_select _unique2 unique_dim".split())


def each(function, x):
    """x with every leaf replaced by function(leaf); torch's tree_map takes three times as long."""
    if isinstance(x, list | tuple):
        return type(x)([each(function, y) for y in x])
    return {name: each(function, y) for name, y in x.items()} if isinstance(x, dict) else function(x)


class GpuTensor(torch.Tensor):
    """A tensor that holds its `numbers` on the CPU; torch believes it to be on meta:0, a device without numbers."""

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
    """Computes what is on the pretend device `kind`; `waits` counts, by the reason, the host's waits for it."""

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
        """Counts what the host waits for: copies, results that it needs, and masks, whose sums it needs."""
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
                f"{name}: Expected all tensors to be on the same device, but found cpu, {tuple(wrong[0].shape)}"
            )

    def cast(self, name, inputs):
        """The dtype of an operation, where not its inputs'. In a backward pass what was saved was not yet cast."""
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
CUDA |= dict(get_device_name="pretend", mem_get_info=(2**34, 2**34), memory_reserved=0, memory_allocated=0)
CUDA |= dict(
    max_memory_allocated=2**30,
    _lazy_init=None,
    synchronize=None,
    empty_cache=None,
    reset_peak_memory_stats=None,
    manual_seed_all=None,
)


def forget_kernels():
    """What was compiled is looked for again, and what is missing is said again."""
    modrwkv.kernel.cache_clear()
    modrwkv.WARNED.clear()


@contextlib.contextmanager
def pretend_gpu(kind="cuda", kernel=True, capability=(8, 0)):
    """Inside there is a GPU, for threads and libraries, too. kernel: whether kernel.cu can be compiled for it."""
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

    def patched():
        return torch.cuda.is_available, torch.Tensor.to, torch.Generator, F.conv1d, modrwkv.compile_for_gpu

    before, on_cpu, first = patched(), torch.ones(3), torch.tensor([0, 1])
    with pretend_gpu():
        x = torch.ones(3, device="cuda")
        assert (x.device, x.is_cuda, x.cpu().is_cuda) == (torch.device("cuda:0"), True, False)
        assert (x + torch.tensor(2.0))[first].tolist() == [3, 3]  # numbers and indices from the CPU are taken
        for wrong in (
            lambda: x + on_cpu,
            lambda: torch.cat([x, on_cpu]),
            lambda: on_cpu.mul_(x),
            lambda: on_cpu[x.long()],
            lambda: x.index_put_((first,), on_cpu[:2]),
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
    assert before == patched()


def test_the_pretend_gpu_casts_under_autocast_as_cuda():
    """As torch's documentation lists it: products in bfloat16, norms, softmax and sums in float32, gradients too."""
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


@pytest.fixture
def senses(senses_folder, monkeypatch):
    """The working directory is that of `senses_folder`."""
    monkeypatch.chdir(senses_folder)


@pytest.fixture(scope="session")
def senses_folder(tmp_path_factory):
    """A folder with a few records of each kind: image, audio, series, text and quiet (nothing is asked)
    .jsonl; x.csv; and ckpt.pt, a language model that has learned to be brief."""
    folder = tmp_path_factory.mktemp("senses")
    for n in range(4):
        bars(folder / f"{n}.png", n + 1)
        soundfile.write(folder / f"{n}.wav", 0.5 * np.sin(np.arange(3200 + 160 * n) * n / 5) + 0.01, 16000)
    records = {
        "image": [talk("<image>\nHow many?", str(n), "Many?", "no", image=f"{n}.png") for n in range(4)],
        "audio": [talk("<audio>", "low", audio=f"{n}.wav") for n in range(4)],
        "series": [{"target": wave(n / 3, 60)} for n in range(4)],
        "quiet": [{"text": "there is nothing to answer"}],
        "text": [{"text": "what"}] + [talk("Up?", "no")] * 8,
    }
    records["series"] += [talk("<series>\nUp?", "yes", series=wave(0, 24))] * 4
    for kind in records:
        jsonl(folder / f"{kind}.jsonl", *records[kind])
    csv(folder / "x.csv", "y", wave(0, 300))
    flags = f"--data={folder / 'text.jsonl'}", f"--out_dir={folder}", "--device=cpu", "--rwkv=6", "--learning_rate=1e-2"
    said(train.main, *SHORT, *flags, "--max_steps=10")
    return folder


ASKED = {  # by the kind of data: one prompt, or a forecast; what the chat is told; what else is scored
    "image": (("--image=0.png", "--prompt=How many?"), "<1.png> How many?", "image.jsonl"),
    "audio": (("--audio=0.wav", "--temperature=1", "--top_k=9"), "<1.wav>", "audio.jsonl"),
    "series": (("--series=x.csv", "--horizon=20"), "<x.csv> Up?", "x.csv"),
    "text": (("--raw", "--prompt=what", "--temperature=1", "--top_p=0.9"), "Up?", "text.jsonl"),
}
PINNED = pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # torch's data loader is not taken in


def on_device(device, **how):
    """The context in which there is a device."""
    return contextlib.nullcontext() if device == "cpu" else pretend_gpu(device, **how)


def train_on(device, out, kind, *flags):
    """Trains SHORTly on a kind of data of `senses`; returns what was said, and the curves."""
    data = f"--device={device}", f"--out_dir={out}", f"--data={kind}.jsonl", f"--val_data={kind}.jsonl"
    words = said(train.main, *SHORT, *data, *flags)
    return words, {key: column(out, key) for key in ("loss", "grad_norm", "val_loss")}


# fmt: off
@PINNED
@pytest.mark.parametrize("device, kind, encoder, flags", [
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
])
# fmt: on
def test_a_gpu_trains_resumes_and_answers_as_the_cpu_does(
    device, kind, encoder, flags, senses, folders, tmp_path, monkeypatch
):
    """Score, checkpoint, --resume, a prompt or a forecast, --eval and --chat, against the CPU's. In bfloat16 within
    what its rounding does to three steps, as a GPU does not round where a CPU does."""
    for name, value in dict(width=16, PATCH=4, LAYERS=2, HEADS=2, HIDDEN=24).items():
        monkeypatch.setattr(Timer, name, value)
    modrwkv.write("timer.safetensors", randomise(Timer(Config()), 5).state_dict())
    encoder = folders(encoder) if encoder in modrwkv.HUB else encoder
    if kind != "text":
        flags += f" --{kind}_encoder={encoder}"
    prompt, told, file = ASKED[kind]
    curves, printed = [], []
    for place in ("cpu", device):
        with on_device(place):
            more = flags.format(device=place).split()
            train_on(place, tmp_path / place, kind, *more)
            curves.append(train_on(place, tmp_path / place, kind, *more, "--resume", "--max_steps=3")[1])
            ask = f"--out_dir={tmp_path / place}", f"--device={place}", "--max_new_tokens=4"
            words = said(sample.main, *ask, *prompt) + said(sample.main, *ask, f"--eval={file}")
            with patch("builtins.input", side_effect=[told, "And now?", ""]):
                printed.append(words + said(sample.main, *ask, "--chat"))
    half = "bfloat16" in flags
    for key, rounding in dict(loss=0.03, val_loss=0.03, grad_norm=0.1).items():
        want, got = (curve[key] for curve in curves)
        assert got == pytest.approx(want, rel=rounding if half else 1e-5) and len(set(want)) >= 2
    number = re.compile(r"\d+\.\d+")
    if not half:
        assert number.sub("#", printed[0]) == number.sub("#", printed[1])
        want, got = ([*map(float, number.findall(words))] for words in printed)
        assert got == pytest.approx(want, rel=1e-4)


# fmt: off
@PINNED
@pytest.mark.parametrize("device, programs, reason", [
    ("cpu", {}, "there is no C++ compiler; install g++ or clang++"),
    ("cpu", {"g++": "exit 1"}, "cannot compile kernel.cu"),
    ("cuda", {}, "there is no nvcc; pip install"),
    ("cuda", {"nvcc": "exit 1"}, "nvcc cannot compile kernel.cu"),
    ("mps", {}, "not for mps"),
])
# fmt: on
def test_a_machine_without_the_kernel_trains_and_says_why_it_is_slower(
    device, programs, reason, senses, tmp_path, monkeypatch, capsys
):
    """In one line, once; against a machine that has it. programs: shell scripts, all that PATH holds."""
    _, fast = train_on("cpu", tmp_path / "fast", "text")
    (tmp_path / "bin").mkdir()
    for name, script in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name, value in dict(PATH=tmp_path / "bin", XDG_CACHE_HOME=tmp_path, CUDA_HOME=tmp_path, CXX="").items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setitem(sys.modules, "nvidia", None)  # where pip puts another nvcc
    forget_kernels()
    capsys.readouterr()
    with on_device(device, kernel=False):
        _, slow = train_on(device, tmp_path / "slow", "text")
    forget_kernels()
    slower = [line for line in capsys.readouterr().err.splitlines() if "several times slower" in line]
    assert len(slower) == 1 and reason in slower[0]
    for key in fast:
        assert slow[key] == pytest.approx(fast[key], rel=1e-4)


@PINNED
@pytest.mark.parametrize("device, head_size", [("cpu", 48), ("cpu", 8), ("cuda", 8)])
def test_head_sizes_that_the_kernel_lacks_train(device, head_size, senses, tmp_path, capsys):
    """In PyTorch's operations, as the one line says."""
    forget_kernels()
    with on_device(device):
        _, curves = train_on(device, tmp_path, "text", f"--head_size={head_size}", "--n_embd=48")
    first, second = curves["loss"]
    assert second < first and "head sizes 16, 32, 64 and 128 alone\n" in capsys.readouterr().err


@PINNED
@pytest.mark.parametrize("capability, dtype, skipped", [((8, 0), "bfloat16", 0), ((7, 5), "float16", 3)])
def test_a_gpu_trains_in_the_precision_that_it_has(capability, dtype, skipped, senses, tmp_path):
    """bfloat16 from Ampere on. Before, float16 and its scale of gradients, which is halved at steps in which they
    overflow (null in the log) and kept by a checkpoint; the first gradient that does not is float32's."""
    data = f"--data={jsonl(tmp_path / 'up.jsonl', *[talk('Up?', 'no')] * 4)}"
    _, want = train_on("cpu", tmp_path / "cpu", "quiet", data)
    with pretend_gpu(capability=capability):
        words, _ = train_on("cuda", tmp_path / "gpu", "quiet", data, "--dtype=auto", "--max_steps=4")
        said(train.main, f"--out_dir={tmp_path / 'gpu'}", "--resume", "--max_steps=5")
    assert f"cuda:0, {dtype}" in words
    norms, losses = column(tmp_path / "gpu", "grad_norm"), column(tmp_path / "gpu", "loss")
    assert norms[:skipped] == [None] * skipped and len(norms) == 5 and None not in norms[skipped:]
    assert norms[skipped] == pytest.approx(want["grad_norm"][0], rel=0.02)
    assert losses[: skipped + 1] == pytest.approx(want["loss"][:1] * (skipped + 1), rel=0.02)
    assert losses[skipped + 1] < 0.8 * losses[0]
    assert kept(tmp_path / "gpu", "scaler").get("scale") == (65536 / 2**skipped if skipped else None)


@PINNED
def test_a_training_step_waits_for_the_gpu_only_where_it_logs(senses, tmp_path):
    """Four steps more are no wait more; with a line in the log for each step there is one for each."""
    flags = "--image_encoder=patch --audio_encoder=mel --series_encoder=wavenet --scan=bi --n_layer=1 --dtype=bfloat16"
    flags += " --data=image.jsonl,audio.jsonl,series.jsonl,text.jsonl"
    waits = {}
    for steps, interval in ((12, 100), (8, 100), (12, 1)):  # in eight steps each record comes once
        more = f"--max_steps={steps}", f"--log_interval={interval}"
        with pretend_gpu() as gpu:
            train_on("cuda", tmp_path / f"{steps} {interval}", "quiet", *flags.split(), *more)
        waits[steps, interval] = gpu.waits
    assert waits[12, 100] == waits[8, 100]
    assert waits[12, 1] - waits[12, 100] == {"tolist": 11}


def test_batches_may_be_on_the_gpu_already(model, folders):
    """FSDP2 moves what a module is given to its device; both kinds of encoders, against the CPU's loss."""
    from torch.distributed.utils import _to_kwargs

    frozen = dataclasses.replace(SMALL, image_encoder=folders("dinov2"), audio_encoder=folders("whisper"))
    image, ears = torch.from_numpy(pixels(1, 3, 32, 32)), torch.from_numpy(pixels(2, 9000)) / 255
    ahead = [("forecast", (series(3, 48)[1], torch.ones(12, 12)))]
    for net, batch in (
        (copy.deepcopy(model).float(), [[picture(0), sound(1), series(2), ("answer", codes("abc"))], ahead]),
        (randomise(ModRWKV(frozen)), [[("image", [image]), ("audio", ears), ("answer", codes("abc"))]]),
    ):
        want = net.loss(batch).item()
        with pretend_gpu():
            net.to("cuda")
            for given in (batch, net.collate(batch)):
                [[moved]], _ = _to_kwargs((given,), {}, torch.device("cuda", 0), False)
                assert net.loss(moved).item() == pytest.approx(want, rel=1e-5)
