"""What is promised, against something the project did not write: numpy, float64 autograd, the package `rwkv`, PIL;
then the scripts as a user runs them."""

import ast
import base64
import contextlib
import copy
import ctypes
import dataclasses
import functools
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
from multiprocessing.reduction import ForkingPickler
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
from data import batches as data_batches
from data import records as data_records
from data import released as released_files
from data import scores as data_scores
from data.answers import Answer, ask, generate_text
from data.convert import convert
from data.convert import main as convert_main
from data.convert import write as write_file
from data.flags import flags
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
from data.records import held_out_samples, read_records, record_media, record_sample, record_turns
from data.released import load, read_checkpoint
from data.text import PROMPT_STYLES, SHORT_ANSWER, TEMPLATES, conversation, get_tokenizer
from modrwkv import Adapter, Config, InputError, MelEncoder, ModRWKV, PatchEncoder, SpeechAdapter, Timer, WaveNet, save

torch.set_num_threads(1)
REPO = Path(modrwkv.__file__).resolve().parent
SEEDS = st.integers(0, 2**31)


def trials(n):
    return settings(max_examples=n, deadline=None, derandomize=True, database=None)


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


SMALL = Config(n_layer=2, n_embd=64, head_size=32, patch_width=8, encoder_width=48, conv_kernel=3, audio_encoder="mel")
SMALL = dataclasses.replace(SMALL, series_encoder="wavenet", series_kernel=6, series_stride=4, lookback=48, horizon=12)


@pytest.fixture(scope="session")
def model():
    """A small random model in float64, so that what must be equal is equal to 1e-6 or better (the decay is float32)."""
    return randomise(ModRWKV(SMALL)).double()


# the tokens of the tokenizer "bytes" that are more than a byte
MARKS = {257: b"\n\n", 258: b"User:", 259: b"Assistant:"}


def codes(string):
    return [b + 1 for b in (string if isinstance(string, bytes) else string.encode())]  # and those that are one


def text(string):
    return ("text", codes(string))


def pixels(seed, *shape):
    return np.random.RandomState(seed).randint(0, 256, shape, np.uint8)


def picture(seed, patches=3):
    return ("image", torch.from_numpy(pixels(seed, 3, 32, 8 * patches)))


def features(encoder, media):
    """What an encoder makes of a batch, as one tensor (length, width) for each."""
    return encoder(*encoder.collate(media)).split([encoder.length(x) for x in media])


def adapted(adapter, xs):
    """What an adapter makes of a batch of features (length, width), as one tensor (windows, n_embd) for each."""
    lengths = [len(x) for x in xs]
    return adapter(torch.cat(xs), *adapter.collate(lengths)).split([adapter.length(n) for n in lengths])


def sound(seed, frames=30):
    return "audio", torch.from_numpy(np.random.RandomState(seed).randn(80, frames).astype(np.float32))


def series(seed, points=30):
    return "series", modrwkv.normalise(torch.from_numpy(np.random.RandomState(seed).randn(points)))[0]


def noise(width, height):
    return Image.fromarray(pixels(0, height, width, 3))


def stored(image, path, **how):
    image.save(path, **how)
    return path


def talk(*values, **more):
    """A record: questions and answers by turns."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return more | {"conversations": turns}


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


# ------------------------------------------------------------ text: tokenizers, records, conversations


def strings(*pieces):
    """A strategy: any text, or a row of these pieces and short texts."""
    return st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(pieces), st.text(max_size=3))).map("".join))


@trials(100)
@given(strings("\n", "User:", "Assistant:", "User", ":", "a", "é"))
def test_bytes_tokenizer(string):
    """Against a regular expression that finds the marks, and UTF-8 between them."""
    tokenizer, want = get_tokenizer("bytes"), []
    for piece in re.split("(\n\n|User:|Assistant:)", string):
        want += [i for i, mark in MARKS.items() if mark == piece.encode()] or codes(piece)
    assert tokenizer.encode(string) == want
    assert tokenizer.decode([*want, 0, 260]) == string.encode()  # a model may have more tokens than its tokenizer
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
@given(strings(*PIECES))
def test_world_tokenizer(official, string):
    """Against the tokenizer of the package `rwkv`."""
    ours = get_tokenizer(official[1])
    ids = ours.encode(string)
    assert ids == official[2].encode(string)
    assert ours.decode([0, *ids, 65535]) == string.encode()  # neither the end nor an id above the vocabulary has a text
    assert (ours.end, ours.vocab_size) == (0, 65536)


@pytest.mark.parametrize("line", ["", "5", "x 'b' 1", "2 'b' x", "2 b 1", "2 'b 1", "2 'bb' 1", "2 5 1", "2 'é' 1"])
def test_broken_vocabulary(tmp_path, line):
    """The error names the line; a byte without an entry is named when it occurs."""
    path = tmp_path / "vocab.txt"
    path.write_text(f"1 'a' 1\n{line}\n3 'c' 1\n", encoding="utf-8")
    assert f"{path}, line 2" in refusal(get_tokenizer, str(path))
    path.write_text("1 'a' 1\n")
    assert "98" in refusal(get_tokenizer(str(path)).encode, "ab")


def test_gpt2_tokenizer():
    """Against GPT-2's known ids; without a network an error that names a tokenizer that needs none."""
    try:
        tokenizer = get_tokenizer("gpt2")
    except InputError as e:
        assert "gpt2" in str(e) and "bytes" in str(e)
    else:
        assert tokenizer.encode("hello world") == [31373, 995] and tokenizer.decode([31373, 995]) == b"hello world"
        assert (tokenizer.end, tokenizer.vocab_size) == (50256, 50257)


BROKEN_RECORDS = {  # what the error says: records
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
    "audio": [talk("<audio>", "a", audio=x) for x in (None, 5)] + [talk("?", "a", audio="x.wav")],
    "series": [talk("<series>", "a", series=x) for x in (None, 5, [1, "x"])] + [talk("?", "a", series=[1.0, 2])],
    '"series"': [{"series": x, "target": [1, 2]} for x in (5, ["a", "b"])],
    "target": [{"target": x} for x in (5, [], [1], ["a", "b"], [1, None], [1, math.nan])],
    "image": [talk("<image>", "a", image=x) for x in (None, ["x.png", "y.png"], 5, [5], {"path": "x.png"})]
    + [talk(question, answer, image="x.png") for question, answer in (("?", "a"), ("?", "a <image>"))],
}


@pytest.mark.parametrize("reason,record", [(reason, x) for reason, records in BROKEN_RECORDS.items() for x in records])
def test_broken_records(tmp_path, reason, record):
    """The error names file, place and reason, in a list and in lines with an empty one."""
    good, bad = json.dumps(talk("q", "a")), record if isinstance(record, str) else json.dumps(record)
    array, lines = tmp_path / "x.json", tmp_path / "x.jsonl"
    array.write_text(f"[{good}, {bad}]")
    lines.write_text(f"{good}\n\n{bad}\n")
    for path, place in ((array, str(array) if reason == "JSON" else f"{array}, record 2"), (lines, f"{lines}, line 3")):
        message = refusal(read_records, path)
        assert place in message and reason in message


def spell(segments):
    """Segments as a string: answers in brackets, media as <their data> if that is a string, else as <kind>."""
    string = ""
    for kind, data in segments:
        if kind in modrwkv.MEDIA:
            string += f"<{data if isinstance(data, str) else kind}>"
        else:
            words = b"".join(MARKS.get(i, bytes([(i - 1) % 256])) for i in data).decode()
            string += f"[{words}]" if kind == "answer" else words
    return string


TURNS = {
    "world": "User: hi\n\nAssistant:[ hello\n\n]User: who?\n\nAssistant:[ me\n\n]",
    "v1": "\x16User: hi\x17Assistant:[ hello\x17]User: who?\x17Assistant:[ me\x17]",
    "v2": "\x16User: hi\x17\x16Assistant:[ hello\x17]\x16User: who?\x17\x16Assistant:[ me\x17]",
    "v3": "\x16User:hi\x17\x16Assistant:[hello\x17]\x16User:who?\x17\x16Assistant:[me\x17]",
}
TRANSCRIPTS = {"world": "Assistant:[ yes\n\n]", "v3": "\x16Assistant:[yes\x17]"}


@pytest.mark.parametrize("template,turns", TURNS.items())
def test_templates(template, turns):
    """Against the turns spelled out, also where a chat goes on; a sound and nothing asked has no question."""
    transcript = "<A>" + TRANSCRIPTS.get(template, "\x16Assistant:[ yes\x17]")
    config = dataclasses.replace(SMALL, template=template)
    assert spell(conversation(config, [("hi", "hello"), ("who?", "me")], iter(()))) == turns
    later = conversation(config, [("who?", None)], iter(()), first=False)
    assert spell(later) == turns.split("]")[1].split("[")[0]
    for style in PROMPT_STYLES:
        config = dataclasses.replace(config, prompt_style=style)
        assert spell(conversation(config, [("<audio>\n", "yes")], iter([("audio", "A")]))) == transcript
        assert "Why?" in spell(conversation(config, [("<audio>\nWhy?", "yes")], iter([("audio", "A")])))


def test_whitespace_and_media_in_a_conversation(official):
    """Against the turns spelled out, and the end's own token in a tokenizer that has one of "。\\n" (28329)."""
    turns = [("<image>\nWhat is this?", "A cat.")]
    turns += [("And <image><image>\n\n \nits colour?  ", " black\n\n\nand white\n")]
    want = "User: <A>\nWhat is this?\n\nAssistant:[ A cat.\n\n]"
    want += "User: And <B><C>\nits colour?\n\nAssistant:[ black\nand white\n\n]"
    assert spell(conversation(SMALL, turns, iter([("image", name) for name in "ABC"]))) == want
    config = dataclasses.replace(SMALL, tokenizer=official[1])
    assert conversation(config, [("q", "好。")], iter(()))[-1][1][-1] == 261


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("message", ["a\n\nb", "a\n \t\n\n b", "a\r\n\r\nb", "\x16a\x17b", "a\n\x17\n\x16\nb", "{}"])
def test_no_message_ends_its_turn(template, message):
    """The end of a turn occurs once, at its end."""
    config, end = dataclasses.replace(SMALL, template=template), TEMPLATES[template].end
    question, answer = map(spell, zip(conversation(config, [(message, message)], iter(()))))
    assert question.count(end) == answer.count(end) == 1 and answer.endswith(f"{end}]")


def test_records_as_llava_writes_them(tmp_path, model):
    """Against the media read by themselves; paths are relative to the file, and a record can be read again."""
    (tmp_path / "sub").mkdir()
    files, encoder = ["sub/x.png", "sub/y.png"], model.encoder["image"]
    x, y = (load_media(encoder, stored(drawing(at=(at, 8)), tmp_path / file)) for at, file in zip((10, 30), files))
    records = [talk("<image>\nWhat?", "A thing.", image=files[0]), talk("<image> and <image>", "two", image=files)]
    records += [talk("hi", "hello", id="2"), {"text": "ab\n\nc"}, {"text": "d", "conversations": None}]
    (tmp_path / "x.json").write_text(json.dumps(records))
    for path in (tmp_path / "x.json", jsonl(tmp_path / "x.jsonl", *records)):
        one, two, none, text, more = read_records(path)
        assert record_media(one) == [("image", str(tmp_path / "sub/x.png"))] and record_media(none) == []
        assert spell(record_sample(model, one)) == "User: <image>\nWhat?\n\nAssistant:[ A thing.\n\n]"
        for _epoch in range(2):
            first, second = (data for kind, data in record_sample(model, two) if kind == "image")
            assert torch.equal(first, x) and torch.equal(second, y)
        assert record_sample(model, text) == [("answer", [98, 99, 257, 100, 0])]  # id 0 ends a document
        assert record_sample(model, more) == [("answer", [101, 0])]
    (tmp_path / "x.csv").write_text("a\n1\n2\n")
    records = [{"series": past, "target": [3, 4]} for past in ("x.csv", [1, 2])] + [{"target": [1, 2, 3, 4]}]
    for record in read_records(jsonl(tmp_path / "y.jsonl", *records)):
        [(kind, points)] = record_sample(model, record)
        assert kind == "forecast" and points.tolist() == [1, 2, 3, 4]


def test_records_are_told_by_what_a_file_holds(tmp_path, model):
    """A list, one a line, a text, a byte order mark: against the record written; without private keys, too."""
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


def test_question_puts_media_first(tmp_path, model):
    """Against the prompt spelled out; media without an encoder, or fewer than the prompt has, are errors."""
    path = stored(drawing(), tmp_path / "x.png")
    segments = data_records.question(model, "What?", [("image", path)])
    assert spell(segments) == "User: <image>\nWhat?\n\nAssistant:"
    assert torch.equal(segments[1][1], load_media(model.encoder["image"], path))
    both = data_records.question(model, "What <image>?", [("image", path)] * 2)
    assert spell(both) == "User: <image>\nWhat <image>?\n\nAssistant:"
    assert "<image>" in refusal(data_records.question, model, "<image>", [])
    blind = ModRWKV(dataclasses.replace(SMALL, image_encoder="none"))
    assert "image encoder" in refusal(data_records.question, blind, "What?", [("image", path)])
    assert "image encoder" in refusal(blind, [segments])


# ------------------------------------------------------------ the recurrence


def formula(r, w, k, v, a, b, S):
    """The paper's equation 17, entry by entry, in numpy."""
    ys = []
    for t in range(r.shape[1]):
        Sa = np.einsum("bhij,bhj->bhi", S, a[:, t])
        vk = np.einsum("bhi,bhj->bhij", v[:, t], k[:, t])
        S = S * np.exp(w[:, t])[:, :, None, :] + np.einsum("bhi,bhj->bhij", Sa, b[:, t]) + vk
        ys.append(np.einsum("bhij,bhj->bhi", S, r[:, t]))
    return np.stack(ys, 1), S


METHODS = (modrwkv.wkv7, modrwkv.wkv7_chunked, modrwkv.wkv7_loop)
NAMES = ("r", "w", "k", "v", "a", "b", "state")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@pytest.mark.parametrize("function", METHODS)
@pytest.mark.parametrize("T", [1, 9, 100])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("decay", [0, -math.inf])
def test_wkv7_is_the_formula(function, T, with_state, decay):
    """At a head size of 4, and where one channel forgets nothing or all in one step."""
    rng = np.random.RandomState(0)
    r, k, v, a, b = rng.randn(5, 2, T, 3, 4) / 2
    w, S = -0.6 * rng.rand(2, T, 3, 4), rng.randn(2, 3, 4, 4) * with_state
    w[0, T // 2, 1, 2] = decay
    got = function(*map(torch.from_numpy, (r, w, k, v, a, b)), torch.from_numpy(S) if with_state else None)
    assert max(map(distance, got, formula(r, w, k, v, a, b, S))) < 1e-12


def wkv7_inputs(
    T, N, fastest=0.6, mixed=True, transition=1, with_state=True, seed=1, scale=1.0, infinite=0.0, B=1, H=2
):
    """[r, w, k, v, a, b(, state)], none contiguous: decays -fastest, or mixed: log-uniform from 1e-6 to fastest; a
    share infinite."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=F64).mT

    def uniform():
        return torch.rand(B, T, N, H, generator=g, dtype=F64).mT

    r, k, v = (scale * normal(B, T, N, H) for _ in range(3))
    w = -(1e-6 * (max(fastest, 1e-6) / 1e-6) ** uniform()) if mixed else torch.full_like(r, -fastest)
    w[uniform() < infinite] = -math.inf
    kk, rate = F.normalize(normal(B, T, N, H), dim=-1) * transition, uniform()
    state = [scale**2 * normal(B, H, N, N)] if with_state else []
    return [x.float() for x in [r, w, k, v, -kk, kk * rate, *state]]


def run_wkv7(function, inputs, dtype=None, used=(0, 1), device="cpu", weights=None):
    """y, the state, and the gradients in every input of a linear function of those of the two that are used."""
    xs = [x.detach().to(device, dtype or x.dtype, copy=True).requires_grad_() for x in inputs]
    results, g = function(*xs), torch.Generator().manual_seed(0)
    if weights is None:
        weights = [torch.randn(x.shape, generator=g).to(BF16) for x in results]  # as exact in every dtype
    loss = sum((results[i] * weights[i].to(results[i])).sum() for i in used)
    return [*(x.detach() for x in results), *torch.autograd.grad(loss, xs, materialize_grads=True)]


def assert_wkv7_exact(inputs, used=(0, 1), device="cpu"):
    """The loop in float64 against the formula; against its autograd the two other ways, and the kernel's without."""
    exact, N = run_wkv7(modrwkv.wkv7_loop, inputs, F64, used), inputs[0].shape[-1]
    *six, S = [x.double().numpy() for x in (*inputs, torch.zeros(exact[1].shape))][:7]
    assert max(map(distance, exact, formula(*six, S))) < 1e-12
    kernel = 2e-6 if N in (16, 32, 64, 128) and modrwkv.has_kernel(device) else 1e-5
    chunked, wkv7 = modrwkv.wkv7_chunked, modrwkv.wkv7
    for function, dtype, tolerance in (
        (wkv7, F32, kernel),
        (chunked, F32, 1e-5),
        (wkv7, F64, 1e-10),
        (chunked, F64, 1e-10),
    ):
        got = run_wkv7(function, inputs, dtype, used, device)
        errors = {name: distance(x, y) for name, x, y in zip(("y", "S", *NAMES), got, exact)}
        assert all(e <= tolerance for e in errors.values()), (function, dtype, errors)  # a NaN fails too
    with torch.no_grad():
        got = wkv7(*(x.to(device) for x in inputs))
    assert all(distance(x, y) <= kernel for x, y in zip(got, exact))


ANCHOR = dict(B=1, T=40, N=16, exponent=math.log10(0.6065), mixed=True, transition=1, with_state=True, scale=1.0)
ANCHOR |= dict(infinite=0, used=(0, 1), seed=1)


@pytest.mark.parametrize("device", DEVICES)
@trials(70)
@given(
    B=st.integers(1, 2),
    T=st.one_of(st.integers(1, 4), st.integers(1, 130)),
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
@example(**ANCHOR | dict(T=130, N=64))
@example(**ANCHOR | dict(T=96, N=64, mixed=False, with_state=False, scale=1e6, seed=2))
@example(**ANCHOR | dict(infinite=0.02, seed=3))
@example(**ANCHOR | dict(infinite=0.5, seed=4))
@example(**ANCHOR | dict(infinite=1, seed=5))
def test_wkv7_is_exact_with_its_gradients(device, used, exponent, **problem):
    """In few steps, as decoding has them, and many; of tensors with any strides."""
    assert_wkv7_exact(wkv7_inputs(fastest=10**exponent, **problem), used, device)


@pytest.mark.parametrize("fastest", [1e-6, 0.3, 0.6065, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.5, 7.6, 20.0, 60.0])
@pytest.mark.parametrize("T", [8, 20, 64])
def test_wkv7_is_exact_at_every_decay(fastest, T):
    """By the loop where they are fast, else in chunks."""
    for transition, with_state, scale in itertools.product((1, 0), (True, False), (1, 1e-6)):
        assert_wkv7_exact(wkv7_inputs(T, 16, fastest, False, transition, with_state, T, scale))


@trials(100)
@given(
    name=st.sampled_from(NAMES),
    shape=st.none() | st.lists(st.integers(0, 17), max_size=5).map(tuple),
    dtype=st.sampled_from([F64, BF16, torch.int64, torch.bool, torch.complex64]),
    device=st.sampled_from(["cpu", "meta"]),
    method=st.sampled_from(METHODS),
)
@example(name="w", shape=(1, 5, 2, 16), dtype=F32, device="cpu", method=modrwkv.wkv7)  # fewer steps
@example(name="k", shape=(1, 9, 1, 16), dtype=F32, device="cpu", method=modrwkv.wkv7)  # fewer heads
@example(name="v", shape=(2, 9, 2, 16), dtype=F32, device="cpu", method=modrwkv.wkv7)  # more samples
@example(name="state", shape=(1, 16, 16), dtype=F32, device="cpu", method=modrwkv.wkv7_chunked)
@example(name="r", shape=(1, 9, 2, 8), dtype=F32, device="cpu", method=modrwkv.wkv7_loop)
def test_wkv7_refuses_tensors_that_do_not_fit(name, shape, dtype, device, method):
    """One tensor of seven has another shape, dtype or device: a sentence that names it, or the result if it fits."""
    inputs = dict(zip(NAMES, wkv7_inputs(9, 16)))
    good = inputs[name]
    fits = shape in (None, good.shape)
    inputs[name] = good.to(dtype).to(device) if fits else torch.ones(shape, dtype=dtype, device=device)
    if fits and dtype.is_floating_point and device == "cpu":
        assert method(*inputs.values())[0].shape == (1, 9, 2, 16)
        return
    reason = f"(w|{name}) is floating point on r's device" if fits else f"(r|w|{name}) (has|is) "
    with pytest.raises(ValueError, match=f"wkv7: {reason}") as e:
        method(*inputs.values())
    assert "\n" not in str(e.value)


class Operations(TorchDispatchMode):
    """Counts the operations that compute: each is a kernel on a GPU. Views and what numpy does are not counted."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not (operation.is_view or operation in (torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default)):
            self.names[str(operation.overloadpacket)] += 1
        return operation(*args, **(kwargs or {}))


def test_rwkv7_without_a_kernel_reads_no_values(monkeypatch):
    """A GPU would have to be waited for; RWKV-6, whose decays are free, looks for the fastest."""
    monkeypatch.setattr(modrwkv, "has_kernel", lambda *args: False)
    for generation, T in itertools.product((7, 6), (20, 300)):
        model = ModRWKV(Config(rwkv=generation, n_layer=1, n_embd=32, head_size=16, image_encoder="none"))
        with Operations() as operations:
            y, *_ = model.blocks[0].att(torch.randn(2, T, 32), None)
            y.sum().backward()
        assert ("aten._local_scalar_dense" in operations.names) == (generation == 6)


@pytest.mark.parametrize("T", [1, 8, 97, 300])
def test_wkv7_of_known_decays_reads_no_values(T):
    """As RWKV-7 calls it: the loop's values, and no copy to the host."""
    inputs = wkv7_inputs(T, 8, 0.6065, False, seed=T)
    with Operations() as operations:
        got = run_wkv7(functools.partial(modrwkv.wkv7_chunked, w_min=-0.607), inputs)
    assert "aten.bmm" in operations.names and "aten._local_scalar_dense" not in operations.names
    assert all(distance(x, y) <= 1e-5 for x, y in zip(got, run_wkv7(modrwkv.wkv7_loop, inputs, F64), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("N", [8, 48, 64])
def test_wkv7_on_fake_tensors(method, N):
    """Shapes and dtypes of the results and gradients, where there are no values to look at."""
    with FakeTensorMode():
        xs = [torch.rand(2, 12, 3, N, dtype=BF16, requires_grad=True) for _ in range(6)]
        xs.append(torch.rand(2, 3, N, N, requires_grad=True))
        y, S = method(*xs)
        gradients = torch.autograd.grad(y.sum() + S.sum(), xs)
    assert (y.shape, y.dtype, S.shape, S.dtype) == ((2, 12, 3, N), BF16, (2, 3, N, N), F32)
    assert all(g.shape == x.shape and g.dtype == x.dtype for g, x in zip(gradients, xs, strict=True))


def test_the_line_that_says_why_there_is_no_kernel(capsys):
    """Once for each reason."""
    modrwkv.WARNED.clear()
    modrwkv.kernel.cache_clear()
    for _ in range(2):
        assert not modrwkv.has_kernel("mps")
        modrwkv.wkv7(*wkv7_inputs(9, 48))
    reasons = "kernel.cu is for CPUs and NVIDIA GPUs, not for mps", "kernel.cu has head sizes 16, 32, 64 and 128 alone"
    line = "the recurrence runs in PyTorch's own operations, which is several times slower: %s\n"
    assert capsys.readouterr().err == "".join(line % reason for reason in reasons)


def test_wkv7_without_a_kernel_compiles():
    """Into one graph, for one length at a time, where decays are known; else with graph breaks, as the smallest decay
    is looked up. In no case a value other than the loop's."""
    known = functools.partial(modrwkv.wkv7, w_min=-0.607)
    one_graph = torch.compile(known, fullgraph=True, dynamic=False, backend="aot_eager")
    with_breaks = torch.compile(modrwkv.wkv7, backend="eager")
    for compiled, T, fastest in (
        (known, 97, 0.6),
        (one_graph, 97, 0.6),
        (with_breaks, 40, 0.5),
        (with_breaks, 40, 5.0),
    ):
        inputs = wkv7_inputs(T, 8, fastest)
        got, exact = run_wkv7(compiled, inputs), run_wkv7(modrwkv.wkv7_loop, inputs, F64)
        assert max(map(distance, got, exact)) < 1e-5
        assert compiled is not one_graph or max(map(distance, got, run_wkv7(known, inputs))) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("T,N", [(5, 8), (70, 8), (5, 32), (70, 32), (70, 64)])  # without the kernel and with it
def test_wkv7_rounds_half_precision_once(device, dtype, autocast, T, N):
    """Against the loop in float64, rounded: y and each gradient but the state's, which is float32 throughout."""
    *six, state = wkv7_inputs(T, N, seed=6)
    inputs = [*(x.to(dtype) for x in six), state]
    exact, kernel = run_wkv7(modrwkv.wkv7_loop, inputs, F64), 2e-6 if N > 8 and modrwkv.has_kernel(device) else 1e-5
    got = run_wkv7(torch.autocast(device, BF16, enabled=autocast)(modrwkv.wkv7), inputs, device=device)
    for name, x, want in zip(("y", "S", *NAMES), got, exact, strict=True):
        exactly = name in ("S", "state")
        assert x.dtype == (F32 if exactly else dtype), name
        assert distance(x, want) <= (kernel if exactly else 1.5 * distance(want.to(dtype), want)), name


# ------------------------------------------------------------ kernel.cu on the CPU


@needs_compiler
@pytest.mark.parametrize("T", [1, 32, 45])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_kernel_writes_all_it_returns(monkeypatch, T, used):
    """Tensors that torch makes empty are full of NaN."""
    inputs = wkv7_inputs(T, 16, with_state=False)
    want, empty = run_wkv7(modrwkv.wkv7, inputs, used=used), torch.empty_like

    def new_empty(self, *shape, **how):
        return self.new_full(shape if len(shape) > 1 else shape[0], math.nan, **how)

    monkeypatch.setattr(torch, "empty_like", lambda *args, **how: empty(*args, **how).fill_(math.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    assert all(map(torch.equal, run_wkv7(modrwkv.wkv7, inputs, used=used), want))


@needs_compiler
@pytest.mark.parametrize("rwkv", [5, 6, 7])
def test_blocks_share_two_graphs(rwkv):
    """torch.compile of each block, as train.py does it: one graph of the first block and one of the others, for all
    lengths and without breaks, by torch's own count; the loss is that of a model that is not compiled."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.manual_seed(0)
    model = randomise(ModRWKV(Config(rwkv=rwkv, n_layer=4, n_embd=64, head_size=32, image_encoder="none")))
    samples = [[text("a" * n), ("answer", [5, 6])] for n in (9, 17, 33)]
    want = [model.loss([sample] * 2).item() for sample in samples]
    for block in model.blocks:
        block.compile(dynamic=True, backend="eager")
    got = [model.loss([sample] * 2).item() for sample in samples]
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    assert got == pytest.approx(want, rel=1e-5)


@needs_compiler
@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("threads", [2, 3, 4, 16, 64])
def test_kernel_with_rows_shared_out_among_threads(N, threads):
    """Of one head, so that there are more threads than heads, and at last than blocks of rows."""
    inputs = wkv7_inputs(600, N, seed=2, H=1)
    want = run_wkv7(modrwkv.wkv7, inputs)
    torch.set_num_threads(threads)
    try:
        got = run_wkv7(modrwkv.wkv7, inputs)
    finally:
        torch.set_num_threads(1)
    assert max(map(distance, got, want)) < 1e-6


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_state", [True, False])
def test_kernel_as_an_operator_of_torch(device, with_state):
    """By torch's own checks of schema, gradients, fake tensors and compilation with unknown sizes; the gradients are
    the same compiled and where the forward pass is repeated."""
    assert modrwkv.has_kernel(device)
    *six, state = [x.to(device).contiguous().requires_grad_() for x in wkv7_inputs(40, 16, seed=4)]
    checks = torch.library.opcheck(modrwkv.wkv7_kernel, (*six, state if with_state else None, True))
    assert set(checks.values()) == {"SUCCESS"}

    def loss(*inputs):
        y, S = modrwkv.wkv7(*inputs)
        return y.square().sum() + S.square().sum()

    inputs = (*six, state) if with_state else six
    want = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    for other in (compiled, torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False)):
        assert max(map(distance, torch.autograd.grad(other, inputs), want)) < 1e-6


@needs_compiler
def test_kernel_compiles_once_for_all_lengths():
    """torch.compile: one graph, made twice at most; the values are the loop's."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(modrwkv.wkv7, fullgraph=True, dynamic=True, backend=counter)
    for T in (17, 40, 77, 200):
        inputs = wkv7_inputs(T, 16, with_state=False, seed=T)
        assert max(map(distance, run_wkv7(compiled, inputs), run_wkv7(modrwkv.wkv7_loop, inputs))) < 1e-5
    assert counter.frame_count <= 2


RECURRENCE = """
import torch, modrwkv
x = torch.ones(1, 9, 1, 16)
print(modrwkv.wkv7(x, -x, x, x, x, x * 0)[0].sum().item(), flush=True)
"""


def recurrence(cache, **environment):
    """A fresh process that prints a sum, and whose compiled kernels are in the folder `cache`."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"} | environment
    command, pipes = [sys.executable, "-c", RECURRENCE], dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


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


CACHES = "no home", "empty home", "relative", "anyone writes", "a link", "a file", "read only"


@pytest.mark.parametrize("case", CACHES)
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


KERNEL = REPO / "kernel.cu"
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


def executable(path, script):
    """An executable file, its folder made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_gpu_kernel_is_compiled_by_a_package_of_pip(gpus, cuda, tmp_path, monkeypatch, capsys):
    """Where there is no nvcc but that of cuda-toolkit; here a script that gives the library for the CPU."""
    folder, calls = tmp_path / "site" / "nvidia" / "cu13", tmp_path / "calls"
    script = f'PATH=/usr/bin:/bin\necho "$@" >> {calls}\nfor last; do :; done\ncp {cuda._name} "$last"'
    executable(folder / "bin" / "nvcc", script)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    gpus += [(9, 0), (7, 5), (9, 0)]
    assert not modrwkv.has_kernel("cuda")
    assert 'there is no nvcc; pip install "cuda-toolkit[nvcc,cccl]" brings it' in capsys.readouterr().err
    monkeypatch.syspath_prepend(tmp_path / "site")
    for said in ("compiling kernel.cu for this GPU, once, about 30 seconds ...\n", ""):
        modrwkv.kernel.cache_clear()
        assert modrwkv.has_kernel("cuda") and capsys.readouterr().err == said
    [call] = calls.read_text().splitlines()
    gencode = "-gencode=arch=compute_75,code=sm_75 -gencode=arch=compute_90,code=sm_90"
    assert gencode in call and f"-L{folder}/lib" in call
    gpus.append((8, 0))  # another GPU, another library
    assert modrwkv.compile_for_gpu(str(KERNEL)) and "compiling" in capsys.readouterr().err


@pytest.mark.skipif(not NVCC, reason="no nvcc")
def test_gpu_kernel_without_its_driver(gpus, tmp_path, capsys):
    """What nvcc makes is a library that can be opened here; one line says why there is no kernel."""
    source = tmp_path / "kernel.cu"
    source.write_text(re.sub(r"\n *case (16|32|128|1|2): .*", "", KERNEL.read_text()))  # of the 24 kernels two
    gpus += [(7, 5), (12, 0)]
    path = modrwkv.compile_for_gpu(str(source))
    assert ctypes.CDLL(path).wkv7_backward and "compiling" in capsys.readouterr().err
    assert modrwkv.compile_for_gpu(str(source)) == path and not capsys.readouterr().err
    gpus[:] = [(1, 0)]
    message = refusal(modrwkv.compile_for_gpu, str(source))
    assert "cannot compile kernel.cu: nvcc fatal" in message and "compute_10" in message


@needs_compiler
def test_kernel_is_compiled_once_by_processes_at_once(tmp_path):
    """Both and a third one, which compiles nothing, print the same, and so does torch where nothing can be compiled."""
    (sum1, _), (sum2, _) = [process.communicate() for process in [recurrence(tmp_path / "cache") for _ in range(2)]]
    [library] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert recurrence(tmp_path / "cache").communicate() == (sum1, "") and library.suffix == ".so" and sum1 == sum2
    for reason in ("there is no C++ compiler; install g++ or clang++", "cannot compile kernel.cu"):
        out, err = recurrence(tmp_path, PATH=str(tmp_path / "bin"), CXX="").communicate()
        assert float(out) == pytest.approx(float(sum1), rel=1e-6) and "Traceback" not in err
        assert reason in err and "the recurrence runs in PyTorch's own operations" in err
        executable(tmp_path / "bin" / "g++", "echo no error: >&2; exit 1")


# ------------------------------------------------------------ kernel.cu's CUDA, run on the CPU


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


@pytest.fixture(scope="session")
def sm_75(tmp_path_factory):
    return open_cuda_on_cpu(tmp_path_factory.mktemp("sm_75"), "-DCUDA_ON_CPU_ARCH=75")


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
    grads = [guarded((B, T, H, N), F32 if name == "w" else dtype) for name in NAMES[:6]]
    ds0 = guarded((B, H, N, N), F32) if want_ds0 else None
    assert call(cuda.wkv7_backward, x[0].shape, dtype, *x, kept, dy, dsT, *grads, ds0) == 0
    intact(*grads, ds0)
    return *grads, ds0


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
    tensors = [(t, dtype) for t in (r, k, v, -kk * removal, kk * rate * removal, dy)] + [(t, F32) for t in (w, s0, dsT)]
    r, k, v, a, b, dy, w, s0, dsT = (guarded(t.shape, dtype).copy_(t) for t, dtype in tensors)
    return [r, w, k, v, a, b], s0, dy, dsT


def check(found, x, s0, dy, dsT):
    """Against float64: 2e-6 of the norm in float32 (ds0 at fast decays: twice the float32 loop's); rounding in 16."""
    zero = torch.zeros(x[0].shape[0], x[0].shape[2], x[0].shape[3], x[0].shape[3])
    inputs, weights = [*x, zero if s0 is None else s0], (dy, zero if dsT is None else dsT)
    exact, exact32 = (run_wkv7(modrwkv.wkv7_loop, inputs, dtype, weights=weights) for dtype in (F64, F32))
    for name, y, e, e32 in zip(RESULTS, found, exact, exact32, strict=True):
        if y is None:
            continue
        error, size = (y.double() - e).norm().item(), e.norm().item()
        bound = max(2e-6 * size, 2 * (e32.double() - e).norm().item() if name == "ds0" else 0, 1e-20)
        if y.dtype != F32:
            bound = max(1.5 * (e.to(y.dtype).double() - e).norm().item(), 1e-20)
        assert error <= bound, f"{name} {y.dtype}: error {error:.3g}, bound {bound:.3g}, norm {size:.3g}"


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
def test_cuda_gives_the_same_bits_in_any_order_of_threads(cuda, sm_75, N, dtype, monkeypatch):
    """By the copies of sm_75, which has no cp.async, as by those of sm_80, and without states for a backward pass."""
    problem = cuda_inputs((1, 21 if N < 128 else 9, 2 if N < 128 else 1, N), dtype, "rwkv7", 5)
    first, others = run_all(cuda, *problem), [run_all(sm_75, *problem)]
    for order in ("-1", "1", "2") if dtype == BF16 else ("-1",):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        others.append(run_all(cuda, *problem))
    others.append(cuda_forward(cuda, *problem[:2], keep=False)[:2])
    for other in others:
        assert all(map(torch.equal, other, first))
    monkeypatch.delenv("CUDA_ON_CPU_ORDER")
    problem = cuda_inputs((1, 21 if N < 128 else 9, 1, N), dtype, "edges", N)
    assert all(map(torch.equal, run_all(sm_75, *problem), run_all(cuda, *problem)))


def test_cuda_in_two_halves(cuda):
    """The state after the first begins the second, and its gradient goes back: bits of the whole, and float64."""
    x, s0, dy, dsT = cuda_inputs((2, 45, 1, 64), F32, "rwkv7", 7)
    whole, sT, _ = cuda_forward(cuda, x, s0, keep=False)
    (*first, dy1), (*second, dy2) = zip(*((t[:, :18].contiguous(), t[:, 18:].contiguous()) for t in (*x, dy)))
    y1, s1, kept1 = cuda_forward(cuda, first, s0)
    y2, s2, kept2 = cuda_forward(cuda, second, s1)
    assert torch.equal(torch.cat([y1, y2], 1), whole) and torch.equal(s2, sT)
    *grads2, ds1 = cuda_backward(cuda, second, kept2, dy2, dsT)
    *grads1, ds0 = cuda_backward(cuda, first, kept1, dy1, ds1)
    check((whole, sT, *(torch.cat(pair, 1) for pair in zip(grads1, grads2)), ds0), x, s0, dy, dsT)


@pytest.mark.parametrize("N", [32, 64, 128])
def test_cuda_overflows_in_float16_as_rounding_does(cuda, N):
    """GradScaler looks for infinities: they are where the float64 loop's results are beyond float16, and nowhere else;
    at N = 128 also where the gradient of one half of the rows is, which is added to the other's in float16."""
    x, s0, dy, dsT = cuda_inputs((1, 20, 1, N), F16, "rwkv7", 3)
    x[2], x[3], dy = 20 * x[2], 1000 * x[3], 5000 * dy
    found = run_all(cuda, x, s0, dy, dsT)
    exact = run_wkv7(modrwkv.wkv7_loop, [*x, s0], F64, weights=(dy, dsT))
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
    grads = [torch.zeros(x[0].shape, dtype=F32 if name == "w" else F16) for name in NAMES[:6]]
    assert call(cuda.wkv7_backward, x[0].shape, F16, *x, kept, dy, dsT, *grads, ds0 := torch.zeros_like(s0)) == 0
    assert not any(y.isfinite().all() for y in (*grads, ds0))


def test_cuda_refuses_what_it_cannot_do(cuda):
    """With CUDA's own numbers of errors: an unknown head size, no steps, pointers that are not aligned."""
    x, s0, dy, dsT = cuda_inputs((1, 2, 1, 16), F32, "one", 0)
    y, sT, kept = cuda_forward(cuda, x, s0)
    assert call(cuda.wkv7_forward, (0, 1, 1, 16), F32, *[None] * 10) == 0  # nothing to do
    assert call(cuda.wkv7_forward, (1, 2, 1, 24), F32, *x, s0, y, sT, kept) == 1
    assert call(cuda.wkv7_forward, (1, 0, 1, 16), F32, *x, s0, y, sT, kept) == 1
    x[0] = x[0].flatten()[1:]
    assert call(cuda.wkv7_forward, (1, 1, 1, 16), F32, *x, s0, y, sT, kept) == 716 and cuda.wkv7_error(716)


def test_cuda_launches(cuda):
    """The stream that was given; shared memory for two blocks on an SM of sm_80 and sm_90 at N = 64, one of sm_75."""
    stream, shared = ctypes.c_void_p.in_dll(cuda, "last_stream"), ctypes.c_size_t.in_dll(cuda, "last_shared")
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
    flags = ["-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", "-o", tmp_path / "kernel.cubin"]
    compiled = subprocess.run([NVCC, *flags, tmp_path / "kernel.cu"], check=True, capture_output=True, text=True)
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    kernels = re.findall(pattern, compiled.stderr, re.S)
    assert len(kernels) == 8
    for name, stores, loads, registers in kernels:
        assert (stores, loads) == ("0", "0"), name
        assert int(registers) <= (255 if "backward" in name else 168), name


# ------------------------------------------------------------ blocks, as the official code has them


def official_weights(n_layer, C, V=300, N=64, ranks=(32, 32, 32, 32), seed=0, rwkv=7):
    """A checkpoint as BlinkDL's files are, every tensor random and non-zero, the logits of order 2."""
    g = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=g)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*(shape or (1, 1, C)), generator=g)

    def matrix(rows, columns):
        return normal(rows, columns) / columns**0.5

    def norm(name):
        return {f"{name}.weight": 1 + 0.2 * normal(C), f"{name}.bias": 0.2 * normal(C)}

    hidden = 4 * C if rwkv == 7 else int(3.5 * C) // 32 * 32
    z = {"emb.weight": normal(V, C), "head.weight": 2 * matrix(V, C), **norm("ln_out"), **norm("blocks.0.ln0")}
    for i in range(n_layer):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        z |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2") | norm(att + "ln_x")
        z |= {att + f"{s}.weight": matrix(C, C) for s in ("receptance", "key", "value", "output")}
        z |= {ffn + "key.weight": matrix(hidden, C), ffn + "value.weight": matrix(C, hidden)}
        if rwkv == 7:
            z |= {att + f"x_{s}": uniform(0, 1) for s in "rwkvag"} | {ffn + "x_k": uniform(0, 1)}
            z |= {att + "w0": uniform(-6, 2), att + "a0": uniform(-1, 1), att + "v0": uniform(-1, 1)}
            for s, rank in zip("wavg", ranks):
                z |= {att + f"{s}1": normal(C, rank) / C**0.5, att + f"{s}2": normal(rank, C) / rank**0.5}
            z |= {att + "k_k": uniform(0.5, 1), att + "k_a": uniform(0.8, 1.2), att + "r_k": 0.3 * normal(C // N, N)}
            continue
        mix, names = ("mix", "kvrg") if rwkv == 5 else ("maa", "xwkvrg")
        z |= {att + f"time_{mix}_{s}": uniform(0, 1) for s in names}
        z |= {ffn + f"time_{mix}_{s}": uniform(0, 1) for s in "kr"} | {ffn + "receptance.weight": matrix(C, C)}
        z |= {att + "gate.weight": matrix(C, C), att + "time_faaaa": normal(C // N, N)}
        z |= {att + "time_decay": uniform(-6, 3, C // N, N) if rwkv == 5 else uniform(-6, 3)}
        if rwkv == 6:
            z |= {att + "time_decay_w1": matrix(C, 24), att + "time_decay_w2": normal(24, C) / 5}
            z |= {att + "time_maa_w1": normal(C, 5 * 16) / C**0.5, att + "time_maa_w2": normal(5, 16, C) / 8}
    assert all(x.std() > 0.02 for x in z.values())
    return z


def weights_of(rwkv, n_layer, C):
    return official_weights(n_layer, C, rwkv=rwkv)


@pytest.fixture(scope="session")
def official_before_7():
    """The class of the package `rwkv` for the generations before 7: a flag read at import decides which it is."""
    with pytest.MonkeyPatch.context() as m:
        for name in ("RWKV_V7_ON", "RWKV_JIT_ON", "RWKV_CUDA_ON"):
            m.setenv(name, "0")
        RWKV = runpy.run_module("rwkv.model")["RWKV"]
    return lambda path, strategy="cpu fp32": RWKV(path, strategy, verbose=False)


def assert_logits_agree(ours, theirs, tokens):
    """In one pass and token by token; returns our states after both, and theirs."""
    exact, exact_state = theirs.forward(tokens.tolist(), None, full_output=True)
    assert 1 < exact.std() < 5  # there is something to compare
    logits, state = ours(tokens[None])
    steps, step_state = [], None
    for t in tokens:
        z, step_state = ours(t.view(1, 1), step_state)
        steps.append(z[0, 0])
    for got in (logits[0], torch.stack(steps)):
        error = (got - exact).abs().amax(-1)
        assert error[0] < 1e-2  # one token's k . r may be nearly 0, and the norm after it blows up its rounding
        assert error[1:].max() < 1e-4
    return state, step_state, exact_state


SHAPES = [(7, 1, 64, 64, (32, 32, 32, 32)), (7, 2, 128, 64, (64, 32, 16, 96)), (7, 3, 192, 64, (32, 48, 24, 64))]
SHAPES += [(7, 3, 128, 32, (8, 16, 64, 40)), (5, 1, 64, 64, ()), (5, 3, 128, 64, ()), (6, 1, 64, 64, ())]
SHAPES += [(6, 3, 128, 64, ())]


@pytest.mark.parametrize("rwkv,n_layer,C,N,ranks", SHAPES)
@torch.no_grad()
def test_logits_and_states(official, official_before_7, tmp_path, rwkv, n_layer, C, N, ranks):
    """Against the package `rwkv`, of a file in float32 or, as the released ones are, in bfloat16."""
    weights = official_weights(n_layer, C, N=N, ranks=ranks, seed=n_layer if rwkv == 7 else 0, rwkv=rwkv)
    dtype = torch.bfloat16 if rwkv == 7 and N == 64 and n_layer > 1 else torch.float32
    torch.save({name: x.to(dtype) for name, x in weights.items()}, tmp_path / "x.pth")
    theirs = official[0](str(tmp_path / "x"), "cpu fp32") if rwkv == 7 else official_before_7(str(tmp_path / "x"))
    ours = load(tmp_path / "x.pth", dtype=torch.float32)
    tokens = torch.randint(300, (60,), generator=torch.Generator().manual_seed(7))
    assert ours.config.rwkv == rwkv
    *states, exact_state = assert_logits_agree(ours, theirs, tokens)
    for got, (i, layer) in itertools.product(states, enumerate(zip(*[iter(exact_state)] * 3))):
        for x, want in zip(got[i], layer):
            assert distance(x[0], want.mT if rwkv < 7 and want.dim() == 3 else want) < 1e-5


def test_sizes_are_read_off_an_official_checkpoint(tmp_path):
    """Config and tensors against those written, also where vectors are flat, as some converters leave them."""
    weights = official_weights(3, 128, N=32, ranks=(8, 16, 24, 40))
    torch.save(weights, tmp_path / "x.pth")
    changes = dict(tokenizer="bytes", template="v2")
    ours = load(tmp_path / "x.pth", **changes)
    assert ours.config == Config(n_layer=3, n_embd=128, head_size=32, image_encoder="none", **changes)
    unused = {f"blocks.0.att.v{i}" for i in "012"}
    assert set(ours.state_dict()) == set(weights) - unused
    flat = {name: x.flatten() if x.dim() == 3 else x for name, x in weights.items() if name not in unused}
    torch.save(flat, tmp_path / "flat.pth")
    seeing = load(tmp_path / "flat.pth", image_encoder="patch", tokenizer="bytes")  # an encoder may be added
    assert "image" in seeing.encoder
    for name, x in ours.state_dict().items():
        assert torch.equal(x, weights[name]) and torch.equal(x, seeing.state_dict()[name])


@pytest.mark.parametrize("L,C,N,V", [(3, 128, 64, 260), (1, 16, 16, 8)])  # also V < C and rank > C
def test_initial_values(L, C, N, V):
    """Against the formulas of the official training code, in numpy."""
    torch.manual_seed(0)
    z = arrays(ModRWKV(Config(n_layer=L, n_embd=C, head_size=N), V))
    i = np.arange(C)
    q, lin, zz = i / C, i / (C - 1) - 0.5, (i % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zz * abs(zz)
    want, gains = {"ln_out.weight": 1, "ln_out.bias": 0}, {"head.weight": 0.5 * max(1, V / C) ** 0.5}
    for layer in range(L):
        block, att, rho0, rho1 = f"blocks.{layer}.", f"blocks.{layer}.att.", layer / max(1, L - 1), 1 - layer / L
        powers = dict(r=0.2, g=0.2, w=0.9, a=0.9, k=0.7, v=0.7)
        want |= {f"{att}x_{s}": 1 - q ** (p * rho1) for s, p in powers.items()}
        want[f"{att}w0"] = -6 + 6 * (i / (C - 1)) ** (1 + rho0**0.3) + 0.5 + 2.5 * zigzag
        want[f"{att}a0"] = -0.19 + 0.3 * zigzag + 0.4 * lin
        want |= {f"{att}k_k": 0.71 - 0.1 * lin, f"{att}k_a": 1.02, f"{att}r_k": -0.04}
        want |= {f"{att}v0": 0.73 - 0.4 * lin} if layer else {}
        want |= {f"{att}ln_x.weight": ((layer + 1) / L) ** 0.7, f"{att}ln_x.bias": 0}
        want |= {f"{block}ffn.x_k": 1 - q ** (rho1**4), f"{block}ffn.value.weight": 0}
        for norm in ("ln1", "ln2") if layer else ("ln0", "ln1", "ln2"):
            want |= {f"{block}{norm}.weight": 1, f"{block}{norm}.bias": 0}
        for s in "wavg" if layer else "wag":
            want[f"{att}{s}1"], gains[f"{att}{s}2"] = 0, 0.1 * max(1, len(z[f"{att}{s}2"]) / C) ** 0.5
        gains |= {f"{att}{s}.weight": gain for s, gain in dict(receptance=1, key=0.1, value=1, output=0).items()}
        gains[f"{block}ffn.key.weight"] = 1
    for name, x in want.items():
        assert np.allclose(z[name].squeeze(), x, rtol=0, atol=2e-6), name
    for name, gain in gains.items():  # orthogonal
        x = z[name] if len(z[name]) <= z[name].shape[1] else z[name].T
        assert np.allclose(x @ x.T, gain**2 * np.eye(len(x)), atol=1e-6 if gain < 0.2 else 1e-5), name
    assert abs(z["emb.weight"]).max() <= 1e-4
    assert z["emb.weight"].std() == pytest.approx(1e-4 / 3**0.5, rel=0.02 if V > C else 0.1)
    assert {"emb.weight", *want, *gains} == {name for name in z if not name.startswith(("encoder.", "adapter."))}


def test_lora_ranks():
    """Against the ranks of w, a, v, g in the released models."""
    official_ranks = {128: (32, 32, 32, 64), 768: (64, 64, 32, 128), 1024: (64, 64, 64, 160), 2048: (128, 128, 64, 224)}
    for C, ranks in official_ranks.items():
        with torch.device("meta"):
            att = modrwkv.TimeMix7(2, C, 64, layer=1)
        for s, rank in zip("wavg", ranks):
            assert att.get_parameter(f"{s}1").shape == (C, rank) and att.get_parameter(f"{s}2").shape == (rank, C)


def test_optimizer_groups():
    """Against the names that the official training code decays, and those of a doubled learning rate."""
    model = ModRWKV(Config(n_layer=2, n_embd=128))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = modrwkv.parameter_groups(model, 0.1)
    found = [[names[id(p)] for p in group["params"]] for group in groups]
    layers = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]
    outside = {f"{name}.weight" for name in ("emb", "head", "adapter.image.conv")}
    outside |= {f"encoder.image.{name}.weight" for name in ("conv1", "conv2", "proj")}
    matrices = {f"blocks.{i}.{s}.weight" for i in (0, 1) for s in layers}
    matrices |= {"adapter.image.mlp.0.weight", "adapter.image.mlp.2.weight"}
    assert set(found[0]) == outside | matrices and set(found[1]) == {"blocks.0.att.w0", "blocks.1.att.w0"}
    assert sorted(sum(found, [])) == sorted(names.values())  # none lost, none twice
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(0.1, 1.0), (0.0, 2.0), (0.0, 1.0)]
    assert [g["lr_scale"] for g in modrwkv.parameter_groups(model, 0.1, 1.0)] == [1.0, 1.0, 1.0]
    groups = modrwkv.parameter_groups(model, 0.1, muon=True)
    with_muon = [{names[id(p)] for p in group["params"]} for group in groups]
    assert with_muon == [outside, set(found[1]), set(found[2]), matrices]
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(0.1, 1.0), (0.0, 2.0), (0.0, 1.0), (0.1, 1.0)]


# ------------------------------------------------------------ pictures: encoder, Conv1D and adapter


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
def test_picture_of_any_mode(tmp_path, mode, trim):
    """Against PIL's conversion to RGB; of 16 bits a pixel, x * 257 is x in 8."""
    encoder = PatchEncoder(Config(image_trim=trim))
    image = drawing(mode="L" if mode == "I;16" else mode)
    want = load_media(encoder, image.convert("RGB"))
    if mode == "I;16":
        image = Image.fromarray(np.array(image).astype(np.uint16) * 257)
    how = {"format": "JPEG", "quality": 95, "subsampling": 0} if mode == "CMYK" else {"format": "PNG"}
    got = load_media(encoder, stored(image, tmp_path / "x", **how))
    assert image.mode == mode and got.dtype == torch.uint8 and got.shape == want.shape
    assert (got.int() - want.int()).abs().float().mean() <= (4 if mode == "CMYK" else 0)  # what JPEG loses
    assert got.float().std() > 20


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("patch_width", [4, 12, 32])
def test_picture_of_any_size(patch_width, trim):
    """Whole patches, 32 pixels high and no more than 16 times as wide."""
    encoder = PatchEncoder(Config(patch_width=patch_width, image_trim=trim))
    for size in ((1, 1), (5000, 3), (3, 5000), (700, 1), (1, 700), (513, 32), (33, 31)):
        x = load_media(encoder, noise(*size))
        n = encoder.length(x)
        assert x.shape == (3, 32, n * patch_width) and 1 <= n <= 16 * 32 / patch_width + 1
        assert features(encoder, [x])[0].shape == (n, 128) and features(encoder, [x])[0].isfinite().all()


def test_picture_is_scaled_and_trimmed():
    """Scaled as PIL does; the figure is the same wherever it lies, on white or black."""
    scaled = np.array(noise(75, 50).resize((48, 32), Image.BILINEAR))
    assert torch.equal(load_media(WHOLE, noise(75, 50)), torch.from_numpy(scaled).permute(2, 0, 1))
    trimming = PatchEncoder(Config(image_trim=True))
    first = load_media(trimming, drawing())
    assert first.shape == (3, 32, 28)  # 20 x 24, scaled to 26.7 x 32, in patches of 4
    assert torch.equal(first, load_media(trimming, drawing((300, 200), (140, 2))))
    assert torch.equal(first, load_media(trimming, drawing((21, 25), (1, 1))))
    black = Image.eval(drawing((80, 80), (30, 30)), lambda x: 255 - x)
    assert (load_media(trimming, black).int() + first.int() - 255).abs().max() <= 1
    assert not torch.equal(load_media(WHOLE, drawing(at=(1, 1))), load_media(WHOLE, drawing()))
    white = load_media(trimming, Image.new("RGB", (50, 25), "white"))  # nothing to trim it to
    assert white.shape == (3, 32, 64) and (white == 255).all()


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def arrays(module):
    """A module's parameters in numpy."""
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


@torch.no_grad()
def test_patch_encoder():
    """A batch of several widths against F.conv2d on each picture alone, patch by patch, row by row."""
    encoder = randomise(PatchEncoder(Config(encoder_width=8, image_height=24, patch_height=12, patch_width=8))).double()
    images = [torch.from_numpy(pixels(width, 3, 24, width)) for width in (24, 8, 16)]
    for image, got in zip(images, features(encoder, images)):
        x = (1 - image.double() / 255)[None]
        for conv in (encoder.conv1, encoder.conv2):  # 4 pixels become 1
            x = gelu(F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1))
        want = []
        for row, col in itertools.product(range(2), range(image.shape[2] // 8)):
            patch = x[0, :, 3 * row : 3 * row + 3, 2 * col : 2 * col + 2].flatten()
            bias = encoder.proj.bias + encoder.row[row] + encoder.col[col]
            want.append(gelu(encoder.proj.weight.flatten(1) @ patch + bias))
        assert len(want) == encoder.length(image) and distance(got, torch.stack(want)) < 1e-5


def layer(x, z, name):
    return x @ z[f"{name}.weight"].T + z[f"{name}.bias"]


def norm(y, z, name):
    variance = y.var(1, correction=0, keepdim=True)
    return (y - y.mean(1, keepdim=True)) / (variance + 1e-5).sqrt() * z[f"{name}.weight"] + z[f"{name}.bias"]


def vision_adapter(z, x, first):
    """ModRWKV's equation 4 as its code has it."""
    y = layer(layer(x, z, f"{first}.0").clamp(min=0), z, f"{first}.2")
    return y + norm(y, z, "pre_norm")


def speech_adapter(z, x, first="proj"):
    """A Conv1D of kernel 3, stride 2, then ModRWKV's mlp."""
    x = torch.cat([torch.zeros(2, x.shape[1]), x, torch.zeros(2, x.shape[1])])
    windows = [sum(z["conv.weight"][:, :, j] @ x[i + j] for j in range(3)) for i in range(0, len(x) - 2, 2)]
    return layer(layer(torch.stack(windows) + z["conv.bias"], z, f"{first}.0").clamp(min=0), z, f"{first}.2")


def gated_adapter(z, x):
    """VisualRWKV 7.00's."""
    return norm((x / (1 + (-x @ z["gate.weight"].T).exp())) @ z["o_proj.weight"].T, z, "ln_v")


def plain_adapter(adapter, x):
    """[1], equations 4 and 5: what becomes of features x, and which of them each window ends on."""
    z, ends = dict(adapter.named_parameters()), range(len(x))
    if isinstance(adapter, SpeechAdapter):
        return speech_adapter(z, x, "mlp"), None
    k, s = adapter.kernel, adapter.stride
    if k:
        left = (s - (len(x) - k) % s) % s if len(x) >= k else k - len(x)
        x = F.pad(x, (0, 0, left, 0))
        starts = range(0, len(x) - k + 1, s)
        x = torch.stack([sum(z["conv.weight"][:, :, j] @ x[i + j] for j in range(k)) for i in starts])
        ends = [i + k - 1 - left for i in starts]
    return vision_adapter(z, x, "mlp"), list(ends)


LENGTHS = {(3, 2): {577: 288, 576: 288, 720: 360}, (4, 3): {577: 192, 576: 192, 720: 240}, (0, 2): {577: 577}}
LENGTHS |= {(5, 4): {577: 144, 576: 144, 720: 180}, "speech": {49: 26, 576: 289, 1499: 751, 1500: 751}}


def random_features(lengths):
    return [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)).double() for n in lengths]


@pytest.mark.parametrize("conv", [*LENGTHS, (1, 1), (4, 2), (2, 5), (6, 2)], ids=str)
@torch.no_grad()
def test_adapter(conv):
    """A batch against plain_adapter, and lengths against those of the papers' code."""
    adapter = SpeechAdapter(12, 16, 2) if conv == "speech" else Adapter(12, 16, 2, *conv)
    adapter = randomise(adapter).double()
    signals = random_features([23, *range(1, 16), 40])
    for x, y in zip(signals, adapted(adapter, signals)):
        want, ends = plain_adapter(adapter, x)
        assert len(y) == adapter.length(len(x)) >= 1 and distance(y, want) < 1e-12
        assert conv == "speech" or list(adapter.window_ends(len(x))) == ends
    assert all(adapter.length(n) == length for n, length in LENGTHS.get(conv, {}).items())


@pytest.mark.parametrize("kind", ["mlp", "linear", "gated"])
@torch.no_grad()
def test_positions_of_a_series(kind, model):
    """Against the same adapter without positions: they count from the end, and vectors further back share the first."""
    adapter = Adapter(12, 16, 2, 4, 2, kind, vectors=20)
    assert adapter.place.shape == (9, 16) and 1.5 < adapter.place.std() < 2.5
    adapter, signals = randomise(adapter).double(), random_features((20, 1, 9, 60))
    placed, place = adapted(adapter, signals), adapter.place.clone()
    adapter.place.zero_()
    for n, y, z in zip((9, 1, 4, 29), placed, adapted(adapter, signals)):
        assert distance(y - z, place[np.arange(9 - n, 9).clip(0)]) < 1e-12
    assert model.adapter["series"].place.shape == (12, 64) and model.adapter["image"].place is None


@pytest.mark.parametrize("n,frames", [(1, 3), (480, 3), (1700, 11), (16000 * 31, 3100)])
def test_log_mel_frames(n, frames):
    """Against transformers' WhisperFeatureExtractor, without its cut at 30 s, of the sound filled up to whole hops."""
    from transformers import WhisperFeatureExtractor

    x = torch.randn(n, generator=torch.Generator().manual_seed(n)) * torch.linspace(0, 0.5, n)
    padded, how = F.pad(x, (0, 160 * frames - n)), dict(padding="do_not_pad", truncation=False)
    [theirs] = WhisperFeatureExtractor()(padded.numpy(), sampling_rate=16000, **how)["input_features"]
    ours = load_media(MelEncoder(Config()), x)
    assert ours.shape == theirs.shape == (80, frames) and np.abs(ours.numpy() - theirs).max() < 1e-6


def test_pictures_are_those_that_a_viewer_shows(tmp_path):
    """Against the picture before it was stored turned (EXIF), alpha blending in numpy, which PIL rounds in its own way,
    and white for transparent colours; an EPS is no picture."""
    image, exif = noise(50, 40), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = stored(image.transpose(Image.Transpose.ROTATE_90), tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_picture(turned), image)
    rgba = pixels(0, 32, 64, 4)
    alpha = rgba[..., 3:] / 255
    got = np.asarray(read_picture(stored(Image.fromarray(rgba, "RGBA"), tmp_path / "rgba.png")))
    assert abs(got - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    palette = Image.new("P", (5, 4))
    palette.putpalette([0, 0, 0, 250, 0, 0])
    palette.putpixel((0, 0), 1)
    for clear, colour in ((palette, 0), (palette.convert("RGB"), (0, 0, 0))):
        got = np.asarray(read_picture(stored(clear, tmp_path / "clear.png", transparency=colour)))
        assert got[0, 0].tolist() == [250, 0, 0] and got[1:].min() == 255
    assert "PNG" in refusal(read_picture, stored(image, tmp_path / "program.png", format="EPS"))
    floats = stored(Image.fromarray(np.ones((4, 5), np.float32)), tmp_path / "float.tif")
    assert "save it with 8" in refusal(read_picture, floats)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
@pytest.mark.parametrize("kind,channels", [("wav", 1), ("wav", 2), ("flac", 1), ("flac", 6), ("ogg", 2), ("mp3", 2)])
def test_sound_of_any_kind(tmp_path, rate, kind, channels):
    """Against the sine that was written, the mean of its channels, at 16 kHz; mp3 is in whole blocks, in silence."""
    wave, exact = (0.4 * np.sin(2 * np.pi * 440 * np.arange(n // 2) / n) for n in (rate, 16000))
    loudness = 1 + 0.5 * np.linspace(-1, 1, channels) if channels > 1 else np.ones(1)
    soundfile.write(tmp_path / f"x.{kind}", wave[:, None] * loudness, rate)
    got, lossless = read_sound(tmp_path / f"x.{kind}", 16000).numpy(), kind in ("wav", "flac")
    assert abs(len(got) - 8000) < (2 if lossless else 2500)
    spectrum = np.abs(np.fft.rfft(got * np.hanning(len(got))))
    assert abs(spectrum.argmax() * 16000 / len(got) - 440) < 4
    assert got[2000:6000].std() == pytest.approx(0.4 / 2**0.5, rel=0.1)
    assert not lossless or np.abs(got[500:7500] - exact[500:7500]).max() < 1e-3


def test_sounds_that_cannot_be_read(tmp_path):
    """Errors name the file, also wherever its bytes end."""
    path, empty = tmp_path / "x.wav", tmp_path / "empty.wav"
    path.write_bytes(b"no sound at all")
    soundfile.write(empty, np.zeros(0), 16000)
    errors = {tmp_path / "none.wav": "No such file", path: "not a sound", empty: "no sound", tmp_path: "Is a directory"}
    for kind, part in itertools.product(("wav", "flac", "ogg", "mp3", "aiff"), (0.0, 0.01, 0.3, 0.9)):
        path = tmp_path / f"{part}.{kind}"
        soundfile.write(path, np.random.RandomState(0).randn(30000) / 10, 16000)
        data = path.read_bytes()
        path.write_bytes(data[: int(part * len(data))])
        errors[path] = ""
    for path, words in errors.items():
        message = refusal(load_media, MelEncoder(Config()), path)
        assert str(path) in message and words in message


def test_sounds_with_odd_headers_and_channels(tmp_path):
    """Against the samples that were written: what a header counts too much, and channels whose mean is silence."""
    x = np.random.RandomState(0).randn(800).astype(np.float32) / 10
    soundfile.write(tmp_path / "x.wav", x, 16000, "FLOAT")
    data = (tmp_path / "x.wav").read_bytes()
    at = data.index(b"data") + 4
    for promised in (3200 + 44, 0x7FFFF000, 0xFFFFFFFF):  # the header itself, and streams
        size = promised.to_bytes(4, "little")
        for start in (data[:at], data[:4] + size + data[8:at]):
            (tmp_path / "y.wav").write_bytes(start + size + data[at + 4 :])
            assert np.array_equal(read_sound(tmp_path / "y.wav", 16000), x)
    soundfile.write(tmp_path / "z.wav", np.stack([x, -x], 1), 16000, "FLOAT")
    assert np.array_equal(read_sound(tmp_path / "z.wav", 16000), x)


@torch.no_grad()
def test_mel_encoder():
    """A batch against F.conv1d on each sound alone, without each bin's mean and what is 40 dB below the loudest."""
    encoder = randomise(MelEncoder(Config(encoder_width=8))).double()
    sounds, z = [sound(n, n)[1] for n in (1, 2, 7, 90, 16)], dict(encoder.named_parameters())

    def conv(name, x, **how):
        return F.conv1d(x, z[f"{name}.weight"], z[f"{name}.bias"], **how)

    for frames, got in zip(sounds, features(encoder, sounds)):
        x = torch.maximum(frames, frames.max() - 1)
        x = (x - x.double().mean(1, keepdim=True).float()).double()[None]
        x = gelu(conv("conv2", gelu(conv("conv1", x, padding=1)), stride=2, padding=1))
        for i, d in enumerate((1, 2, 4, 8)):
            y = conv(f"deep.{i}.0", x, padding=2 * d, dilation=d, groups=8)
            x = x + gelu(conv(f"deep.{i}.1", y))
        assert x.shape[2] == encoder.length(frames) and distance(got, x[0].T) < 1e-12


@torch.no_grad()
def test_wavenet():
    """A batch of several lengths against [7]'s formula in numpy, each series alone; zeros before it, nothing after."""
    encoder = randomise(WaveNet(Config(encoder_width=8))).double()
    batch, z = [series(n, n)[1].double() for n in (1, 2, 16, 17, 60)], arrays(encoder)

    def at(name, x, j=0):
        return z[f"{name}.weight"][:, :, j] @ x

    for points, got in zip(batch, features(encoder, batch)):
        x = points.numpy()
        x = np.vstack([x, 5 * np.diff(x[0], prepend=x[0, 0])])
        h, skips = at("start", x) + z["start.bias"][:, None], 0
        for i, d in enumerate((1, 2, 4, 8)):
            before = np.pad(h, ((0, 0), (d, 0)))[:, : h.shape[1]]
            y = at(f"gates.{i}", before) + at(f"gates.{i}", h, 1) + z[f"gates.{i}.bias"][:, None]
            value, opening = np.split(y, 2)
            y = np.tanh(value) / (1 + np.exp(-opening))
            h, skips = h + at(f"residuals.{i}", y) + z[f"residuals.{i}.bias"][:, None], skips + y
        want = at("end", np.vstack([skips.clip(0), x])) + z["end.bias"][:, None]
        assert len(got) == encoder.length(points) and distance(got, want.T) < 1e-12


def test_timer_layout():
    """Against the names and shapes in the published file."""
    layer = {f"self_attn.{x}_proj.weight": (1024, 1024) for x in "qkvo"}
    layer |= {f"self_attn.{x}_proj.bias": (1024,) for x in "qkv"} | {"ffn_layer.down_proj.weight": (1024, 2048)}
    layer |= {f"ffn_layer.{x}_proj.weight": (2048, 1024) for x in ("gate", "up")}
    layer |= {f"norm{j}.{x}": (1024,) for j in (1, 2) for x in ("weight", "bias")}
    want = {f"model.layers.{i}.{name}": shape for i in range(8) for name, shape in layer.items()}
    want |= {"model.embed_layer.emb.weight": (1024, 96), "lm_heads.0.weight": (96, 1024)}
    want |= {"model.norm.weight": (1024,), "model.norm.bias": (1024,)}
    with torch.device("meta"):
        own = {name: tuple(x.shape) for name, x in Timer(Config()).state_dict().items()}
    assert own == want and len(own) == 116 and sum(map(math.prod, own.values())) == 84_142_080


class TinyTimer(Timer):
    width, PATCH, LAYERS, HEADS, HIDDEN = 16, 4, 2, 2, 24


@torch.no_grad()
def test_timer():
    """Against the formulas: complex rotations, a softmax over what came before, the norms behind the sums."""
    encoder = randomise(TinyTimer(Config())).double()
    z = {name: p.data for name, p in encoder.named_parameters()}

    def proj(x, name):
        return x @ z[f"{name}_proj.weight"].T + z.get(f"{name}_proj.bias", 0)

    batch = [series(n, n)[1].double() for n in (1, 3, 4, 7, 8, 23)]
    for points, got in zip(batch, features(encoder, batch)):
        n, patches = len(points[0]), max(1, len(points[0]) // 4)
        assert len(got) == encoder.length(points) == patches
        assert list(encoder.window_ends(n)) == [n - 1 - 4 * i for i in reversed(range(patches))]
        x = points[0][n % 4 :] if n >= 4 else F.pad(points[0], (4 - n, 0))  # the newest points count
        x = x.reshape(-1, 4) @ z["model.embed_layer.emb.weight"].T
        turn = torch.from_numpy(np.exp(1j * np.outer(np.arange(patches), 10000 ** (-np.arange(4) / 4))))
        for at in ("model.layers.0", "model.layers.1"):
            out = []
            for h in (slice(0, 8), slice(8, 16)):
                q, k, v = (proj(x, f"{at}.self_attn.{name}")[:, h] for name in "qkv")
                q, k = ((y[:, :4] + 1j * y[:, 4:]) * turn for y in (q, k))
                scores = ((q @ k.mH).real / 8**0.5).exp().tril()
                out.append(scores / scores.sum(1, keepdim=True) @ v)
            x = norm(x + proj(torch.cat(out, 1), f"{at}.self_attn.o"), z, f"{at}.norm1")
            gate = proj(x, f"{at}.ffn_layer.gate")
            y = gate / (1 + (-gate).exp()) * proj(x, f"{at}.ffn_layer.up")
            x = norm(x + proj(y, f"{at}.ffn_layer.down"), z, f"{at}.norm2")
        assert distance(got, norm(x, z, "model.norm")) < 1e-6


def test_timer_is_loaded_and_frozen(tmp_path, monkeypatch):
    """Its weights after training against those of the file; errors name flag, file, what is missing or too much."""
    from safetensors.torch import save_file

    monkeypatch.setitem(modrwkv.ENCODERS["series"], "timer", TinyTimer)
    data = jsonl(tmp_path / "x.jsonl", *({"target": [math.sin(i / 3 + n) for i in range(100)]} for n in range(8)))
    out, flags = tmp_path / "out", ["--series_encoder=timer", "--image_encoder=none", "--series_kernel=0"]
    flags += ["--lookback=48", "--horizon=8", "--max_steps=2", "--level_steps=0"]
    assert "--timer_weights" in refusal(learn, out, (data, data), *flags)
    flags.append(f"--timer_weights={tmp_path / 'x.safetensors'}")
    assert "x.safetensors" in refusal(learn, out, (data, data), *flags)
    weights = {name: x.contiguous() for name, x in randomise(TinyTimer(Config()), 5).state_dict().items()}
    save_file(weights | {"more": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "more is not expected" in refusal(learn, out, (data, data), *flags)
    save_file({name: x for name, x in weights.items() if name != "model.norm.bias"}, tmp_path / "x.safetensors")
    assert "model.norm.bias is missing" in refusal(learn, out, (data, data), *flags)
    save_file(weights, tmp_path / "x.safetensors")
    learn(out, (data, data), *flags)
    after = kept(out)
    assert all(torch.equal(after[f"encoder.series.{name}"], x) for name, x in weights.items())
    assert load(out / "ckpt.pt").forecast([[math.sin(i / 3) for i in range(60)]]).shape == (1, 8)


LENGTH = st.integers(1, 60)


@trials(60)
@given(LENGTH, LENGTH, st.floats(0, 1), st.floats(-1e3, 1e3), st.sampled_from([0, 1e-3, 1, 1e6]), SEEDS)
def test_normalise(n, known, gaps, level, size, seed):
    """Mean and deviation against numpy's, of a series with gaps; they undo it."""
    rng = np.random.RandomState(seed)
    x = level + size * rng.randn(n)
    x[rng.rand(n) < gaps] = rng.choice([np.nan, np.inf, -np.inf])
    points, mean, deviation = modrwkv.normalise(torch.from_numpy(x), known)
    values, mask = points[0].numpy(), np.isfinite(x)
    assert points.shape == (2, n) and points.isfinite().all() and deviation > 0
    assert (points[1].numpy() == mask).all() and not values[~mask].any() and abs(values).max() <= 10
    first = x[:known][mask[:known]]
    scale = x[mask].std() if size and mask.sum() > 1 else 0  # of a constant, whatever rounding makes of it
    if len(first):
        assert mean == pytest.approx(first.mean(), rel=1e-9)
        assert deviation == pytest.approx((first.var() + (0.1 * scale or 1) ** 2) ** 0.5, rel=1e-3)
    mild = mask & (np.abs(values) < 9.9)
    assert np.allclose((values * deviation + mean)[mild], x[mild], rtol=1e-5, atol=1e-5 * deviation)


def test_tables(tmp_path):
    """Against the numbers written; a spreadsheet's export has semicolons, decimal commas and a column too many."""
    path, export = tmp_path / "x.csv", tmp_path / "y.csv"
    path.write_text("date,load,price\n2020-01-01,1,2.5\n\n2020-01-02,,-3e2\n")
    names, table = read_table(path)
    assert names == ["load", "price"] and np.array_equal(table, [[1, 2.5], [np.nan, -300]], equal_nan=True)
    assert read_series(path).tolist() == [2.5, -300]
    assert read_series(f"{path}#load").isnan().tolist() == [False, True]
    assert read_series([1, None, 3]).isnan().tolist() == [False, True, False]
    export.write_text('\ufeffwhen;a;b;\nx;1;"1,5";\ny;NA;"2,5";\n', encoding="utf-8")
    assert read_series(f"{export}#a").isnan().tolist() == [False, True]
    errors = {f"{path}#x": "no column x; its columns are date, load, price", f"{export}#when": "'x' in column when"}
    errors |= {export: "column 4 is empty; another is chosen by", f"{export}#b": "line 2: '1,5' in column b"}
    errors |= {tmp_path / "none.csv": "No such file", (None, math.nan): "no numbers"}
    for series, words in errors.items():
        assert words in refusal(read_series, series)
    broken = {b"": "no rows", b"a,b\n": "no rows", b"\xff\xfe\x00": "not a .csv", b"1,2\n3,4\n": "no header"}
    broken |= {b"a\nx\n": "no column of numbers", b"a,b\n1,2\n3\n": "line 3, has 1 values, not 2"}
    for content, words in (broken | {b"a\n1\n2\noops\n": "line 4: 'oops' in column a"}).items():
        path.write_bytes(content)
        message = refusal(read_table, path)
        assert str(path) in message and words in message


# ------------------------------------------------------------ the model, generation


def walk(n):
    """A random walk (n,) in float64."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).double().cumsum(0)


@torch.no_grad()
def test_loss(model):
    """Against cross-entropies, and of forecasts half Huber's and half the absolute error, in numpy, by sample."""
    words = [[picture(1, 7), text("what?"), ("answer", [20, 21, 22]), text("more"), ("answer", [23])]]
    words += [[text("hello"), ("answer", [24, 25, 26, 27, 28, 29])], [text("no answer")]]
    x, rng, losses, largest = walk(200), random.Random(1), [], []
    x[::17] = math.nan
    windows = [model.window(x, rng) for _ in range(3)]
    for segments in words:
        (logits, _), at, own = model([segments]), 0, []
        for kind, data in segments:
            for z, token in zip(logits[0, at - 1 :].numpy(), data if kind == "answer" else ()):
                own.append(np.log(np.exp(z).sum()) - z[token])
                largest.append(z.max())
            at += model.length([(kind, data)])
        losses.append(own)
    for [(_, (points, targets))] in windows:
        ahead = model.forecast_head(model.backbone(model.fuse([[("series", points)]])[0])[0])[0]
        errors = (ahead - targets).abs().numpy()
        errors = np.where(errors < 1, errors**2 / 2, errors - 0.5) / 2 + errors / 2
        losses.append(list(np.nanmean(errors[~np.isnan(errors).all(1)], 1)))
    samples, together, means = words + windows, np.concatenate(losses), [np.mean(own) for own in losses if own]
    assert list(map(len, losses)) == [n_targets(model, [x]) for x in samples] and len(together) > 16
    wrap = 0.1 / 2 * np.square(largest).sum() / len(together)
    assert model.loss(samples).item() == pytest.approx(together.mean(), rel=1e-6)
    assert model.loss(samples, 4).item() == pytest.approx(together.sum() / 4, rel=1e-6)
    assert model.loss(samples, reduction="sample").item() == pytest.approx(np.mean(means), rel=1e-6)
    assert model.loss(samples, 7, "sample").item() == pytest.approx(np.sum(means) / 7, rel=1e-6)
    assert model.loss(samples, l2wrap=0.1).item() == pytest.approx(together.mean() + wrap, rel=1e-6)
    assert model.loss(words[2:]).item() == 0
    assert "260" in refusal(model.loss, [[("answer", [260])]])  # beyond the vocabulary


@trials(40)
@given(n=st.integers(2, 150), gaps=st.sampled_from([0, 0, 0.2]), seed=SEEDS)
@example(n=60, gaps=0, seed=0)
def test_window_targets(model, n, gaps, seed):
    """Point i of the series is about i, so a target's value tells its place: behind its vector's end, 4 j + 3."""
    rng = np.random.RandomState(seed % 2**32)
    x = torch.from_numpy(np.arange(n) + 0.01 * rng.rand(n))
    x[torch.from_numpy(rng.rand(n) < gaps)] = math.nan
    x[0], x[-1] = 0, n - 1
    for draw in (None, random.Random(seed)):
        [(kind, (points, targets))] = sample = model.window(x, draw)
        assert kind == "forecast" and points.shape == (2, 48) and targets.shape == (12, 12)
        learned = (~targets.isnan()).any(1)
        assert n_targets(model, [sample]) == learned.sum() and model.length(sample) == 12
        if draw is None:
            assert not learned[:-1].any() and learned[-1] == bool(x[-12:].isfinite().any() and n > 12)
        if gaps == 0 and n >= 60:
            place = 47 * (targets - points[0, 0]) / (points[0, 47] - points[0, 0])
            off = (place - 4 * torch.arange(12)[:, None] - 4 - torch.arange(12))[targets.abs() < 9.9]
            assert (off.abs() < 0.5).all()
            assert (draw is None or learned[-1]) and not targets[learned].isnan().any()


def test_forecast_is_causal(model):
    """Other points ahead change no input; a forecast is the head's output, scaled by what came before."""
    x = walk(90)
    for n in (90, 60):
        [(_, (points, targets))] = model.window(x[:n])
        [(_, (same, changed))] = model.window(torch.cat([x[: n - 12], 100 * torch.randn(12)]))
        assert torch.equal(points, same) and not torch.equal(targets[-1], changed[-1])
        learned = model.backbone(model.fuse([[("series", points)]])[0])[0][:, -1]
        _, mean, deviation = modrwkv.normalise(x[max(0, n - 60) : n - 12], scale=x[: n - 12].std(correction=0))
        ahead = model.forecast([x[: n - 12]])[0]
        assert distance(model.forecast_head(learned)[0] * deviation + mean, ahead) < 1e-5
    rng = SimpleNamespace(randint=Mock(side_effect=[0, 29]), random=lambda: 1.0)  # mean and deviation see 29 points
    [(_, (_, targets))] = model.window(x, rng)
    assert (~targets.isnan()).any(1).tolist() == [4 * j + 4 >= 29 for j in range(12)]


def test_forecast_units(model):
    """Against the forecasts of a scaled series, of one alone, of one that goes on, and an untrained model's mean."""
    x = walk(100)
    y = model.forecast([x, x[:20], list(x)])
    assert y.shape == (3, 12) and distance(y[2], y[0]) < 1e-9 and distance(y[1], model.forecast([x[:20]])[0]) < 1e-6
    assert distance(model.forecast([1000 * x + 5e4])[0], 1000 * y[0] + 5e4) < 1e-6
    assert distance(model.forecast([x], 30)[0, :12], y[0]) < 1e-9
    assert distance(model.forecast([torch.cat([x, y[0]])])[0], model.forecast([x], 24)[0, 12:]) < 1e-9
    assert (model.forecast([torch.full((60,), 7.0)]) - 7).abs().max() < 20  # of a constant, nothing blows up
    assert distance(ModRWKV(SMALL).forecast([x])[0], x[-48:].mean().expand(12)) < 1e-9
    without = ModRWKV(Config())
    assert "series encoder" in refusal(without.forecast, [x]) and "series encoder" in refusal(without.window, x)


def assert_state_equal(got, want, tolerance=1e-6):
    for x, y in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
        assert distance(x, y) < tolerance


@functools.cache
def scanner(rwkv, scan, kernel):
    config = dataclasses.replace(SMALL, rwkv=rwkv, scan=scan, n_layer=5, patch_height=8, conv_kernel=kernel)
    return randomise(ModRWKV(config)).double()


KINDS = st.sampled_from(["text", "answer", "image", "audio", "series"])
PLANS = st.lists(st.lists(st.tuples(KINDS, st.integers(1, 12)), min_size=1, max_size=4), min_size=2, max_size=4)


def make_sample(plan, seed):
    """Segments of a plan [(kind, size)]."""
    rng, segments = np.random.RandomState(seed % 2**32), []
    media = {"image": picture, "audio": sound, "series": series}
    for kind, n in plan:
        segments.append(
            media[kind](rng.randint(2**31), n) if kind in media else (kind, rng.randint(0, 257, n).tolist())
        )
    return segments


@trials(20)
@given(st.sampled_from([5, 6, 7]), st.sampled_from(["uni", "bi", "multi"]), st.sampled_from([0, 3]), PLANS, SEEDS)
@example(7, "uni", 3, [[("text", 120)], [("image", 20), ("text", 60), ("image", 9)]], 0)
@example(7, "uni", 3, [[("audio", 1)], [("audio", 40), ("image", 2), ("audio", 3)]], 0)
@torch.no_grad()
def test_batched_prefill_and_decoding(rwkv, scan, kernel, plans, seed):
    """Two ragged batches, one continuing the other, and segments and tokens one by one, against one pass a sample."""
    model = scanner(rwkv, scan, kernel)
    first = [make_sample(plan, seed + i) for i, plan in enumerate(plans)]
    second = [make_sample([("text", 2 + i)], seed) for i in range(len(plans))]
    logits, state = model(first)
    logits2, state2 = model(second, state)
    for i, (a, b) in enumerate(zip(first, second)):
        (whole, want), (_, want1), n = model([a + b]), model([a]), model.length(a)
        assert distance(logits[i, :n], whole[0, :n]) < 1e-6
        assert distance(logits2[i, : i + 2], whole[0, n:]) < 1e-6
        for together, alone in ((state, want1), (state2, want)):
            assert_state_equal([[x[i : i + 1] for x in layer] for layer in together], alone)
        parts, s = [], None
        for segment in a:
            z, s = model([[segment]], s)
            parts.append(z)
        for token in b[0][1]:
            z, s = model(torch.tensor([[token]]), s)
            parts.append(z)
        assert whole.std() > 0.3 and distance(torch.cat(parts, 1), whole) < 1e-6
        assert_state_equal(s, want)


@trials(8)
@given(plans=PLANS, seed=SEEDS)
@example(plans=[[("answer", 3), ("image", 20), ("answer", 9)], [("audio", 3), ("answer", 2), ("series", 9)]], seed=0)
def test_gradients_of_a_batch(model, plans, seed):
    """Against the sum of one sample at a time, where nothing is padded, and the same batch made in another process."""
    samples = [make_sample(plan, seed + i) for i, plan in enumerate(plans)]
    samples.append(model.window(torch.arange(90).double().sin(), random.Random(seed)))
    parameters = list(model.parameters())

    def gradients(samples):
        return torch.autograd.grad(model.loss(samples, 1), parameters, allow_unused=True, materialize_grads=True)

    batch = pickle.loads(pickle.dumps(model.collate(samples)))
    for together, again, *alone in zip(gradients(samples), gradients(batch), *(gradients([x]) for x in samples)):
        assert torch.equal(together, again) and distance(together, sum(alone)) < 1e-6
    assert len(batch.n_targets) == sum(n_targets(model, [sample]) for sample in samples)


@pytest.mark.skipif(not modrwkv.has_kernel("cpu"), reason="the recurrence without kernel.cu takes more, by length")
def test_operations_do_not_grow_with_the_batch(digits):
    """A large batch's counts against a small one's, of data/digits and of all media; none waits for a GPU."""

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
    samples = [record_sample(model, record) for record in read_records(digits / "train.jsonl")[:64]]
    counts = count(model, samples)
    assert len(samples) == 64 and counts == count(model, samples[:8])
    assert counts[0] <= 30 and counts[1] <= 160 and counts[2] <= 320
    model = ModRWKV(dataclasses.replace(SMALL, scan="multi", n_layer=4))
    plans = (
        [("image", 1 + i % 5), ("audio", 9 + i), ("series", 5 + i), ("text", i), ("answer", 1 + i)] for i in range(16)
    )
    mixed = [make_sample(plan, i) for i, plan in enumerate(plans)]
    mixed += [model.window(walk(90), random.Random(i)) for i in range(4)]
    assert count(model, mixed) == count(model, mixed[-7:])


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
    monkeypatch.setattr(modrwkv, "sample_token", lambda *a: torch.tensor(next(tokens)))


@pytest.mark.parametrize("how", [{}, {"temperature": 3.0, "top_k": 1}, {"temperature": 3.0, "top_p": 1e-6}], ids=str)
@torch.no_grad()
def test_greedy_decoding(model, how, monkeypatch):
    """Two samples of unequal length against the argmax of full passes over each."""
    picked, pick = [], modrwkv.sample_token
    monkeypatch.setattr(modrwkv, "sample_token", lambda *a: picked.append(pick(*a)) or picked[-1])
    samples = [[text("User: "), picture(3, 6), text("?\n\nAssistant:")], [text("Hi")]]
    assert len(list(generate_text(model, samples, max_new_tokens=12, end=None, **how))) == 12
    for i, token in enumerate(picked):  # by turns
        so_far = ("text", list(map(int, picked[i % 2 : i : 2])))
        assert token == model([[*samples[i % 2], so_far]])[0][0, -1].argmax()
    assert len(set(map(int, picked))) > 2


ANSWERS = [  # tokens that the model gives, settings, pieces of text, and tokens that the state has seen
    (codes("a\nb\n\nc"), {}, ["a", "", "\nb", "", ""], codes("a\nb\n\n")),  # what may begin the end is held back
    (codes("\n\n"), {}, ["", ""], codes("\n\n")),
    ([98, 257, 99], {}, ["a", ""], [98, 257]),
    (codes("a\n") + [0], {}, ["a", "", "\n"], codes("a\n") + [257]),
    ([0], {}, [""], [257]),
    (codes("aaa"), {"max_new_tokens": 3}, ["a", "a", "a"], codes("aaa") + [257]),
    (codes("a\n"), {"max_new_tokens": 2}, ["a", "\n"], codes("a\n") + [257]),
    (codes("a\n\nb") + [0], {"end": None}, ["a", "\n", "\n", "b", ""], codes("a\n\nb")),
    (codes("a\n\nb"), {"end": None, "max_new_tokens": 4}, ["a", "\n", "\n", "b"], codes("a\n\nb")),
    (codes("é中🙂") + [0], {}, ["", "é", "", "", "中", "", "", "", "🙂", ""], codes("é中🙂") + [257]),
    (codes(b"\xe4\xb8a") + [0], {}, ["", "", "\ufffda", ""], codes(b"\xe4\xb8a") + [257]),
    (codes("ab中"), {"max_new_tokens": 4}, ["a", "b", "", "\ufffd"], codes("ab中")[:4] + [257]),  # no more to wait for
]


@pytest.mark.parametrize("tokens,how,pieces,read", ANSWERS)
@torch.no_grad()
def test_answer_and_the_state_after_it(model, monkeypatch, tokens, how, pieces, read):
    """Against the pieces spelled out, and the state of one pass over all that was read, also where a chat goes on."""
    segments = [picture(1, 4), text("hello")]
    script(monkeypatch, tokens)
    got, state = answer(model, segments, **how)
    assert got == pieces
    assert_state_equal(state, model([segments + [("text", read)]])[1])
    script(monkeypatch, tokens)
    _, state = answer(model, [text("more")], state, **how)
    assert_state_equal(state, model([segments + [("text", read), text("more"), ("text", read)]])[1])


def test_answers_of_a_batch_end_one_by_one(model, monkeypatch):
    """Against the pieces spelled out."""
    script(monkeypatch, [98, 99, 0, 99, 100, 11, 100, 11])  # by turns the first and the second answer
    assert list(generate_text(model, [[text("x")], [text("yy")]])) == [["a", "b"], ["", "b"], ["", ""], ["", ""]]
    assert "max_new_tokens" in refusal(answer, model, [text("x")], max_new_tokens=0)


def test_end_inside_longer_tokens(tmp_path, monkeypatch):
    """Against the pieces spelled out, with a vocabulary that joins the end to other text."""
    entries = [bytes([b]) for b in range(256)] + [b"\n\n", "。\n".encode(), b"a\n\nUser"]
    (tmp_path / "vocab").write_text("".join(f"{i + 1} {e!r} {len(e)}\n" for i, e in enumerate(entries)))
    model = ModRWKV(dataclasses.replace(SMALL, tokenizer=str(tmp_path / "vocab")), vocab_size=300)
    for tokens, pieces in (([258, 11], ["。", ""]), ([98, 257], ["a", ""]), ([99, 259], ["b", "a"])):
        script(monkeypatch, tokens)
        assert answer(model, [("text", [1])])[0] == pieces


P = [0.1, 0.5, 0.15, 0.25]
FIRST, TWO, THREE = [0, 1, 0, 0], [0, 2 / 3, 0, 1 / 3], [0, 5 / 9, 1.5 / 9, 2.5 / 9]
CHOICES = [({"temperature": 1 / n}, np.power(P, n) / np.power(P, n).sum()) for n in (1, 2, 0.5)]
CHOICES += [({"temperature": 0.0}, FIRST), ({"temperature": 1e-9}, FIRST), ({"temperature": 5.0, "top_k": 1}, FIRST)]
CHOICES += [({"top_k": 2}, TWO), ({"top_k": 100}, P), ({"top_k": 3, "top_p": 0.7}, TWO)]
CHOICES += [({"top_p": p}, want) for p, want in ((0.0, FIRST), (0.4, FIRST), (0.6, TWO), (0.8, THREE))]


@pytest.mark.parametrize("how,want", CHOICES, ids=str)
def test_sampling_distribution(how, want):
    """1,500 tokens against the probabilities by hand, to nearly four standard deviations."""
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "generator": torch.Generator().manual_seed(0)} | how
    logits = torch.tensor(P, dtype=torch.float64).log().float() + 3
    got = np.bincount([modrwkv.sample_token(logits, **how).item() for _ in range(1500)], minlength=len(P)) / 1500
    assert (got[np.array(want) == 0] == 0).all()
    assert abs(got - want).max() < 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype,tolerance", [(F64, 1e-5), (BF16, 0.03)])
def test_precision(dtype, tolerance):
    """Logits against those in float32; the state stays in float32 at least."""
    segments = [text("what is this?"), picture(1), text(" Assistant:")]
    model = randomise(ModRWKV(SMALL))
    exact = model([segments])[0]
    got, state = model.to(dtype)([segments])
    assert got.dtype == dtype and distance(got, exact) < tolerance
    assert all(S.dtype == (F64 if dtype == F64 else F32) for _, S, _ in state)


# ------------------------------------------------------------ scanning, prompts, losses, freezing


def test_scan_orders_of_a_grid():
    """Against numpy's transpose of 3 rows of 4, and by hand where windows end on some patches only."""
    span = range(10, 22)
    forward, backward, down, up = map(list, modrwkv.scan(span, range(12), 4))
    assert forward == list(span) and backward == forward[::-1] and up == down[::-1]
    assert down == np.arange(10, 22).reshape(3, 4).T.flatten().tolist()
    ends = [1, 3, 5, 7, 9, 11]  # the second and last column of each row
    assert list(modrwkv.scan(range(6), ends, 4)[2]) == [0, 2, 4, 1, 3, 5]
    assert list(modrwkv.scan(range(4), range(4), 4)[2]) == [0, 1, 2, 3]  # one row: down is forward


@pytest.mark.parametrize("rwkv", [5, 6, 7])
@pytest.mark.parametrize("scan", ["uni", "bi", "multi"])
@torch.no_grad()
def test_scan_by_layers(rwkv, scan):
    """Against blocks that are given each sample alone, its pictures' vectors reordered before and put back after."""
    model = scanner(rwkv, scan, 0)
    samples = [[text("a"), picture(1, 3), text("bc"), picture(2, 2), text("d")], [picture(3, 4), text("efg")]]
    for got, segments in zip(model(samples)[0], samples):
        x, v_first, at = model.fuse([segments])[0], None, 0
        orders = np.tile(np.arange(x.shape[1]), ({"uni": 1, "bi": 2, "multi": 4}[scan], 1))
        for kind, data in segments:
            n = model.length([(kind, data)])
            if kind == "image":
                forward = np.arange(at, at + n)
                down = forward.reshape(-1, data.shape[2] // 8).T.flatten()
                orders[:, at : at + n] = [forward, forward[::-1], down, down[::-1]][: len(orders)]
            at += n
        for layer, block in enumerate(model.blocks):
            order = torch.from_numpy(orders[layer % len(orders)])
            v = None if v_first is None else v_first[:, order]
            y, v, _ = block(x[:, order], v, (None, None, None), None)
            x, v_first = y[:, order.argsort()], v if layer == 0 else v_first
        assert distance(got[: x.shape[1]], model.head(model.ln_out(x))[0]) < 1e-9


SHORT = "Answer the question using a single word or phrase."
LOOK = ["Look:\n<image>\nWhat is it?", "Which colour?"]
ARRANGED = [
    ("written", LOOK, "Look:\n<image>\nWhat is it?"),
    ("first", LOOK, "<image>\nLook:\nWhat is it?"),
    ("last", LOOK, "Look:\nWhat is it?\n<image>"),
    ("sandwich", LOOK, "Look:\nWhat is it?\nWhich colour?\n<image>\nLook:\nWhat is it?"),
    ("sandwich", [f"<image>\nSame as <image>?\n{SHORT}"], f"Same as ?\n<image>\n<image>\nSame as ?\n{SHORT}"),
    ("first", ["Same as <image> or <image>?"], "<image>\n<image>\nSame as  or ?"),
    ("sandwich", ["No picture?"], "No picture?"),
]


@pytest.mark.parametrize("style,questions,want", ARRANGED)
def test_prompt_styles(style, questions, want):
    """Against the first question spelled out; those after it stay as they are."""
    config, media = dataclasses.replace(SMALL, prompt_style=style), iter([picture(0), picture(1)])
    got = spell(conversation(config, [(question, "A.") for question in questions], media))
    assert got == "".join(f"User: {question}\n\nAssistant:[ A.\n\n]" for question in [want, *questions[1:]])


@pytest.mark.parametrize("rwkv,scan", [(6, "uni"), (6, "multi"), (7, "uni"), (7, "multi")])
def test_activation_checkpointing(rwkv, scan):
    """Loss and gradients against those without it, which keeps 4 times as many bytes between the passes."""
    config = dataclasses.replace(SMALL, rwkv=rwkv, scan=scan, n_layer=4, adapter_scale=1)
    model = randomise(ModRWKV(config)).double().train()
    samples = [[text("ab"), picture(1, 4), ("answer", codes("cd"))], [("answer", codes("a longer one, no picture"))]]
    samples.append(model.window(walk(90), random.Random(1)))
    parameters, found, sizes = list(model.parameters()), [], []
    for model.checkpoint_activations in (False, True):
        kept = {}

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model.loss(samples)
        found.append((loss, *torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)))
        own = {p.untyped_storage().data_ptr() for p in parameters}
        sizes.append(sum(size for pointer, size in kept.items() if pointer not in own))
    assert sum(bool(x.any()) for x in found[0]) > 100 and all(map(torch.equal, *found))
    assert sizes[1] < sizes[0] / 4


def test_freezing_by_name():
    """Against the parameters whose names begin so; a name that none begins with is an error."""
    for names in ("emb", "blocks.0", "adapter,head"):
        model = ModRWKV(SMALL)
        modrwkv.freeze(model, "all", names)
        for name, p in model.named_parameters():
            assert p.requires_grad != name.startswith(tuple(f"{start}." for start in names.split(",")))
    assert "no parameter is called blocks.7" in refusal(modrwkv.freeze, model, "all", "blocks.7")
    assert "rwkv=4 is not one of 5, 6, 7" in refusal(ModRWKV, dataclasses.replace(SMALL, rwkv=4))


# ------------------------------------------------------------ checkpoints and flags


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
FAILURES = [("os.fsync", FULL), ("torch.save", FULL), ("torch.save", UNOPENED), ("os.replace", FULL)]


@pytest.mark.parametrize("broken,error", FAILURES)
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


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_files_that_are_no_checkpoints(tmp_path):
    """Each is named, with the reason; code in them, which makes a folder where torch trusts it, does not run."""
    Evil.path, path = str(tmp_path / "ran"), tmp_path / "x.pt"
    evil = {"model": {"emb.weight": Evil()}, "config": {}}
    for content, reason in [*FOREIGN, (evil, "safely")]:
        torch.save(content, path)
        message = refusal(load, path)
        assert str(path) in message and reason in message
    torch_file = path.read_bytes()
    path.write_bytes(pickle.dumps(evil))
    message = refusal(load, path)
    assert str(path) in message and "safely" in message and not os.path.exists(Evil.path)
    path.write_bytes(torch_file)
    torch.load(path, weights_only=False)
    assert os.path.exists(Evil.path)


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


@pytest.mark.parametrize("scan,cls", [*itertools.product(("bi", "multi"), ("first", "last"))])
@torch.no_grad()
def test_the_cls_token_is_not_scanned(scan, cls, pretrained, monkeypatch):
    """Against blocks that are given the patches in another order, and the rest where it is."""
    monkeypatch.setattr(Pretrained, "cls", True, raising=False)
    config = dataclasses.replace(SMALL, image_encoder="clip", adapter_kind="linear", conv_kernel=0, n_layer=4)
    config = dataclasses.replace(config, scan=scan, cls=cls)
    model, x = randomise(ModRWKV(config)).double(), normal(7, WIDTH).double()  # the CLS token, two rows of 3 patches
    got, _ = model([[text("ab"), ("image", x), text("cd")]])
    whole, patches = model.adapter["image"].o_proj(x).split([1, 6])
    before, after = (model.emb(torch.tensor(codes(string))) for string in ("ab", "cd"))
    before, after = (torch.cat([before, whole]), after) if cls == "first" else (before, torch.cat([whole, after]))
    x, v_first, n = torch.cat([before, patches, after])[None], None, len(before)
    turns = ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 3, 1, 4, 2, 5], [5, 2, 4, 1, 3, 0])
    for block, turn in zip(model.blocks, (turns if scan == "multi" else turns[:2]) * 2):
        order = torch.tensor([*range(n), *(n + i for i in turn), *range(n + 6, x.shape[1])])
        back = order.argsort()
        y, v, _ = block(x[:, order], None if v_first is None else v_first[:, order], (None, None, None), None)
        x, v_first = y[:, back], v[:, back] if v_first is None else v_first
    assert distance(got, model.head(model.ln_out(x))) < 1e-9
    config = dataclasses.replace(config, conv_kernel=2, conv_stride=2)  # windows end on it and on 1, 3, 5; or 0, 2, 4
    *_, orders = ModRWKV(config).double().fuse([[("image", normal(7, WIDTH).double())]])
    assert scan == "bi" or orders[2].tolist() == [[0, 2, 1, 3]]  # by columns: 3, 1, 5 behind it; or 0, 4, 2 before it


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
    segments = [tags.get(data[0], (kind, data)) if kind == "text" else (kind, data) for kind, data in segments]
    assert spell(segments) == prompt

    convert(path, tmp_path / "ckpt.pt")
    again, want = load(tmp_path), ours.state_dict()
    assert again.config == ours.config and again.state_dict().keys() == want.keys()
    assert all(torch.equal(x, want[name]) for name, x in again.state_dict().items())
    capsys.readouterr()
    convert(tmp_path / "ckpt.pt", tmp_path / "y.pth")
    assert ("left out" in capsys.readouterr().err) == bool(formula)
    assert all(torch.equal(x, weights[name]) for name, x in torch.load(tmp_path / "y.pth").items())


SIZED = "emb.weight embeddings.weight r_k time_faaaa .w1 .v1 [wv]_lora.lora.0.weight time_decay_w1 ffn.key.weight"
SIZED += " (mlp|proj).2.weight"
TELLING = "conv.bias", "gate.weight"  # without these it is another layout that the file does not fit


def shape_of(x):
    return [n for n in x.shape if n > 1]


@pytest.mark.parametrize("layout", ["ours", *RELEASED])
def test_checkpoints_that_do_not_fit(layout, pretrained, checkpoint, tmp_path, monkeypatch):
    """What is missing, too much or misshapen is named as the file names it. SIZED tensors tell what fits."""
    path = checkpoint[0] if layout == "ours" else released(layout, tmp_path / "x.pth")[0]
    file, sized = torch.load(path), re.compile(f"({'|'.join(SIZED.split())})$")
    data = file.get("model", file)

    def message(name, x):
        z = data | {name: x}
        if x is None:
            del z[name]
        monkeypatch.setattr("data.released.read_any_file", lambda *_: file | {"model": z} if layout == "ours" else z)
        words = refusal(load, path)
        assert words.startswith(str(path))
        return words

    for i, (name, x) in enumerate(data.items()):
        tells = sized.search(name)
        if x.shape == (2,) or re.search(r"(blocks|layers)\.0\.", name) and not tells or ".0.att.v" in name:
            continue
        wrong = [None, 5, torch.cat([x, x], -1)]
        if x.dim() > 1:
            wrong += [y for y in (x.flatten(), x.mT.contiguous()) if shape_of(y) != shape_of(x)]
        for y in wrong if tells else [wrong[i % len(wrong)]]:
            words = message(name, y)
            other_name = name.replace("adapter.mlp", "adapter.proj") if "July" in layout else name  # in other files
            unsure = name.endswith(TELLING) or tells and torch.is_tensor(y) and y.dim() > 1
            assert name in words or other_name in words or unsure
    for name in "foo blocks.0.ffn.s_emb.weight proj.more.weight blocks.1.att.qkv.weight adapter.image.extra".split():
        assert f"{name} is not expected" in message(name, torch.ones(3))
    [head] = [name for name in data if name.endswith("head.weight")]
    if head != "head.weight":
        assert f"{head} is there twice, the other time as head.weight" in message("head.weight", data[head])


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
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"norm_eps": 1e-5} | config))
    place = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    if shards == 1:
        place = dict.fromkeys(weights, "model.safetensors")
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    for file in set(place.values()):
        write_file(str(folder / file), {name: x for name, x in weights.items() if place[name] == file})
    return folder


def test_folders_of_safetensors(pretrained, tmp_path, monkeypatch):
    """Whole and in parts, against the tensors that were written; what is damaged, missing or other is named."""
    weights = {name: x.bfloat16() for name, x in official_weights(2, C_).items()}
    layouts = itertools.product(("fla", "WorldRWKV, Hugging Face"), (1, 3))
    for i, (layout, shards) in enumerate(layouts):
        folder = hf_folder(tmp_path / f"{i}", RELEASED[layout][1](weights), shards)
        names = [name for name in weights if ".0.att.v" not in name or "value" in name]
        for path in (folder, *folder.glob("model.safetensors")):
            own = load(path).state_dict()
            assert all(torch.equal(own[name], weights[name].float()) for name in names)
        if shards == 1:
            continue
        first, part = (folder / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
        part.unlink()
        assert part.name in refusal(load, folder)
        shutil.copy(first, part)
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
MADE_OF = (1, torch.float16), (2, torch.bfloat16), (3, torch.float32)
CONVERSIONS = [(7, *made_of, chain) for made_of in MADE_OF for chain in CHAINS]
CONVERSIONS += [(rwkv, 2, torch.bfloat16, CHAINS[1]) for rwkv in (5, 6)]


@pytest.mark.parametrize("rwkv,n_layer,dtype,chain", CONVERSIONS)
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


def test_a_released_file_is_sampled_from_as_the_flags_say(tmp_path, monkeypatch):
    """The config that an answer is generated with, against the flags; the rest is the file's."""
    path, _ = released("WorldRWKV, pictures", tmp_path / "x.pth")
    asked = Mock(side_effect=conversation)
    monkeypatch.setattr("data.records.conversation", asked)
    own = {"tokenizer": "bytes", "template": "v3", "prompt_style": "last", "image_encoder": "none"}
    more = [f"--{name}={value}" for name, value in own.items()]
    said(sample.main, f"--out_dir={path}", "--prompt=Hi", "--max_new_tokens=2", *more)
    config = dataclasses.asdict(asked.call_args.args[0])
    assert own.items() <= config.items() and config["adapter_scale"] == 2


@pytest.mark.parametrize("layout", ["fla", "WorldRWKV, pictures", "VisualRWKV 6.0"])
def test_training_starts_from_released_files(layout, pretrained, counting, tmp_path):
    """The config is the file's, its tensors move a little."""
    path, _ = released(layout, tmp_path / "x.pth")
    eyes = {"image_encoder": "patch"} if layout == "fla" else {}
    more = [f"--rwkv={RELEASED[layout][0]}", *(f"--{name}={value}" for name, value in eyes.items()), "--max_steps=1"]
    own = "--n_embd=128", "--head_size=64", "--tokenizer=bytes"
    learn(tmp_path / "out", counting, f"--init_from={path}", *own, *more)
    before, after = load(path, tokenizer="bytes", **eyes), load(tmp_path / "out")
    assert after.config == before.config
    names = [name for name in before.state_dict() if name.startswith("head" if eyes else ("head", "adapter"))]
    assert names and all(0 < distance(after.state_dict()[name], before.state_dict()[name]) < 0.5 for name in names)


def test_vocabulary_sizes_are_the_tokenizers():
    """ModRWKV's default, which needs no tokenizer, against the tokenizer; gpt2's vocabulary may not be at hand."""
    for tokenizer, want in (("bytes", get_tokenizer("bytes").vocab_size), ("gpt2", 50257)):
        config = Config(n_layer=1, n_embd=64, tokenizer=tokenizer, image_encoder="none")
        assert len(ModRWKV(config).emb.weight) == want


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


def test_flags(capsys):
    """The fields against those written out; what is wrong is one line with the flag and the one that may be meant."""
    for line, fields in RIGHT.items():
        argv = [*shlex.split(line), "--n_layer=5", "--image_trim=no"]
        config, settings, names = flags("about", Config, train.Train, argv=argv)
        assert settings == dataclasses.replace(train.Train(), **fields)
        assert config == dataclasses.replace(Config(), n_layer=5, image_trim=False)
        assert names == {*fields, "n_layer", "image_trim"}
    for line, words in WRONG.items():
        with pytest.raises(SystemExit, match="^2$"):
            flags("about", Config, train.Train, argv=line.split())
        message = capsys.readouterr().err
        assert all(word in message for word in words.split()) and message.count("\n") == 1


def test_help_lists_every_flag(capsys):
    """Each field's own help and default."""
    odd = dataclasses.make_dataclass("Odd", [("rate", float, modrwkv.setting(0.5, "in % of something"))])
    with pytest.raises(SystemExit) as e:
        flags("what it is about", Config, train.Train, odd, argv=["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert not e.value.code and "what it is about" in out
    for field in [field for cls in (Config, train.Train, odd) for field in dataclasses.fields(cls)]:
        assert f"--{field.name} " in out and f"{' '.join(field.metadata['help'].split())} [{field.default}]" in out


# ------------------------------------------------------------ data sets


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
    waves = small | dict(conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        num_buckets=32, max_bucket_distance=64)
    large = waves | dict(feat_extract_norm="layer", do_stable_layer_norm=True)
    whisper = dict(num_mel_bins=16, d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, max_source_positions=100)
    dino, finer = (small | dict(mlp_ratio=2, patch_size=p, image_size=n) for p, n in ((8, 48), (4, 32)))
    square = dict(size={"height": 32, "width": 32})
    short = dict(size={"shortest_edge": 40}, crop_size=square["size"])
    model, processor, sizes, settings = {
        "siglip": ("SiglipVisionModel", "SiglipImageProcessorPil", vision, square),
        "siglip, both towers": ("SiglipModel", "SiglipImageProcessorPil", both, square | dict(resample=2)),
        "clip": ("CLIPVisionModel", "CLIPImageProcessorPil", vision | dict(projection_dim=16), short),
        "clip, older": ("CLIPVisionModel", "CLIPImageProcessorPil", vision | dict(projection_dim=16), short),
        "dinov2": ("Dinov2Model", "BitImageProcessorPil", dino, short),
        "dinov2, finer": ("Dinov2Model", "BitImageProcessorPil", finer, short),
        "wavlm": ("WavLMModel", "Wav2Vec2FeatureExtractor", waves, dict(do_normalize=False)),
        "wavlm, large": ("WavLMModel", "Wav2Vec2FeatureExtractor", large, dict(do_normalize=True)),
        "whisper": ("WhisperModel", "WhisperFeatureExtractor", whisper, dict(feature_size=16, chunk_length=2)),
    }[family]
    # fmt: on
    model = getattr(hf, model)
    with torch.random.fork_rng():
        torch.manual_seed(len(family))
        randomise(model(model.config_class(**sizes))).save_pretrained(folder)
    getattr(hf, processor)(**settings).save_pretrained(folder)
    if "older" in family:  # sizes as numbers and no rescale_factor
        file, old = folder / "preprocessor_config.json", {"crop_size": 32, "size": 40}
        for name in ("do_center_crop", "do_normalize", "do_resize", "image_mean", "image_std", "resample"):
            old[name] = json.loads(file.read_text())[name]
        file.write_text(json.dumps(old | {"feature_extractor_type": "CLIPFeatureExtractor"}))
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    pytest.importorskip("transformers")
    names = {"clip, older": "with+"}  # a sign that joins the names of several
    return functools.cache(lambda family: save_encoder(family, tmp_path_factory.mktemp(names.get(family, "encoder"))))


def encoded(encoder, media):
    """Features of one file, picture or sound."""
    return features(encoder, [load_media(encoder, media)])[0]


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
    """What the library makes of a picture or a sound alone; of Whisper in parts of two seconds, without the silence
    behind them."""
    import transformers as hf

    if isinstance(x, Image.Image):
        classes = {"siglip": hf.SiglipVisionModel, "clip": hf.CLIPVisionModel, "dinov2": hf.Dinov2Model}
        model = classes[family.split(",")[0]].from_pretrained(folder, dtype=torch.float32)
        inputs = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")(x.convert("RGB"), return_tensors="pt")
        return model(**inputs).last_hidden_state[0]
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


PICTURES = [noise(*size) for size in [(32, 32), (57, 40), (40, 90), (41, 300), (7, 9)]]
PICTURES += [noise(50, 60).convert(mode) for mode in ("L", "P")]
SOUND_LENGTHS = 400, 1000, 9000, 16000, 32000, 32161, 70000
SOUNDS = [torch.randn(n, generator=torch.Generator().manual_seed(n)) / 5 + 0.1 for n in SOUND_LENGTHS]
FAMILIES = "siglip; siglip, both towers; clip; clip, older; dinov2; wavlm; wavlm, large; whisper".split("; ")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pretrained_encoders(family, folders):
    """Pictures or sounds in a batch, against what the library makes of each alone."""
    kind, given = ("audio", SOUNDS) if family.startswith("w") else ("image", PICTURES)
    encoder = modrwkv.read_pretrained(kind, folders(family))
    encoder.train()  # dropout and masks in time would show
    media = [load_media(encoder, x) for x in given]
    for x, prepared, got in zip(given, media, features(encoder, media), strict=True):
        assert distance(got, library_features(family, folders(family), x)) < 1e-5
        assert len(got) == encoder.length(prepared)
    if kind == "image":
        assert (encoder.width, encoder.columns(media[0]), encoder.length(media[0])) == (32, 4, 16 + encoder.cls)
        assert encoder.cls == (not family.startswith("siglip"))
    else:
        assert encoded(encoder, given[0][:9]).isfinite().all()  # shorter than the first feature's receptive field


def test_pretrained_encoders_are_frozen_and_not_stored(folders):
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
    seen = load_media(model.encoder["image"], noise(40, 50))
    model.loss([[("image", seen), ("answer", codes("x"))]]).backward()
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
    tensors, content = released_files.read_safetensors(str(weights)), json.loads(preparation.read_text())
    changes = ({"size": None}, "no size"), ({"image_mean": None}, "no image_mean"), ({"crop_size": 24}, "not 24 x 24")
    for change, word in changes:
        preparation.write_text(json.dumps({k: v for k, v in (content | change).items() if v is not None}))
        assert word in message()
    preparation.write_text(json.dumps(content))
    kept = {name: x for name, x in tensors.items() if "layers.1.mlp.fc1" not in name}  # the library fills in noise
    write_file(str(weights), kept)
    assert "layers.1.mlp.fc1.bias and 1 more" in message()
    weights.write_bytes(weights.read_bytes()[:1000])
    assert message()


@torch.no_grad()
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
    folder, moved, plain = (tmp_path / name for name in ("eyes", "moved", "plain"))
    shutil.copytree(folders("dinov2"), folder)
    for i in range(8):
        noise(40 + i, 50).save(tmp_path / f"{i}.png")
    data = (jsonl(tmp_path / "x.jsonl", *(talk("<image>\nWhich?", f"{i}", image=f"{i}.png") for i in range(8))),) * 2
    flags = f"--image_encoder={folder}", "--conv_kernel=0", "--batch_size=8", "--level_steps=0", "--warmup_steps=1"
    learn(plain, data, *flags, "--max_steps=4")
    prepare_picture = Mock(side_effect=load_pretrained_picture)
    monkeypatch.setitem(LOADERS, modrwkv.Vision, prepare_picture)
    for out, workers in (("cold", 1), ("warm", 0)):
        more = f"--feature_cache={tmp_path / 'cache'}", "--max_steps=4", f"--num_workers={workers}"
        learn(tmp_path / out, data, *flags, *more)
    assert prepare_picture.call_count == 8  # in both runs, training and scoring
    curves = [column(tmp_path / out, "loss") for out in ("plain", "cold", "warm")]
    assert curves[1] == curves[2] and curves[0] == pytest.approx(curves[1], rel=2e-3) and curves[0] != curves[1]

    assert not any("encoder." in name for name in kept(plain))
    question = data_records.question(load(plain), "Which?", [("image", str(tmp_path / "0.png"))])
    want, _ = load(plain)([question])
    folder.rename(moved)
    more = "--resume", "--max_steps=5"
    for message in (refusal(load, plain), refusal(learn, plain, data, *more)):
        assert f"--image_encoder={folder}" in message
    got, _ = load(plain, image_encoder=str(moved))([question])
    assert torch.equal(got, want)
    assert "was trained with image_encoder" in refusal(learn, plain, data, *more, "--image_encoder=patch")
    learn(plain, data, *more, f"--image_encoder={moved}")
    assert len(column(plain, "loss")) == 5 and load(plain).config.image_encoder == str(moved)
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
    for x in features(encoder, [read_features(encoder, path, cache), load_media(encoder, path)]):  # in one batch
        assert distance(x, true) < 1e-3
    noise(41, 50).save(path)  # another picture by the same name
    assert read_features(encoder, path, cache) is None and not torch.equal(cached(), first)
    assert len(contents(cache)) == 2 and not [*cache.rglob("*.*")]  # nothing partial

    copied = Path(shutil.copytree(folders("siglip"), tmp_path / "copied"))
    bare, big = (modrwkv.read_pretrained("image", str(copied)) for _ in range(2))
    cache_features(bare, [], cache)
    bare.models[0].to("meta")  # as in the processes that prepare batches
    assert fingerprint(bare) == fingerprint(encoder)  # wherever it lies
    for name, old, new in (("config.json", "gelu_pytorch_tanh", "relu"), ("preprocessor_config.json", "0.5", "0.4")):
        content = (copied / name).read_text()
        (copied / name).write_text(content.replace(old, new))
        assert old in content and fingerprint(modrwkv.read_pretrained("image", str(copied))) != fingerprint(encoder)
        (copied / name).write_text(content)
    big.models[0].post_layernorm.weight.data *= 1e6
    assert fingerprint(big) != fingerprint(encoder)
    assert cached(big).dtype == torch.float32 and cached(big).isfinite().all()  # beyond float16
    assert "--feature_cache" in refusal(cache_features, encoder, [path], file / "no")


def write_and_read(rank, gate, folder, x):
    for i in range(50):
        gate.wait(30)
        write_features(folder / "ab" / f"{i}", x)
        assert (folder / "ab" / f"{i}").read_bytes() == (folder / "right").read_bytes()


def test_processes_write_the_same_features_at_once(tmp_path):
    """As the ranks of a run do, or two runs: each finds the bytes that one process alone writes."""
    x = torch.randn(50, 32)
    write_features(tmp_path / "right", x)
    gate = multiprocessing.get_context("fork").Barrier(4)
    torch.multiprocessing.start_processes(write_and_read, (gate, tmp_path, x), nprocs=4, start_method="fork")


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


# fmt: off
WRONG_FILES = [  # data set, its arguments, words of what it says
    ("shakespeare", "missing", "missing"), ("shakespeare", "short", "short"), ("shakespeare", "binary", "binary"),
    ("spoken_digits", "missing", ""), ("spoken_digits", "bad", ""), ("spoken_digits", "VOICES --held_out=nobody", ""),
    ("series", "--real=missing.jsonl", "cannot read"), ("series", "--real=no.jsonl", "line 2"),
    ("series", "--real=empty", "arrow"), ("gift_eval", "short.arrow", "short.arrow"), ("gift_eval", "one.jsonl", "few"),
    ("llava", "missing", "missing"), ("llava", "no.json", "no.json, record 1 conversations"),
    ("llava", "empty.json --images=cut.zip", "cut.zip cut short"),
    ("librispeech", "empty", "trans.txt"), ("aishell", "empty", "aishell_transcript_v0.8.txt"),
    ("librispeech", "cut.tar.gz", "cut.tar.gz cut short"), ("librispeech", "missing.tar.gz", "missing.tar.gz"),
    ("aishell", "cut.tar.gz", "cut.tar.gz cut short"), ("aishell", "missing.tar.gz", "missing.tar.gz"),
]
# fmt: on


@pytest.mark.parametrize("name, line, words", WRONG_FILES)
def test_data_sets_say_which_file_is_wrong(name, line, words, voices, tmp_path, monkeypatch):
    """In one sentence, and write no records."""
    if line == "short.arrow":
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "bad"):
        Path(folder).mkdir()
    written = {"short": b"short", "short.arrow": b"short", "binary": b"\xff\xfe" * 50, "bad/1_a_0.wav": b"RIFF"}
    written |= {"no.json": b'[{"image": "x.jpg"}]', "empty.json": b"[]", "noise": os.urandom(5000)}
    for path, content in written.items():
        Path(path).write_bytes(content)
    with zipfile.ZipFile("whole.zip", "w") as z:
        z.write("noise")
    Path("cut.zip").write_bytes(Path("whole.zip").read_bytes()[:-40])
    Path("cut.tar.gz").write_bytes(packed(Path(), "whole.tar.gz", "noise").read_bytes()[:-200])
    jsonl(Path("no.jsonl"), {"target": [1, 2]}, {"item_id": 1})
    jsonl(Path("one.jsonl"), {"item_id": "1", "target": [*range(300)]})
    with pytest.raises(SystemExit) as e:
        prepare(name, *line.replace("VOICES", str(voices)).split(), "--out=out")
    message = str(e.value)
    assert message.startswith("error: ") and "\n" not in message
    assert not [word for word in words.split() if word not in message]
    left = "out/*.jsonl" if name == "gift_eval" else "out/*"  # that one writes what it reads to *.partial
    assert not [*Path().glob(left)] and (name != "spoken_digits" or not Path("out").exists())


def parts(folder):
    """The records of train.jsonl and val.jsonl."""
    return [read_records(folder / f"{name}.jsonl") for name in ("train", "val")]


def everything(folder):
    return sum(parts(folder), [])


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    assert run([REPO / "data/digits/prepare.py", "--pictures=60", f"--out={folder}"], folder.parent).returncode == 0
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


@pytest.mark.parametrize("name", MADE)
def test_data_sets_are_deterministic_and_their_parts_disjoint(name, voices, tmp_path):
    """Files and records counted; twice the same bytes, other ones by another seed; nothing is in both parts."""
    flags, n_files, n_records, seeded = MADE[name]
    points = [float(i % 24) for i in range(400)]
    jsonl(tmp_path / "real.jsonl", *({"item_id": f"{i}", "target": [i % 7, *points]} for i in range(30)))
    (tmp_path / "play.txt").write_text("ROMEO: Is the day so young?\n" * 20)
    captions = [talk("<image>\nDescribe it.", f"Thing {i}.", id=f"{i}", image=f"{i}.jpg") for i in range(12)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    for i in range(12):
        noise(8, 8 + i).save(tmp_path / f"{i}.jpg")
    args = flags.replace("VOICES", str(voices)).replace("FOLDER", str(tmp_path)).split()
    args.append(f"--out={tmp_path / 'out'}")
    prepare(name, *args)
    first, made = contents(tmp_path / "out"), parts(tmp_path / "out")
    assert len(first) == n_files and tuple(map(len, made)) == n_records
    for key in ("id", "item_id"):
        ids = [r[key] for r in sum(made, []) if key in r]
        assert len(set(ids)) == len(ids)
    media = [{Path(path).read_bytes() for r in part for _, path in record_media(r)} for part in made]
    assert not media[0] & media[1]
    assert all(isinstance(r.get("task", ""), str) and r.get("level", 1) >= 1 for r in sum(made, []))
    prepare(name, *args)
    assert contents(tmp_path / "out") == first
    if seeded:
        prepare(name, *args, "--seed=2")
        other = contents(tmp_path / "out")
        assert other.keys() == first.keys() and not [x for x in first if other[x] == first[x] and x != "val.jsonl"]


@pytest.fixture
def scanned(tmp_path, monkeypatch):
    """(the labels of scikit-learn's digits, {path under tmp_path: [number of each scan in it]}), filled by and by."""
    real = sklearn.datasets.load_digits()
    used, pictures, frombytes, save = [], {}, Image.frombytes, Image.Image.save
    scans = [scan.tobytes() for scan in np.minimum(16 * real.images, 255).astype(np.uint8)]

    def note_scan(mode, size, data):
        used.append(scans.index(data))
        return frombytes(mode, size, data)

    def note_picture(image, path, **how):
        pictures[os.path.relpath(path, tmp_path)] = used[:]
        used.clear()
        save(image, path, **how)

    monkeypatch.setattr(Image, "frombytes", note_scan)
    monkeypatch.setattr(Image.Image, "save", note_picture)
    return real.target, pictures


def test_digits_answers_are_true_and_writers_are_held_out(scanned, tmp_path):
    """Every answer again, from the labels of the scans that were drawn."""
    labels, pictures = scanned
    prepare("digits", f"--out={tmp_path}", "--pictures=400")
    made = parts(tmp_path)
    printed = [r for r in sum(made, []) if "image" not in r]
    drawn = [[r for r in part if "image" in r] for part in made]
    assert [r["image"] for part in drawn for r in part] == [*pictures]
    seen, held_out = ({i for r in part for i in pictures[r["image"]]} for part in drawn)
    assert max(seen) < 1415 <= min(held_out) and [*labels[1415:1435]] == [*range(10)] * 2  # a form begins
    for r in sum(made, []):
        turns = record_turns(r)
        number = turns[0][0].split("\n")[0]
        if "image" in r:
            number = "".join(str(labels[i]) for i in pictures[r["image"]])
        n, numbers = len(number), [*map(int, number)]
        total = number[0] + ", ".join(f"+{x}={sum(numbers[: i + 1])}" for i, x in enumerate(numbers) if i)
        truths = {"What number|Read": number, "How many|Count": str(n), "sum|Add": total, "largest": max(number)}
        for question, truth in turns:
            assert [t for words, t in truths.items() if re.search(words, question)] == [truth]
        if r in printed:
            assert r["level"] == n >= 2 and r["id"].startswith("train") and len(turns) == 1
            continue
        assert r["level"] == n if r["task"] == "read" and len(turns) == 1 else r["level"] > n  # reading comes first
        with Image.open(tmp_path / r["image"]) as image:
            assert turns[0][0].startswith("<image>\n") and image.height == 56
            assert image.getpixel((0, 0)) == 255 and image.getextrema()[0] < 100  # black on white
    assert len(printed) == 100 and {r["task"] for r in printed} == {"count", "sum", "largest"}
    for part, n_turns in zip(drawn, ({1, 2}, {1})):
        assert {len(record_turns(r)) for r in part} == n_turns
        assert {len(pictures[r["image"]]) for r in part} == {1, 2, 3, 4, 5}
        assert {r["task"] for r in part} == {"read", "count", "sum", "largest"}


def test_series_are_normalised_and_leave_out_benchmarks(tmp_path):
    """Lengths, mean and deviation; names of benchmarks, gaps and still series among real ones."""
    names = ["a", "ETTh1", "weather/T", "b_weather"]
    lines = [{"item_id": name, "target": [float(i % 24 + n) for i in range(400)]} for n, name in enumerate(names)]
    odd = {"item_id": "gap", "target": [1.0, None] * 300}, {"item_id": "still", "target": [3] * 300}
    real = jsonl(tmp_path / "real.jsonl", *lines, *odd)
    real_series = functions_of("series")["real_series"]
    assert [(name, len(x)) for _, name, x in real_series([str(real)])] == [("a", 400), ("b_weather", 400)]
    prepare("series", "--series=20", f"--real={real}", f"--out={tmp_path}")
    train_records, val = parts(tmp_path)
    assert len(train_records) == 20 and len(val) == 1
    for r in train_records:
        x = np.array(r["target"])
        assert 192 <= len(x) <= 1632 and abs(x.mean()) < 0.01 and x.std() == pytest.approx(1, abs=0.01)

    several = jsonl(tmp_path / "several.jsonl", {"target": [[*range(300)], [*range(300)]]})  # two variables
    assert len(real_series([str(several)])) == 2
    for folder in ("solar/H", "ett1/H", "LOOP_SEATTLE/D"):
        published_arrow(tmp_path / "gift" / folder, [[*map(float, range(300))]] * 2)
    assert [len(x) for *_, x in real_series([str(tmp_path / "gift")])] == [300, 300]


COLOURS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "yellow": (255, 220, 0), "black": (0, 0, 0)}


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
            rgb = np.median(cell[ink > 0.8], 0)
            colour = min(COLOURS, key=lambda name: math.dist(COLOURS[name], rgb))
            things[row, column] = colour, shape_name(ink)
    return things


def answers_of(things):
    """{question: (its answer, the cells that it is about)} of every question that a picture answers unambiguously."""
    rows, columns = ("top", "middle", "bottom"), ("left", "centre", "right")
    sides = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    kinds, shapes, found = [*things.values()], [shape for _, shape in things.values()], {}
    for cell, thing in things.items():
        place, called = f"{rows[cell[0]]} {columns[cell[1]]}", " ".join(thing)
        found[f"What colour is {place}?"] = thing[0], [cell]
        found[f"What shape is {place}?"] = thing[1], [cell]
        if kinds.count(thing) == 1:
            found[f"Where is the {called}?"] = place, [cell]
        for side, (down, right) in sides.items():
            there = cell[0] + down, cell[1] + right
            if kinds.count(thing) == 1 and there in things:
                found[f"What is just {side} the {called}?"] = things[there][1], [cell, there]
    for thing in itertools.product(COLOURS, "circle square triangle star cross".split()):
        several = " ".join(thing) + ("es" if thing[1] == "cross" else "s")
        like = [cell for cell in things if things[cell] == thing]
        found[f"How many {several}?"] = str(len(like)), like or [*things]
        for (row, column), (_, shape) in things.items():
            for side, (down, right) in sides.items() if shapes.count(shape) == 1 and shape != thing[1] else ():
                n = sum(down * (i - row) + right * (j - column) > 0 for i, j in like)
                found[f"How many {several} are {side} the {shape}?"] = str(n), [(row, column), *like]
    return found


def test_shapes_answers_are_true_and_places_are_held_out(tmp_path):
    """Every answer again, from the pixels; each question of val is about a thing where train never draws it. Without
    the picture: the most frequent answer to each question of one half of the records, tried on the other half."""
    prepare("shapes", "--pictures=400", f"--out={tmp_path}")
    drawn, about = defaultdict(set), []
    for name, n, n_turns, records in zip(("train", "val"), (3 * 400, 50), ({1, 2}, {1}), parts(tmp_path)):
        assert len(records) == n and {len(record_turns(r)) for r in records} == n_turns
        assert {r["task"] for r in records} == {"colour", "shape", "position", "count", "relation"}
        for r in records:
            [(_, path)] = record_media(r)
            things = look(path)
            drawn[name] |= set(things.items())
            assert 1 <= len(things) <= 5
            for question, answer in record_turns(r):
                truth, cells = answers_of(things)[question.removeprefix("<image>\n")]
                assert answer == truth, (path, question)
                about += [{(cell, things[cell]) for cell in cells}] if name == "val" else []
    assert all(things - drawn["train"] for things in about)
    assert 190 <= len(drawn["train"]) <= 200  # of 9 x 25
    never = drawn["val"] - drawn["train"]
    assert [len({thing[i] for _, thing in never}) for i in (0, 1)] == [5, 5] and len({cell for cell, _ in never}) == 9

    turns = [(r["task"], *record_turns(r)[0]) for r in read_records(tmp_path / "train.jsonl")]
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
    key, compose, rng = functions_of("morse")["key"], functions_of("morse")["compose"], random.Random(0)
    texts = ["THE QUICK BROWN FOX JUMPS OVER A LAZY DOG", "CQ DE K1AB/7", "0123456789?", "PARIS"] * 5
    copies = [copy_morse(key(text, Quiet(seed)), 4000) for seed, text in enumerate(texts)]
    copied, speeds, tones = map(list, zip(*copies))
    assert copied == texts
    assert 9 < min(speeds) < 14 and 26 < max(speeds) < 33 and 395 < min(tones) < 480 and 820 < max(tones) < 905

    learned, held_out = ({compose(rng, part) for _ in range(3000)} for part in (False, True))
    assert max(map(len, learned & held_out)) < 3
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
    labels, pictures = scanned
    monkeypatch.setattr(random, "Random", Quiet)
    prepare("same", f"--out={tmp_path}", "--pairs=320")
    made, answers, copied = parts(tmp_path), [], 0
    seen, held_out = ({i for r in part for i in pictures[r["image"]]} for part in made)
    assert [*map(len, made)] == [320, 20] and max(seen) < 1415 <= min(held_out)
    for r in sum(made, []):
        [(_, answer)] = record_turns(r)
        see, hear, same = re.fullmatch(r"(\d+), (\d+): (yes|no)", answer).groups()
        answers.append(same)
        assert see == "".join(str(labels[i]) for i in pictures[r["image"]])
        assert r["level"] == len(see) == len(hear) <= 3 and sum(a != b for a, b in zip(see, hear)) == (same == "no")
        if set(hear) - {"0", "5"}:  # with dots and dashes
            x, rate = soundfile.read(tmp_path / r["audio"])
            assert copy_morse(x - x.mean(), rate)[0] == hear
            copied += 1
    assert copied > 250 and 0.4 < answers[:320].count("yes") / 320 < 0.6
    kinds = {tuple(kind for kind, _ in record_sample(ModRWKV(SMALL), r) if kind in modrwkv.MEDIA) for r in made[1]}
    assert kinds == {("image", "audio"), ("audio", "image")}


def test_spoken_digits_hold_one_speaker_out(voices, tmp_path):
    """The tones of val are the last speaker's digits; train stays the same when that speaker's recordings change."""
    shorter, learned = Path(shutil.copytree(voices, tmp_path / "shorter")), []
    for d, i in itertools.product(range(10), range(2)):
        hum(shorter / f"{d}_c_{i}.wav", 260 + 150 * d, 8000, 2400)
    for folder, *more in ([voices], [shorter, "--held_out=c"]):
        prepare("spoken_digits", folder, "--sounds=160", f"--out={tmp_path}", *more)
        train_records, val = parts(tmp_path)
        learned.append(contents(tmp_path / "train"))
        assert {r["level"] for r in train_records} == {1, 2, 3, 4, 5, 6} and learned[0] == learned[-1]
        for r in val:
            x, rate = soundfile.read(tmp_path / r["audio"])
            loudness = np.convolve(np.abs(x), np.ones(80), "same")
            edges, heard = np.flatnonzero(np.diff((loudness > 0.3 * loudness.max()).astype(int))), []
            for start, end in zip(edges[::2], edges[1::2]):
                hz = np.abs(np.fft.rfft(x[start:end])).argmax() * rate / (end - start)
                heard.append(str(round((hz - 260) / 150)))
            assert record_turns(r)[0][1] == " ".join(heard) and r["level"] == len(heard) <= 6


def test_spoken_digits_are_stretched_cut_and_equalised():
    """A tone's length and frequency, noise that steps from loud to faint, a filter's gain against its own draws."""
    data, g = functions_of("spoken_digits"), np.random.default_rng(0)
    x = np.sin(2 * np.pi * 300 * np.arange(8000) / 8000)
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


def test_llava_captions_from_the_published_zip(tmp_path):
    """Ids, pictures and turns against those packed; the unpacked folder gives the same."""
    names = [f"{i:09}" for i in range(40)]
    captions = [talk("<image>\nDescribe it.", f"Thing {x}.", id=x, image=f"{x[4:]}/{x}.jpg") for x in names]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as z:
        for r in captions:
            z.writestr(r["image"], b"a picture")
    args = "llava", tmp_path / "captions.json", "--val=4", f"--out={tmp_path / 'a'}"
    prepare(*args, f"--images={tmp_path / 'images.zip'}")
    made = parts(tmp_path / "a")
    assert [*map(len, made)] == [36, 4] and {r["id"] for r in sum(made, [])} == set(names)
    for r in sum(made, []):
        [(kind, path)] = record_media(r)
        assert Path(path).read_bytes() == b"a picture" and path.endswith(f"{r['id']}.jpg")
        assert record_turns(r) == [("<image>\nDescribe it.", f"Thing {r['id']}.")]
    prepare(*args, f"--images={tmp_path / 'a/images'}")
    assert parts(tmp_path / "a") == made


def test_llava_mix_is_mended_and_what_is_missing_is_named(tmp_path, capsys):
    """The turns that are left of odd conversations, written out."""
    out, mix, short = tmp_path / "out", [], f"\n{SHORT_ANSWER}"
    for place in ["coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K_2"]:
        (tmp_path / place).mkdir(parents=True)
        for i in range(8):
            (tmp_path / place / f"{i}.jpg").write_bytes(b"a picture")
            mix += [talk("<image>\nWhat is it?", f"{place} {i}", id=f"{i}", image=f"{place}/{i}.jpg")] * 2
    asked = [f"<image>\nOne?{short}", "1", "Two?", "2", "Three?", "3", "Four?"]
    mix += [talk(*asked, id="long", image="coco/train2017/0.jpg")]
    mix += [talk("No mark?", "none", "<audio>, <image>, <image>?", "two", id="marks", image="gqa/images/0.jpg")]
    mix += [talk("How do I write <audio> and <image> in HTML?", "So: <audio>.", "", " ", id="html", model="")]
    odd = [{"from": "gpt", "value": "unasked"}, *talk("unanswered?")["conversations"], *talk("q", "a")["conversations"]]
    mix += [{"id": "odd", "conversations": odd}, talk("never answered", id="silent")]
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    args = "llava", tmp_path / "mix.json", "--val=5", f"--out={out}"
    prepare(*args)
    assert ", 2 of them text alone\nleft out: 6 turns without an answer, 0 records" in capsys.readouterr().out

    def turns_of(name):
        return record_turns(next(r for r in everything(out) if r["id"] == name))

    marks = [("No mark?", "none"), ("<audio >, <image>, <image >?", "two")]
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
        (tmp_path / f"ocr_vqa/images/{i}.jpg").unlink()
    with pytest.raises(SystemExit, match="^error: 2 of 40 pictures .*ocr_vqa/images/0.jpg.* --skip_missing$"):
        prepare(*args)
    assert everything(out) == records  # what was there stays
    prepare(*args, "--skip_missing")
    assert "4 records whose picture is missing" in capsys.readouterr().out and len(everything(out)) == 80


def packed(folder, archive, name):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / name, name)
    return Path(archive)


def librispeech(folder):
    """(its folder, its archives, {part: [(id, task, text)]}) of a data set of two utterances a part, as published."""
    spoken, archives = defaultdict(list), []
    places = "train-clean-100/19/198 train-other-500/20/205 dev-clean/84/121 test-other/36/13"
    for place in places.split():
        task, speaker, chapter = place.split("/")
        lines = ""
        for name in (f"{speaker}-{chapter}-0000", f"{speaker}-{chapter}-0001"):
            hum(folder / "LibriSpeech" / place / f"{name}.flac")
            spoken[task.split("-")[0].replace("dev", "val")].append((name, task, f"don't stop {task}"))
            lines += f"{name} DON'T STOP {task.upper()}\n"
        (folder / "LibriSpeech" / place / f"{speaker}-{chapter}.trans.txt").write_text(lines)
        archives.append(packed(folder, folder / f"{task}.tar.gz", f"LibriSpeech/{task}"))
    (folder / "LibriSpeech/SPEAKERS.TXT").write_text("19 | F | train-clean-100 | 25.19 | Kara Shallenberg\n")
    return folder / "LibriSpeech", archives, spoken


def aishell(folder):
    """The same of AISHELL, where each speaker is packed, and each has a sound without a transcript."""
    spoken, lines, place = {}, "", folder / "data_aishell"
    for name in ("transcript", "wav"):
        (place / name).mkdir(parents=True)
    for part, task, speaker in (("train", "train", "S0002"), ("val", "dev", "S0724"), ("test", "test", "S0764")):
        names = [f"BAC009{speaker}W012{i}" for i in range(3)]
        for name in names:
            hum(folder / f"plain/{task}/{speaker}/{name}.wav")
        spoken[part] = [(name, task, f"而对楼市成交{speaker}") for name in names[:2]]
        lines += "".join(f"{name} 而 对 楼市 成交 {speaker}\n" for name in names[:2])
        packed(folder / "plain", place / f"wav/{speaker}.tar.gz", f"{task}/{speaker}")
    (place / "transcript/aishell_transcript_v0.8.txt").write_text(lines, encoding="utf-8")
    return place, [packed(folder, folder / "data_aishell.tgz", "data_aishell")], spoken


def transcripts(folder):
    """{part: [(id, task, transcript)]} of a data set of speech, each with its sound."""
    found = defaultdict(list)
    for part in ("train", "val", "test"):
        for r in read_records(folder / f"{part}.jsonl"):
            [(question, text)], [(kind, path)] = record_turns(r), record_media(r)
            assert (question, kind, Path(path).stem) == ("<audio>", "audio", r["id"])
            assert len(read_sound(path, 16000)) == 800
            found[part].append((r["id"], r["task"], text))
    return found


@pytest.mark.parametrize("make", [librispeech, aishell])
def test_speech_from_folders_and_archives(make, tmp_path, capsys):
    """Ids, parts and transcripts against those that were packed; what is missing is named."""
    name, (folder, archives, spoken) = make.__name__, make(tmp_path / "published")
    prepare(name, *archives, f"--out={tmp_path / 'packed'}")
    assert ("3 sounds that the transcript does not know" in capsys.readouterr().out) == (name == "aishell")
    prepare(name, folder, f"--out={tmp_path / 'folder'}")
    if name == "aishell":  # each speaker unpacked, beside the archive
        shutil.copytree(tmp_path / "published/plain", folder / "wav", dirs_exist_ok=True)
    prepare(name, folder, f"--out={tmp_path / 'unpacked'}")
    assert not (tmp_path / "unpacked/wav").exists()
    assert all(transcripts(tmp_path / out) == spoken for out in ("packed", "folder", "unpacked"))

    gone = next(path for path in folder.rglob("*") if path.stem == spoken["val"][1][0])
    gone.unlink()
    n = sum(map(len, spoken.values()))
    with pytest.raises(SystemExit, match=f"^error: 1 of {n} sounds .*{gone.name}.* --skip_missing"):
        prepare(name, folder, f"--out={tmp_path / 'some'}")
    prepare(name, folder, "--skip_missing", f"--out={tmp_path / 'some'}")
    assert transcripts(tmp_path / "some") == spoken | {"val": spoken["val"][:1]}


def test_gift_eval_folders_become_series(tmp_path, capsys):
    """Points, pieces and parts against what was written; each data set has its own level."""
    gift, out = tmp_path / "gift", tmp_path / "out"

    def level(n, k):
        return [round(math.sin(i / 7) * k + k, 3) for i in range(n)]

    for name in ("data-00000-of-00001.arrow", "cache-1318815c7ce7bc45.arrow"):  # a copy
        published_arrow(gift / "solar/H", [level(300, k) for k in range(1, 31)], name)
    published_arrow(gift / "long/D", [[None, *level(2000, 40)]])
    published_arrow(gift / "two/T", [[level(250, 50), level(250, 51)]] * 25)  # two variables a record
    published_arrow(gift / "short/D", [level(100, 60), [7.0] * 400])
    for own in "ett1/15T ett2/W electricity/H jena_weather/10T LOOP_SEATTLE/5T SZ_TAXI/15T traffic_hourly".split():
        published_arrow(gift / own, [level(300, 99)])
    prepare("gift_eval", gift, "--length=1000", f"--out={out}")
    words = capsys.readouterr().out
    assert "LOOP_SEATTLE, SZ_TAXI, electricity, ett1, ett2, jena_weather, traffic" in words
    assert "2 left out as too short" in words

    def strength(r):
        return round(max(x for x in r["target"] if x is not None) / 2)

    train_records, val = parts(out)
    assert Counter(map(strength, train_records + val)) == Counter(range(1, 31)) | {40: 3, 50: 25, 51: 25}
    pieces = [r["target"] for r in everything(out) if strength(r) == 40]
    assert [len(x) for x in pieces] == [667] * 3 and sum(pieces, []) == [None, *level(2000, 40)]
    assert next(r for r in train_records if strength(r) == 7)["target"] == level(300, 7)
    sides = [*map(strength, val)]  # every 20th of 56 records, with all its variables and pieces
    assert len(set(sides)) == 3 + 1 and sides.count(50) == sides.count(51) == 1
    prepare("gift_eval", gift, "--most=10", f"--out={out}")
    assert len(everything(out)) == 10 + 2 + 10
    broken = gift / "solar/H/data-00000-of-00001.arrow"
    broken.write_bytes(broken.read_bytes()[:700])
    for path, words in ((gift, str(broken)), (gift / "short", "too few")):
        with pytest.raises(SystemExit, match=f"^error: .*{re.escape(words)}"):
            prepare("gift_eval", path, f"--out={tmp_path / 'none'}")
    assert not list((tmp_path / "none").glob("*.jsonl"))


def test_data_is_found(tmp_path, monkeypatch, capfd):
    """Of any folder of train and val the paths written out; a set made from files of one's own names its command."""
    train_file, val_file = (str(jsonl(tmp_path / f"{name}.jsonl", {"text": "a"})) for name in ("train", "val"))
    assert train.find_data(str(tmp_path), "") == ([train_file], [val_file])
    assert train.find_data(f"{tmp_path},{val_file}", "x.jsonl") == ([train_file, val_file], ["x.jsonl"])
    monkeypatch.setattr(os.path, "exists", lambda path: False)  # as if it were not made yet
    for name in ("llava", "librispeech", "aishell", "gift_eval", "spoken_digits"):
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


def test_recipes_of_the_readme_are_the_papers():
    """Number of samples and learning rates against PUBLISHED; each flag of a prepare.py is one that it has."""
    for recipe, (name, (n, highest, last)) in zip(RECIPES, PUBLISHED.items(), strict=True):
        s, _, names = flags("about", train.Train, Config, argv=recipe)
        assert s.out_dir == name and len(names) == len(recipe)
        assert abs(s.max_steps * s.batch_size - n) < s.batch_size
        rates = [train.learning_rate(step, s) for step in range(s.max_steps)]
        assert max(rates) == pytest.approx(highest, rel=1e-5) and rates[-1] == pytest.approx(last, abs=1e-12)
        assert rates[0] == pytest.approx(
            highest / max(1, s.warmup_steps), rel=1e-5
        )  # from the first step, or warming up
    lines = [shlex.split(line, comments=True)[1:] for line in README if line.startswith("python data/")]
    assert len(lines) == 7
    for script, *args in lines:
        code = (REPO / script).read_text(encoding="utf-8")
        assert all(f'"{arg.split("=")[0]}"' in code for arg in args if arg.startswith("--"))


def test_two_stages_by_the_flags_of_the_readme(tmp_path):
    """VisualRWKV's on a tiny RWKV-6, at another size and with a PatchEncoder: which tensors each stage changes."""
    model = randomise(ModRWKV(Config(rwkv=6, n_layer=2, n_embd=64, head_size=32, image_encoder="none"), vocab_size=300))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    vocabulary = "".join(f"{b + 1} {bytes([b])!r} 1\n" for b in range(256)) + r"261 '\n\n' 2"
    (tmp_path / "vocab.txt").write_text(vocabulary)
    noise(32, 32).save(tmp_path / "x.jpg")
    records = [talk(f"<image>\n{i}?\n{SHORT_ANSWER}", f"{i}", "Why?", "So.", image="x.jpg") for i in range(20)]
    for name in ("train", "val"):
        jsonl(tmp_path / f"{name}.jsonl", *records, talk("How do I write <image > in HTML?", "So: <image>."))
    others = {"data": tmp_path, "tokenizer": tmp_path / "vocab.txt", "init_from": tmp_path / "x.pth"}
    others |= {"image_encoder": "patch", "max_steps": 2, "batch_size": 4, "dtype": "float32"}
    weights = [torch.load(others["init_from"])]
    for recipe in RECIPES[-2:]:
        recipe = dict(flag.lstrip("-").split("=", 1) for flag in recipe)
        out = tmp_path / recipe["out_dir"]
        recipe |= {name: value for name, value in others.items() if name in recipe} | {"out_dir": out}
        said(train.main, *(f"--{name}={value}" for name, value in recipe.items()), "--eval_samples=1", "--device=cpu")
        ckpt, others["init_from"] = torch.load(out / "ckpt.pt"), out / "ckpt.pt"
        weights.append(read_checkpoint(out)["model"])
        want = {"prompt_style": recipe["prompt_style"], "scan": "bi", "rwkv": 6}
        assert want.items() <= ckpt["config"].items()
        assert len({group["lr"] for group in ckpt["optimizer"]["param_groups"]}) == 1  # the decays' is the others'
    start, one, two = weights
    assert all(torch.equal(one[name], x) for name, x in start.items())  # stage 1 leaves the language model as it is
    assert [name for name in start if torch.equal(two[name], one[name])] == ["emb.weight"]  # frozen in stage 2
    assert not [name for name in one if name.startswith("adapter.image") and torch.equal(two[name], one[name])]


# ------------------------------------------------------------ train.py


@pytest.fixture
def batches(monkeypatch):
    """Makes Batches of records: a sample is its record's id, or of a text as many numbers as it has characters."""

    def record_sample(model, record):
        return record["id"] if "conversations" in record else [("answer", list(range(len(record["text"]))))]

    def make(levels, records=None, **settings):
        rng, model = random.Random(0), torch.nn.Module()
        model.encoder, model.collate = torch.nn.ModuleDict(), list  # samples as they are
        records = records or [talk("q" * rng.randint(1, 50), "a", id=i, level=x) for i, x in enumerate(levels)]
        return train.Batches(records, train.Train(**dict(batch_size=8, level_steps=0) | settings), model)

    monkeypatch.setattr(data_batches, "record_sample", record_sample)
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


SCHEDULES = [
    ("wsd", dict(warmup_steps=10, decay_fraction=0.4, lr_final=0.2), {0: 0.1, 9: 1, 10: 1, 59: 1, 79: 0.6, 99: 0.2}),
    ("wsd", dict(warmup_steps=0, decay_fraction=1.0), {0: 0.99, 49: 0.5, 99: 0}),
    ("cosine", dict(max_steps=1100, warmup_steps=100), {0: 0.01, 99: 1, 349: (2 + 2**0.5) / 4, 599: 0.5, 1099: 0}),
    ("cosine", dict(max_steps=200, warmup_steps=0, lr_final=0.5), {49: 0.5 + (2 + 2**0.5) / 8, 99: 0.75, 199: 0.5}),
    ("constant", dict(warmup_steps=10, lr_final=0.2), {0: 0.1, 4: 0.5, 9: 1, 50: 1, 99: 1}),
    ("constant", dict(warmup_steps=0), {0: 1, 99: 1}),
]


@pytest.mark.parametrize("schedule, flags, expected", SCHEDULES)
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


def test_a_run_leaves_its_log_checkpoint_and_curve(trained, counting):
    """Against the files, steps and keys that the README names; a second run touches none of them."""
    out = trained[0]
    before = contents(out)
    assert list(before) == ["ckpt.pt", "log.jsonl", "loss.png"]
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
    message = refusal(train.main, [*TINY, f"--data={counting[0]}", "--max_steps=1", f"--out_dir={out}"])
    assert "ckpt.pt" in message and "--resume" in message and "--out_dir" in message
    assert "100 steps" in refusal(train.main, ["--resume", f"--out_dir={out}"])
    assert contents(out) == before


def test_a_run_scores_what_was_held_out(trained, counting):
    """Against one batch of all: batches of answers of unequal length must not be averaged; against sample.py --eval.
    The command in the last line is run, too, and gives the answer to the first held-out record."""
    out, words, model = trained
    with torch.no_grad():
        loss = model.loss([record_sample(model, r) for r in read_records(counting[0])]).item()
    assert column(out, "val_loss")[-1] == pytest.approx(loss, abs=1e-5)
    assert f"\nheld-out loss {column(out, 'val_loss')[-1]:.4f}\n" in words
    *table, scores = said(sample.main, f"--out_dir={out}", f"--eval={counting[0]}").splitlines()
    scores = json.loads(scores)
    tasks = scores.pop("tasks")
    assert scores == {key: column(out, key)[-1] for key in ("n", "exact", "chars", "majority")} and scores["n"] == 24
    *_, command = words.splitlines()
    assert table == words.splitlines()[-len(table) - 2 : -2]
    [line] = [x for x in table if x.startswith("read ")]
    assert line.split()[1:4] == ["16", f"{100 * tasks['read']['exact']:.1f}", "%"]
    assert shlex.split(command)[:3] == ["python", "sample.py", f"--out_dir={out}"]
    question = data_records.question(model, "<image>\nHow many?", [("image", counting[0].parent / "1.png")])
    assert said(sample.main, *shlex.split(command)[2:]).strip() == "".join(answer(model, question)[0]).strip()


@pytest.mark.parametrize("table,rows", [("data", 4), ("prompt", 3), ("scan", 3), ("adapter", 3), ("conv", 4)])
def test_ablation_runs_each_row_with_three_seeds(table, rows, tmp_path, monkeypatch, capsys):
    """Against means and deviations by hand; a function plays the runs: it logs, and fails once."""
    commands, failing = [], ["_2"]

    def play(command, env, stdout, stderr):
        flags = dict(flag[2:].split("=", 1) for flag in command[2:])
        commands.append(flags)
        assert command[1] == str(REPO / "train.py") and env["OMP_NUM_THREADS"] == "1"
        out, seed = Path(flags["out_dir"]), int(flags["seed"])
        score = {"n": 9, "exact": 0.1 * seed + 0.01 * len(flags.get("scan", "")), "tasks": {"read": {"exact": 0.5}}}
        if table == "adapter":  # series are not answers
            score = {"n": 0, "exact": 0.0, "tasks": {}, "val_loss": seed / int(flags["adapter_scale"])}
        # the evaluation behind one step is none of its time
        steps = [{"step": n, "loss": 1.0, "seconds": 5.0 + 3.2 * n + (n == 4)} for n in range(7)]
        torch.save({"train": {"batch_size": 64, "max_steps": 7}}, out / "ckpt.pt")
        jsonl(out / "log.jsonl", *steps, {"step": 7, **score})
        if flags["out_dir"].endswith(tuple(failing)):
            (out / "log.jsonl").write_text("{")
            return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablate.subprocess, "run", play)
    argv = [table, "--data=x.jsonl", f"--out_dir={tmp_path}", "--max_steps=7", "--seed=9"]
    assert "_2 did not finish" in refusal(ablate.main, argv) and "said.txt" in refusal(ablate.main, argv)
    done = sum((folder / "log.jsonl").read_text() != "{" for folder in tmp_path.iterdir())
    failing.clear()
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


def test_a_model_learns_to_forecast(tmp_path):
    """From series alone, against the sine itself; the last line says how to ask."""
    data = jsonl(tmp_path / "train.jsonl", *({"target": wave(phase)} for phase in range(20)))
    val = jsonl(tmp_path / "val.jsonl", {"target": wave(0.5)})
    more = "--image_encoder=none", "--max_steps=120", "--learning_rate=5e-3"
    words = learn(tmp_path / "out", (data, val), *FORECAST, *more)
    assert "held-out loss 0.0" in words and "--series=NUMBERS.csv" in words.splitlines()[-1]
    y = load(tmp_path / "out").forecast([wave(0.2, 100)])[0]
    assert (y - torch.tensor(wave(0.2, 108)[100:])).abs().mean() < 0.25


def test_one_model_sees_hears_and_forecasts(tmp_path):
    """Three data sets learned at once, then all in one question, each of which the answer depends on; forecasts
    against the sine itself, and as sample.py prints them in each column's units."""
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
    data = [jsonl(tmp_path / f"{i}.jsonl", *x) for i, x in enumerate((seen, heard, ahead, both))]
    out, val = tmp_path / "out", jsonl(tmp_path / "val.jsonl", *both, *seen, *heard)
    more = "--audio_encoder=mel", "--encoder_width=32", "--max_steps=200", "--batch_size=16"
    learn(out, (",".join(map(str, data)), val), *FORECAST, *more)
    assert {task: score["exact"] for task, score in log(out)[-1]["tasks"].items()} == dict(both=1, hear=1, see=1)
    model, logits = load(out), []
    for number, tone, phase in (("one", "low", 1), ("two", "low", 1), ("one", "high", 1), ("one", "low", 2)):
        files = [("image", tmp_path / f"{number}.png"), ("audio", tmp_path / f"{tone}.wav")]
        asked = data_records.question(model, prompt, [*files, ("series", wave(phase, 48))])
        logits.append(model([asked])[0][0, -1])
    assert all(distance(other, logits[0]) > 1e-4 for other in logits[1:])
    table = csv(tmp_path / "x.csv", "a,y", [10 * y for y in wave(0.2, 100)], wave(0.2, 100))
    asked = f"--image={tmp_path / 'three.png'}", f"--audio={tmp_path / 'high.wav'}", f"--series={table}"
    assert said(sample.main, f"--out_dir={out}", *asked, f"--prompt={prompt}").strip() == "three high"

    y = model.forecast([wave(0.2, 100)])[0]
    assert (y - torch.tensor(wave(0.2, 108)[100:])).abs().mean() < 0.3
    printed = said(sample.main, f"--out_dir={out}", f"--series={table},{table}#a", f"--plot={tmp_path / 'x.png'}")
    b, a = ([float(x) for x in line.split()[1:]] for line in printed.splitlines())
    assert b == pytest.approx(y.tolist(), rel=1e-4) and a == pytest.approx((10 * y).tolist(), rel=1e-4)
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_the_benchmark_is_every_window_of_the_test_split(small_chat, tmp_path):
    """Against numpy, window by window."""
    save(tmp_path / "x.pt", small_chat.model)
    x = np.stack([10 * np.array(wave(1, 400)), np.random.RandomState(0).randn(400).cumsum()], 1)
    table = csv(tmp_path / "data.csv", "date,a,b", [f"d{i}" for i in range(400)], *x.T.tolist())
    scores = json.loads(said(sample.main, f"--out_dir={tmp_path / 'x.pt'}", f"--eval={table}").splitlines()[-1])
    z = (x - x[:280].mean(0)) / x[:280].std(0)
    windows = np.stack([z[i : i + 60, c] for c in range(2) for i in range(320 - 48, 400 - 60 + 1)])
    assert scores["windows"] == len(windows) == 138
    guesses = {
        "repeat the last point": windows[:, 47:48],
        "repeat the last 24": windows[:, 24:36],
        "mean of the lookback": windows[:, :48].mean(1, keepdims=True),
    }
    for name, guess in guesses.items():
        error = windows[:, 48:] - guess
        assert scores[name] == pytest.approx({"mse": (error**2).mean(), "mae": np.abs(error).mean()}, rel=1e-6)
    ahead = small_chat.model.forecast([torch.from_numpy(w[:48]) for w in windows], scale=1.0).numpy()
    assert scores["mse"] == pytest.approx(np.mean((windows[:, 48:] - ahead) ** 2), rel=1e-4)
    short = csv(tmp_path / "short.csv", "a", [1, 2] * 10)
    assert "too few" in refusal(sample.main, [f"--out_dir={tmp_path / 'x.pt'}", f"--eval={short}"])


def test_naive_forecasts_of_etth1():
    """Against the published mean squared errors."""
    table = REPO.parent / "shared/data/ett/ETTh1.csv"
    if not table.exists():
        pytest.skip("ETTh1.csv is not at hand")
    forecast = Mock(side_effect=lambda x, scale: x[:, -1:].expand(-1, 96))
    naive = SimpleNamespace(config=Config(), encoder={"series"}, forecast=forecast)
    scores = data_scores.benchmark(naive, str(table), 1024)
    published = {"repeat the last point": 1.2944, "repeat the last 24": 0.5122, "mean of the lookback": 0.7217}
    assert {name: round(scores[name]["mse"], 4) for name in published} == published
    assert scores["windows"] == 7 * 2785


COMMANDS = [
    (dict(text="a"), ["--raw", "--temperature=0.8"]),
    (dict(target=[1, 2]), ["--series=NUMBERS.csv"]),
    (talk("<audio>", "a", audio="y z.wav"), ["--audio=x/y z.wav"]),
    (talk("<series>\nUp?", "a", series=[1, 2]), ["--series=NUMBERS.csv", "--prompt=Up?"]),
    (
        talk("<image> and <audio><image>: what's that?", "a", "<image>?", "b", image=["1", "2", "3"], audio="a"),
        ["--image=x/1,x/2", "--audio=x/a", "--prompt=<image> and <audio><image>: what's that?"],
    ),
]


@pytest.mark.parametrize("record, flags", COMMANDS)
def test_sample_command(record, flags):
    """Against what a shell makes of it."""
    record = dict(record, _folder=os.path.join(os.getcwd(), "x"))
    assert shlex.split(data_scores.sample_command(record)) == flags


def test_a_language_model_is_given_the_encoder_of_the_presets(trained, counting, tmp_path, monkeypatch):
    """Against the presets; the encoder of a model that sees already stays as it is."""
    flags = "--image_height=16 --patch_height=16 --conv_kernel=0 --prompt_style=last --n_layer=7"
    monkeypatch.setattr(train, "presets", lambda data: flags)
    save(tmp_path / "lm.pt", ModRWKV(Config(n_layer=1, n_embd=64, image_encoder="none")))
    own = "--n_layer=1", "--head_size=64", "--conv_kernel=2", "--max_steps=1"
    learn(tmp_path / "blind", counting, f"--init_from={tmp_path / 'lm.pt'}", *own)
    config = dict(n_layer=1, n_embd=64, image_height=16, patch_height=16, conv_kernel=2, prompt_style="last")
    assert load(tmp_path / "blind").config == dataclasses.replace(Config(), **config)
    learn(tmp_path / "seeing", counting, f"--init_from={trained[0]}", "--n_layer=2", "--head_size=32", "--max_steps=1")
    assert load(tmp_path / "seeing").config == trained[2].config


PHASES = [
    ("--phase=adapter", ("blocks.", "emb.", "ln_out.", "head.")),
    ("--phase=all", ("none",)),
    ("--phase=all --freeze=emb,blocks.0 --decay_lr=1", ("emb.", "blocks.0.")),
]


@pytest.mark.parametrize("flags, frozen", PHASES)
def test_phases(flags, frozen, counting, trained, tmp_path):
    """Which tensors a phase changes; the first loss is that of the model it starts from, on the first batch."""
    more = f"--init_from={trained[0] / 'ckpt.pt'}", "--schedule=constant", "--warmup_steps=0", "--max_steps=3"
    learn(tmp_path, counting, *more, *flags.split())
    before, after = kept(trained[0]), kept(tmp_path)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in after if name.startswith(frozen)}
    [first] = train.Batches(read_records(counting[0]), train.Train(batch_size=8), trained[2])[0]
    assert column(tmp_path, "loss")[0] == pytest.approx(trained[2].loss(first).item(), rel=1e-5)
    rates = {group["lr"] for group in kept(tmp_path, "optimizer")["param_groups"]}
    assert len(rates) == 1 + ("decay_lr" not in flags)  # the decays' is another one by default


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
    (tmp_path / "data/shakespeare").mkdir(parents=True)
    for path in (*REPO.glob("*.py"), *REPO.glob("*.cu"), *REPO.glob("data/*.py"), REPO / "data/shakespeare/prepare.py"):
        shutil.copy(path, tmp_path / path.relative_to(REPO))
    (tmp_path / "data/shakespeare/tinyshakespeare.txt").write_text(play, encoding="utf-8")  # so nothing is downloaded
    flags = "--data=shakespeare --out_dir=plays --max_steps=30 --ctx_len=32 --warmup_steps=5 --learning_rate=5e-3"
    result = run(["train.py", *TINY, *flags.split()], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, last = (r["text"] for r in everything(tmp_path / "data/shakespeare"))
    assert first + last == play and len(first) == int(0.9 * len(play))
    curve = column(tmp_path / "plays", "loss")
    assert len(curve) == 30 and sum(curve[-5:]) < 0.7 * sum(curve[:5])
    assert not [name for name in kept(tmp_path / "plays") if name.startswith(("encoder.", "adapter."))]
    assert "1 records to learn from" in result.stdout and " 1 held out" in result.stdout
    command = shlex.split(result.stdout.splitlines()[-1])
    assert command == ["python", "sample.py", "--out_dir=plays", "--raw", "--temperature=0.8"]
    went_on = run([*command[1:-1], "--prompt=ROMEO:\nLine", "--max_new_tokens=40"], cwd=tmp_path)
    prompt = ("text", get_tokenizer("bytes").encode("ROMEO:\nLine"))
    pieces, _ = answer(load(tmp_path / "plays"), [prompt], max_new_tokens=40, end=None)
    assert went_on.stdout == "ROMEO:\nLine" + "".join(pieces) + "\n"


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
    command, log = [sys.executable, str(REPO / "train.py"), *flags, f"--out_dir={out}"], out / "log.jsonl"
    # what a shell starts in the background ignores SIGINT
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=ENV, preexec_fn=heed, **pipes) as process:
        while process.poll() is None and not (log.exists() and f'"step": {step},' in log.read_text()):
            time.sleep(0.002)
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


@pytest.mark.parametrize("early", [True, False])
def test_interrupted_killed_and_resumed(early, whole, tmp_path):
    """Against the uninterrupted run: before the first checkpoint it begins afresh, and what the log said is forgotten;
    later on it goes on, though a kill tore a line of the log and left half a checkpoint."""
    out, every = tmp_path / "out", "--save_interval=25" if early else "--save_interval=5"
    words = stop_at(3 if early else 7, signal.SIGINT, out, *whole[1], every)
    assert "Traceback" not in words
    if early:
        assert "--resume" not in words  # no advice that cannot be followed
        assert str(out / "ckpt.pt") in refusal(train.main, ["--resume", f"--out_dir={out}"])
        said(train.main, *whole[1], f"--out_dir={out}", every)
    else:
        assert f"--out_dir={out} --resume" in words
        stop_at(18, signal.SIGKILL, out, "--resume")
        with open(out / "log.jsonl", "a") as f:
            f.write('{"step": 5, "lo')
        (out / "ckpt.pt.partial").write_bytes(b"half a checkpoint")
        assert re.search(r"from step (15|20|25)\b", said(train.main, "--resume", f"--out_dir={out}"))
    assert_same_run(out, whole[0])
    assert list(contents(out)) == ["ckpt.pt", "log.jsonl", "loss.png"]


def test_resume_scores_again_and_goes_on_with_the_same_settings(whole, tmp_path):
    """Killed while it was scored a run is scored; it refuses another model, and takes more steps. Its learning rate
    follows wsd's formula: as the log says it, and as the optimizer's last step was made."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    assert "n_embd=64" in refusal(train.main, ["--resume", f"--out_dir={out}", "--n_embd=128"])
    assert contents(out) == contents(whole[0])
    *steps, _ = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(steps) + '{"step": 30, "val')
    said(train.main, "--resume", f"--out_dir={out}")
    assert_same_run(out, whole[0])
    peak, final = 2e-3, 1e-4
    rates = [peak * n / 5 for n in range(1, 6)] + [peak] * 10
    rates += [final + (peak - final) * (1 - n / 15) for n in range(1, 16)]
    assert column(out, "lr") == pytest.approx(rates, rel=1e-9)
    rates = [group["lr"] for group in kept(out, "optimizer")["param_groups"]]
    assert rates == pytest.approx([final, 2 * final, final, final], rel=1e-9)
    assert "30 steps" in refusal(train.main, ["--resume", f"--out_dir={out}"])
    said(train.main, "--resume", f"--out_dir={out}", "--max_steps=33")
    assert column(out, "loss")[:30] == column(whole[0], "loss") and len(column(out, "loss")) == 33
    old, new = kept(whole[0], "train"), kept(out, "train")
    assert {key for key in old if old[key] != new[key]} == {"resume", "out_dir", "max_steps"}


def test_disk_full(counting, tmp_path):
    """Much as it is when a file may hold so many bytes only (Python ignores SIGXFSZ); one line on stderr, no traceback,
    as of sample.py."""
    out = tmp_path / "out"

    def complaint(*command, **how):
        result = run(command, cwd=tmp_path, **how)
        *_, last = result.stderr.splitlines()
        assert result.returncode != 0 and "Traceback" not in result.stderr and result.stderr.count("error: ") == 1
        assert last.startswith("error: "), result.stderr
        return last

    def limited(size, *flags):
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        return complaint(REPO / "train.py", "--num_workers=0", *flags, preexec_fn=limit)

    learn(out, counting, "--max_steps=2")
    before = contents(out)["ckpt.pt"]
    message = limited(200_000, "--resume", "--max_steps=4")
    assert "ckpt.pt" in message and re.search("disk|space|large", message)
    assert contents(out)["ckpt.pt"] == before and len(before) > 500_000 and not list(out.glob("*.partial"))
    said(train.main, "--resume", "--max_steps=3", f"--out_dir={out}")  # with room again it goes on
    assert len(column(out, "loss")) == 3
    data = f"--data={counting[0]}", f"--val_data={counting[1]}"
    assert "log.jsonl" in limited(100, *TINY, *data, "--out_dir=other")
    assert "nowhere" in complaint(REPO / "sample.py", "--out_dir=nowhere", "--prompt=Hi")


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


def two_processes(out, data, *flags):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", REPO / "train.py")
    data = f"--data={data[0]}", f"--val_data={data[1]}", f"--out_dir={out}"
    result = run([*torchrun, *TINY, "--grad_accum=2", *flags, *data], cwd=out.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes") == result.stdout.count("held-out loss") == 1  # one process speaks


def micro_batches(path, rank, world, grad_accum):
    settings = train.Train(batch_size=16, grad_accum=grad_accum)
    b = train.Batches(read_records(path), settings, ModRWKV(Config(n_layer=1, n_embd=64)), rank, world)
    return [b[step] for step in range(12)]


def test_micro_batches_are_unequal(unequal):
    """So that a mean of their means would be another loss, and processes need each other's gradients."""
    path = unequal[1][0]
    counts = [[len(batch.n_targets) for batch in micro] for micro in micro_batches(path, 0, 1, 4)]
    assert max(max(c) / min(c) for c in counts) > 3
    seen = [[["image" in b.media for b in micro] for micro in micro_batches(path, rank, 2, 2)] for rank in (0, 1)]
    assert any(a[-1] != b[-1] for a, b in zip(*seen))  # one process without a picture while the other has some
    assert [True, False] in seen[0] + seen[1]  # and pictures that only a micro-batch before the exchange has seen


@pytest.mark.parametrize("how", ["--grad_accum=4", "--shard=False", "--shard"])
def test_micro_batches_and_two_processes_change_nothing(how, unequal, tmp_path):
    """Against one batch, tensor by tensor, whether each process has all the weights or its part of them."""
    one, data, flags, _ = unequal
    train_in_parts = learn if "grad_accum" in how else two_processes
    train_in_parts(tmp_path / "two", data, *flags, how)
    assert column(tmp_path / "two", "tokens") == column(one, "tokens")
    for key, tolerance in dict(loss={"abs": 1e-5}, val_loss={"abs": 1e-5}, grad_norm={"rel": 1e-4}).items():
        want = column(one, key)
        assert want and column(tmp_path / "two", key) == pytest.approx(want, **tolerance)
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


FAILURES = [(calls, torch.OutOfMemoryError("CUDA out of memory")) for calls in (0, 4)]
FAILURES += [(1, RuntimeError("DefaultCPUAllocator: can't allocate memory"))]


@pytest.mark.parametrize("calls, error", FAILURES)
def test_running_out_of_memory_is_one_sentence(calls, error, counting, tmp_path, monkeypatch):
    """In the trial, the first step and a later one: as torch raises it on a GPU, and as the CPU's allocator does."""
    loss, left = ModRWKV.loss, iter(range(calls))

    def fails(*args, **more):
        if next(left, None) is None:
            raise error
        return loss(*args, **more)

    monkeypatch.setattr(ModRWKV, "loss", fails)
    message = refusal(learn, tmp_path, counting, "--max_steps=9")
    assert all(flag in message for flag in ("--grad_accum", "--batch_size", "--checkpoint_activations", "--shard"))


@pytest.mark.parametrize("flag, size", [("--eval_batch_size=0", 2), ("--eval_batch_size=3", 3)])
def test_evaluation_takes_micro_batches_of_the_training(flag, size, counting, tmp_path, monkeypatch):
    """Counted where samples become batches, of the loss and of generation alike; autocast is the training's."""
    sizes, dtypes = set(), set()
    collate, backbone = ModRWKV.collate, ModRWKV.backbone

    def collated(model, samples):
        sizes.update([len(samples)] if isinstance(samples, list) and not model.training else [])
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
    batches = train.Batches(read_records(counting[0]), train.Train(batch_size=8), load(tmp_path / "0"))
    copied = pickle.loads(ForkingPickler.dumps(batches))  # as where processes are spawned, not forked
    assert torch.equal(copied[3][0].rows, batches[3][0].rows) and torch.equal(copied[3][0].ids, batches[3][0].ids)
    bad = jsonl(tmp_path / "bad.jsonl", talk("<image>?", "a", image="gone.png"), talk("?", "a"))
    message = refusal(learn, tmp_path / "bad", (bad, counting[1]), "--max_steps=9", "--num_workers=2")
    assert "bad.jsonl, line 1" in message and "gone.png" in message


@pytest.mark.parametrize("muon", [False, True])
def test_what_was_never_trained_has_no_moments_after_resuming(muon):
    """Against the names before: AdamW counts a parameter's steps, so that a state too many is another first step."""

    def new():
        model = ModRWKV(Config(n_layer=1, n_embd=32, head_size=16))
        groups = modrwkv.parameter_groups(model, 0.1, muon=muon)
        optimizers = [torch.optim.AdamW(groups[:3])]
        optimizers += [torch.optim.Muon([group], adjust_lr_fn="match_rms_adamw") for group in groups[3:]]
        return model, optimizers

    def with_moments(model, optimizers):
        found = set().union(*(optimizer.state for optimizer in optimizers))
        return {name for name, p in model.named_parameters() if p in found}

    model, optimizers = new()
    model.loss([[("answer", codes("text"))]]).backward()
    for optimizer in optimizers:
        optimizer.step()
    saved = train.state_dicts.get_optimizer_state_dict(model, optimizers, options=train.WHOLE)
    other, resumed = new()
    train.load_optimizer_state(other, resumed, saved)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_moments(other, resumed) == with_moments(model, optimizers) == trained
    for p, q in zip(model.parameters(), other.parameters()):
        for before, after in zip(optimizers, resumed):
            for key, x in before.state[p].items() if p in before.state else ():
                assert torch.equal(torch.as_tensor(x), torch.as_tensor(after.state[q][key]))
    assert trained and not any("image" in name for name in trained)


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
    """Against the same flags on a command line, however the folder is spelled; --help shows a run's own values."""
    for name, preset in data_records.PRESETS.items():
        want = flags("", train.Train, Config, argv=[*preset.split(), f"--data={name}", "--n_layer=9"])
        got = flags("", train.Train, Config, argv=[f"--data={name}", "--n_layer=9"], presets=train.presets)
        assert got[:2] == want[:2] and got[2] == {"data", "n_layer"}
    folder = REPO / "data" / "shapes"
    spelled = {train.presets(name) for name in (str(folder), f"{folder}/", os.path.relpath(folder))}
    assert spelled == {data_records.PRESETS["shapes"]} and train.presets("mine.jsonl") == ""
    for more in (["--data=shapes"], ["--data=digits,shapes", "--n_layer=3"], ["--data=spoken_digits,shapes"]):
        with pytest.raises(SystemExit):
            train.main([*more, "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert "optimizer steps [4000]" in words and "each so many steps; 0: all at once [100]" in words
    s, config, _ = flags("", train.Train, Config, argv=["--data=shapes"], presets=train.presets)
    assert (s.max_steps, config.prompt_style) == (4000, "last")
    words = learn(tmp_path, counting, "--max_steps=1")
    [line] = [line for line in words.splitlines() if line.startswith("settings: ")]
    assert "--n_embd=64" in line and "--max_steps=1" in line and "--seed" not in line


def test_records_held_out_by_default(tmp_path):
    """Every twentieth record; the last twentieth of a text, on which a model without encoders trains."""
    records, val = data_records.read_data([jsonl(tmp_path / "a.jsonl", *({"text": f"{i}"} for i in range(21)))], [])
    assert len(records) == 19 and [record["text"] for record in val] == ["0", "20"]
    text = "".join(f"{i} is a number. " for i in range(200))
    path = tmp_path / "my.txt"
    path.write_text(text)
    records, val = data_records.read_data([str(path)], [])
    assert records[0]["text"] + val[0]["text"] == text and len(val[0]["text"]) == len(text) // 20
    words = said(train.main, *TINY, f"--data={path}", "--max_steps=2", f"--out_dir={tmp_path / 'out'}")
    assert "1 records to learn from" in words and " 1 held out" in words and "--raw" in words
    model = load(tmp_path / "out")
    assert len(model.encoder) == 0 and model.config.image_encoder == "none"


# ------------------------------------------------------------ sample.py


def test_score():
    """Against counts by hand. Of 7 words one is substituted, one missing, one too many; of 25 characters 7."""
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
    pairs = [("Four zero, seven!", "four zero seven"), ("one too", "one two three"), ("a b", "b"), ("anything", "...")]
    counts = {"substitutions": 1, "deletions": 1, "insertions": 1}
    assert data_scores.errors(pairs) == {"wer": 3 / 7, "cer": pytest.approx(7 / 25), **counts}
    assert data_scores.errors([("x", "?!")])["wer"] == 1 and data_scores.errors([("a", "!")]) == {}
    record = talk("<audio>", "one two three", audio="x.wav", task="speech")
    scores = data_scores.score([record, talk("q", "a", task="other")], ["one too", "a"])
    assert scores["tasks"]["speech"]["wer"] == 2 / 3 and "wer" not in scores["tasks"]["other"]


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
    assert len(set(answers)) > 2 and ask(model, records, 7, **sampling) == answers
    assert (ask(model, records, 7, **sampling | {"seed": 4}) != answers) == ("seed" in sampling)
    flags = [f"--{k}={v}" for k, v in sampling.items()]
    printed = said(sample.main, f"--out_dir={out}", f"--eval={counting[0]}", "--batch_size=7", *flags)
    assert json.loads(printed.splitlines()[-1]) == data_scores.score(records, answers)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("raw", [False, True])
def test_chat_answers_as_the_command_line_does(raw, sampling, trained, counting, monkeypatch):
    """Against the tokens of model.generate, decoded here; each piece is on the screen before the next is made."""
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
    screen, flushed = io.StringIO(), set()
    monkeypatch.setattr(screen, "flush", lambda: flushed.add(screen.getvalue()))
    with contextlib.redirect_stdout(screen):
        sample.main([f"--out_dir={out}", f"--prompt={prompt}", *flags])
    assert screen.getvalue() == prompt * raw + want + "\n" and len(flushed) >= len(pieces)


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
    for more, typed, want in sessions:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert said(sample.main, *line, "--chat", *more).endswith(want)
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
        ("image", [stored(picture.quantize(16), tmp_path / "palette.png"), picture.quantize(16)]),
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
    assert "--plot=x.jpg" in refusal(data_scores.draw_forecasts, "x.jpg", {}, 48)


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
    contents["config"]["image_encoder"] = "not/here"
    torch.save({"model": contents["model"], "config": contents["config"]}, tmp_path / "x.pt")
    flags = "--info", "--template=v3", "--audio_encoder=mel", "--prompt_style=last"
    first, _, changed, _ = said(sample.main, f"--out_dir={tmp_path / 'x.pt'}", *flags).splitlines()
    assert first.endswith("takes text, image, audio") and "--template=v3 --prompt_style=last" in changed
    assert "--image_encoder=not/here --audio_encoder=mel" in changed
    path, _ = released("WorldRWKV, pictures", tmp_path / "x.pth")
    lines = said(sample.main, f"--out_dir={path}", "--info").splitlines()
    assert lines[0].endswith("takes text, image") and "--image_encoder=siglip" in lines[2] and len(lines) == 4


# ------------------------------------------------------------ what the user gets wrong


CUT = stored(noise(40, 40), io.BytesIO(), format="PNG").getvalue()[:2000]


UNREADABLE = [
    (read_records, "x.jsonl", [b"", b"\n\n", b'{"text": "\xff"}\n']),
    (read_records, "x.json", [b"[]", b"{}", b"[{"]),
    (get_tokenizer, "vocabulary", [b"\x80\x02\xff" * 100]),
    (functools.partial(load_media, WHOLE), "x.png", [b"", b"no picture", CUT]),
    (load, "x.pt", [b"", b"no checkpoint"]),
]


@pytest.mark.parametrize("reader, name, contents", UNREADABLE)
def test_files_that_cannot_be_read(reader, name, contents, tmp_path):
    """One sentence that names the file; a folder and a file that is missing, too."""
    path = tmp_path / name
    assert str(path) in refusal(reader, str(path)) and str(tmp_path) in refusal(reader, str(tmp_path))
    for content in contents:
        path.write_bytes(content)
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
    path = jsonl(tmp_path / "bad.jsonl", good, good, bad if "." in name else {"id": 1}, good)
    trains = [*TINY, f"--data={path}", f"--val_data={odd / 'texts.jsonl'}", f"--out_dir={tmp_path}"]
    asks = [f"--out_dir={trained[0]}", f"--eval={path}", "--max_new_tokens=3"]
    for message in (refusal(train.main, trains), refusal(sample.main, asks)):
        assert f"{path}, line 3" in message and (name in message or name == "no record")
    assert not (tmp_path / "ckpt.pt").exists()


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
    assert small_chat.state is state
    del pieces
    assert small_chat.state is state  # it was not given to its end
    monkeypatch.setattr(modrwkv, "sample_token", Mock(side_effect=[torch.tensor(66), torch.tensor(67), MemoryError]))
    with pytest.raises(MemoryError):
        small_chat.ask("What?")
    assert small_chat.state is state
    deaf = sample.Chat(trained[0], device="cpu")
    for sound in (np.zeros(999, np.float32), "x.wav"):
        assert "no audio encoder" in refusal(deaf.ask, "What?", audio=sound)
    assert "series encoder" in refusal(deaf.forecast, [1.0, 2.0])
    assert "nowhere" in refusal(sample.Chat, "nowhere") and "ckpt.pt" in refusal(sample.Chat, ".")
    assert "foo" in refusal(sample.Chat, trained[0], device="foo")


# ------------------------------------------------------------ a pretend GPU
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
        name, kwargs, inputs = operation.__name__.split(".")[0], dict(kwargs or {}), []
        each(inputs.append, (args, kwargs))
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        mine = [x for x in tensors if isinstance(x, GpuTensor)]
        on_cpu = [x for x in tensors if x.device.type == "cpu"]
        here = bool(mine)
        if kwargs.get("device"):
            here = self.is_here(torch.device(kwargs["device"]))
            kwargs["device"] = torch.device("cpu") if here else kwargs["device"]
        self.count(name, args, kwargs, tensors, here)
        indices = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        wrong = [x for x in on_cpu if x.dim() and not any(x is index for index in indices)]
        if wrong and mine and name not in ("copy_", "_to_copy"):  # single numbers and indices may be on the CPU
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {wrong[0].shape}")
        if here and any(isinstance(x, torch._C.Generator) and x._cdata not in self.generators for x in inputs):
            raise RuntimeError(f"{name}: Expected a '{self.kind}' device type for generator but found 'cpu'")
        if name == "_fused_sdp_choice":
            return 0  # attention by plain operations: what the CPU would choose is for CPU tensors
        known, dtype = {id(x.numbers): x for x in mine}, self.cast(name, tensors)

        def unwrap(x):
            x = x.numbers if isinstance(x, GpuTensor) else x
            return x.to(dtype) if dtype and isinstance(x, torch.Tensor) and x.is_floating_point() else x

        def wrap(x):
            if not isinstance(x, torch.Tensor) or id(x) in known:  # what is changed in place stays the same tensor
                return known.get(id(x), x)
            if self.kind == "mps" and x.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return GpuTensor(self, x)

        made = operation(*each(unwrap, args), **each(unwrap, kwargs))
        return each(wrap, made) if here else made

    def is_here(self, device):
        """What torch itself makes beside a GpuTensor, it makes on meta:0."""
        if device.type == self.kind and device.index:
            raise RuntimeError(f"{device}: invalid device ordinal")
        return device.type == self.kind or device == torch.device("meta", 0)

    def count(self, name, args, kwargs, tensors, here):
        """Counts what the host waits for: copies, results that it needs, and masks, whose sums it needs."""
        mine = any(isinstance(x, GpuTensor) for x in tensors)
        on_cpu = [x for x in tensors if x.device.type == "cpu"]
        if name in ("copy_", "_to_copy"):
            up = isinstance(args[0], GpuTensor) if name == "copy_" else here
            if up and on_cpu and not kwargs.get("non_blocking", args[2:] == (True,)):
                self.waits["copy to the GPU"] += 1
            if mine and not up:
                self.waits["copy to the CPU"] += 1
        elif mine and name in WAITS:
            self.waits[name] += 1
        elif mine and name.startswith("index"):
            self.waits["mask"] += sum(x.dtype == torch.bool for x in tensors[1:])
            self.waits["copy to the GPU"] += sum(x.dim() > 0 for x in on_cpu)

    def cast(self, name, tensors):
        """The dtype of an operation, where not its inputs'. In a backward pass what was saved was not yet cast."""
        floats = {x.dtype for x in tensors if x.is_floating_point()}
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
CUDA |= dict(get_device_name="pretend", mem_get_info=(2**34, 2**34), max_memory_allocated=2**30)
CUDA |= dict.fromkeys("memory_reserved memory_allocated".split(), 0)
CUDA |= dict.fromkeys("_lazy_init synchronize empty_cache reset_peak_memory_stats manual_seed_all".split())


def forget_kernels():
    """What was compiled is looked for again, and what is missing is said again."""
    modrwkv.kernel.cache_clear()
    modrwkv.WARNED.clear()


@contextlib.contextmanager
def pretend_gpu(kind="cuda", kernel=True, capability=(8, 0)):
    """Inside there is a GPU, for threads and libraries, too. kernel: whether kernel.cu can be compiled for it."""
    if kind == "cpu":  # there is one already
        yield
        return
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
    """As torch does on CUDA, and float64 on mps; single numbers and indices from the CPU are taken. It is gone then."""

    def patched():
        return torch.cuda.is_available, torch.Tensor.to, torch.Generator, F.conv1d, modrwkv.compile_for_gpu

    before, on_cpu, first = patched(), torch.ones(3), torch.tensor([0, 1])
    with pretend_gpu():
        x = torch.ones(3, device="cuda")
        assert (x.device, x.is_cuda, x.cpu().is_cuda) == (torch.device("cuda:0"), True, False)
        assert (x + torch.tensor(2.0))[first].tolist() == [3, 3]
        for error, wrong in (
            (RuntimeError, lambda: x + on_cpu),
            (RuntimeError, lambda: torch.cat([x, on_cpu])),
            (RuntimeError, lambda: on_cpu.mul_(x)),
            (RuntimeError, lambda: on_cpu[x.long()]),
            (RuntimeError, lambda: x.index_put_((first,), on_cpu[:2])),
            (RuntimeError, lambda: torch.multinomial(x, 1, generator=torch.Generator())),
            (RuntimeError, lambda: torch.empty(1, device="cuda:1")),
            (ValueError, lambda: torch.cuda.set_device(torch.device("cuda"))),
            (TypeError, lambda: x.numpy()),
        ):
            with pytest.raises(error, match="same device|device type|ordinal|index|numpy"):
                wrong()
    with pretend_gpu("mps"), pytest.raises(TypeError, match="float64"):
        torch.ones(3, device="mps").double()
    assert before == patched()


def test_the_pretend_gpu_casts_and_waits_as_cuda():
    """As torch lists it: under autocast products in bfloat16, norms, softmax and sums in float32, gradients too; and
    the waits that torch.cuda.set_sync_debug_mode warns of."""
    net = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    with pretend_gpu() as gpu:
        net.to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            half = net(torch.ones(2, 4, device="cuda"))
            full = net[1](half.repeat(1, 2)), half.softmax(-1), half.sum(), half.exp()
            with torch.autocast("cuda", enabled=False):
                full += (net[2].weight @ net[2].weight.mT,)
        half.sum().backward()
        assert half.dtype == torch.bfloat16
        assert {x.dtype for x in full} | {p.grad.dtype for p in net.parameters()} == {torch.float32}
        with pytest.raises(RuntimeError, match="dtype"):
            half @ net[2].weight
        gpu.waits.clear()
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


def train_on(device, out, kind, *flags):
    """Trains SHORTly on a kind of data of `senses`; returns what was said, and the curves."""
    data = f"--device={device}", f"--out_dir={out}", f"--data={kind}.jsonl", f"--val_data={kind}.jsonl"
    words = said(train.main, *SHORT, *data, *flags)
    return words, {key: column(out, key) for key in ("loss", "grad_norm", "val_loss")}


ON_A_GPU = [
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
]


@PINNED
@pytest.mark.parametrize("device, kind, encoder, flags", ON_A_GPU)
def test_a_gpu_trains_and_answers_as_the_cpu_does(device, kind, encoder, flags, senses, folders, tmp_path, monkeypatch):
    """Score, checkpoint, --resume, a prompt or a forecast, --eval and --chat, against the CPU's. In bfloat16 within
    what its rounding does to three steps, as a GPU does not round where a CPU does."""
    for name, value in dict(width=16, PATCH=4, LAYERS=2, HEADS=2, HIDDEN=24).items():
        monkeypatch.setattr(Timer, name, value)
    write_file("timer.safetensors", randomise(Timer(Config()), 5).state_dict())
    encoder = folders(encoder) if encoder in modrwkv.FAMILIES else encoder
    if kind != "text":
        flags += f" --{kind}_encoder={encoder}"
    prompt, told, file = ASKED[kind]
    curves, printed = [], []
    for place in ("cpu", device):
        with pretend_gpu(place):
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


WITHOUT_KERNEL = [
    ("cpu", {}, "", "there is no C++ compiler; install g++ or clang++"),
    ("cpu", {"g++": "exit 1"}, "", "cannot compile kernel.cu"),
    ("cuda", {}, "", "there is no nvcc; pip install"),
    ("cuda", {"nvcc": "exit 1"}, "", "nvcc cannot compile kernel.cu"),
    ("mps", {}, "", "not for mps"),
    ("cpu", None, "--head_size=48 --n_embd=48", "head sizes 16, 32, 64 and 128 alone"),
    ("cpu", None, "--head_size=8", "head sizes 16, 32, 64 and 128 alone"),
    ("cuda", None, "--head_size=8", "head sizes 16, 32, 64 and 128 alone"),
]


@PINNED
@pytest.mark.parametrize("device, programs, flags, reason", WITHOUT_KERNEL)
def test_training_without_the_kernel(device, programs, flags, reason, senses, tmp_path, monkeypatch, capsys):
    """In one line, once; against the CPU with what it has. programs: shell scripts, all that PATH holds."""
    _, want = train_on("cpu", tmp_path / "cpu", "text", *flags.split())
    if programs is not None:
        for name, script in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        for name, value in dict(PATH=tmp_path, XDG_CACHE_HOME=tmp_path, CUDA_HOME=tmp_path, CXX="").items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setitem(sys.modules, "nvidia", None)  # where pip puts another nvcc
    forget_kernels()
    capsys.readouterr()
    with pretend_gpu(device, kernel=programs is None):
        _, slow = train_on(device, tmp_path / "slow", "text", *flags.split())
    forget_kernels()
    [slower] = [line for line in capsys.readouterr().err.splitlines() if "several times slower" in line]
    assert reason in slower
    for key in want:
        assert slow[key] == pytest.approx(want[key], rel=1e-4)
    assert slow["loss"][1] < slow["loss"][0]


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


# ------------------------------------------------------------ asking: pieces, precision, speed, states


@trials(12)
@given(st.sampled_from([5, 6, 7]), st.sampled_from(["uni", "bi", "multi"]), PLANS, SEEDS, st.integers(1, 40))
@example(7, "bi", [[("image", 5), ("text", 9), ("image", 12), ("text", 30)], [("text", 1)]], 0, 4)
@torch.no_grad()
def test_reading_in_pieces(rwkv, scan, plans, seed, piece):
    """A ragged batch after a state, in pieces of any size, against one pass over each sample; pictures stay whole."""
    model = scanner(rwkv, scan, 3)
    samples = [make_sample(plan, seed + i) for i, plan in enumerate(plans)]
    before = [("text", codes("before"))]
    _, state = model.read([before])
    sizes, backbone = [], model.backbone
    with pytest.MonkeyPatch.context() as m:
        m.setattr(modrwkv, "PIECE", piece)
        m.setattr(model, "backbone", lambda x, *more: sizes.append(x.shape[1]) or backbone(x, *more))
        hidden, states = model.read(samples, state)
    assert sum(sizes) == max(map(model.length, samples))
    longest = max([model.length([x]) for x in itertools.chain(*samples) if x[0] == "image"], default=1)
    if scan == "uni":
        assert max(sizes) <= piece
    elif len(samples) == 1:
        assert max(sizes) <= max(piece, longest)
    for i, segments in enumerate(samples):
        logits, alone = model([before + segments])
        assert distance(model.head(hidden[i]), logits[0, -1]) < 1e-6
        assert_state_equal([[x[i : i + 1] for x in layer] for layer in states], alone)


@pytest.mark.parametrize("rwkv", [5, 6, 7])
@pytest.mark.parametrize("style", PROMPT_STYLES)
@torch.no_grad()
def test_three_ways_to_read(rwkv, style, monkeypatch):
    """In float32: a conversation whole, in pieces, and one token at a time behind its picture."""
    config = dataclasses.replace(SMALL, rwkv=rwkv, prompt_style=style, scan="bi", n_layer=3)
    model = randomise(ModRWKV(config, vocab_size=65536))  # "tagged" has tokens of RWKV World
    turns = [("<image>\nWhat is it?", "a cat"), ("Why?", None)]
    sample = conversation(config, turns, iter([picture(1, 40)]))
    logits, state = model([sample])
    monkeypatch.setattr(modrwkv, "PIECE", 8)
    hidden, in_pieces = model.read([sample])
    assert distance(model.head(hidden), logits[:, -1]) < 1e-4
    steps, one_by_one = None, None
    for kind, data in sample:
        for segment in [(kind, data)] if kind == "image" else [("text", [token]) for token in data]:
            steps, one_by_one = model.read([[segment]], one_by_one)
    assert distance(model.head(steps), logits[:, -1]) < 1e-4
    for states in (in_pieces, one_by_one):
        assert_state_equal(states, state, 1e-4)


@pytest.mark.parametrize("rwkv", [5, 6, 7])
@torch.no_grad()
def test_bfloat16_is_at_least_as_exact_as_the_official_package(official, official_before_7, tmp_path, rwkv):
    """Against float32 logits of the same file, at the median position; norms and decays stay in float32."""
    weights = official_weights(4, 128, rwkv=rwkv)
    torch.save({name: x.bfloat16() for name, x in weights.items()}, tmp_path / "x.pth")
    theirs = official[0] if rwkv == 7 else official_before_7
    tokens = torch.randint(300, (60,), generator=torch.Generator().manual_seed(7))
    exact = load(tmp_path / "x.pth", dtype=torch.float32)(tokens[None])[0][0]
    model = load(tmp_path / "x.pth")
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    sensitive = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert sensitive == {name for name in dtypes if re.search(r"(^|\.)ln(\d|_x|_out)\.|att\.(w0|time_decay)$", name)}
    assert dtypes["emb.weight"] == torch.bfloat16
    logits, state = model(tokens[None])
    assert logits.dtype == torch.bfloat16 and {S.dtype for _, S, _ in state} == {torch.float32}
    peer = theirs(str(tmp_path / "x"), "cpu bf16").forward(tokens.tolist(), None, full_output=True)[0]
    ours, peers = ((z.float() - exact).square().mean(-1).sqrt().median() for z in (logits[0], peer))
    assert 0 < ours <= peers


def test_dtype_of_a_checkpoint(tmp_path):
    """That of the file or the one that is asked for; a float32 file in bfloat16 is the file rounded."""
    model = randomise(ModRWKV(SMALL))
    save(tmp_path / "x.pt", model)
    for dtype, want in (("auto", torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)):
        loaded = load(tmp_path / "x.pt", dtype=dtype)
        for name, p in model.named_parameters():
            got = loaded.get_parameter(name)
            sensitive = re.match(r"(blocks\.\d+\.(att\.)?)?ln|.*att\.w0$", name)
            assert got.dtype == (torch.float32 if sensitive else want) and torch.equal(got, p.to(got.dtype))
    chat = sample.Chat(tmp_path / "x.pt", device="cpu", dtype="bfloat16")
    assert chat.model.emb.weight.dtype == torch.bfloat16 and isinstance(chat.ask("Hi", max_new_tokens=3), str)


@torch.inference_mode()
def test_faster_steps(model, monkeypatch):
    """Traced and compiled (in one graph, without breaks) against model.step, for other batches, too."""
    monkeypatch.setattr(modrwkv, "TRACE_AFTER", 2)
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **how: compile(f, backend="eager", **how))
    for step in (modrwkv.traced_step(model), modrwkv.compiled_step(model)):
        for B in (1, 1, 1, 3):
            _, state = model.read([[text("Hello, you")]] * B)
            tokens = torch.arange(B) + 40
            (x, new), (want, want_state) = step(tokens, state), model.step(tokens, state)
            assert distance(x, want) < 1e-6
            assert_state_equal(new, want_state)
    torch._dynamo.reset()


@torch.inference_mode()
def test_a_traced_step_is_one_call(model, monkeypatch):
    """After TRACE_AFTER steps no module of the model is called by Python."""
    monkeypatch.setattr(modrwkv, "TRACE_AFTER", 3)
    step, calls, (_, state) = modrwkv.traced_step(model), [], model.read([[text("Hi")]])
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(6):
        _, state = step(torch.tensor([40]), state)
    handle.remove()
    assert len(calls) == 3


@torch.no_grad()
def test_a_state_of_one_sample_serves_a_batch(model):
    """Against reading it again with each question; a state that does not fit is an error."""
    shared, questions = [picture(1, 4), text("hello")], [[text("a")], [text("bcd")], [text("ef")]]
    read, want = model.read([shared]), model.read([shared + question for question in questions])
    hidden, states = model.read(questions, read[1])
    assert distance(hidden, want[0]) < 1e-5
    assert_state_equal(states, want[1])
    assert "2 samples" in refusal(model.read, questions, [tuple(x[:2] for x in s) for s in states])
    assert "another model" in refusal(model.read, questions, states[:-1])
    assert "another model" in refusal(model, torch.tensor([[1]]), [(x, S[:, :1], y) for x, S, y in read[1]])


def test_several_answers(small_chat):
    """Each with random numbers of its own: the first is the one that is asked alone, the others follow its seed."""
    ask = functools.partial(small_chat.ask, "What?", max_new_tokens=12, temperature=1.0)
    alone = []
    for seed in (5, 6, 7):
        small_chat.reset()
        alone.append(ask(seed=seed))
    small_chat.reset()
    assert ask(seed=5, num_samples=3) == alone and len(set(alone)) == 3 and small_chat.state is None


def test_penalties_are_chatrwkvs(official):
    """Against PIPELINE.generate of the package `rwkv`, over a model of fixed logits."""
    from rwkv.utils import PIPELINE, PIPELINE_ARGS

    logits = torch.linspace(0, 1.5, 60)[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    pipeline = PIPELINE(SimpleNamespace(forward=lambda *_: (logits.clone(), None)), "rwkv_vocab_v20230424")
    pipeline.decode = lambda tokens: "x"  # it does not count spaces and digits of its vocabulary
    sample_logits = pipeline.sample_logits
    pipeline.sample_logits = lambda *more, **how: want.append(int(sample_logits(*more, **how))) or want[-1]
    model = ModRWKV(dataclasses.replace(SMALL, image_encoder="none"), vocab_size=60)
    model.ln_out.weight.data.zero_()
    model.ln_out.bias.data.fill_(1)
    model.head.weight.data = logits[:, None].expand(60, SMALL.n_embd) / SMALL.n_embd
    for presence, frequency, decay in ((0.4, 0.3, 0.9), (0, 0.5, 0.996), (0.5, 0, 1.0)):
        want, alphas = [], dict(alpha_presence=presence, alpha_frequency=frequency, alpha_decay=decay)
        pipeline.generate("x", 40, PIPELINE_ARGS(temperature=1, top_k=1, **alphas))
        how = dict(presence_penalty=presence, frequency_penalty=frequency, penalty_decay=decay, end=())
        assert [token for [token] in model.generate([[("text", [1])]], max_new_tokens=40, **how)] == want
        assert len(set(want)) > 5


@trials(200)
@given(st.text("ab", max_size=9), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
@example("aab", ["b", "aab"])
@example("aaab", ["aab", "aaa"])
def test_the_first_of_several_ends(written, ends):
    """Against str.find in the whole text, whatever is held back on the way."""
    tokens = codes(written)
    reply, pieces = Answer(get_tokenizer("bytes"), ends), []
    for i, token in enumerate(tokens):
        pieces.append(reply.add(token, i == len(tokens) - 1))
        if reply.ended:
            break
    shortest = next((n for n in range(len(written) + 1) if any(written[:n].endswith(end) for end in ends)), None)
    if shortest is None:
        assert "".join(pieces) == written and not reply.ended
    else:
        got = "".join(pieces)
        assert written[:shortest].startswith(got) and written[len(got) :].startswith(reply.ended)
        assert min(written[:shortest].find(end) for end in ends if end in written[:shortest]) == len(got)


def test_stop_texts(small_chat, monkeypatch):
    """An answer ends before any of them; the conversation goes on behind the template's own end."""
    small_chat.reset()
    script(monkeypatch, codes("a bc"))
    assert small_chat.ask("What?", stop=["x", "b"]) == "a "
    read = get_tokenizer("bytes").encode("User: What?\n\nAssistant:a b\n\n")
    assert_state_equal(small_chat.state, small_chat.model.read([[("text", read)]])[1], 1e-5)
    _, settings, given = flags("", sample.Sample, sample.Sampling, argv=["--stop=x", "--stop=b c"])
    assert settings.stop == ["x", "b c"] and given == {"stop"}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("style", ["written", "first", "before"])
def test_a_picture_is_read_once_and_asked_later(template, style, tmp_path):
    """By the flags, and for two questions, against asking with the picture each time."""
    save(tmp_path / "x.pt", randomise(ModRWKV(dataclasses.replace(SMALL, template=template, prompt_style=style))))
    image, state = stored(Image.fromarray(pixels(1, 20, 30)), tmp_path / "x.png"), tmp_path / "x.state"
    flags = [f"--checkpoint={tmp_path / 'x.pt'}", "--max_new_tokens=9", "--device=cpu"]
    assert said(sample.main, *flags, f"--image={image}", f"--save_state={state}") == ""
    for question in ("What is it?", "How many?"):
        want = said(sample.main, *flags, f"--image={image}", f"--prompt={question}")
        assert said(sample.main, *flags, f"--state={state}", f"--prompt={question}") == want != "\n"
    chat = sample.Chat(tmp_path / "x.pt", device="cpu")
    chat.load_state(state)
    assert "no more media" in refusal(chat.ask, "What?", image=image)
    assert "other weights" in refusal(sample.Chat(tmp_path / "x.pt", device="cpu", dtype="bfloat16").load_state, state)
    assert "no file of --save_state" in refusal(chat.load_state, tmp_path / "x.pt")
    chat.reset()
    assert "no conversation" in refusal(chat.save_state, state)
    assert "media" in refusal(chat.read, "a text alone")
    chat.model.config.prompt_style = "sandwich"
    assert "before the media" in refusal(chat.read, image=image)


def test_a_long_text_is_read_once_and_asked_later(small_chat, tmp_path):
    """Against reading the text and asking in one go."""
    small_chat.reset()
    small_chat.read("A long text.\n\n" * 9, raw=True)
    small_chat.save_state(tmp_path / "x.state")
    want = small_chat.ask("What?", max_new_tokens=9)
    small_chat.reset()
    small_chat.load_state(tmp_path / "x.state")
    assert small_chat.ask("What?", max_new_tokens=9) == want
    tokens = get_tokenizer("bytes").encode("A long text.\n\n" * 9 + "User: What?\n\nAssistant:")
    steps = generate_text(small_chat.model, [[("text", tokens)]], max_new_tokens=9)
    assert "".join(piece for [piece] in steps).lstrip() == want


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_records_are_read_once_for_all_their_questions(style, tmp_path, monkeypatch):
    """Answers against those of reading everything again for each turn; how often a picture is encoded is counted."""
    config = dataclasses.replace(SMALL, prompt_style=style)
    model = randomise(ModRWKV(config, vocab_size=65536))
    model.head.weight.data[257:] = 0  # beyond the vocabulary no token has a text
    image = stored(Image.fromarray(pixels(1, 20, 30)), tmp_path / "x.png")
    turns = ["<image>\nWhat?", "a", "Why?", "b", "How?", "c"]
    records = [talk(*turns[:n], image=str(image), _at="here") for n in (2, 6, 4)]
    records.insert(1, talk("Text?", "d", "More?", "e", _at="here"))
    want = []
    for record in records:
        for i, (question, _) in enumerate(record_turns(record)):
            asked = [*record_turns(record)[:i], (question, None)]
            segments = data_records.segments(model, asked, record_media(record))
            want.append("".join(answer(model, segments, max_new_tokens=6)[0]).strip())
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda batch: encoded.append(len(batch.media)) or encode(batch))
    for batch_size in (1, 4):
        encoded.clear()
        assert ask(model, records, batch_size, max_new_tokens=6) == want
        if style in ("written", "first", "before", "tagged"):
            assert sum(encoded) == (3 if batch_size == 1 else 1)
    assert len(set(want)) > 3


def test_chat_commands(trained, monkeypatch, tmp_path):
    """/retry, /reset and /save against Chat; an interrupted answer leaves the conversation as it was."""
    chat, line = sample.Chat(trained[0], device="cpu"), [f"--out_dir={trained[0]}", "--max_new_tokens=20", "--chat"]
    how = {"max_new_tokens": 20, "temperature": 1.5}
    first, second = (sample.Chat(trained[0], device="cpu").ask("How many?", seed=seed, **how) for seed in (1, 2))
    chat.ask("How many?", seed=2, **how)
    then = chat.ask("More?", seed=2, **how)
    typed = f"/retry\nHow many?\n/retry\nMore?\n/save {tmp_path / 'x.state'}\n/reset\n/save {tmp_path / 'y'}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    words = said(sample.main, *line, "--temperature=1.5").split("\n> ", 1)[1]
    assert words.startswith(f"> {first}\n> {second}\n> {then}\n> go on later with --state=")
    saved = sample.Chat(trained[0], device="cpu")
    saved.load_state(tmp_path / "x.state")
    assert_state_equal(saved.state, chat.state)
    assert not (tmp_path / "y").exists()
    asked, answers = [], sample.Chat.answer

    def interrupted(self, steps, begun):
        asked.append(self.state)
        pieces = answers(self, steps, begun)
        yield next(pieces)
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(sample.Chat, "answer", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("How many?\n/retry\n"))
    assert second in said(sample.main, *line, "--temperature=1.5") and asked == [None, None]


@pytest.mark.parametrize(
    "flag", ["temperature=-1", "temperature=nan", "temperature=inf", "top_p=1.5", "top_p=-0.1", "top_k=-1"]
)
def test_sampling_out_of_range(flag, small_chat):
    """By a flag and by Chat.ask: one sentence names it and its range."""
    name, value = flag.split("=")
    assert f"{name}=" in refusal(flags, "", sample.Sample, sample.Sampling, argv=[f"--{flag}"])
    assert f"{name}=" in refusal(small_chat.ask, "What?", **{name: float(value)})


def test_consoles_lose_nothing(trained, tmp_path):
    """A console in ASCII, and bytes that are no UTF-8 in a prompt, in a process of its own."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    flags = [f"--out_dir={trained[0]}", "--raw", "--max_new_tokens=2", b"--prompt=\xff\xe4\xb8\xad"]
    done = subprocess.run([sys.executable, REPO / "sample.py", *flags], env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"\\udcff\\u4e2d"), done.stderr


# ------------------------------------------------------------ checkpoints: out again, in parts, and found


SENSES = dict(n_layer=2, n_embd=64, head_size=64, conv_kernel=0, adapter_scale=2, tokenizer="bytes")


def modrwkv_of(folders, path, **settings):
    """A random model that sees, hears and reads series, stored at path in float32."""
    senses = dict(image_encoder=folders("siglip"), audio_encoder=folders("wavlm"), series_encoder="wavenet")
    model = randomise(ModRWKV(Config(**SENSES | senses | settings)))
    save(path, model)
    return model


@pytest.mark.parametrize("target", ["x.safetensors", "x.pt", "x"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
@torch.no_grad()
def test_a_whole_model_goes_out_and_loads_again(target, dtype, folders, tmp_path, capsys):
    """Its tensors as torch casts them, its settings, and logits about a picture and a sound."""
    model = modrwkv_of(folders, tmp_path / "ckpt.pt", template="v2", scan="bi")
    capsys.readouterr()
    flags = ["--layout=ours", *([f"--dtype={dtype}"] if dtype else [])]
    convert_main([str(tmp_path / "ckpt.pt"), str(tmp_path / target), *flags])
    assert capsys.readouterr() == ("", "")
    if target == "x":
        assert os.listdir(tmp_path / "x") == ["model.safetensors"]
    written, kind = read_checkpoint(tmp_path / target), getattr(torch, dtype or "float32")
    assert written["config"] == dataclasses.asdict(model.config)
    assert written["model"].keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        assert written["model"][name].dtype == kind and torch.equal(written["model"][name], x.to(kind))
    again = load(tmp_path / target, dtype=torch.float32)
    media = [("image", noise(40, 50)), ("audio", np.sin(np.arange(9000) / 9).astype(np.float32))]
    asked = [data_records.question(model, "What?", media)]
    limit = 1e-6 if kind == torch.float32 else 0.1
    assert again.config == model.config and distance(again(asked)[0], model(asked)[0]) < limit


def test_numbers_that_a_dtype_does_not_hold(tmp_path):
    """float16 ends at 65504; bfloat16 does not. NaN and infinity are what they were."""
    weights = official_weights(1, 64)
    weights["emb.weight"][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    torch.save(weights, tmp_path / "x.pth")
    convert(tmp_path / "x.pth", tmp_path / "a.pth", dtype=torch.float16)
    same = torch.load(tmp_path / "a.pth")["emb.weight"]
    assert torch.equal(same.nan_to_num(7.0), weights["emb.weight"].half().nan_to_num(7.0))
    weights["ln_out.weight"][5] = 70000
    torch.save(weights, tmp_path / "x.pth")
    message = refusal(convert, tmp_path / "x.pth", tmp_path / "b.pth", dtype=torch.float16)
    assert "ln_out.weight" in message and "float16" in message and not (tmp_path / "b.pth").exists()
    convert(tmp_path / "x.pth", tmp_path / "b.pth", dtype=torch.bfloat16)


def test_files_written_hold_no_more_than_their_tensors(tmp_path):
    """Of tensors that are views of one storage, as some files have them: a layer is no larger than its numbers."""
    weights = official_weights(1, 64)
    whole = torch.cat([x.flatten() for x in (*weights.values(), torch.zeros(2_000_000))])
    n = 0
    for name, x in weights.items():
        weights[name] = whole[n : n + x.numel()].view(x.shape)
        n += x.numel()
    torch.save(weights, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size > 8e6
    for target in ("a.pt", "a.pth", "a.safetensors"):
        convert(tmp_path / "x.pth", tmp_path / target)
        assert (tmp_path / target).stat().st_size < 4 * n + 2e4


@torch.no_grad()
def test_worldrwkv_layout(folders, tmp_path, capsys):
    """Names and tensors of August 2025 written out; what the file does not hold is said; what it cannot is refused."""
    own = dict(template="v3", prompt_style="tagged", tokenizer="rwkv_vocab_v20230424.txt")
    model = modrwkv_of(folders, tmp_path / "ckpt.pt", **own)
    capsys.readouterr()  # what transformers said of its own files
    convert(tmp_path / "ckpt.pt", tmp_path / "rwkv-0.pth", "worldrwkv", torch.bfloat16)
    lines = capsys.readouterr().err.splitlines()
    left_out = "adapter.audio, adapter.series, encoder.series, forecast_head left out"
    assert len(lines) == 2 and left_out in lines[0] and "--layout=ours" in lines[0]
    assert lines[1].endswith(f"need --image_encoder={folders('siglip')}: the layout worldrwkv holds no settings")
    kept, want = torch.load(tmp_path / "rwkv-0.pth"), {}
    for name, x in model.state_dict().items():
        if name.startswith("adapter.image."):
            want[name.replace("adapter.image", "proj")] = x.bfloat16()
        elif not name.startswith(("adapter", "encoder", "forecast")):
            want[f"llm.{name}"] = x.bfloat16()
    assert {"llm.emb.weight", "llm.blocks.0.att.r_k", "proj.mlp.0.weight", "proj.pre_norm.bias"} < want.keys()
    assert kept.keys() == want.keys() and all(torch.equal(x, want[name]) for name, x in kept.items())

    read = load(tmp_path / "rwkv-0.pth", image_encoder=folders("siglip"))
    assert read.config == dataclasses.replace(model.config, audio_encoder="none", series_encoder="none")
    convert(tmp_path / "rwkv-0.pth", tmp_path / "again.safetensors", "worldrwkv")
    again = read_checkpoint(tmp_path / "again.safetensors")["model"]
    assert all(torch.equal(x, read_checkpoint(tmp_path / "rwkv-0.pth")["model"][name]) for name, x in again.items())

    modrwkv_of(folders, tmp_path / "other.pt", conv_kernel=4, conv_stride=2)
    capsys.readouterr()
    convert(tmp_path / "other.pt", tmp_path / "other.pth", "worldrwkv")
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--tokenizer=bytes --template=world --prompt_style=written --conv_stride=2 --image_encoder=" in line
    modrwkv_of(folders, tmp_path / "more.pt", scan="bi", cls="last", conv_kernel=3, conv_stride=2)
    convert(tmp_path / "more.pt", tmp_path / "more.pth", "worldrwkv")
    assert "written --scan=bi --cls=last --image_encoder=" in capsys.readouterr().err
    for changed, words in (
        (dict(image_encoder="patch"), "image_encoder=patch"),
        (dict(image_encoder="none"), "image_encoder=none"),
        (dict(rwkv=6), "RWKV-6"),
        (dict(head_size=32), "heads of 32"),
        (dict(adapter_kind="linear"), "adapter_kind=linear"),
    ):
        modrwkv_of(folders, tmp_path / "odd.pt", **changed)
        message = refusal(convert, tmp_path / "odd.pt", tmp_path / "odd.pth", "worldrwkv")
        assert words in message and "worldrwkv" in message and not (tmp_path / "odd.pth").exists()


def test_what_a_language_models_layout_leaves_out_is_said(folders, tmp_path, capsys):
    """In one line with the layout that keeps it; of a language model alone nothing."""
    modrwkv_of(folders, tmp_path / "ckpt.pt")
    capsys.readouterr()
    for target in ("x.pth", "x.safetensors"):
        convert(tmp_path / "ckpt.pt", tmp_path / target)
        [line] = capsys.readouterr().err.splitlines()
        names = "adapter.audio, adapter.image, adapter.series, encoder.series, forecast_head left out"
        assert names in line and "language model alone" in line and "--layout=ours" in line
        convert(tmp_path / target, tmp_path / f"of {target}", "blinkdl")
        assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit):
        convert_main([str(tmp_path / "x.pth"), str(tmp_path / "y.pth"), "--layout=foo"])
    assert "worldrwkv" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        convert_main([str(tmp_path / "x.pth"), str(tmp_path / "x.safetensors")])
    assert str(e.value).startswith("error: ") and "exists" in str(e.value)


def test_broken_settings_in_a_safetensors_file(tmp_path):
    """A message that names the file, not what json or dict says."""
    from safetensors.torch import save_file

    for config in ("{", "5", "[1]", '"abc"'):
        save_file(official_weights(1, 64), tmp_path / "x.safetensors", {"config": config})
        assert "x.safetensors" in refusal(load, tmp_path / "x.safetensors")


LANGUAGE = dict(n_layer=2, n_embd=64, head_size=32, image_encoder="none")
PHASE = ("--image_encoder=patch", "--phase=adapter", "--eval_samples=1", "--schedule=constant", "--warmup_steps=0")


@pytest.fixture
def adapters(counting, tmp_path):
    """(the folder of a run of phase I, its flags, the file of its language model in bfloat16)."""
    language = tmp_path / "lm" / "lm.pth"
    language.parent.mkdir()
    weights = randomise(ModRWKV(Config(**LANGUAGE))).state_dict()
    torch.save({name: x.bfloat16() for name, x in weights.items()}, language)
    flags = (f"--init_from={language}", "--tokenizer=bytes", *PHASE)
    assert f"language model in {language}" in learn(tmp_path / "one", counting, *flags, "--max_steps=2")
    return tmp_path / "one", flags, language


def test_phase_one_stores_what_it_trained(adapters, counting, tmp_path, monkeypatch):
    """The file's names; the language model's numbers in either precision; the same run in one go, bit for bit."""
    out, flags, language = adapters
    before = language.read_bytes(), language.stat().st_mtime_ns
    contents = torch.load(out / "ckpt.pt")
    assert contents["base"]["path"] == str(language)
    assert contents["model"] and all(name.startswith(("encoder.", "adapter.")) for name in contents["model"])
    weights = torch.load(language)
    for dtype in (torch.float32, torch.bfloat16, "auto"):
        own = load(out, dtype=dtype).state_dict()
        for name, x in weights.items():
            is_float = own[name].dtype == torch.float32
            assert torch.equal(own[name], x.float() if is_float else x)
        assert own["emb.weight"].dtype == (torch.float32 if dtype == torch.float32 else torch.bfloat16)
    assert len(said(sample.main, f"--out_dir={out}", "--prompt=Hi", "--max_new_tokens=4")) > 0

    learn(out, counting, "--resume", "--max_steps=4")
    learn(tmp_path / "whole", counting, *flags, "--max_steps=4", "--save_interval=9")
    runs = [torch.load(folder / "ckpt.pt")["model"] for folder in (out, tmp_path / "whole")]
    assert runs[0].keys() == contents["model"].keys() == runs[1].keys()
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())
    assert not torch.equal(runs[0]["adapter.image.mlp.2.weight"], contents["model"]["adapter.image.mlp.2.weight"])

    learn(tmp_path / "again", counting, f"--init_from={out}", "--phase=adapter", "--max_steps=1")  # of adapters
    assert torch.load(tmp_path / "again/ckpt.pt")["base"] == contents["base"]
    learn(tmp_path / "two", counting, f"--init_from={out / 'ckpt.pt'}", "--max_steps=1")
    two = torch.load(tmp_path / "two/ckpt.pt")
    assert not two["base"] and weights.keys() < two["model"].keys()
    assert 0 < distance(two["model"]["head.weight"], weights["head.weight"].float()) < 0.5
    convert(out, tmp_path / "x.safetensors", "ours")
    assert weights.keys() | contents["model"].keys() == read_checkpoint(tmp_path / "x.safetensors")["model"].keys()
    assert before == (language.read_bytes(), language.stat().st_mtime_ns)

    learn(out, counting, "--resume", "--phase=all", "--max_steps=5")  # from then on it is another language model
    assert weights.keys() < torch.load(out / "ckpt.pt")["model"].keys()
    language.unlink()
    load(out), load(tmp_path / "two")


def test_a_language_model_that_is_gone_or_another_one(adapters, counting, tmp_path):
    """One sentence of every reader; it is found beside the checkpoint, in whatever layout and precision."""
    out, flags, language = adapters
    weights, first = torch.load(language), torch.load(out / "ckpt.pt")

    def refused(*words):
        for reader, *args in (
            (load, out),
            (sample.main, [f"--out_dir={out}", "--prompt=Hi"]),
            (learn, out, counting, "--resume", "--max_steps=9"),
            (learn, tmp_path / "no", counting, f"--init_from={out}", "--max_steps=9"),
        ):
            message = refusal(reader, *args)
            assert all(word in message for word in (str(out), str(language), *words)), message

    moved = {name: x.clone() for name, x in weights.items()}
    moved["blocks.1.att.k_k"] += 1
    torch.save(moved, language)
    refused("is another one")
    language.unlink()
    refused("is gone", "beside")
    torch.save({name: x.float() for name, x in weights.items()}, out / "lm.pth")  # the same numbers
    assert torch.equal(load(out).head.weight, weights["head.weight"].float())
    learn(out, counting, "--resume", "--max_steps=3")
    (out / "lm.pth").unlink()
    for base in (5, {"path": 5}, {"path": str(language)}, {"path": b"\0", "fingerprint": ""}, [1]):
        torch.save(first | {"base": base}, out / "ckpt.pt")
        assert str(out) in refusal(load, out)
    own = {"path": str(out / "ckpt.pt"), "fingerprint": ""}
    for path in (out / "ckpt.pt", out, "/dev/zero"):  # neither itself nor what has no end
        torch.save(first | {"base": own | {"path": str(path)}}, out / "ckpt.pt")
        assert "is gone" in refusal(load, out)


def test_checkpoints_that_stay_whole(adapters, counting, trained, tmp_path):
    """Of a new model, of a language model that learns, and of a run's own file, which may go on changing."""
    _, flags, language = adapters
    start = f"--init_from={language}", "--tokenizer=bytes", "--image_encoder=patch"
    frozen = "--phase=adapter", f"--init_from={trained[0]}"
    for i, more in enumerate((frozen[:1], frozen, (*start, "--freeze=emb,blocks.0"))):
        learn(tmp_path / f"{i}", counting, *more, "--max_steps=1", "--eval_samples=1")
        assert "emb.weight" in torch.load(tmp_path / f"{i}" / "ckpt.pt")["model"]
    learn(tmp_path / "frozen", counting, *start, "--freeze=emb,blocks,ln_out,head", "--max_steps=1", "--eval_samples=1")
    assert "emb.weight" not in torch.load(tmp_path / "frozen/ckpt.pt")["model"]


def test_fingerprints_of_language_models():
    """Equal where the numbers are, whatever holds them; another where one tensor is."""
    weights = {name: x.bfloat16() for name, x in official_weights(2, 64).items()}
    key = released_files.fingerprint(weights)
    more = {"adapter.image.mlp.0.weight": torch.ones(3), "blocks.0.att.v0": torch.ones(64)}
    assert released_files.fingerprint({name: x.float() for name, x in weights.items()} | more) == key
    transposed = {name: x.t().contiguous().t() if x.dim() == 2 else x.flatten() for name, x in weights.items()}
    assert released_files.fingerprint(transposed) == key
    for name, x in weights.items():
        if ".0.att.v" not in name or "value" in name:
            assert released_files.fingerprint(weights | {name: x + 1}) != key
    assert released_files.fingerprint({name: x for name, x in weights.items() if name != "ln_out.bias"}) != key


GROWTH = """
import sys, torch, modrwkv
from data.released import load
torch.set_num_threads(1)
def peak():
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
def answer(path):
    model = load(path)
    for _ in model.generate([[("text", list(range(1, 100)))]], max_new_tokens=8, step=modrwkv.traced_step(model)):
        pass
    assert model.emb.weight.dtype == torch.bfloat16
with torch.inference_mode():
    torch.randn(1, 64).bfloat16() @ torch.randn(64, 64).bfloat16()
    answer(sys.argv[1])
    before = peak()
    answer(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process is read as Linux gives it")
def test_a_checkpoint_takes_no_more_memory_than_its_file(tmp_path):
    """The growth of a process of its own that reads and asks a file of 16 bits, in each layout; what a tiny one takes,
    which is libraries, is not counted."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    for name, size in (("small", (1, 64)), ("large", (4, 768))):
        with torch.device("meta"):
            model = ModRWKV(Config(n_layer=size[0], n_embd=size[1], image_encoder="none"), vocab_size=16384)
        weights = {name: normal(x.shape).mul_(0.02).bfloat16() for name, x in model.state_dict().items()}
        torch.save(weights, tmp_path / f"{name}.pth")
    for target in ("x.pt", "x.safetensors"):
        convert(tmp_path / "large.pth", tmp_path / target)
    assert (tmp_path / "large.pth").stat().st_size > 60 * 2**20
    for file in ("large.pth", "x.pt", "x.safetensors"):
        done = run(["-c", GROWTH, tmp_path / "small.pth", tmp_path / file], REPO)
        growth = int(done.stdout) / (tmp_path / file).stat().st_size
        assert 0.7 < growth < 1.1, file  # all but the embeddings of other tokens, and what a layer's products take


def test_files_are_mapped_for_answers_alone(adapters, monkeypatch):
    """How each reader opens a checkpoint: a run's own, which it writes anew, without a map."""
    out, _, language = adapters
    opened, read = [], torch.load

    def noted(path, **how):
        opened.append((Path(path), how["mmap"]))
        return read(path, **how)

    monkeypatch.setattr(torch, "load", noted)
    load(out)
    assert opened == [(out / "ckpt.pt", True), (language, True)]
    train.read_run(str(out / "ckpt.pt"), train.Train(), set())
    assert opened[2:] == [(out / "ckpt.pt", False), (language, True)]


WORLD_VOCABULARY = "rwkv_vocab_v20230424.txt"


def test_where_the_world_vocabulary_is_found(official, tmp_path, monkeypatch):
    """By its path, here, beside the checkpoint, in the package, which is not imported; else where to get it is said."""
    monkeypatch.setenv("RWKV_VOCABULARY", "")
    monkeypatch.chdir(tmp_path)
    get_tokenizer.cache_clear()
    torch.save(official_weights(1, 64, V=65536), tmp_path / "x.pth")

    def found():
        """The token of "a" in each place is another one."""
        get_tokenizer.cache_clear()
        assert load(tmp_path / "x.pth").config.tokenizer == WORLD_VOCABULARY  # the plain name wherever it is
        return get_tokenizer(WORLD_VOCABULARY).encode("a")

    def place(folder, token):
        folder.mkdir(exist_ok=True)
        (folder / WORLD_VOCABULARY).write_text(f"{token} 'a' 1\n")
        return str(folder / WORLD_VOCABULARY)

    imported = {name for name in sys.modules if name.startswith("rwkv.")}
    assert found() == official[2].encode("a")
    assert {name for name in sys.modules if name.startswith("rwkv.")} == imported
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(found)
    assert all(word in message for word in (WORLD_VOCABULARY, "pip install rwkv", "BlinkDL's RWKV-LM"))
    beside = place(tmp_path, 5)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert found() == [5]
    asked = "from data.text import get_tokenizer; print(get_tokenizer('rwkv_vocab_v20230424.txt').encode('a'))"
    env = ENV | {"PYTHONPATH": str(REPO), "RWKV_VOCABULARY": os.environ["RWKV_VOCABULARY"]}
    done = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path / "here", env=env, text=True, capture_output=True)
    assert (done.stdout, os.environ["RWKV_VOCABULARY"]) == ("[5]\n", beside)  # in processes that are started later
    place(tmp_path / "here", 6)
    assert found() == [6]
    get_tokenizer.cache_clear()
    assert get_tokenizer(place(tmp_path / "other", 7)).encode("a") == [7]
    get_tokenizer.cache_clear()
    assert get_tokenizer(f"/gone/{WORLD_VOCABULARY}").encode("a") == [6]  # trained elsewhere
    assert "there is no tokenizer" in refusal(get_tokenizer, "/gone/vocab.txt")
    get_tokenizer.cache_clear()


def test_the_vocabulary_beside_a_language_model_is_found_for_its_adapters(adapters, monkeypatch):
    """And beside them in a folder, as flash-linear-attention's are."""
    out, _, language = adapters
    for folder, checkpoint in ((language.parent, out), (out, out / "ckpt.pt")):
        monkeypatch.setenv("RWKV_VOCABULARY", "")
        (folder / WORLD_VOCABULARY).write_text("5 'a' 1\n")
        load(checkpoint, tokenizer=WORLD_VOCABULARY)
        assert os.environ["RWKV_VOCABULARY"] == str(folder / WORLD_VOCABULARY)


COMMANDS = (REPO / "README.md").read_text(encoding="utf-8").splitlines()
DOWNLOADS = [i for i, line in enumerate(COMMANDS) if line.startswith("hf download")]
LAYOUTS_OF_THE_README = "BlinkDL", "fla", "WorldRWKV, pictures", "WorldRWKV, speech", "VisualRWKV 6.0"


@pytest.mark.parametrize("i,layout", list(zip(DOWNLOADS, LAYOUTS_OF_THE_README, strict=True)))
def test_blocks_of_the_readme_from_a_released_file_to_an_answer(i, layout, folders, official, tmp_path, monkeypatch):
    """With a random file of the layout in the place of the download, and tiny encoders in those of the hub."""
    monkeypatch.setenv("RWKV_VOCABULARY", "")
    monkeypatch.chdir(tmp_path)
    for name in ("siglip", "clip", "wavlm"):
        family, model, _ = modrwkv.FAMILIES[name]
        monkeypatch.setitem(modrwkv.FAMILIES, name, (family, model, folders(name)))
    download, ask = map(shlex.split, COMMANDS[i : i + 2])
    *files, place = download[3:]
    place = tmp_path / place.removeprefix("--local-dir=")
    adapter = mlp(C_, 2, 32, "proj")
    speech = mlp(C_, 2, 2 * C_, "proj", norm=False)
    speech |= {"conv.weight": normal(2 * C_, 32, 3), "conv.bias": normal(2 * C_)}
    adapters = {  # of the width of the tiny encoders
        "WorldRWKV, pictures": under(WORLD + "adapter.", adapter),
        "WorldRWKV, speech": under(WORLD + "adapter.", speech),
        "VisualRWKV 6.0": {"proj.weight": normal(C_, 32)},
    }
    rwkv = RELEASED[layout][0]
    weights = {name: x.bfloat16() for name, x in official_weights(2, C_, V=65536, rwkv=rwkv).items()}
    if layout == "VisualRWKV 6.0":
        weights = under("rwkv.", weights) | ones("vit.vision_model.x")
    weights |= {name: x.bfloat16() for name, x in adapters.get(layout, {}).items()}
    if layout == "fla":
        place.parent.mkdir(parents=True)
        hf_folder(place, fla_names(weights))
        shutil.copy(official[1], place)  # as the repository has it
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        place.mkdir(parents=True)
        torch.save(weights, place / files[0])
    noise(50, 40).save("cat.jpg")
    soundfile.write("speech.wav", np.sin(np.arange(16000) / 9), 16000)

    asked = Mock(side_effect=conversation)
    monkeypatch.setattr("data.records.conversation", asked)
    get_tokenizer.cache_clear()
    answer = said(sample.main, *ask[2:], "--max_new_tokens=8", "--device=cpu")
    config = asked.call_args.args[0]
    named = dict(image_encoder="clip" if rwkv == 6 else "siglip", audio_encoder="wavlm")
    want = {name: named[name] for name in named if RELEASED[layout][2].get(name, "none") != "none"}
    want |= {name: value for name, value in RELEASED[layout][2].items() if name in ("template", "prompt_style", "scan")}
    assert want.items() <= dataclasses.asdict(config).items() and config.tokenizer == WORLD_VOCABULARY
    assert answer.strip()
    get_tokenizer.cache_clear()


@pytest.fixture
def small_points(monkeypatch):
    """Points of data/long.py run in this process, but for the first; the list of those that ran."""
    alone, ran = ablate.long.subprocess.run, []

    def play(command, **more):
        assert command[:3] == [sys.executable, "-m", "data.long"]
        ran.append(command[3])
        if len(ran) == 1:
            return alone(command, **more)
        return SimpleNamespace(returncode=0, stdout=said(ablate.long.main, "point", *command[3:]))

    monkeypatch.setattr(ablate.long.subprocess, "run", play)
    return ran


def test_long_prompts_beside_a_llama(small_points, tmp_path, monkeypatch):
    """Parameters, state and cache, and vectors of a picture, counted: against sums by hand."""
    argv = "long --tokens=32,16 --new_tokens=4 --n_layer=2 --n_embd=64 --threads=1 --device=cpu".split()
    argv = [*argv, f"--out_dir={tmp_path}"]
    lines = said(ablate.main, *argv).splitlines()
    assert len(small_points) == 10 and lines[-1] == str(tmp_path / "long.png") and (tmp_path / "long.png").exists()
    points = {}
    for line in (tmp_path / "long.jsonl").read_text().splitlines():
        point = json.loads(line)
        points[point["flags"][0].removeprefix("--point=")] = point
        assert 0 < point["token"] <= point["total"] and 0 < point["first"] <= point["total"]
    for n in (16, 32):
        for kind in ("llama", "static"):
            assert points[f"{kind},{n}"]["parameters"] == pytest.approx(points[f"rwkv,{n}"]["parameters"], rel=0.02)
        assert points[f"rwkv,{n}"]["state"] == 4 * 2 * (64 * 64 + 2 * 64)  # float32, layers, S and two tokens
        assert points[f"llama,{n}"]["state"] == 4 * 2 * 2 * 64 * (n + 3)  # keys and values; the last is not read
        assert points[f"static,{n}"]["state"] == 4 * 2 * 2 * 64 * (n + 4)
    assert [points[f"image,{conv}"]["vectors"] - 32 for conv in ("0,1", "3,2", "4,3", "5,4")] == [576, 288, 192, 144]
    assert [x.count("|") for x in lines if x.startswith("|")] == [8] * 8 + [6] * 6
    assert [x.split(" | ")[0] for x in lines if x.startswith("| ")][2:8] == ["| 16"] * 3 + ["| 32"] * 3
    assert sum("4 tokens after 32, Llama" in x for x in lines) == 2

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    again = said(ablate.main, *argv).splitlines()
    assert len(small_points) == 10 and again[:-1] == lines[10:-1] and "[plot]" in again[-1]
    monkeypatch.setattr(ablate.long.subprocess, "run", Mock(return_value=SimpleNamespace(returncode=1)))
    assert "rwkv,17 did not finish" in refusal(ablate.main, [*argv, "--tokens=17"])


def test_one_token_beside_the_package(monkeypatch):
    """A row for each size, of five figures."""
    for name in ("RWKV_V7_ON", "RWKV_JIT_ON", "RWKV_CUDA_ON"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))  # to be as before
    monkeypatch.setattr(ablate.long, "SIZES", [(2, 64, 64, torch.float32)])
    monkeypatch.setattr(ablate.long, "TRACE_AFTER", 0)
    head, _, row = said(ablate.main, "decode", "--threads=1").splitlines()
    assert head.count("|") == row.count("|") == 7 and row.startswith("| 2 x 64, torch.float32 | ")
    assert all(float(cell) > 0 for cell in row.split(" | ")[1:-1])
