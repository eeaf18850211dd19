"""What is promised, against something the project did not write: numpy, float64 autograd, the package `rwkv`, PIL; then the scripts as a user runs them."""

import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import modrwkv
import sample
import train
from modrwkv import (
    TEMPLATES,
    Adapter,
    Config,
    InputError,
    ModRWKV,
    PatchEncoder,
    WorldTokenizer,
    conversation,
    flags,
    get_tokenizer,
    load,
    parameter_groups,
    pick,
    read_checkpoint,
    read_records,
    record_media,
    save,
    setting,
    wkv7,
    wkv7_chunked,
    wkv7_loop,
)

torch.set_num_threads(1)
SEEDS = st.integers(0, 2**31)


def trials(n):
    return settings(max_examples=n, deadline=None, derandomize=True, database=None)


def distance(got, exact):
    """Norm-wise relative error; below 1e-20 the exact norm counts as 1e-20."""
    got, exact = torch.as_tensor(got).double(), torch.as_tensor(exact).double()
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


SMALL = Config(n_layer=2, n_embd=64, head_size=32, patch_width=8, encoder_width=48, conv_kernel=3, conv_stride=2)


@pytest.fixture(scope="session")
def model():
    """A small random model in float64, so that what must be equal is equal to 1e-6 or better (the decay is float32)."""
    return randomise(ModRWKV(SMALL)).double()


MARKS = {257: b"\n\n", 258: b"User:", 259: b"Assistant:"}  # of the tokenizer "bytes"


def codes(string):
    """Bytes as tokens, without the marks."""
    return [b + 1 for b in (string if isinstance(string, bytes) else string.encode())]


def text(string):
    return ("text", codes(string))


def picture(seed, patches=3):
    return ("image", torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (3, 32, 8 * patches), np.uint8)))


# ----------------------------------------------------------------------------------------------
# 1. The recurrence


def entry_by_entry(r, w, k, v, a, b, S):
    B, T, H, N = r.shape
    S, y = S.copy(), np.zeros_like(r)
    for n in range(B):
        for h in range(H):
            for t in range(T):
                old = S[n, h].copy()
                for i in range(N):
                    Sa = sum(old[i, j] * a[n, t, h, j] for j in range(N))
                    for j in range(N):
                        S[n, h, i, j] = old[i, j] * math.exp(w[n, t, h, j]) + Sa * b[n, t, h, j] + v[n, t, h, i] * k[n, t, h, j]
                    y[n, t, h, i] = sum(S[n, h, i, j] * r[n, t, h, j] for j in range(N))
    return y, S


@pytest.mark.parametrize("function", [wkv7_loop, wkv7_chunked, wkv7])
@pytest.mark.parametrize("T", [1, 9, 100])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("infinite", [False, True])
def test_wkv7_is_the_formula(function, T, with_state, infinite):
    rng = np.random.RandomState(0)
    r, k, v, a, b = rng.randn(5, 2, T, 3, 4) / 2
    w, S = -0.6 * rng.rand(2, T, 3, 4), rng.randn(2, 3, 4, 4) * with_state
    w[0, T // 2, 1, 2] = -np.inf if infinite else 0
    exact = entry_by_entry(r, w, k, v, a, b, S)
    got = function(*map(torch.from_numpy, (r, w, k, v, a, b)), torch.from_numpy(S) if with_state else None)
    for x, y in zip(got, exact):
        assert distance(x, y) < 1e-12


def wkv7_inputs(T, N, fastest, mixed, transition, with_state, seed, scale=1.0, dtype=torch.float32, B=1, H=2):
    """[r, w, k, v, a, b(, state)]: decays all -fastest, or mixed: each log-uniform between 1e-6 and fastest."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    uniform = lambda: torch.rand(B, T, H, N, generator=g, dtype=torch.float64)
    r, k, v = (scale * normal(B, T, H, N) for _ in range(3))
    w = -(1e-6 * (max(fastest, 1e-6) / 1e-6) ** uniform()) if mixed else torch.full((B, T, H, N), -fastest, dtype=torch.float64)
    kk, rate = F.normalize(normal(B, T, H, N), dim=-1) * transition, uniform()
    state = [scale**2 * normal(B, H, N, N)] if with_state else []
    return [x.to(dtype) for x in [r, w, k, v, -kk, kk * rate, *state]]


def run_wkv7(function, inputs, dtype, seed=0):
    """y, the state, and the gradients of a random linear function of both in every input."""
    xs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y, S = function(*xs)
    g = torch.Generator().manual_seed(seed)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)).sum() for x in (y, S))
    return [y, S, *torch.autograd.grad(loss, xs)]


RESULTS = "y state dr dw dk dv da db dstate".split()


def assert_wkv7_exact(function, inputs, dtype, tolerance):
    exact = run_wkv7(wkv7_loop, inputs, torch.float64)
    got = run_wkv7(function, inputs, dtype)
    errors = {name: distance(x, y) for name, x, y in zip(RESULTS, got, exact)}
    assert all(e <= tolerance for e in errors.values()), errors  # a NaN fails too


@pytest.mark.parametrize("function", [wkv7, wkv7_chunked])
@trials(40)
@given(
    T=st.integers(1, 130),
    N=st.sampled_from([16, 32, 64, 128]),
    exponent=st.floats(-6, math.log10(60)),
    mixed=st.booleans(),
    transition=st.sampled_from([1, 1, 0]),
    with_state=st.booleans(),
    scale=st.sampled_from([1.0, 1.0, 1e-6, 1e6]),
    double=st.booleans(),
    seed=SEEDS,
)
@example(T=130, N=64, exponent=math.log10(0.6065), mixed=True, transition=1, with_state=True, scale=1.0, double=False, seed=1)
@example(T=96, N=64, exponent=math.log10(0.6065), mixed=False, transition=1, with_state=False, scale=1e6, double=False, seed=2)
def test_wkv7_is_exact_with_its_gradients(function, T, N, exponent, mixed, transition, with_state, scale, double, seed):
    dtype, tolerance = (torch.float64, 1e-10) if double else (torch.float32, 1e-5)
    inputs = wkv7_inputs(T, N, 10**exponent, mixed, transition, with_state, seed, scale, dtype)
    assert_wkv7_exact(function, inputs, dtype, tolerance)


@pytest.mark.parametrize("fastest", [1e-6, 0.3, 0.6065, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.5, 7.6, 20.0, 60.0])
@pytest.mark.parametrize("T", [8, 20, 64])
def test_wkv7_is_exact_at_every_decay(fastest, T):
    for transition, with_state, scale in itertools.product((1, 0), (True, False), (1, 1e-6)):
        inputs = wkv7_inputs(T, 16, fastest, False, transition, with_state, seed=T, scale=scale)
        assert_wkv7_exact(wkv7, inputs, torch.float32, 1e-5)
        assert_wkv7_exact(wkv7, [x.double() for x in inputs], torch.float64, 1e-10)


@pytest.mark.parametrize("T", [3, 10, 65], ids=["loop", "one chunk", "two chunks"])
@pytest.mark.parametrize("with_state", [True, False])
def test_wkv7_gradcheck(T, with_state):
    inputs = wkv7_inputs(T, 2, 1.0, False, 1, with_state, seed=4, dtype=torch.float64, H=1)
    assert torch.autograd.gradcheck(wkv7, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_wkv7_with_infinite_decay(share):
    inputs = wkv7_inputs(40, 16, 0.6, True, 1, True, seed=5)
    inputs[1][torch.rand(inputs[1].shape, generator=torch.Generator().manual_seed(0)) < share] = -math.inf
    assert all(x.isfinite().all() for x in run_wkv7(wkv7, inputs, torch.float32))
    assert_wkv7_exact(wkv7, inputs, torch.float32, 1e-5)


@pytest.mark.parametrize("dtype,unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("T", [5, 70])
def test_wkv7_in_half_precision(dtype, unit, T):
    inputs = wkv7_inputs(T, 32, 0.6, True, 1, False, seed=6, dtype=dtype)
    state = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    y, S = wkv7(*inputs, state)
    exact_y, exact_S = wkv7_loop(*(x.double() for x in inputs), state.double())
    assert y.dtype == dtype and S.dtype == torch.float32
    assert distance(y, exact_y) <= unit  # the one rounding of y, nothing more
    assert distance(S, exact_S) <= 1e-5


@trials(20)
@given(T=st.integers(2, 130), cut=st.floats(0, 1), fastest=st.sampled_from([0.6, 5.0, 30.0]), seed=SEEDS)
def test_wkv7_continues_from_its_state(T, cut, fastest, seed):
    inputs = wkv7_inputs(T, 16, fastest, True, 1, True, seed, dtype=torch.float64)
    t = 1 + int(cut * (T - 2))
    y, S = wkv7(*inputs)
    y1, S1 = wkv7(*(x[:, :t] for x in inputs[:6]), inputs[6])
    y2, S2 = wkv7(*(x[:, t:] for x in inputs[:6]), S1)
    assert distance(torch.cat([y1, y2], 1), y) < 1e-12 and distance(S2, S) < 1e-12


# ----------------------------------------------------------------------------------------------
# 2. Parity with the official package


@pytest.fixture(scope="session")
def official():
    """The package `rwkv`: (its class RWKV, the path of its vocabulary, its tokenizer)."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")  # read when the package is imported
    import rwkv.model
    import rwkv.rwkv_tokenizer

    path = os.path.join(os.path.dirname(rwkv.model.__file__), "rwkv_vocab_v20230424.txt")
    return rwkv.model.RWKV, path, rwkv.rwkv_tokenizer.TRIE_TOKENIZER(path)


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


@pytest.mark.parametrize(
    "n_layer,C,N,ranks,dtype",
    [
        (1, 64, 64, (32, 32, 32, 32), torch.float32),
        (2, 128, 64, (64, 32, 16, 96), torch.float32),
        (3, 192, 64, (32, 48, 24, 64), torch.float32),
        (3, 128, 32, (8, 16, 64, 40), torch.float32),
        (2, 128, 64, (32, 32, 32, 64), torch.bfloat16),  # as released files are
    ],
)
def test_logits_are_those_of_the_official_package(official, tmp_path, n_layer, C, N, ranks, dtype):
    weights = {name: x.to(dtype) for name, x in official_weights(n_layer, C, N=N, ranks=ranks, seed=n_layer).items()}
    torch.save(weights, tmp_path / "x.pth")
    theirs, ours = official[0](str(tmp_path / "x"), "cpu fp32"), load(tmp_path / "x.pth")
    tokens = torch.randint(300, (60,), generator=torch.Generator().manual_seed(7))
    exact, exact_state = theirs.forward(tokens.tolist(), None, full_output=True)
    assert 1 < exact.std() < 5  # there is something to compare
    with torch.no_grad():
        logits, state = ours(tokens[None])
        steps, step_state, exact_steps, exact_step_state = [], None, [], None
        for t in tokens:
            z, step_state = ours(t.view(1, 1), step_state)
            steps.append(z[0, 0])
            z, exact_step_state = theirs.forward([t.item()], exact_step_state)
            exact_steps.append(z)
    for got in (logits[0], torch.stack(steps)):
        for want in (exact, torch.stack(exact_steps)):
            error = (got - want).abs().amax(-1)
            assert error[0] < 1e-2  # one token's k . r may be nearly 0, and the norm after it blows up its rounding
            assert error[1:].max() < 1e-4
    for got in (state, step_state):
        for i, layer in enumerate(got):
            for x, want in zip(layer, exact_state[3 * i : 3 * i + 3]):
                assert distance(x[0], want) < 1e-5


def test_official_checkpoint_is_found_out_from_its_tensors(tmp_path):
    weights = official_weights(3, 128, N=32, ranks=(8, 16, 24, 40))
    torch.save(weights, tmp_path / "x.pth")
    ours = load(tmp_path / "x.pth", tokenizer="bytes", template="v2")
    assert dataclasses.replace(ours.config) == dataclasses.replace(
        Config(), n_layer=3, n_embd=128, head_size=32, tokenizer="bytes", template="v2", image_encoder="none"
    )
    own = ours.state_dict()
    unused = {f"blocks.0.att.v{i}" for i in "012"}
    assert set(own) == set(weights) - unused
    for name, x in own.items():
        assert torch.equal(x, weights[name])
    flat = {name: x.flatten() if x.dim() == 3 else x for name, x in weights.items() if name not in unused}  # as some converters do
    torch.save(flat, tmp_path / "flat.pth")
    for name, x in load(tmp_path / "flat.pth").state_dict().items():
        assert torch.equal(x, weights[name])


# ----------------------------------------------------------------------------------------------
# 3. State, batches, padding


def assert_state_equal(got, want, tolerance=1e-6):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        for x, y in zip(a, b):
            assert distance(x, y) < tolerance


def state_of(state, i):
    return [tuple(x[i : i + 1] for x in layer) for layer in state]


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


SEGMENT = st.one_of(
    st.integers(1, 60).map(lambda n: ("text", n)), st.integers(1, 6).map(lambda n: ("answer", n)), st.integers(1, 30).map(lambda n: ("image", n))
)


def make_sample(plan, seed):
    """Segments of a plan [(kind, size)], a few tokens at its end."""
    rng = np.random.RandomState(seed % 2**32)
    return [picture(rng.randint(2**31), n) if kind == "image" else (kind, rng.randint(0, 257, n).tolist()) for kind, n in plan + [("text", 2)]]


@torch.no_grad()
@trials(12)
@given(plans=st.lists(st.lists(SEGMENT, max_size=4), min_size=2, max_size=4), seed=SEEDS)
@example(plans=[[], [("image", 20), ("text", 60), ("image", 9)], [("text", 1), ("image", 1)]], seed=0)
def test_a_sample_in_a_batch_is_the_sample_alone(model, plans, seed):
    samples = [make_sample(plan, seed + i) for i, plan in enumerate(plans)]
    logits, state = model(samples)
    more = [make_sample([("text", 1 + i)], seed) for i in range(len(plans))]  # a second turn
    logits2, state2 = model(more, state)
    for i, segments in enumerate(samples):
        alone, alone_state = model([segments])
        assert distance(logits[i, : alone.shape[1]], alone[0]) < 1e-6
        assert_state_equal(state_of(state, i), alone_state)
        both, both_state = model([segments + more[i]])
        assert distance(logits2[i, : both.shape[1] - alone.shape[1]], both[0, alone.shape[1] :]) < 1e-6
        assert_state_equal(state_of(state2, i), both_state)


@torch.no_grad()
def test_neighbours_change_nothing(model):
    one = [text("User: "), picture(1), text("what?\n\nAssistant:")]
    first, first_state = model([one, [text("x" * 50)]])
    for neighbour in ([text("y" * 50)], [picture(2, 40), text("z")], [text("a")]):
        logits, state = model([one, neighbour])
        n = model.length(one)
        assert distance(logits[0, :n], first[0, :n]) < 1e-6
        assert_state_equal(state_of(state, 0), state_of(first_state, 0))
        logits, state = model([neighbour, one])
        assert distance(logits[1, :n], first[0, :n]) < 1e-6


@torch.no_grad()
def test_pictures_stand_where_they_were_put(model):
    A, B, t1, t2 = picture(1, 5), picture(2, 2), text("first "), text("second")
    vectors = {id(s): model.adapter["image"](model.encoder["image"]([s[1]]))[0] for s in (A, B)}
    vectors |= {id(s): model.emb.weight[torch.tensor(s[1])] for s in (t1, t2)}
    for segments in ([A, t1, B, t2], [B, t1, A, t2], [t1, A, B, t2], [t2, t1, B, A], [A, A, t1]):
        x, _, lengths = model.fuse([[text("ab"), B], segments, [A, text("c")]])
        want = torch.cat([vectors[id(s)] for s in segments])
        assert lengths[1] == len(want)
        assert distance(x[1, : lengths[1]], want) < 1e-12
        assert not x[1, lengths[1] :].any()


@torch.no_grad()
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-5), (torch.bfloat16, 0.03)])
def test_a_model_in_another_precision(dtype, tolerance):
    segments = [text("what is this?"), picture(1), text(" Assistant:")]
    model = randomise(ModRWKV(SMALL))
    exact = model([segments])[0]
    got, state = model.to(dtype)([segments])
    assert got.dtype == dtype and distance(got, exact) < tolerance
    assert all(S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for _, S, _ in state)


@torch.no_grad()
def test_a_batch_of_pictures_alone(model):
    A, B = picture(1, 5), picture(2, 9)
    logits, _ = model([[A], [B]])
    with_text, _ = model([[A, text("x")], [B, text("y")]])
    assert distance(logits[1], with_text[1, :-1]) < 1e-6


# ----------------------------------------------------------------------------------------------
# 4. Initial values, names, optimizer groups (spec of the official training code)


def test_initial_values():
    torch.manual_seed(0)
    L, C, N = 3, 128, 64
    z = {name: x.detach().double().numpy() for name, x in ModRWKV(Config(n_layer=L, n_embd=C, head_size=N)).state_dict().items()}
    i = np.arange(C)
    q, lin = i / C, i / (C - 1) - 0.5
    zz = (i % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = zz * abs(zz)
    assert abs(z["emb.weight"]).max() <= 1e-4 and z["emb.weight"].std() == pytest.approx(1e-4 / 3**0.5, rel=0.02)
    gain = 0.5 * math.sqrt(len(z["emb.weight"]) / C)
    assert np.allclose(z["head.weight"].T @ z["head.weight"], gain**2 * np.eye(C), atol=1e-5)
    for ell in range(L):
        rho0, rho1 = ell / (L - 1), 1 - ell / L
        at = lambda name: z[f"blocks.{ell}.att.{name}"]
        vectors = {f"x_{s}": 1 - q ** (p * rho1) for s, p in dict(r=0.2, g=0.2, w=0.9, a=0.9, k=0.7, v=0.7).items()}
        vectors["w0"] = -6 + 6 * (i / (C - 1)) ** (1 + rho0**0.3) + 0.5 + 2.5 * zigzag
        vectors["a0"] = -0.19 + 0.3 * zigzag + 0.4 * lin
        vectors |= {"k_k": 0.71 - 0.1 * lin, "k_a": np.full(C, 1.02)}
        vectors |= {"v0": 0.73 - 0.4 * lin} if ell else {}
        for name, want in vectors.items():
            assert at(name).shape == (1, 1, C)
            assert np.allclose(at(name).ravel(), want, rtol=0, atol=2e-6), name
        assert np.allclose(z[f"blocks.{ell}.ffn.x_k"].ravel(), 1 - q ** (rho1**4), rtol=0, atol=2e-6)
        assert np.allclose(at("r_k"), -0.04) and at("r_k").shape == (C // N, N)
        assert np.allclose(at("ln_x.weight"), ((ell + 1) / L) ** 0.7) and not at("ln_x.bias").any()
        for s in "wag" + "v" * (ell > 0):
            assert not at(f"{s}1").any()
            assert np.allclose(at(f"{s}2") @ at(f"{s}2").T, 0.1**2 * np.eye(len(at(f"{s}2"))), atol=1e-6)
        for name, gain in dict(receptance=1, key=0.1, value=1, output=0).items():
            assert np.allclose(at(f"{name}.weight") @ at(f"{name}.weight").T, gain**2 * np.eye(C), atol=1e-5)
        key = z[f"blocks.{ell}.ffn.key.weight"]
        assert key.shape == (4 * C, C) and np.allclose(key.T @ key, np.eye(C), atol=1e-5)
        assert not z[f"blocks.{ell}.ffn.value.weight"].any()
        for norm in ("ln1", "ln2") + ("ln0",) * (ell == 0):
            assert (z[f"blocks.{ell}.{norm}.weight"] == 1).all() and not z[f"blocks.{ell}.{norm}.bias"].any()
    assert (z["ln_out.weight"] == 1).all() and not z["ln_out.bias"].any()


def test_initial_values_at_the_edges():
    torch.manual_seed(0)
    narrow = ModRWKV(Config(n_layer=1, n_embd=16, head_size=16, image_encoder="none"), vocab_size=8)
    assert all(x.isfinite().all() for x in narrow.state_dict().values())  # one layer: its depth is 0 of 0
    head, w2 = narrow.head.weight.double(), narrow.blocks[0].att.w2.double()
    assert torch.allclose(head @ head.T, 0.5**2 * torch.eye(8).double(), atol=1e-6)  # V < C
    assert w2.shape == (32, 16) and torch.allclose(w2.T @ w2, 0.1**2 * 2 * torch.eye(16).double(), atol=1e-6)  # rank > C


@pytest.mark.parametrize("C,ranks", [(768, (64, 64, 32, 128)), (1024, (64, 64, 64, 160)), (2048, (128, 128, 64, 224))])
def test_ranks_are_the_official_ones(C, ranks):
    with torch.device("meta"):
        att = modrwkv.TimeMix7(2, C, 64, layer=1)
    for s, rank in zip("wavg", ranks):
        assert att.get_parameter(f"{s}1").shape == (C, rank) and att.get_parameter(f"{s}2").shape == (rank, C)


def test_names_and_shapes_are_the_official_ones():
    C, H, N, V, rank = 128, 2, 64, 260, {"w": 32, "a": 32, "v": 32, "g": 64}
    want = {"emb.weight": (V, C), "head.weight": (V, C), "ln_out.weight": (C,), "ln_out.bias": (C,)}
    for i in range(3):
        block = f"blocks.{i}."
        for norm in ("ln0",) * (i == 0) + ("ln1", "ln2", "att.ln_x"):
            want |= {f"{block}{norm}.weight": (C,), f"{block}{norm}.bias": (C,)}
        want |= {f"{block}att.{s}": (1, 1, C) for s in "x_r x_w x_k x_v x_a x_g w0 a0 k_k k_a".split() + ["v0"] * (i > 0)}
        for s in "wag" + "v" * (i > 0):
            want |= {f"{block}att.{s}1": (C, rank[s]), f"{block}att.{s}2": (rank[s], C)}
        want |= {f"{block}att.{s}.weight": (C, C) for s in ("receptance", "key", "value", "output")} | {f"{block}att.r_k": (H, N)}
        want |= {f"{block}ffn.x_k": (1, 1, C), f"{block}ffn.key.weight": (4 * C, C), f"{block}ffn.value.weight": (C, 4 * C)}
    text_model = ModRWKV(Config(n_layer=3, n_embd=C, image_encoder="none"))
    assert {name: tuple(x.shape) for name, x in text_model.state_dict().items()} == want
    both = {name for name, _ in ModRWKV(Config(n_layer=3, n_embd=C)).named_parameters()}
    assert {name for name in both if not name.startswith(("encoder.", "adapter."))} == set(want)


def test_optimizer_groups():
    model = ModRWKV(Config(n_layer=2, n_embd=128))
    names = {id(p): name for name, p in model.named_parameters()}
    decay, w0, rest = groups = parameter_groups(model, 0.1)
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


# ----------------------------------------------------------------------------------------------
# 5. Conv1D and adapter


def plain_adapter(adapter, x):
    """One signal through the formulas, window by window, in numpy."""
    z = {name: p.detach().double().numpy() for name, p in adapter.named_parameters()}
    x, k, s = x.double().numpy(), adapter.kernel, adapter.stride
    if k:
        left = (s - (len(x) - k) % s) % s if len(x) >= k else k - len(x)
        x = np.concatenate([np.zeros((left, x.shape[1])), x])
        x = np.stack([sum(z["conv.weight"][:, :, j] @ x[i + j] for j in range(k)) for i in range(0, len(x) - k + 1, s)])
    y = np.maximum(x @ z["mlp.0.weight"].T + z["mlp.0.bias"], 0) @ z["mlp.2.weight"].T + z["mlp.2.bias"]
    norm = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
    return y + norm * z["pre_norm.weight"] + z["pre_norm.bias"]


def make_adapter(kernel, stride, width=12, n_embd=16):
    return randomise(Adapter(width, n_embd, 2, kernel, stride)).double()


@pytest.mark.parametrize("kernel,stride,counts", [(3, 2, (288, 288, 360)), (4, 3, (192, 192, 240)), (5, 4, (144, 144, 180)), (0, 0, (577, 576, 720))])
def test_conv_shortens_as_the_paper_says(kernel, stride, counts):
    adapter = make_adapter(kernel, stride, width=2, n_embd=2)
    for n, count in zip((577, 576, 720), counts):
        assert adapter.length(n) == count == len(adapter([torch.randn(n, 2).double()])[0])


@pytest.mark.parametrize("kernel,stride", [(3, 2), (4, 3), (5, 4), (1, 1), (4, 2), (2, 5), (0, 2)])
@torch.no_grad()
def test_adapter_is_conv_mlp_and_norm(kernel, stride):
    adapter = make_adapter(kernel, stride)
    signals = [torch.randn(n, 12, generator=torch.Generator().manual_seed(n)).double() for n in [23, *range(1, 11), 40]]
    batch = adapter(signals)
    for x, y in zip(signals, batch):
        assert len(y) == adapter.length(len(x)) >= 1
        assert distance(y, plain_adapter(adapter, x)) < 1e-12
        assert distance(adapter([x])[0], y) < 1e-12  # alone as in the batch


@pytest.mark.parametrize("kernel,stride", [(3, 2), (4, 3), (5, 4), (4, 2)])
@pytest.mark.parametrize("n", [1, 2, 5, 12, 13, 14, 15])
@torch.no_grad()
def test_last_window_ends_on_the_last_vector(kernel, stride, n):
    adapter, x = make_adapter(kernel, stride), torch.randn(n, 12).double()
    y = adapter([x])[0]
    for j in range(n):
        touched = x.clone()
        touched[j] += 1
        changed = (adapter([touched])[0] != y).any(1).nonzero()[:, 0].tolist()
        ends = [n - 1 - stride * back for back in range(len(y))][::-1]  # the last vector each window holds
        assert changed == [i for i, end in enumerate(ends) if end - kernel < j <= end]


@trials(15)
@given(plan=st.lists(SEGMENT, max_size=5), seed=SEEDS)
def test_length_is_what_fuse_makes(model, plan, seed):
    segments = make_sample(plan, seed)
    x, labels, lengths = model.fuse([segments])
    assert model.length(segments) == lengths[0] == x.shape[1] == labels.shape[1]


# ----------------------------------------------------------------------------------------------
# 6. Pictures


@pytest.fixture
def encoder():
    return PatchEncoder(Config(image_trim=False))


def drawing(size=(60, 40), at=(10, 8), mode="RGB"):
    """A grey and coloured figure on white."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle([at[0], at[1], at[0] + 19, at[1] + 23], fill=(20, 20, 20))
    draw.rectangle([at[0] + 5, at[1] + 5, at[0] + 9, at[1] + 12], fill=(200, 40, 90))
    return image.convert(mode)


def stored(image, path, **how):
    image.save(path, **how)
    return path


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("mode", ["P", "L", "1", "LA", "RGBA", "I;16", "CMYK"])
def test_every_kind_of_picture_is_read_as_its_rgb(tmp_path, mode, trim):
    encoder = PatchEncoder(Config(image_trim=trim))
    if mode == "I;16":
        grey = np.array(drawing(mode="L"))
        image, want = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey)  # 257 * x is x in 16 bits
        assert image.mode == "I;16"
    elif mode == "CMYK":
        image = drawing(mode="CMYK")
        path = stored(image, tmp_path / "x.jpg", quality=95, subsampling=0)
        got, want = encoder.load(path).int(), encoder.load(stored(drawing(), tmp_path / "y.png")).int()
        assert got.shape == want.shape and (got - want).abs().float().mean() < 4  # what JPEG loses
        return
    else:
        image = drawing(mode=mode)
        want = drawing(mode={"LA": "L", "RGBA": "RGB", "P": "P"}.get(mode, mode))
    got = encoder.load(stored(image, tmp_path / "x.png"))
    want = encoder.load(stored(want.convert("RGB"), tmp_path / "y.png"))
    assert got.dtype == torch.uint8 and torch.equal(got, want)
    assert got.float().std() > 20  # the figure is there


def test_what_is_transparent_lies_on_white(tmp_path, encoder):
    rgba = np.random.RandomState(0).randint(0, 256, (32, 64, 4)).astype(np.uint8)
    alpha = rgba[..., 3:] / 255
    got = encoder.load(stored(Image.fromarray(rgba, "RGBA"), tmp_path / "x.png")).permute(1, 2, 0).numpy()
    assert abs(got - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1  # PIL rounds its own way
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0, 250, 0, 0])
    palette.paste(1, (8, 8, 24, 24))
    got = encoder.load(stored(palette, tmp_path / "p.png", transparency=0))
    assert got[:, 0, 0].tolist() == [255, 255, 255] and got[:, 16, 16].tolist() == [250, 0, 0]


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("patch_width", [4, 8, 12, 32])
@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000), (700, 1), (1, 700), (513, 32), (32, 32), (33, 31)])
def test_every_size_becomes_patches(tmp_path, size, patch_width, trim):
    config = Config(encoder_width=64, patch_width=patch_width, image_trim=trim)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    encoder = PatchEncoder(config)
    x = encoder.load(stored(image, tmp_path / "x.png"))
    assert x.shape[:2] == (3, 32) and x.shape[2] % patch_width == 0
    assert 1 <= x.shape[2] / patch_width == encoder.length(x) <= 16 * 32 / patch_width + 1
    y = encoder([x])[0]
    assert y.shape == (encoder.length(x), 64) and y.isfinite().all()


def test_a_white_picture_stays_white(tmp_path):
    x = PatchEncoder(Config()).load(stored(Image.new("RGB", (50, 25), "white"), tmp_path / "x.png"))
    assert x.shape == (3, 32, 64) and (x == 255).all()


def test_trim_takes_away_the_margins(tmp_path):
    trimming = PatchEncoder(Config(image_trim=True))
    results = [trimming.load(stored(drawing(size, at), tmp_path / "x.png")) for size, at in [((60, 40), (10, 8)), ((300, 200), (140, 2)), ((21, 25), (1, 1))]]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert results[0].shape == (3, 32, 28)  # 20 x 24, scaled to 26.7 x 32, in patches of 4
    black = Image.eval(drawing((80, 80), (30, 30)), lambda x: 255 - x)  # the paper may be dark
    inverse = trimming.load(stored(black, tmp_path / "b.png")).int() + results[0].int()
    assert (inverse - 255).abs().max() <= 1
    whole = PatchEncoder(Config(image_trim=False))
    assert not torch.equal(whole.load(tmp_path / "x.png"), whole.load(stored(drawing(), tmp_path / "y.png")))


def test_scaling_is_bilinear_and_keeps_the_aspect(tmp_path, encoder):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (50, 75, 3)).astype(np.uint8))
    got = encoder.load(stored(image, tmp_path / "x.png"))
    assert torch.equal(got, torch.from_numpy(np.array(image.resize((48, 32), Image.BILINEAR))).permute(2, 0, 1))


@torch.no_grad()
def test_patches_are_cut_row_by_row():
    config = Config(encoder_width=8, image_height=24, patch_height=12, patch_width=8)
    encoder = randomise(PatchEncoder(config)).double()
    images = [torch.from_numpy(np.random.RandomState(w).randint(0, 256, (3, 24, w), np.uint8)) for w in (24, 8, 16)]
    gelu = lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2
    for image, got in zip(images, encoder(images)):
        x = (1 - image.double() / 255)[None]
        for conv in (encoder.conv1, encoder.conv2):  # each picture by itself: 4 pixels become 1
            x = gelu(F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1))
        want = []
        for row in range(2):
            for col in range(image.shape[2] // 8):
                patch = x[0, :, 3 * row : 3 * row + 3, 2 * col : 2 * col + 2]
                want.append(gelu(encoder.proj.weight.flatten(1) @ patch.flatten() + encoder.proj.bias + encoder.row[row] + encoder.col[col]))
        assert len(want) == encoder.length(image)
        assert distance(got, torch.stack(want)) < 1e-5


def test_pictures_that_cannot_be_read(tmp_path, encoder):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8)).save(file, "PNG")
    (tmp_path / "short.png").write_bytes(file.getvalue()[:2000])
    for name in ("text.png", "empty.png", "short.png", "missing.png", ""):
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            encoder.load(tmp_path / name)


# ----------------------------------------------------------------------------------------------
# 7. Conversations


def spell(segments):
    """Segments as [(kind, string)], a picture as its data."""
    return [(kind, data if kind == "image" else b"".join(MARKS.get(i, bytes([(i - 1) % 256])) for i in data).decode()) for kind, data in segments]


def test_layout_of_a_conversation():
    turns = [("<image>\nWhat is this?", "A cat."), ("And\n\n \nits colour?  ", " black\n\n\nand white\n")]
    got = spell(conversation(SMALL, turns, iter([("image", "PIXELS")])))
    assert got == [
        ("text", "User: "),
        ("image", "PIXELS"),
        ("text", "\nWhat is this?\n\nAssistant:"),
        ("answer", " A cat.\n\n"),
        ("text", "User: And\nits colour?\n\nAssistant:"),
        ("answer", " black\nand white\n\n"),
    ]


def test_layout_of_several_pictures_and_a_question():
    media = [("image", "A"), ("image", "B")]
    got = spell(conversation(SMALL, [("this <image>, that<image>", None)], iter(media)))
    assert got == [("text", "User: this "), media[0], ("text", ", that"), media[1], ("text", "\n\nAssistant:")]
    assert spell(conversation(SMALL, [("<image><image>", None)], iter(media)))[1:3] == media


@pytest.mark.parametrize(
    "template,want",
    [
        ("v1", "\x16User: hi\x17Assistant:| hello\x17|User: who?\x17Assistant:| me\x17"),
        ("v2", "\x16User: hi\x17\x16Assistant:| hello\x17|\x16User: who?\x17\x16Assistant:| me\x17"),
        ("v3", "\x16User:hi\x17\x16Assistant:|hello\x17|\x16User:who?\x17\x16Assistant:|me\x17"),
        ("world", "User: hi\n\nAssistant:| hello\n\n|User: who?\n\nAssistant:| me\n\n"),
    ],
)
def test_templates(template, want):
    config = dataclasses.replace(SMALL, template=template)
    got = spell(conversation(config, [("hi", "hello"), ("who?", "me")], iter(())))
    assert "|".join(string for _, string in got) == want
    assert [kind for kind, _ in got] == ["text", "answer"] * 2
    later = spell(conversation(config, [("who?", None)], iter(()), first=False))  # a chat that goes on
    assert [later[0][1]] == [want.split("|")[2]]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("message", ["a\n\nb", "a\n \t\n\n b", "a\r\n\r\nb", "a\x17b", "\x16a\x17", "a\n\x16\nb", "a\n\x17", "{}", "a\n\x17\n\x16\nb"])
def test_no_message_ends_its_turn(template, message):
    config, end = dataclasses.replace(SMALL, template=template), TEMPLATES[template].end
    (_, question), (_, answer) = spell(conversation(config, [(message, message)], iter(())))
    assert question.count(end) == (template == "world") + template.startswith("v")
    assert answer.count(end) == 1 and answer.endswith(end)
    assert answer.find(end) == len(answer) - len(end)


def test_labels_are_the_next_token_of_an_answer(model):
    one = [picture(1, 3), ("text", [10, 11]), ("answer", [20, 21, 22]), ("text", [12]), ("answer", [23])]
    two = [("text", [13]), ("answer", [24, 25])]
    _, labels, lengths = model.fuse([one, two])
    no = -100
    assert model.adapter["image"].length(3) == 1
    assert labels.tolist() == [[no, no, 20, 21, 22, no, 23, no], [24, 25, no, no, no, no, no, no]]
    assert lengths.tolist() == [8, 3]


@torch.no_grad()
def test_loss_is_the_mean_over_the_answers_tokens(model):
    one = [picture(1, 7), text("what?"), ("answer", [20, 21, 22]), text("more"), ("answer", [23])]
    two, three = [text("hello"), ("answer", [24, 25, 26, 27, 28, 29])], [text("no answer")]
    samples, costs = [one, two, three], []
    for segments in samples:
        logits, at = model([segments])[0][0].numpy(), 0
        for kind, data in segments:
            n = model.length([(kind, data)])
            for j in range(n if kind == "answer" else 0):
                z = logits[at + j - 1]
                costs.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[data[j]])
            at += n
    assert len(costs) == 10
    assert model.loss(samples).item() == pytest.approx(np.mean(costs), rel=1e-6)
    assert model.loss(samples, count=4).item() == pytest.approx(np.sum(costs) / 4, rel=1e-6)
    assert model.loss([three]).item() == 0
    assert model.loss([one]).item() != pytest.approx(model.loss([two]).item(), rel=1e-3)


def test_token_beyond_the_vocabulary(model):
    with pytest.raises(InputError, match="260"):
        model([[("text", [260])]])


def talk(*values, **more):
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)], **more}


GOOD = json.dumps(talk("q", "a"))


@pytest.mark.parametrize(
    "lines,place,reason",
    [
        (["{oops"], "line 2", "JSON"),
        (["[1, 2]"], "line 2", "object"),
        (["3"], "line 2", "object"),
        (["{}"], "line 2", "conversations"),
        (['{"conversations": []}'], "line 2", "conversations"),
        (['{"conversations": ["hi"]}'], "line 2", "turn 1"),
        (['{"text": 5}'], "line 2", "conversations"),
        ([json.dumps(talk("<image>what?", "a"))], "line 2", "image"),
        ([json.dumps(talk("what?", "a", image="x.png"))], "line 2", "image"),
        ([json.dumps(talk("<image>what?", "a", image=["x.png", "y.png"]))], "line 2", "image"),
        ([json.dumps(talk("what?", "a <image>", image="x.png"))], "line 2", "image"),
        ([json.dumps(talk("q", " \n"))], "line 2", "turn 2"),
        ([json.dumps(talk("q"))], "line 2", "question"),
        ([json.dumps(talk("q", "a", "q"))], "line 2", "question"),
        (['{"conversations": [{"from": "gpt", "value": "a"}]}'], "line 2", "human"),
        (['{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}'], "line 2", "gpt"),
        (['{"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "b"}]}'], "line 2", "turn 1"),
        (["", "", "{oops"], "line 4", "JSON"),
        ([json.dumps(talk("<image>?", "a", image=5))], "line 2", "image"),
        ([json.dumps(talk("<image>?", "a", image=[5]))], "line 2", "image"),
        ([json.dumps(talk("<image>?", "a", image={"path": "x.png"}))], "line 2", "image"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, lines, place, reason):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([GOOD, *lines]) + "\n")
    with pytest.raises(InputError) as e:
        read_records(path)
    assert f"{path}, {place}" in str(e.value) and reason in str(e.value)
    if not any(line == "" or line == "{oops" for line in lines):  # the same in a list
        path = tmp_path / "x.json"
        path.write_text("[" + ",".join([GOOD, *lines]) + "]")
        with pytest.raises(InputError) as e:
            read_records(path)
        assert f"{path}, record 2" in str(e.value) and reason in str(e.value)


@pytest.mark.parametrize(
    "name,content", [("x.jsonl", b""), ("x.jsonl", b"\n\n"), ("x.jsonl", b'{"text": "\xff"}\n'), ("x.json", b"[]"), ("x.json", b"{}"), ("x.json", b"[{")]
)
def test_files_that_cannot_be_used(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
        read_records(tmp_path / name)


def test_missing_files(tmp_path, model):
    for path in (tmp_path / "no.jsonl", tmp_path / "no.json", tmp_path):
        with pytest.raises(InputError, match=re.escape(str(path))):
            read_records(path)
    (tmp_path / "x.jsonl").write_text(GOOD + "\n" + json.dumps(talk("<image>?", "a", image="no.png")))
    with pytest.raises(InputError) as e:
        model.sample(read_records(tmp_path / "x.jsonl")[1])
    assert "x.jsonl, line 2" in str(e.value) and str(tmp_path / "no.png") in str(e.value)


def test_llava_file(tmp_path, model):
    (tmp_path / "sub").mkdir()
    stored(drawing(), tmp_path / "sub" / "x.png")
    records = [talk("<image>\nWhat?", "A thing.", id="1", image="sub/x.png"), talk("hi", "hello", "who?", "me", id="2")]
    (tmp_path / "x.json").write_text(json.dumps(records))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n\n" for r in records))
    for name in ("x.json", "x.jsonl"):
        first, second = read_records(tmp_path / name)
        assert record_media(first) == [("image", str(tmp_path / "sub" / "x.png"))] and record_media(second) == []
        segments = model.sample(first)
        assert torch.equal(segments[1][1], model.encoder["image"].load(tmp_path / "sub" / "x.png"))
        assert [kind for kind, _ in segments] == ["text", "image", "text", "answer"]
        assert "".join(string for _, string in spell(model.sample(second))) == "User: hi\n\nAssistant: hello\n\nUser: who?\n\nAssistant: me\n\n"


def test_a_record_of_two_pictures_can_be_read_twice(tmp_path, model):
    stored(drawing(), tmp_path / "x.png")
    stored(drawing(at=(30, 10)), tmp_path / "y.png")
    (tmp_path / "x.jsonl").write_text(json.dumps(talk("<image> and <image>", "two", image=["x.png", "y.png"])))
    record = read_records(tmp_path / "x.jsonl")[0]
    media = [("image", str(tmp_path / "x.png")), ("image", str(tmp_path / "y.png"))]
    assert record_media(record) == media
    assert record_media(record) == media  # the second epoch
    assert len(model.sample(record)) == 6


def test_records_of_text(tmp_path, model):
    (tmp_path / "x.jsonl").write_text('{"text": "ab\\n\\nc"}\n{"text": "d", "conversations": null}\n')
    first, second = read_records(tmp_path / "x.jsonl")
    assert model.sample(first) == [("answer", [98, 99, 257, 100, 0])]  # all of it learned, id 0 ends it
    assert model.sample(second) == [("answer", [101, 0])]


def test_question_puts_pictures_first(tmp_path, model):
    path = stored(drawing(), tmp_path / "x.png")
    pixels = ("image", model.encoder["image"].load(path))
    got = model.question("What?", [("image", path)])
    assert spell([got[0], got[2]]) == [("text", "User: "), ("text", "\nWhat?\n\nAssistant:")] and torch.equal(got[1][1], pixels[1])
    got = model.question("What <image>?", [("image", path)] * 2)
    assert [kind for kind, _ in got] == ["text", "image", "text", "image", "text"] and spell(got[2:3]) == [("text", "\nWhat ")]
    with pytest.raises(InputError, match="<image>"):
        model.question("<image>", [])
    blind = ModRWKV(dataclasses.replace(SMALL, image_encoder="none"))
    with pytest.raises(InputError, match="image encoder"):
        blind.question("What?", [("image", path)])
    with pytest.raises(InputError, match="image encoder"):
        blind([[pixels, text("x")]])


# ----------------------------------------------------------------------------------------------
# 8. Tokenizers


@trials(100)
@given(st.one_of(st.text(), st.lists(st.sampled_from(["\n", "User:", "Assistant:", "User", ":", "a", "é"])).map("".join)))
def test_bytes_tokenizer(string):
    tokenizer = get_tokenizer("bytes")
    want = []
    for piece in re.split("(\n\n|User:|Assistant:)", string):
        mark = [i for i, m in MARKS.items() if m == piece.encode()]
        want += mark or codes(piece)
    assert tokenizer.encode(string) == want
    assert tokenizer.decode([*want, 0]) == string.encode()
    assert (tokenizer.end, tokenizer.vocab_size) == (0, 260)


PIECES = ["User: ", "Assistant:", "\n", "\n\n", " ", "   ", "\t", "。", "，", "中文", "机器学习", "日本語", "привет"]
PIECES += ["🙂", "👨\u200d👩\u200d👧", "é", "e\u0301", "1234", "def f(x):", "\x16", "\x17", "\x00"]


@trials(150)
@given(st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3))).map("".join)))
def test_world_tokenizer_is_the_official_one(official, string):
    _, path, theirs = official
    ours = get_tokenizer(path)
    ids = ours.encode(string)
    assert ids == theirs.encode(string)
    assert ours.decode(ids) == string.encode()


def test_world_tokenizer_examples(official):
    tokenizer = get_tokenizer(official[1])
    for string, ids in {
        "\x16User: What is this?\x17Assistant:": [23, 24281, 59, 30031, 4600, 32234, 64, 24, 5585, 41693, 59],
        "\x16Assistant: hello world\x17": [23, 5585, 41693, 59, 38685, 40213, 24],
        "User: ": [24281, 59, 33],
        "<image>": [61, 34733, 63],
        " Red": [20733],
        "\n\n": [261],
        "。\n\n": [28329, 11],
    }.items():
        assert tokenizer.encode(string) == ids and tokenizer.decode(ids) == string.encode()
    assert (tokenizer.end, tokenizer.vocab_size) == (0, 65536)
    assert tokenizer.decode([0, 261, 65535]) == b"\n\n"
    config = dataclasses.replace(SMALL, tokenizer=official[1])
    assert conversation(config, [("q", "好。")], iter(()))[-1][1][-1] == 261  # not [28329, 11]
    config.template = "v2"
    assert conversation(config, [("q", "hello world")], iter(()))[-1] == ("answer", [38685, 40213, 24])


@pytest.mark.parametrize("line", ["", "5", "x 'b' 1", "2 'b' x", "2 b 1", "2 'b 1", "2 'bb' 1", "2 5 1", "2 'é' 1"], ids=lambda line: line or "empty")
def test_broken_vocabulary(tmp_path, line):
    path = tmp_path / "vocab.txt"
    path.write_text(f"1 'a' 1\n{line}\n3 'c' 1\n", encoding="utf-8")
    with pytest.raises(InputError) as e:
        WorldTokenizer(path)
    assert f"{path}, line 2" in str(e.value)


def test_vocabularies_that_are_none(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x80\x02\xff" * 100)
    for path in (tmp_path / "binary", tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match=re.escape(str(path))):
            WorldTokenizer(path)
    (tmp_path / "small").write_text("1 'a' 1\n2 'ab' 2\n")
    assert WorldTokenizer(tmp_path / "small").encode("aaba") == [1, 2, 1]
    with pytest.raises(InputError, match="98"):
        WorldTokenizer(tmp_path / "small").encode("b")


def test_gpt2_tokenizer_or_a_clear_word():
    try:
        tokenizer = get_tokenizer("gpt2")
    except InputError as e:
        assert "gpt2" in str(e) and "bytes" in str(e)
    else:
        assert tokenizer.encode("hello world") == [31373, 995] and tokenizer.decode([31373, 995]) == b"hello world"
        assert (tokenizer.end, tokenizer.vocab_size) == (50256, 50257)


# ----------------------------------------------------------------------------------------------
# 9. Generation


def finish(generator):
    """(the pieces of each step, what it returns)"""
    steps = []
    while True:
        try:
            steps.append(next(generator))
        except StopIteration as stop:
            return steps, stop.value


@pytest.fixture
def picked(monkeypatch):
    """The tokens `pick` chose, in order."""
    tokens, original = [], modrwkv.pick
    monkeypatch.setattr(modrwkv, "pick", lambda *a: tokens.append(original(*a)) or tokens[-1])
    return tokens


@pytest.fixture
def script(monkeypatch):
    """script(tokens): from now on the model gives these."""

    def to(tokens):
        tokens = iter(tokens)
        monkeypatch.setattr(modrwkv, "pick", lambda *a: torch.tensor(next(tokens)))

    return to


@torch.no_grad()
def test_greedy_is_the_argmax_of_full_passes(model, picked):
    segments = [text("User: "), picture(3, 6), text("?\n\nAssistant:")]
    steps, _ = finish(model.generate([segments], max_new_tokens=12, end=None))
    assert len(steps) == len(picked) == 12
    so_far = []
    for token in picked:
        assert token == model([segments + [("text", so_far)]] if so_far else [segments])[0][0, -1].argmax()
        so_far.append(token.item())
    assert len(set(so_far)) > 2


SAMPLING = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}, {"temperature": 1.5, "top_p": 0.8}, {"temperature": 2.0, "top_k": 50, "top_p": 0.9}]


@pytest.mark.parametrize("how", SAMPLING, ids=str)
def test_answers_do_not_depend_on_the_batch(model, how):
    samples = [[text("a")], [picture(1, 20), text("hello, world")], [text("x" * 40), picture(2, 2)], [text("b" * 100)]]
    run = lambda batch, **more: ["".join(pieces) for pieces in zip(*model.generate(batch, max_new_tokens=10, **how, **more))]
    answers = run(samples)
    assert answers == [run([segments])[0] for segments in samples] and len(set(answers)) > 1
    assert answers == run(samples)  # the same seed, the same text
    if how:
        assert answers != run(samples, seed=1)


def test_top_k_of_one_is_greedy(model):
    segments = [[text("User: hi\n\nAssistant:")]]
    greedy = list(model.generate(segments, max_new_tokens=10))
    assert list(model.generate(segments, max_new_tokens=10, temperature=3.0, top_k=1)) == greedy
    assert list(model.generate(segments, max_new_tokens=10, temperature=3.0)) != greedy


def test_characters_are_never_split(model, script):
    script(codes("é中🙂a") + [0])
    steps, _ = finish(model.generate([[text("x")]]))
    assert [p[0] for p in steps] == ["", "é", "", "", "中", "", "", "", "🙂", "a", ""]
    script(codes("中".encode()[:2] + b"a") + [0])
    assert "".join(p[0] for p in finish(model.generate([[text("x")]]))[0]) == "\ufffda"
    script(codes("ab中"))
    steps, _ = finish(model.generate([[text("x")]], max_new_tokens=4))
    assert [p[0] for p in steps] == ["a", "b", "", "\ufffd"]  # cut short, there is no more to wait for


@pytest.mark.parametrize(
    "answer,pieces",
    [
        ("a\nb\n\nc", ["a", "", "\nb", "", ""]),
        ("\n\n", ["", ""]),
        ("a\n\0", ["a", "", "\n"]),
        ("\0", [""]),
        ("a\n\n", ["a", "", ""]),
    ],
)
def test_answer_stops_at_its_end(model, script, answer, pieces):
    script([0 if b == 0 else b + 1 for b in answer.encode()])
    assert [p[0] for p in finish(model.generate([[text("x")]]))[0]] == pieces


def test_end_of_a_batch_and_of_the_budget(model, script):
    script([98, 99, 0, 99, 100, 11, 100, 11])  # by turns the first and the second answer
    steps, state = finish(model.generate([[text("x")], [text("yy")]]))
    assert steps == [["a", "b"], ["", "b"], ["", ""], ["", ""]] and state is None
    script([98] * 5)
    assert [p[0] for p in model.generate([[text("x")]], max_new_tokens=5)] == ["a"] * 5
    script([98, 11])
    assert [p[0] for p in model.generate([[text("x")]], max_new_tokens=2)] == ["a", "\n"]
    script([98, 11, 11, 99, 0])
    assert [p[0] for p in model.generate([[text("x")]], end=None)] == ["a", "\n", "\n", "b", ""]
    script([98, 257, 99])
    assert [p[0] for p in model.generate([[text("x")]])] == ["a", ""]
    with pytest.raises(InputError, match="max_new_tokens"):
        list(model.generate([[text("x")]], max_new_tokens=0))


def test_end_inside_longer_tokens(tmp_path, script):
    entries = [bytes([b]) for b in range(256)] + [b"\n\n", "。\n".encode(), b"a\n\nUser"]
    (tmp_path / "vocab").write_text("".join(f"{i + 1} {e!r} {len(e)}\n" for i, e in enumerate(entries)))
    config = dataclasses.replace(SMALL, tokenizer=str(tmp_path / "vocab"))
    model = randomise(ModRWKV(config, vocab_size=300))
    run = lambda: [p[0] for p in finish(model.generate([[("text", [1])]]))[0]]
    script([258, 11])
    assert run() == ["。", ""]
    script([98, 257])
    assert run() == ["a", ""]
    script([99, 259])
    assert run() == ["b", "a"]


@pytest.mark.parametrize(
    "tokens,how,read",
    [
        (codes("ab\n\n"), {}, codes("ab\n\n")),
        (codes("ab") + [257], {}, codes("ab") + [257]),
        (codes("ab") + [0], {}, codes("ab") + [257]),
        ([0], {}, [257]),
        (codes("abc"), {"max_new_tokens": 3}, codes("abc") + [257]),
        (codes("ab") + [0], {"end": None}, codes("ab")),
        (codes("a\n\nb"), {"end": None, "max_new_tokens": 4}, codes("a\n\nb")),
    ],
)
@torch.no_grad()
def test_state_after_an_answer(model, script, tokens, how, read):
    segments = [picture(1, 4), text("hello")]
    script(tokens)
    _, state = finish(model.generate([segments], **how))
    assert_state_equal(state, model([segments + [("text", read)]])[1])
    script(tokens)  # a chat goes on from there
    again, state2 = finish(model.generate([[text("more")]], state, **how))
    assert_state_equal(state2, model([segments + [("text", read), text("more"), ("text", read)]])[1])


def frequencies(p, n=4000, **how):
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
    g = torch.Generator().manual_seed(0)
    logits = torch.tensor(p, dtype=torch.float64).log().float() + 3
    tokens = torch.stack([pick(logits, generator=g, **how) for _ in range(n)])
    return np.bincount(tokens.numpy(), minlength=len(p)) / n


P = [0.1, 0.5, 0.15, 0.25]


@pytest.mark.parametrize(
    "how,want",
    [
        ({}, P),
        ({"temperature": 0.5}, np.square(P) / np.square(P).sum()),
        ({"temperature": 2.0}, np.sqrt(P) / np.sqrt(P).sum()),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 100}, P),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"top_k": 1, "temperature": 5.0}, [0, 1, 0, 0]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_pick_has_the_right_distribution(how, want):
    got = frequencies(P, **how)
    assert (got[np.array(want) == 0] == 0).all()
    assert abs(got - want).max() < 0.03  # nearly four standard deviations of 4000 draws


# ----------------------------------------------------------------------------------------------
# 10. Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    """(path, model, logits of a segments) of a checkpoint of ours, adapter and encoder in it."""
    model = randomise(ModRWKV(Config(n_layer=2, n_embd=48, head_size=16, template="v2", conv_kernel=4, conv_stride=3, image_trim=False)))
    save(tmp_path / "ckpt.pt", model, step=7)
    with torch.no_grad():
        return tmp_path / "ckpt.pt", model, model([[text("hi"), ("image", torch.zeros(3, 32, 40, dtype=torch.uint8)), text("?")]])[0]


def test_saved_and_loaded_is_the_same(checkpoint):
    path, model, logits = checkpoint
    again = load(path)
    assert again.config == model.config and not again.training
    with torch.no_grad():
        assert torch.equal(again([[text("hi"), ("image", torch.zeros(3, 32, 40, dtype=torch.uint8)), text("?")]])[0], logits)
    assert modrwkv.read_checkpoint(path)["step"] == 7
    assert os.listdir(path.parent) == [path.name]
    assert load(path, template="v3").config == dataclasses.replace(model.config, template="v3")


@pytest.mark.parametrize("broken", ["fsync", "write", "torch", "replace"])
def test_a_failing_save_leaves_what_was_there(checkpoint, monkeypatch, broken):
    path, model, _ = checkpoint
    before = path.read_bytes()
    other = randomise(ModRWKV(model.config), seed=1)

    def fail(*args, **more):
        raise RuntimeError("enforce fail: file not opened") if broken == "torch" else OSError(28, "No space left on device")

    name = {"fsync": "os.fsync", "write": "torch.save", "torch": "torch.save", "replace": "os.replace"}[broken]
    with monkeypatch.context() as m:
        m.setattr(name, fail)
        with pytest.raises(InputError, match=re.escape(str(path))) as e:
            save(path, other)
    assert "is still there" in str(e.value) and ("No space left" in str(e.value) or broken == "torch")
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    with pytest.raises(InputError, match="nowhere"):
        save(path.parent / "nowhere" / "x.pt", other)
    save(path, other)
    assert path.read_bytes() != before


def test_files_that_are_no_checkpoints(tmp_path, checkpoint):
    data = checkpoint[0].read_bytes()
    contents = {"text": b"not a checkpoint", "empty": b"", "half": data[: len(data) // 2], "cut": data[:-10], "missing": None}
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(tmp_path / name))):
            load(tmp_path / name)
    with pytest.raises(InputError):
        load(tmp_path)


RWKV4 = {name: torch.ones(9, 8) for name in ("emb.weight", "head.weight", "blocks.0.ffn.key.weight", "blocks.0.att.time_decay")}


@pytest.mark.parametrize(
    "content,reason",
    [
        ([1, 2], "no model"),
        (torch.ones(3), "no model"),
        ({"state_dict": {}}, "elsewhere"),
        ({"model": {"transformer.wte.weight": torch.ones(2, 2)}, "config": {}}, "emb.weight"),
        ({"model": torch.ones(2), "config": {}}, "elsewhere"),
        (RWKV4, "blocks.0.att.r_k"),
        (RWKV4 | {"blocks.0.att.time_maa_x": torch.ones(1, 1, 8), "blocks.0.att.time_faaaa": torch.ones(1, 8)}, "blocks.0.att.r_k"),
    ],
    ids=["list", "tensor", "foreign", "gpt", "model is no dict", "rwkv4", "rwkv6"],
)
def test_checkpoints_from_elsewhere(tmp_path, content, reason):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError) as e:
        load(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(e.value) and reason in str(e.value)


LOST = ["emb.weight", "head.weight", "ln_out.bias", "blocks.0.ln0.weight", "blocks.0.att.r_k", "blocks.0.att.w1", "blocks.0.att.a1", "blocks.0.att.g2"]
LOST += ["blocks.1.att.v1", "blocks.1.att.v0", "blocks.1.att.key.weight", "blocks.0.ffn.key.weight", "adapter.image.conv.weight", "encoder.image.proj.bias"]


@pytest.mark.parametrize("name", LOST)
def test_checkpoint_with_a_tensor_missing(checkpoint, name):
    path = checkpoint[0]
    data = torch.load(path)
    del data["model"][name]
    torch.save(data, path)
    with pytest.raises(InputError, match=re.escape(name)) as e:
        load(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("name", ["blocks.0.att.time_decay", "blocks.1.att.qkv.weight", "blocks.0.ffn.s_emb.weight", "adapter.image.extra", "foo"])
def test_checkpoint_with_a_tensor_too_much(checkpoint, name):
    path = checkpoint[0]
    data = torch.load(path)
    data["model"][name] = torch.ones(3)
    torch.save(data, path)
    with pytest.raises(InputError, match=re.escape(name)):
        load(path)


MATRICES = ["head.weight", "blocks.1.att.w2", "blocks.1.ffn.value.weight", "adapter.image.mlp.0.weight"]
VECTORS = ["blocks.0.att.x_r", "blocks.0.att.ln_x.weight", "ln_out.bias"]


@pytest.mark.parametrize("change,name", [("longer", name) for name in MATRICES + VECTORS] + [("transposed", name) for name in MATRICES])
def test_checkpoint_with_a_wrong_shape(checkpoint, name, change):
    path = checkpoint[0]
    data = torch.load(path)
    x = data["model"][name]
    data["model"][name] = torch.cat([x, x], -1) if change == "longer" else x.mT.contiguous()
    torch.save(data, path)
    with pytest.raises(InputError, match=re.escape(name)) as e:
        load(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("name", ["emb.weight", "blocks.0.att.r_k", "blocks.0.att.w1", "blocks.0.ffn.key.weight"])
def test_checkpoint_whose_sizes_cannot_be_read(checkpoint, name):
    path = checkpoint[0]
    data = torch.load(path)
    for wrong in (data["model"][name].flatten(), 5):
        data["model"][name] = wrong
        torch.save(data, path)
        with pytest.raises(InputError, match=re.escape(str(path))):
            load(path)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"model": {"emb.weight": Evil(tmp_path / "ran")}, "config": {}}, tmp_path / "torch.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"emb.weight": Evil(tmp_path / "ran")}))
    for name in ("torch.pt", "pickle.pt"):
        with pytest.raises(InputError, match=name):
            load(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileExistsError):  # it would have run
        (tmp_path / "ran").mkdir()
        torch.load(tmp_path / "torch.pt", weights_only=False)


def test_a_language_model_is_given_eyes(tmp_path):
    torch.save(official_weights(2, 64), tmp_path / "x.pth")
    blind, seeing = load(tmp_path / "x.pth"), load(tmp_path / "x.pth", image_encoder="patch", tokenizer="bytes")
    assert "image" in seeing.encoder and "image" not in blind.encoder
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(blind(tokens)[0], seeing(tokens)[0])


@pytest.mark.parametrize("change", [{"n_embd": 100}, {"template": "v9"}, {"image_encoder": "clip"}, {"image_height": 40}], ids=str)
def test_impossible_settings(change):
    with pytest.raises(InputError, match=next(iter(change))):
        ModRWKV(dataclasses.replace(Config(), **change))


# ----------------------------------------------------------------------------------------------
# 11. Flags


@dataclass
class Things:
    """things"""

    number: int = setting(3, "a number")
    rate: float = setting(0.5, "a rate, in % of something")
    name: str = setting("x", "a name")
    loud: bool = setting(False, "a switch")
    quiet: bool = setting(True, "another switch")


@pytest.mark.parametrize(
    "argv,want",
    [
        ([], {}),
        (["--number=4"], {"number": 4}),
        (["--number", "4", "--rate", "1e-3"], {"number": 4, "rate": 1e-3}),
        (["--name="], {"name": ""}),
        (["--name=a=b c"], {"name": "a=b c"}),
        (["--loud"], {"loud": True}),
        (["--loud", "--number=1"], {"loud": True, "number": 1}),
        (["--loud=1", "--quiet=False"], {"loud": True, "quiet": False}),
        (["--loud", "yes", "--quiet", "no"], {"loud": True, "quiet": False}),
        (["--number=-2"], {"number": -2}),
    ],
    ids=" ".join,
)
def test_flags(argv, want):
    config, things, given_names = flags("about", Config, Things, argv=[*argv, "--n_layer=5"])
    assert things == dataclasses.replace(Things(), **want) and config == dataclasses.replace(Config(), n_layer=5)
    assert given_names == {*want, "n_layer"}


@pytest.mark.parametrize(
    "argv,words",
    [
        (["--number=four"], ["--number", "four"]),
        (["--rate=x"], ["--rate", "x"]),
        (["--loud=maybe"], ["--loud", "maybe"]),
        (["--number"], ["--number"]),
        (["--numbr=4"], ["--numbr", "--number"]),
        (["--n_layers", "4"], ["--n_layers", "--n_layer"]),
        (["--qwertz"], ["--qwertz"]),
        (["--numb=4"], ["--numb", "--number"]),  # no abbreviations: a typo must not set something
        (["stray"], ["stray"]),
    ],
    ids=" ".join,
)
def test_wrong_flags(capsys, argv, words):
    with pytest.raises(SystemExit) as e:
        flags("about", Config, Things, argv=argv)
    message = capsys.readouterr().err
    assert e.value.code == 2 and all(word in message for word in words) and message.count("\n") == 1


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        flags("what it is about", Config, Things, argv=["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "what it is about" in out and "in % of something [0.5]" in out
    for field in [*dataclasses.fields(Config), *dataclasses.fields(Things)]:
        assert f"--{field.name} " in out and " ".join(field.metadata["help"].split()) in out and f"[{field.default}]" in out


BYTES = modrwkv.get_tokenizer("bytes")
REPO = Path(modrwkv.__file__).resolve().parent
DIGITS, SHAKESPEARE = REPO / "data/digits/prepare.py", REPO / "data/shakespeare/prepare.py"
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
TINY = ("--n_layer=2", "--n_embd=64", "--head_size=32", "--batch_size=8", "--device=cpu", "--dtype=float32")


# ---------------------------------------------------------------------------------------------- helpers


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(script, *args, cwd, ok=True, **how):
    """A script of the repo, or a path, in a process of its own; `ok`: it has to end well."""
    result = subprocess.run([sys.executable, str(REPO / script), *map(str, args)], cwd=cwd, env=ENV, text=True, capture_output=True, timeout=300, **how)
    assert not ok or result.returncode == 0, result.stdout + result.stderr
    return result


def complaint(result):
    """The one line, besides progress, that a failed run left on stderr."""
    assert result.returncode != 0
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip() and not re.search(r"\d+%\|", line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def refusal(main, args, capsys):
    """The message with which main(args), in this process, gives up."""
    with pytest.raises((InputError, SystemExit)) as e:
        main(list(map(str, args)))
    if isinstance(e.value, InputError):
        message = f"error: {e.value}"
    else:
        assert e.value.code not in (0, None)
        message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message
    return message


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def steps(out):
    return [x for x in log(out) if "loss" in x]


def losses(out):
    return [(x["step"], x["loss"]) for x in steps(out)]


def tensors(out):
    return read_checkpoint(Path(out) / "ckpt.pt")["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def jsonl(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def dialogue(*pairs, **more):
    return more | {"conversations": [{"from": who, "value": value} for pair in pairs for who, value in zip(("human", "gpt"), pair)]}


def bars(path, n):
    """A picture of n black bars on white."""
    image = Image.new("L", (64, 32), "white")
    for i in range(n):
        ImageDraw.Draw(image).rectangle((4 + 7 * i, 6, 7 + 7 * i, 26), fill="black")
    image.save(path)


def say_all(pieces):
    """What `generate` says to its one sample, and the state it returns."""
    text = ""
    while True:
        try:
            text += next(pieces)[0]
        except StopIteration as stop:
            return text, stop.value


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A folder with a.jsonl: how many bars, and is that even; small enough to be learned by heart in part."""
    folder = tmp_path_factory.mktemp("counting")
    records = []
    for n, word in enumerate("one two three four five six seven eight".split(), 1):
        bars(folder / f"{n}.png", n)
        records.append(dialogue(("<image>\nHow many?", word), ("Loud?", word.upper()), image=f"{n}.png", task="read"))
        records.append(dialogue(("<image>\nEven?", "no" if n % 2 else "yes"), image=f"{n}.png", task="even"))
    jsonl(folder / "a.jsonl", *records)
    return folder


@pytest.fixture(scope="module")
def trained(counting):
    """(out_dir, the run) of a model trained on `counting`, in its folder."""
    flags = ("--max_steps=100", "--learning_rate=4e-3", "--warmup_steps=10", "--eval_interval=50", "--eval_samples=5")
    result = run("train.py", "--data=a.jsonl", "--val_data=a.jsonl", *TINY, *flags, cwd=counting)
    return counting / "out", result


@pytest.fixture(scope="module")
def trained_model(trained):
    return load(trained[0] / "ckpt.pt")


# ---------------------------------------------------------------------------------------------- data/digits/prepare.py


def prepare_digits(monkeypatch, out, *args):
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"--out={out}", *args])
    runpy.run_path(str(DIGITS), run_name="__main__")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    run(DIGITS, "--pictures=60", f"--out={folder}", cwd=folder)
    return folder


def test_digits_are_a_function_of_the_seed(digits, tmp_path, monkeypatch):
    first = contents(digits)
    assert len(first) == 2 + 60 + 6
    prepare_digits(monkeypatch, tmp_path, "--pictures=60")
    assert contents(tmp_path) == first
    prepare_digits(monkeypatch, tmp_path, "--pictures=60", "--seed=2")  # into the same folder: nothing old stays
    other = contents(tmp_path)
    assert other.keys() == first.keys()
    assert [name for name in first if other[name] == first[name]] == []


def test_digits_are_records_that_can_be_read(digits):
    for name, n in (("train", 60), ("val", 6)):
        records = read_records(digits / f"{name}.jsonl")
        assert len(records) == n and len({r["id"] for r in records}) == n
        for r in records:
            turns = modrwkv.record_turns(r)
            assert turns[0][0].startswith("<image>\n") and r["task"] in ("read", "count", "sum", "largest")
            [(kind, path)] = modrwkv.record_media(r)
            with Image.open(path) as image:
                assert kind == "image" and image.format == "PNG" and image.height == 56 and image.getextrema()[0] < 100
        if name == "val":
            assert all(len(modrwkv.record_turns(r)) == 1 for r in records)


def test_digits_answers_are_true_and_writers_are_held_out(tmp_path, monkeypatch):
    """A stand-in for load_digits hands out the scans and notes which ones become a picture."""
    real = sklearn.datasets.load_digits()
    drawn, pictures, save = [], {}, Image.Image.save

    class Scan:
        def __init__(self, i):
            self.i = i

        @property
        def flat(self):
            drawn.append(self.i)
            return real.images[self.i].flat

    class Scans:
        images, target = [Scan(i) for i in range(len(real.images))], real.target

    def note(image, path, **how):
        pictures[os.path.relpath(path, tmp_path)] = drawn[:]
        drawn.clear()
        save(image, path, **how)

    monkeypatch.setattr(sklearn.datasets, "load_digits", Scans)
    monkeypatch.setattr(Image.Image, "save", note)
    prepare_digits(monkeypatch, tmp_path, "--pictures=400")
    records = {name: read_records(tmp_path / f"{name}.jsonl") for name in ("train", "val")}
    assert [r["image"] for r in records["train"] + records["val"]] == list(pictures)
    used = {name: {i for r in records[name] for i in pictures[r["image"]]} for name in records}
    assert max(used["train"]) < 0.8 * len(real.images) <= min(used["val"]) + 1

    for r in records["train"] + records["val"]:
        digits = [int(real.target[i]) for i in pictures[r["image"]]]
        number = "".join(map(str, digits))
        truths = {
            "What number|Read|does it say": number,
            "How many|Count": str(len(digits)),
            "sum|Add": "+".join(number) + f"={sum(digits)}",
            "largest": str(max(digits)),
        }
        for question, answer in modrwkv.record_turns(r):
            assert [truth for words, truth in truths.items() if re.search(words, question)] == [answer]
        reading = r["task"] == "read" and len(r["conversations"]) == 2
        assert r["level"] == len(digits) if reading else r["level"] > len(digits)  # the curriculum reads first
    assert {len(r["conversations"]) for r in records["train"]} == {2, 4}  # one question about a picture, or two
    for name in records:
        assert {len(pictures[r["image"]]) for r in records[name]} == {1, 2, 3, 4, 5}
        assert {r["task"] for r in records[name]} == {"read", "count", "sum", "largest"}


# ---------------------------------------------------------------------------------------------- data/shakespeare/prepare.py


PLAY = "".join(f"ROMEO:\nLine {i} of a play, naïve — and so it goes.\n\n" for i in range(120))


def test_shakespeare_from_a_local_file(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY, encoding="utf-8")
    run(SHAKESPEARE, "play.txt", "--out=.", cwd=tmp_path)
    parts = [read_records(tmp_path / f"{name}.jsonl") for name in ("train", "val")]
    assert [len(part) for part in parts] == [1, 1]
    assert parts[0][0]["text"] + parts[1][0]["text"] == PLAY
    assert len(parts[0][0]["text"]) == int(0.9 * len(PLAY))


@pytest.mark.parametrize("content", [None, b"short", b"\xff\xfe" * 50], ids=["missing", "short", "not UTF-8"])
def test_shakespeare_from_a_bad_file(content, tmp_path):
    if content is not None:
        (tmp_path / "play.txt").write_bytes(content)
    result = run(SHAKESPEARE, "play.txt", "--out=.", cwd=tmp_path, ok=False)
    assert "play.txt" in complaint(result)
    assert not list(tmp_path.glob("*.jsonl"))


def test_text_alone(tmp_path):
    """In a copy of the repository, for --data=shakespeare is prepared beside train.py."""
    for path in ("modrwkv.py", "train.py", "sample.py", "data/shakespeare/prepare.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / path, tmp_path / path)
    (tmp_path / "data/shakespeare/tinyshakespeare.txt").write_text(PLAY, encoding="utf-8")  # so nothing is downloaded
    flags = ("--data=shakespeare", "--out_dir=plays", "--max_steps=30", "--ctx_len=32", "--warmup_steps=5", "--learning_rate=5e-3")
    result = run(tmp_path / "train.py", *TINY, *flags, cwd=tmp_path)
    curve = [loss for _, loss in losses(tmp_path / "plays")]
    assert len(curve) == 30 and sum(curve[-5:]) < 0.7 * sum(curve[:5])
    assert not [name for name in tensors(tmp_path / "plays") if name.startswith(("encoder.", "adapter."))]

    command = shlex.split(result.stdout.splitlines()[-1])
    assert command == ["python", "sample.py", "--out_dir=plays", "--raw"]
    went_on = run(tmp_path / "sample.py", *command[2:], "--prompt=ROMEO:\nLine", "--max_new_tokens=40", cwd=tmp_path).stdout
    text_model = load(tmp_path / "plays/ckpt.pt")
    ids, new = BYTES.encode("ROMEO:\nLine"), []
    while len(new) < 40 and BYTES.end not in new:
        logits, _ = text_model(torch.tensor([ids + new]))
        new.append(int(logits[0, -1].argmax()))
    assert went_on == BYTES.decode(new).decode("utf-8", "replace") + "\n"


def test_held_out_text_is_predicted_once_throughout(tmp_path):
    texts = ["abc " * 33, "x", "hello"]
    records = read_records(jsonl(tmp_path / "t.jsonl", *({"text": t} for t in texts)))
    text_model = modrwkv.ModRWKV(modrwkv.Config(n_layer=1, n_embd=32, head_size=32, image_encoder="none"))
    windows = train.held_out_samples(text_model, records, 32, 10**6)
    assert all(len(sample) == 1 and len(sample[0][1]) <= 33 for sample in windows)
    predicted = [i for [(_, ids)] in windows for i in ids[1:]]
    assert predicted == [i for t in texts for i in BYTES.encode(t)[1:] + [BYTES.end]]
    assert sum(map(train.learned_tokens, windows)) == len(predicted)


# ---------------------------------------------------------------------------------------------- train.py, end to end


def test_a_run_leaves_its_log_checkpoint_and_curve(trained):
    out, _ = trained
    assert sorted(p.name for p in out.iterdir()) == ["ckpt.pt", "log.jsonl", "loss.png"]
    assert [x["step"] for x in steps(out)] == list(range(1, 101))
    for x in steps(out):
        assert x.keys() == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"}
        assert all(math.isfinite(value) for value in x.values()) and x["tokens"] > 0 and x["grad_norm"] > 0
    curve = [loss for _, loss in losses(out)]
    assert sum(curve[-5:]) < 0.3 * sum(curve[:5])
    assert [x["step"] for x in log(out) if "val_loss" in x] == [50, 100]
    with Image.open(out / "loss.png") as image:
        image.load()
        assert image.format == "PNG" and image.getextrema()[0][0] < 255


def test_a_run_scores_what_was_held_out(trained, counting, trained_model):
    out, result = trained
    samples = [trained_model.sample(r) for r in read_records(counting / "a.jsonl")]
    with torch.no_grad():
        loss = trained_model.loss(samples).item()  # in one batch: batches of answers of unequal length must not be averaged
    last = log(out)[-1]
    assert last["val_loss"] == pytest.approx(loss, abs=1e-5)
    assert f"held-out loss {last['val_loss']:.4f}" in result.stdout
    assert last["n"] == 24
    [line] = [x for x in result.stdout.splitlines() if x.startswith("read ")]
    n, exact = re.match(r"read +(\d+) +([\d.]+) %", line).groups()
    shown = run("sample.py", "--eval=a.jsonl", cwd=counting).stdout.splitlines()
    scores = json.loads(shown[-1])
    assert n == "16" and exact == f"{100 * scores['tasks']['read']['exact']:.1f}"
    assert {k: v for k, v in scores.items() if k != "tasks"} == {k: last[k] for k in ("n", "exact", "chars", "majority")}
    assert shown[:-1] == result.stdout.splitlines()[-len(shown) - 1 : -2]  # the same table


def test_the_last_line_names_the_next_command(trained, counting, trained_model):
    out, result = trained
    command = shlex.split(result.stdout.splitlines()[-1].replace("PICTURE.png", "3.png"))
    assert command[:3] == ["python", "sample.py", "--out_dir=out"]
    answer = run("sample.py", *command[2:], cwd=counting)
    prompt = next(x for x in command if x.startswith("--prompt=")).removeprefix("--prompt=")
    expected, _ = say_all(trained_model.generate([trained_model.question(f"<image>\n{prompt}", [("image", str(counting / "3.png"))])]))
    assert answer.stdout.strip() == expected.strip() and answer.stderr == ""


def test_a_second_run_does_not_touch_the_first(trained, counting, capsys, monkeypatch):
    monkeypatch.chdir(counting)
    before = contents(trained[0])
    message = refusal(train.main, [*TINY, "--data=a.jsonl", "--max_steps=1"], capsys)
    assert "ckpt.pt" in message and "--resume" in message and "--out_dir" in message
    assert contents(trained[0]) == before
    assert "100 steps" in refusal(train.main, ["--resume"], capsys)
    assert contents(trained[0]) == before


def test_the_same_seed_gives_the_same_run(counting, tmp_path):
    flags = (f"--data={counting / 'a.jsonl'}", f"--val_data={counting / 'a.jsonl'}")
    one, again = (start(tmp_path / name, *flags, "--seed=1") for name in ("one", "again"))
    assert same(one, again)
    assert not same(one, start(tmp_path / "other", *flags, "--seed=2"))


def start(out, *flags):
    """The weights after one step, in this process."""
    train.main([*TINY, *flags, f"--out_dir={out}", "--max_steps=1"])
    return tensors(out)


def test_a_record_may_hold_several_pictures(tmp_path):
    for n in (1, 2, 3):
        bars(tmp_path / f"{n}.png", n)
    records = [dialogue(("<image> and <image>: more bars?", "second"), image=["1.png", f"{n}.png"]) for n in (2, 3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    flags = (f"--data={tmp_path / 'a.json'}", f"--val_data={tmp_path / 'a.json'}", f"--out_dir={tmp_path / 'out'}", "--max_steps=10")
    train.main([*TINY, *flags])  # each record is read again and again
    curve = [loss for _, loss in losses(tmp_path / "out")]
    assert len(curve) == 10 and curve[-1] < curve[0]


# ---------------------------------------------------------------------------------------------- kill and resume


RUN = (*TINY, "--data=train.jsonl", "--val_data=two.jsonl", "--level_steps=8", "--warmup_steps=5", "--lr_final=1e-4", "--eval_interval=12")


def stop_at(step, *flags, cwd, out, how=signal.SIGKILL):
    """Starts train.py and sends it a signal as soon as the log of `out` says that `step` is done; returns what it has said."""
    with open(cwd / "said.txt", "w+") as said:
        process = subprocess.Popen(
            [sys.executable, str(REPO / "train.py"), *flags, f"--out_dir={out}"], cwd=cwd, env=ENV, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            done = 0
            while done < step and process.poll() is None:
                time.sleep(0.002)
                if (cwd / out / "log.jsonl").exists():
                    lines = (cwd / out / "log.jsonl").read_text().split("\n")[:-1]  # the last one is not whole yet
                    done = json.loads(lines[-1])["step"] if lines else 0
            process.send_signal(how)
            process.wait(60)
        finally:
            process.kill()
        said.seek(0)
        text = said.read()
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), text  # or it ended by itself
    return text


@pytest.fixture(scope="module")
def whole(digits):
    """The out_dir of a run that nobody interrupts; two.jsonl is little to score, which saves time."""
    lines = (digits / "val.jsonl").read_text().splitlines(keepends=True)
    (digits / "two.jsonl").write_text("".join(lines[:2]))
    run("train.py", *RUN, "--max_steps=30", "--save_interval=5", "--out_dir=whole", cwd=digits)
    return digits / "whole"


def agree(a, b):
    assert losses(a) == losses(b)  # to the last bit, and each step once
    assert [x for x in log(a) if "val_loss" in x] == [x for x in log(b) if "val_loss" in x]
    assert same(tensors(a), tensors(b))


def test_killed_before_the_first_checkpoint(whole, digits, monkeypatch, capsys):
    flags = (*RUN, "--max_steps=30", "--save_interval=25")
    stop_at(3, *flags, cwd=digits, out="early")
    assert not (digits / "early/ckpt.pt").exists()
    monkeypatch.chdir(digits)
    assert "early/ckpt.pt" in refusal(train.main, ["--resume", "--out_dir=early"], capsys)
    train.main([*flags, "--out_dir=early"])  # afresh, and what the log said is forgotten
    agree(digits / "early", whole)


def test_killed_and_resumed(whole, digits, monkeypatch):
    stop_at(16, *RUN, "--max_steps=30", "--save_interval=5", cwd=digits, out="once")
    monkeypatch.chdir(digits)
    train.main(["--resume", "--out_dir=once"])
    agree(digits / "once", whole)


def test_killed_twice_and_resumed(whole, digits):
    stop_at(7, *RUN, "--max_steps=30", "--save_interval=5", cwd=digits, out="twice")
    stop_at(18, "--resume", cwd=digits, out="twice")
    with open(digits / "twice/log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')  # a line that the kill tore
    (digits / "twice/ckpt.pt.partial").write_bytes(b"half a checkpoint")
    resumed = run("train.py", "--resume", "--out_dir=twice", cwd=digits)
    assert re.search(r"from step (15|20|25)\b", resumed.stdout)
    agree(digits / "twice", whole)
    assert sorted(p.name for p in (digits / "twice").iterdir()) == ["ckpt.pt", "log.jsonl", "loss.png"]


def test_killed_and_resumed_with_micro_batches(digits, monkeypatch):
    flags = (*RUN, "--max_steps=20", "--save_interval=3", "--grad_accum=2")
    monkeypatch.chdir(digits)
    train.main([*flags, "--out_dir=micro"])
    stop_at(8, *flags, cwd=digits, out="micro-killed")
    train.main(["--resume", "--out_dir=micro-killed"])
    agree(digits / "micro-killed", digits / "micro")
    assert read_checkpoint(digits / "micro-killed/ckpt.pt")["train"]["grad_accum"] == 2


@pytest.mark.parametrize("save_interval", [2, 25])
def test_interrupted_with_control_c(save_interval, whole, digits, monkeypatch, tmp_path):
    out = tmp_path / "out"
    said = stop_at(3, *RUN, "--max_steps=30", f"--save_interval={save_interval}", cwd=digits, out=out, how=signal.SIGINT)
    assert "Traceback" not in said
    assert ("--resume" in said) == (out / "ckpt.pt").exists()  # no advice that cannot be followed


def test_resume_keeps_the_settings_and_refuses_another_model(whole, digits, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(digits)
    shutil.copytree(whole, tmp_path / "more")
    before = contents(tmp_path / "more")
    message = refusal(train.main, ["--resume", f"--out_dir={tmp_path / 'more'}", "--n_embd=128"], capsys)
    assert "n_embd=64" in message and contents(tmp_path / "more") == before
    train.main(["--resume", f"--out_dir={tmp_path / 'more'}", "--max_steps=33"])
    assert losses(tmp_path / "more")[:30] == losses(whole) and len(losses(tmp_path / "more")) == 33
    old, new = (read_checkpoint(out / "ckpt.pt")["train"] for out in (whole, tmp_path / "more"))
    assert {k for k in old if old[k] != new[k]} == {"resume", "out_dir", "max_steps"}


# ---------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "flags, expected",
    [
        (dict(schedule="wsd", max_steps=100, warmup_steps=10, decay_fraction=0.4, lr_final=0.2), {0: 0.1, 9: 1, 10: 1, 59: 1, 79: 0.6, 99: 0.2}),
        (dict(schedule="wsd", max_steps=100, warmup_steps=0, decay_fraction=1.0, lr_final=0.0), {0: 0.99, 49: 0.5, 99: 0}),
        (dict(schedule="cosine", max_steps=1100, warmup_steps=100), {0: 0.01, 49: 0.5, 99: 1, 349: (2 + 2**0.5) / 4, 599: 0.5, 1099: 0}),
        (dict(schedule="cosine", max_steps=200, warmup_steps=0, lr_final=0.5), {49: 0.5 + (2 + 2**0.5) / 8, 99: 0.75, 199: 0.5}),
        (dict(schedule="constant", max_steps=100, warmup_steps=10, lr_final=0.2), {0: 0.1, 4: 0.5, 9: 1, 50: 1, 99: 1}),
        (dict(schedule="constant", max_steps=100, warmup_steps=0), {0: 1, 99: 1}),
    ],
)
def test_learning_rate(flags, expected):
    settings = train.Train(learning_rate=1.0, **flags)
    assert {step: train.learning_rate(step, settings) for step in expected} == pytest.approx(expected, abs=1e-9)


def test_the_learning_rate_of_a_run(whole):
    peak, final = 2e-3, 1e-4
    expected = [peak * n / 5 for n in range(1, 6)] + [peak] * 10 + [final + (peak - final) * (1 - n / 15) for n in range(1, 16)]
    assert [x["lr"] for x in steps(whole)] == pytest.approx(expected, rel=1e-9)
    groups = read_checkpoint(whole / "ckpt.pt")["optimizer"]["param_groups"]  # what the optimizer's last step was made with
    assert sorted(group["lr"] for group in groups) == pytest.approx([final, final, 2 * final], rel=1e-9)


# ---------------------------------------------------------------------------------------------- gradient accumulation, processes


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Answers of 1 and of 40 characters, with pictures, without, and text; as sequences all about as long, so that batches mix them."""
    folder = tmp_path_factory.mktemp("unequal")
    rng, records = random.Random(0), []
    for i in range(40):
        kind = rng.choice(("picture", "chat", "chat", "text"))
        answer = chr(97 + i % 8) * rng.choice((1, 40))
        filler = 64 - len(answer)
        if kind == "picture":
            bars(folder / f"{i}.png", i % 8 + 1)
            records.append(dialogue(("<image>\n" + "x" * (filler - 24), answer), image=f"{i}.png"))
        elif kind == "chat":
            records.append(dialogue(("x" * filler, answer)))
        else:
            records.append({"text": chr(97 + i % 8) * 88})
    jsonl(folder / "a.jsonl", *records)
    jsonl(folder / "val.jsonl", *records[:3], {"text": "hold me"})
    return folder


EQUAL = (*TINY, "--batch_size=16", "--max_steps=12", "--warmup_steps=4", "--data=a.jsonl", "--val_data=val.jsonl")


@pytest.fixture(scope="module")
def alone(unequal):
    """The losses of one process without micro-batches."""
    here = os.getcwd()
    os.chdir(unequal)
    train.main([*EQUAL, "--out_dir=alone"])
    os.chdir(here)
    return [loss for _, loss in losses(unequal / "alone")]


def pieces(folder, rank, world, grad_accum):
    """The kinds of segments and the number of learned tokens in each micro-batch of a process."""
    settings = train.Train(batch_size=16, grad_accum=grad_accum, max_steps=12)
    records = read_records(folder / "a.jsonl")
    batches = train.Batches(records, settings, modrwkv.ModRWKV(modrwkv.Config(n_layer=1, n_embd=64)))
    found = [[[kind for x in micro for kind, _ in x] for micro in batches(step, rank, world)] for step in range(12)]
    counts = [[sum(map(train.learned_tokens, micro)) for micro in batches(step, rank, world)] for step in range(12)]
    return found, counts


def test_micro_batches_change_nothing(unequal, alone, monkeypatch):
    counts = pieces(unequal, 0, 1, 4)[1]
    assert max(max(c) / min(c) for c in counts) > 3  # a mean of their means would be another loss
    monkeypatch.chdir(unequal)
    train.main([*EQUAL, "--out_dir=four", "--grad_accum=4"])
    assert [loss for _, loss in losses(unequal / "four")] == pytest.approx(alone, abs=1e-5)
    a, b = ([x["grad_norm"] for x in steps(unequal / out)] for out in ("alone", "four"))
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_two_processes_change_nothing(grad_accum, unequal, alone):
    seen = [pieces(unequal, rank, 2, grad_accum)[0] for rank in (0, 1)]
    blind = [["image" in kinds[-1] for kinds in steps_of] for steps_of in seen]
    assert any(a != b for a, b in zip(*blind))  # one process without a picture while the other has some
    if grad_accum == 2:  # and pictures that only a micro-batch before the exchange has seen
        assert any("image" in micro[0] and "image" not in micro[1] for steps_of in seen for micro in steps_of)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out = f"two-{grad_accum}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    command += [str(REPO / "train.py"), *EQUAL, f"--out_dir={out}", f"--grad_accum={grad_accum}"]
    result = subprocess.run(command, cwd=unequal, env=ENV, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [loss for _, loss in losses(unequal / out)] == pytest.approx(alone, abs=1e-5)
    a, b = ([x["grad_norm"] for x in steps(unequal / o)] for o in ("alone", out))
    assert a == pytest.approx(b, rel=1e-4)
    assert log(unequal / out)[-1]["val_loss"] == pytest.approx(log(unequal / "alone")[-1]["val_loss"], abs=1e-5)
    assert result.stdout.count("held-out loss") == 1  # one process speaks


# ---------------------------------------------------------------------------------------------- phases


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Eight records, all equally long: each batch of eight is all of them."""
    folder = tmp_path_factory.mktemp("letters")
    for n in range(8):
        bars(folder / f"{n}.png", n + 1)
    return jsonl(folder / "a.jsonl", *(dialogue(("<image>\nHow?", "abcdefgh"[n]), image=f"{n}.png") for n in range(8)))


@pytest.mark.parametrize("phase", ["adapter", "all"])
def test_phases(phase, letters, trained, tmp_path):
    start_from = trained[0] / "ckpt.pt"
    flags = (f"--init_from={start_from}", f"--phase={phase}", f"--data={letters}", f"--val_data={letters}", f"--out_dir={tmp_path}")
    train.main([*flags, "--batch_size=8", "--device=cpu", "--dtype=float32", "--max_steps=4", "--schedule=constant", "--warmup_steps=0"])
    before, after = tensors(trained[0]), tensors(tmp_path)
    assert before.keys() == after.keys()
    signal_parts = {name for name in before if name.startswith(("encoder.", "adapter."))}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == (signal_parts if phase == "adapter" else set(before))

    given = load(start_from)  # the first loss by hand
    total, n = 0.0, 0
    for i, letter in enumerate("abcdefgh"):
        answer = BYTES.encode(f" {letter}") + BYTES.encode("\n\n")
        pixels = given.encoder["image"].load(str(letters.parent / f"{i}.png"))
        with torch.no_grad():
            logits, _ = given([[("text", BYTES.encode("User: ")), ("image", pixels), ("text", BYTES.encode("\nHow?\n\nAssistant:") + answer)]])
        p = logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        total, n = total - p[range(len(answer)), answer].sum().item(), n + len(answer)
    assert losses(tmp_path)[0][1] == pytest.approx(total / n, rel=1e-5)


# ---------------------------------------------------------------------------------------------- batches


class Echo:
    """Stands in for the model: a sample is its record's id, or the tokens of its text."""

    def sample(self, record):
        return record["id"] if "conversations" in record else [("answer", list(range(len(record["text"]))))]


def batches(levels, **settings):
    rng = random.Random(0)
    records = [dialogue(("q" * rng.randint(1, 50), "a"), id=i, level=level) for i, level in enumerate(levels)]
    return train.Batches(records, train.Train(**dict(batch_size=8, level_steps=0) | settings), Echo())


def whole_batch(b, step):
    [batch] = b(step, 0, 1)
    return batch


def test_an_epoch_holds_each_record_once():
    b = batches([1] * 64)
    epochs = [[i for step in range(start, start + 8) for i in whole_batch(b, step)] for start in (0, 8)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64))
    assert epochs[0] != epochs[1]
    b = batches([1] * 40)  # an epoch ends in the middle of a batch
    counts = Counter(i for step in range(40) for i in whole_batch(b, step))
    assert counts == {i: 8 for i in range(40)}
    counts = Counter(i for step in range(8) for i in whole_batch(b, step))
    assert set(counts.values()) == {1, 2} and len(counts) == 40


def test_a_batch_depends_on_seed_and_step_alone():
    levels = [n % 5 + 1 for n in range(50)]
    expected = [whole_batch(batches(levels, level_steps=8), step) for step in range(40)]
    order = list(range(40))
    random.Random(1).shuffle(order)
    b = batches(levels, level_steps=8)
    assert {step: whole_batch(b, step) for step in order} == dict(enumerate(expected))
    other = batches(levels, level_steps=8, seed=2)
    assert [whole_batch(other, step) for step in range(40)] != expected


@pytest.mark.parametrize("world, grad_accum", [(1, 4), (2, 1), (2, 2), (4, 2)])
def test_micro_batches_share_out_the_batch(world, grad_accum):
    b = batches([1] * 100, grad_accum=grad_accum)
    for step in range(20):
        shares = [b(step, rank, world) for rank in range(world)]
        assert [len(share) for share in shares] == [grad_accum] * world
        micro = [m for share in shares for m in share]
        assert {len(m) for m in micro} == {8 // (world * grad_accum)}
        assert Counter(i for m in micro for i in m) == Counter(whole_batch(batches([1] * 100), step))


def test_curriculum():
    levels = [n % 5 + 1 for n in range(64)]
    b = batches(levels, level_steps=16)
    seen = [{levels[i] for i in whole_batch(b, step)} for step in range(80)]
    for top in range(1, 6):
        assert set.union(*seen[16 * (top - 1) : 16 * top]) == set(range(1, top + 1))
    assert sorted(i for step in range(64, 72) for i in whole_batch(b, step)) == list(range(64))
    assert set.union(*({levels[i] for i in whole_batch(batches(levels), step)} for step in range(8))) == {1, 2, 3, 4, 5}  # without one
    assert whole_batch(batches([5] * 20, level_steps=16), 0)  # all too hard: then all are ready


def test_long_texts_are_cut():
    records = [{"text": "x" * 40}, {"text": "x" * 20}]
    b = train.Batches(records, train.Train(batch_size=8, ctx_len=32, level_steps=0), Echo())
    windows = [ids for step in range(64) for [(kind, ids)] in whole_batch(b, step)]
    assert {len(ids) for ids in windows} == {33, 20}
    assert {tuple(ids) for ids in windows} == {tuple(range(start, start + 33)) for start in range(8)} | {tuple(range(20))}
    again = train.Batches(records, train.Train(batch_size=8, ctx_len=32, level_steps=0), Echo())
    assert whole_batch(again, 63) == whole_batch(b, 63)


# ---------------------------------------------------------------------------------------------- sample.py


def test_score():
    turn = lambda *truths, **more: dialogue(*(("q", t) for t in truths), **more)
    records = [turn("12", " 12 ", task="read"), turn("7", task="read"), turn("yes", task="even"), turn("no", task="even")]
    result = sample.score(records, ["12", "1", "9", "yes", "nope"])
    assert result["tasks"]["read"] == {"n": 3, "exact": 1 / 3, "chars": 3 / 5, "majority": 2 / 3}
    assert result["tasks"]["even"] == {"n": 2, "exact": 1 / 2, "chars": 5 / 7, "majority": 1 / 2}
    assert {k: v for k, v in result.items() if k != "tasks"} == {"n": 5, "exact": 2 / 5, "chars": 8 / 12, "majority": 2 / 5}
    assert sample.score([turn("abc")], [""])["tasks"] == {"all": {"n": 1, "exact": 0, "chars": 0, "majority": 1}}


def test_chat_keeps_the_state(trained, counting, trained_model):
    ask = lambda *how: say_all(trained_model.generate(*how, max_new_tokens=30))
    forgotten, _ = ask([trained_model.question("Loud?")])
    for n in range(1, 9):
        media = [("image", str(counting / f"{n}.png"))]
        first, state = ask([trained_model.question("<image> How many?", media)])
        second, _ = ask([trained_model.question("Loud?", first=False)], state)
        if second != forgotten:
            break
    assert second != forgotten  # or the test would not see the state
    read_again, _ = ask([trained_model.segments([("<image> How many?", first), ("Loud?", None)], media)])
    assert second == read_again

    chat = run("sample.py", "--chat", "--max_new_tokens=30", cwd=counting, input=f"<{n}.png> How many?\nLoud?\n\n").stdout
    assert [answer.strip() for answer in chat.split("> ")[-3:]] == [first.strip(), second.strip(), ""]


def test_eval_prints_its_scores(trained, counting, trained_model, capsys):
    sample.main([f"--out_dir={trained[0]}", f"--eval={counting / 'a.jsonl'}", "--batch_size=7"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    records = read_records(counting / "a.jsonl")
    pairs = []
    for r in records:
        turns = modrwkv.record_turns(r)
        for i, (_, truth) in enumerate(turns):  # one by one, and without `ask`
            answer, _ = say_all(trained_model.generate([trained_model.segments(turns[:i] + [(turns[i][0], None)], modrwkv.record_media(r))]))
            pairs.append((r["task"], answer.strip(), truth))
    assert 0 < printed["exact"] < 1
    for task, scores in [*printed["tasks"].items(), ("", printed)]:
        chosen = [(a, t) for name, a, t in pairs if task in ("", name)]
        assert scores["n"] == len(chosen)
        assert scores["exact"] == pytest.approx(sum(a == t for a, t in chosen) / len(chosen))
        right = sum(sum(x == y for x, y in zip(a, t)) for a, t in chosen)
        assert scores["chars"] == pytest.approx(right / sum(max(len(a), len(t)) for a, t in chosen))
        assert scores["majority"] == pytest.approx(max(Counter(t for _, t in chosen).values()) / len(chosen))


@pytest.mark.parametrize("how", [{}, dict(temperature=1.0, top_k=5, seed=3)])
def test_no_answer_depends_on_its_neighbours(how, trained, counting, trained_model, capsys):
    records = read_records(counting / "a.jsonl")
    single, seven = (sample.ask(trained_model, records, size, max_new_tokens=30, **how) for size in (1, 7))
    assert single == seven and len(single) == 24 and len(set(single)) > 2
    shown = []
    for size in (1, 7):
        flags = [f"--{k}={v}" for k, v in how.items()]
        sample.main([f"--out_dir={trained[0]}", f"--eval={counting / 'a.jsonl'}", f"--batch_size={size}", "--max_new_tokens=30", *flags])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_choices_are_those_of_the_seed(trained, counting, capsys):
    def answer(*flags):
        sample.main([f"--out_dir={trained[0]}", f"--image={counting / '5.png'}", "--prompt=How many?", "--max_new_tokens=30", *flags])
        return capsys.readouterr().out

    wild = [answer("--temperature=2", f"--seed={seed}") for seed in (1, 2, 3)]
    assert [answer("--temperature=2", f"--seed={seed}") for seed in (1, 2, 3)] == wild
    assert len(set(wild)) == 3
    assert answer("--temperature=2", "--top_p=0.9", "--seed=3") == answer("--temperature=2", "--top_p=0.9", "--seed=3")
    greedy = answer()
    assert greedy == answer("--seed=2") == answer("--temperature=2", "--top_k=1") == answer("--temperature=2", "--top_p=1e-6")
    assert greedy not in wild


def test_an_answer_is_streamed(trained, counting, monkeypatch):
    writes = []

    class Screen:
        write = staticmethod(writes.append)
        flush = staticmethod(lambda: writes.append("flush"))

    monkeypatch.setattr(sys, "stdout", Screen)
    sample.main([f"--out_dir={trained[0]}", f"--image={counting / '7.png'}", "--prompt=How many?", "--max_new_tokens=30"])
    monkeypatch.undo()
    words = [w for w in writes if w not in ("flush", "")]
    assert len(words) > 3 and writes.count("flush") >= len(words) - 1


# ---------------------------------------------------------------------------------------------- errors


TRUE_TALK = dialogue(("<image>\nHow many?", "one"), image="good.png")


def bad_data(folder, name):
    """A data file in `folder` whose third line is bad; the good ones have a picture."""
    bars(folder / "good.png", 1)
    bars(folder / "cut.png", 5)
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-30])
    (folder / "text.png").write_text("no picture")
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)  # of more pixels than Pillow will read
    parts = ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    chunks = (struct.pack(">I", len(data)) + key + data + struct.pack(">I", zlib.crc32(key + data)) for key, data in parts)
    (folder / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    question = ("<image>\nHow many?", "one")
    bad = {
        "not JSON": None,
        "no object": ["a", "list"],
        "no conversations": {"id": 1, "image": "good.png"},
        "no answer": {"conversations": [{"from": "human", "value": "Hello?"}]},
        "no image": dialogue(question),
        "image without mark": dialogue(("How many?", "one"), image="good.png"),
        "image is a number": dialogue(question, image=5),
        "level is a word": dialogue(question, image="good.png", level="hard"),
        "text and null": {"text": "Hello", "conversations": None},
        "gone.png": dialogue(question, image="gone.png"),
        "text.png": dialogue(question, image="text.png"),
        "cut.png": dialogue(question, image="cut.png"),
        "huge.png": dialogue(question, image="huge.png"),
    }[name]
    jsonl(folder / "good.jsonl", TRUE_TALK)
    path = jsonl(folder / "bad.jsonl", TRUE_TALK, TRUE_TALK, bad, TRUE_TALK)
    if bad is None:
        path.write_text(path.read_text().replace("null", '{"id": '))
    return path


FORMS = ["not JSON", "no object", "no conversations", "no answer", "no image", "image without mark", "image is a number"]
PICTURES = ["gone.png", "text.png", "cut.png", "huge.png"]


@pytest.mark.parametrize("name", [*FORMS, *PICTURES])
def test_bad_records_in_training(name, tmp_path, capsys):
    path = bad_data(tmp_path, name)
    message = refusal(train.main, [*TINY, f"--data={path}", f"--val_data={tmp_path / 'good.jsonl'}", f"--out_dir={tmp_path / 'out'}"], capsys)
    assert f"{path}, line 3" in message and (name in message or name not in PICTURES)
    assert not (tmp_path / "out/ckpt.pt").exists()


@pytest.mark.parametrize("name", ["level is a word", "text and null"])
def test_odd_records_are_refused_or_read(name, tmp_path):
    path = bad_data(tmp_path, name)
    try:
        train.main([*TINY, f"--data={path}", f"--val_data={tmp_path / 'good.jsonl'}", f"--out_dir={tmp_path / 'out'}", "--max_steps=1"])
    except InputError as e:
        assert f"{path}, line 3" in str(e)


@pytest.mark.parametrize("name", [*FORMS[:3], *PICTURES])
def test_bad_records_in_eval(name, trained, tmp_path, capsys):
    path = bad_data(tmp_path, name)
    message = refusal(sample.main, [f"--out_dir={trained[0]}", f"--eval={path}", "--max_new_tokens=3"], capsys)
    assert f"{path}, line 3" in message and (name in message or name not in PICTURES)


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--learning_rat=1", ["--learning_rat", "--learning_rate"]),
        ("--max_steps=many", ["--max_steps", "many"]),
        ("--resume=maybe", ["--resume", "maybe"]),
        ("--data=nothing", ["--data=nothing", "digits", "shakespeare"]),
        ("--data=no/thing", ["--data=no/thing"]),
        ("--data=nothing.jsonl", ["nothing.jsonl"]),
        ("--val_data=nothing.jsonl", ["nothing.jsonl"]),
        ("--init_from=nothing.pt", ["nothing.pt"]),
        ("--init_from=good.jsonl", ["good.jsonl"]),
        ("--out_dir=good.jsonl", ["good.jsonl"]),
        ("--resume", ["ckpt.pt"]),
        ("--phase=foo", ["--phase=foo", "adapter"]),
        ("--schedule=foo", ["--schedule=foo", "cosine"]),
        ("--dtype=foo", ["--dtype=foo", "bfloat16"]),
        ("--template=foo", ["template=foo", "v3"]),
        ("--image_encoder=foo", ["image_encoder=foo", "patch"]),
        ("--tokenizer=foo", ["foo", "gpt2"]),
        ("--device=foo", ["foo"]),
        ("--head_size=48", ["head_size=48"]),
        ("--patch_height=20", ["patch_height=20"]),
        ("--grad_accum=3", ["--batch_size=8", "--grad_accum=3"]),
        ("--grad_accum=0", ["grad_accum"]),
        ("--batch_size=0", ["batch_size"]),
        ("--conv_stride=0", ["conv_stride"]),
        ("--patch_width=0", ["patch_width"]),
        ("--n_layer=0", ["n_layer"]),
        ("--save_interval=0", ["save_interval"]),
        ("--image_encoder=none", ["good.jsonl, line 1", "good.png"]),
        ("--learning_rate=1e30", ["loss", "--learning_rate"]),
    ],
)
def test_bad_flags_of_train(flag, words, tmp_path, capsys, monkeypatch):
    bad_data(tmp_path, "no image")
    monkeypatch.chdir(tmp_path)
    defaults = ["--data=good.jsonl", "--val_data=good.jsonl", "--out_dir=out", "--max_steps=5", "--warmup_steps=0"]
    message = refusal(train.main, [*TINY, *defaults, flag], capsys)
    assert [word for word in words if word not in message] == []


def test_a_whole_number_is_a_learning_rate(letters, tmp_path):
    start(tmp_path, "--learning_rate=1", f"--data={letters}", f"--val_data={letters}")
    assert [x["lr"] for x in steps(tmp_path)] == [pytest.approx(1 / 50)]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out_dir=nowhere"], ["nowhere", "train.py"]),
        (["--out_dir=."], ["ckpt.pt", "train.py"]),
        (["--out_dir=text.txt"], ["text.txt"]),
        (["--out_dir=elsewhere.pt"], ["elsewhere.pt"]),
        (["--out_dir=list.pt"], ["list.pt"]),
        (["--out_dir=part.pt"], ["part.pt", "blocks.0.att.r_k"]),
        (["--out_dir=cut.pt"], ["cut.pt"]),
        (["--promt=Hi"], ["--promt", "--prompt"]),
        (["--seed=x"], ["--seed", "x"]),
        ([], ["--prompt", "--chat", "--eval"]),
        (["--prompt=Hi", "--device=foo"], ["foo"]),
        (["--prompt=Hi", "--tokenizer=foo"], ["foo"]),
        (["--prompt=<image> and <image>?", "--image=good.png"], ["<image>"]),
        (["--prompt=Hi", "--image=gone.png"], ["gone.png"]),
        (["--prompt=Hi", "--image=text.txt"], ["text.txt"]),
        (["--prompt=Hi", "--image=cut.png"], ["cut.png"]),
        (["--prompt=Hi", "--image=huge.png"], ["huge.png"]),
        (["--eval=gone.jsonl"], ["gone.jsonl"]),
        (["--eval=texts.jsonl"], ["texts.jsonl"]),
        (["--eval=good.jsonl", "--batch_size=0"], ["batch_size"]),
    ],
)
def test_bad_flags_of_sample(flags, words, trained, tmp_path, capsys, monkeypatch):
    bad_data(tmp_path, "no image")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no checkpoint, no picture\n")
    jsonl(tmp_path / "texts.jsonl", {"text": "no question"})
    torch.save({"state_dict": {}}, "elsewhere.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"emb.weight": torch.zeros(3, 4)}, "part.pt")
    data = (trained[0] / "ckpt.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    message = refusal(sample.main, [f"--out_dir={trained[0]}", *flags], capsys)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("flag", ["--max_new_tokens=0", "--top_p=0", "--top_k=1000", "--temperature=1e-9"])
def test_extreme_choices_are_refused_or_work(flag, trained, capsys):
    try:
        sample.main([f"--out_dir={trained[0]}", "--prompt=Hi", "--max_new_tokens=5", "--temperature=1", flag])
    except InputError as e:
        assert flag.split("=")[0].strip("-") in str(e)


def test_errors_as_the_user_sees_them(trained, tmp_path):
    path = bad_data(tmp_path, "cut.png")
    message = complaint(run("train.py", *TINY, f"--data={path}", f"--val_data={tmp_path / 'good.jsonl'}", cwd=tmp_path, ok=False))
    assert f"{path}, line 3" in message and "cut.png" in message
    assert "good.jsonl" in complaint(run("sample.py", "--out_dir=good.jsonl", "--prompt=Hi", cwd=tmp_path, ok=False))


def limit_files(size):
    """For preexec_fn: writing more than `size` bytes to a file fails, much as on a full disk. (Python ignores SIGXFSZ.)"""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_disk_full_while_saving(counting, tmp_path, monkeypatch):
    flags = (*TINY, f"--data={counting / 'a.jsonl'}", f"--val_data={counting / 'a.jsonl'}")
    train.main([*flags, "--max_steps=2", f"--out_dir={tmp_path / 'out'}"])
    before = (tmp_path / "out/ckpt.pt").read_bytes()
    assert len(before) > 500_000
    result = run("train.py", "--resume", "--max_steps=4", cwd=tmp_path, ok=False, preexec_fn=limit_files(200_000))
    message = complaint(result)
    assert "ckpt.pt" in message and re.search("disk|space|large", message)
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.partial"))
    assert read_checkpoint(tmp_path / "out/ckpt.pt")["step"] == 2
    load(tmp_path / "out/ckpt.pt")
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "--max_steps=3"])  # with room again it goes on
    assert [step for step, _ in losses(tmp_path / "out")] == [1, 2, 3]


def test_disk_full_while_logging(counting, tmp_path):
    flags = (*TINY, f"--data={counting / 'a.jsonl'}", f"--val_data={counting / 'a.jsonl'}", "--max_steps=3")
    result = run("train.py", *flags, cwd=tmp_path, ok=False, preexec_fn=limit_files(100))
    assert "log.jsonl" in complaint(result)


# ---------------------------------------------------------------------------------------------- precision


def test_bfloat16_trains_like_float32(counting, tmp_path):
    curves = {}
    for dtype in ("float32", "bfloat16"):
        flags = (*TINY, f"--dtype={dtype}", f"--data={counting / 'a.jsonl'}", f"--val_data={counting / 'a.jsonl'}", f"--out_dir={tmp_path / dtype}")
        train.main([*flags, "--max_steps=6", "--warmup_steps=3"])
        curves[dtype] = [loss for _, loss in losses(tmp_path / dtype)]
        assert {x.dtype for x in tensors(tmp_path / dtype).values()} == {torch.float32}
    assert curves["bfloat16"] != curves["float32"]
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=0.02)
