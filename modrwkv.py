"""ModRWKV: one RWKV language model that reads text, pictures, sound and time series, in one file.

An encoder turns a picture, a sound or a series into features, a Conv1D shortens them, and a small MLP, the adapter,
makes each as wide as a token's embedding. From there on they are tokens like any other.

    picture -> PatchEncoder -> Conv1D -> MLP -.
    sound   -> MelEncoder   -> Conv1D -> MLP -.
    series  -> WaveNet      -> Conv1D -> MLP -.
    text    -> tokenizer    -> emb -----------'-> fuse -> ln0 -> block -> ... -> block -> ln_out -> head: the next token
                                                                   |                         '-> forecast_head: points
      state of a block: x_att -> token shift -> TimeMix:    S <- S (diag(w) - kk^T (a * kk)) + v^T k,   y = S r
                        x_ffn -> token shift -> ChannelMix: W_v relu(W_k x)^2

References
    [1] ModRWKV, Kang et al. 2025             https://arxiv.org/abs/2505.14505  https://github.com/JL-er/WorldRWKV
    [2] RWKV-7 "Goose", Peng et al. 2025      https://arxiv.org/abs/2503.14456
    [3] VisualRWKV, Hou et al. 2024           https://arxiv.org/abs/2406.13362  https://github.com/howard-hou/VisualRWKV
    [4] RWKV's official training code         https://github.com/BlinkDL/RWKV-LM
    [5] RWKV-5 and 6, "Eagle and Finch", Peng et al. 2024              https://arxiv.org/abs/2404.05892
    [6] Whisper, Radford et al. 2022                                   https://arxiv.org/abs/2212.04356
    [7] WaveNet, van den Oord et al. 2016                              https://arxiv.org/abs/1609.03499
    [8] transformers, which runs the pretrained encoders               https://github.com/huggingface/transformers

Glossary. B, T, C: batch, time, n_embd. H, N: heads, channels of a head. V: vocabulary. Papers write row vectors.

    symbol in code   [2]: symbol, equation     meaning                                            place
    token_shift      x_{t-1}, 3                token shift: a token sees the one before it, too   token_shift
    x_r x_w x_k ...  mu_r mu_d mu_k ..., 3     weights of the PREVIOUS token, of r, d, k ...      TimeMix7
    xr xw xk ...     x^r_t x^d_t x^k_t ..., 3  these inputs: lerp(x_t, x_{t-1}, mu), 1            TimeMix7.forward
    w1 w2 w0, a1 ..  A_d B_d lambda_d, 2       loramlp: low-rank matrices, bias; of d, a, nu, g   TimeMix7
    iclr             a_t, 4                    in-context learning rate                           TimeMix7.forward
    k                k_t, 5                    key precursor                                      TimeMix7.forward
    kk; k_k          kappa_t, 6; xi            removal key, removal key multiplier                TimeMix7.forward
    kk               kappa-hat_t, 15           removal key of unit length per head                TimeMix7.forward
    k; k_a           k-tilde_t, 7; alpha       replacement key, replacement rate booster          TimeMix7.forward
    nu               nu_t, 8                   value residual gate                                TimeMix7.forward
    v, v_first       v'_t,l, 9; v'_t,0; v_t 10 value precursor, that of layer 0; value            TimeMix7.forward
    d                d_t, 11                   decay precursor                                    TimeMix7.forward
    w                log w_t, 12               log of the decay, in (-0.607, 0)                   TimeMix7.forward
    r                r_t, 13                   receptance, what a query is in attention           TimeMix7.forward
    g                g_t, 14                   output gate                                        TimeMix7.forward
    S, state         wkv_t, 16 to 18           state (H, N, N): a row a value channel             wkv7_loop
    a, b             -kappa-hat_t,             so that the transition matrix G_t, 19, of S <- S G_t + ...
                     a_t * kappa-hat_t         is diag(w_t) + a^T b = diag(w_t) - kappa-hat^T (a_t * kappa-hat)
    bonus; r_k       u_t, 20; rho              bonus for the current token, its weight            TimeMix7.forward
    ln_x, output     p_t, 21; o_t, W_o, 22     norm of each head, output                          TimeMix7.forward
    ChannelMix7      k'_t, 23; o'_t, 24; mu'_k channel mixing                                     ChannelMix7

    [1] eq. 1  h_t = W h_{t-1} + U x_t         any linear RNN: one with a state that is a matrix  wkv7_loop
        eq. 2  s_t = e^{-w_t} s_{t-1} + k_t v_t^T           decay alone: RWKV-5 and 6, a = b = 0  TimeMix5, TimeMix6
        eq. 3  s_t = G_t s_{t-1} + a_t k_t v_t^T            delta rule; k has two keys in [2]     TimeMix7
        eq. 4  h = Linear2(ReLU(Linear1(x)))   the adapter; the authors' code adds a LayerNorm    Adapter
        eq. 5  y = Conv1D(x), L' = ...         sequence compression, no bias, padded on the left  Adapter
    [3] eq. 1  alpha_t, mu                     token shift; these mu are of the CURRENT token     TimeMix5.mix
        eq. 2  wkv_t, w, u                     decay time_decay and bonus time_faaaa              TimeMix5.forward
        eq. 3  o_t                             SiLU gate and norm of each head                    TimeMix5.forward
        eq. 4  lora: A, B, lambda              time_maa_w1, time_maa_w2, time_maa_*               TimeMix6.mix
        eq. 5  ddlerp, mu_x                    data-dependent token shift                         TimeMix6.mix
        eq. 6  alpha_t = ddlerp(...) W         r, k, v, g                                         TimeMix5.forward
        eq. 7  d_t; eq. 8  w_t = exp(-exp d_t) data-dependent decay                               TimeMix6.mix
        eq. 9  wkv_t (its product is over j = i + 1 to t - 1)                                     TimeMix5.forward
        3.2.3  sandwich prompt                 prompt_style="sandwich": PROMPT_STYLES             data/text.py
        3.2.4  bidirectional scan              every second layer reads pictures backwards        scan

Initial values ([4], generate_init_weight): layer l of L, channel i of C, q = i / C, u = i / (C - 1), c = u - 1/2,
z = s |s| with s from -1 to 1 in each head, d0 = l / (L - 1), d1 = 1 - l / L

    emb: U(-1e-4, 1e-4). Orthogonal with gain 1: receptance, value, ffn.key; 0.1: key, gate; 0.5 max(1, sqrt(V / C)):
    head; 0.1 max(1, sqrt(rank / C)): w2, a2, v2, g2. Zero: output, ffn.value, ffn.receptance, w1, a1, v1, g1
    x_r x_g: 1 - q^(0.2 d1)   x_w x_a: 1 - q^(0.9 d1)   x_k x_v: 1 - q^(0.7 d1)   ffn.x_k: 1 - q^(d1^4)
    w0: -5.5 + 6 u^(1 + d0^0.3) + 2.5 z   a0: -0.19 + 0.3 z + 0.4 c   v0: 0.73 - 0.4 c   k_k: 0.71 - 0.1 c   k_a: 1.02
    r_k: -0.04   ln_x.weight: ((l + 1) / L)^0.7   RWKV-5 and 6: TimeMix5, TimeMix6   others: kaiming_init_, Adapter
"""

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import itertools
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------
# 2. Config


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what and why."""


def setting(default, help, choices=(), least=-math.inf, most=math.inf):
    """A field of Config or of a script's flags: its help, and what it may be (see check_settings)."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least, most=most))


def check_settings(settings):
    """Raises InputError unless each setting is one of its choices, or a finite number from least to most."""
    for f in dataclasses.fields(settings):
        value, choices, least, most = getattr(settings, f.name), *(f.metadata[k] for k in ("choices", "least", "most"))
        if choices and value not in choices:
            raise InputError(f"{f.name}={value} is not one of {', '.join(map(str, choices))}")
        if isinstance(value, int | float) and not (math.isfinite(value) and least <= value <= most):
            limits = (
                "finite" if least == -most else f"at least {least}" if most == math.inf else f"from {least} to {most}"
            )
            raise InputError(f"{f.name}={value} is not {limits}")


@dataclass
class Config:
    """What a checkpoint remembers of its model. Each field is a flag of train.py."""

    rwkv: int = setting(7, "generation of the blocks: decay fixed, decay of the data, delta rule", (5, 6, 7))
    n_layer: int = setting(2, "number of RWKV blocks", least=1)
    n_embd: int = setting(128, "width of the model, a multiple of head_size", least=1)
    head_size: int = setting(64, "channels of one head", least=1)
    tokenizer: str = setting("bytes", "bytes, gpt2, or the path of an RWKV World vocabulary: rwkv_vocab_v20230424.txt")
    template: str = setting("world", "how turns are written as text", ("world", "v1", "v2", "v3"))
    prompt_style: str = setting(
        "written", "where a question has its pictures", ("written", "first", "last", "sandwich", "before", "tagged")
    )
    scan: str = setting("uni", "orders in which layers read a picture by turns: 1, 2 or 4", ("uni", "bi", "multi"))
    cls: str = setting("first", "where clip and dinov2 have the vector of the whole picture", ("first", "last"))
    image_encoder: str = setting("patch", "patch, from scratch; siglip, clip, dinov2, a folder or hub id: a+b; none")
    audio_encoder: str = setting("none", "mel, from scratch; wavlm, whisper, a folder or hub id; none")
    series_encoder: str = setting("none", "from scratch, or pretrained", ("none", "wavenet", "timer"))
    series_kernel: int = setting(24, "kernel of the Conv1D after the series encoder; 0 for no Conv1D", least=0)
    series_stride: int = setting(24, "stride of that Conv1D: so many points a vector", least=1)
    lookback: int = setting(720, "points of a series that a forecast is made from", least=1)
    horizon: int = setting(96, "points that each vector of a series predicts", least=1)
    image_height: int = setting(32, "a picture is scaled to this many pixels in height; its width follows", least=1)
    patch_height: int = setting(32, "height of a patch in pixels; the image height gives column patches", least=1)
    patch_width: int = setting(4, "width of a patch in pixels", least=1)
    encoder_width: int = setting(128, "width of the features of an encoder that is trained from scratch", least=1)
    image_trim: bool = setting(True, "cut away the empty border of a picture")
    conv_kernel: int = setting(6, "kernel of the Conv1D after the image encoder; 0 for no Conv1D", least=0)
    conv_stride: int = setting(2, "stride of the Conv1D: that many fewer vectors per picture", least=1)
    adapter_kind: str = setting("mlp", "ModRWKV's, VisualRWKV 6.0's, VisualRWKV 7.00's", ("mlp", "linear", "gated"))
    adapter_scale: int = setting(4, "hidden width of an mlp, in units of n_embd", least=1)


MEDIA = ("image", "audio", "series")
# A sample is a list of segments (kind, data): ("text", ids) read, ("answer", ids) read and learned,
# ("image", pixels), ("audio", log-mel frames), ("series", points); or ("forecast", (points, targets)) alone.


# ----------------------------------------------------------------------------------------------
# 3. The recurrence


def check_wkv7(r, w, k, v, a, b, state):
    """Raises ValueError unless the seven are floating point, on one device, and of shapes that belong together."""
    if r.dim() != 4 or 0 in r.shape:
        raise ValueError(f"wkv7: r has shape (B, T, H, N), none of them 0, not {tuple(r.shape)}")
    B, T, H, N = r.shape
    for name, x in (("r", r), ("w", w), ("k", k), ("v", v), ("a", a), ("b", b), ("state", state)):
        if x is None:
            continue
        shape = (B, H, N, N) if name == "state" else (B, T, H, N)
        if x.shape != shape:
            raise ValueError(f"wkv7: {name} has shape {shape} beside r of {(B, T, H, N)}, not {tuple(x.shape)}")
        if x.device != r.device or not x.dtype.is_floating_point:
            raise ValueError(f"wkv7: {name} is floating point on r's device, {r.device}, not {x.dtype} on {x.device}")


def wkv7_loop(r, w, k, v, a, b, state=None):
    """The RWKV-7 recurrence as the paper writes it ([2], eq. 16, 17): the oracle for every faster path.

        S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T          y_t = S_t r_t

    Official code: rwkv_v7_numpy.py, https://github.com/BlinkDL/RWKV-LM/blob/main/RWKV-v7/rwkv_v7_numpy.py
    Args:
        r, w, k, v, a, b: (B, T, H, N); w <= 0 is the log of the decay, -inf is legal
        state: (B, H, N, N), or None for zeros; rows are value channels, columns key channels
    Returns:
        y (B, T, H, N) in r's dtype, and the state after the last step, in float32 (float64 for float64
        inputs). Differentiable in all seven inputs.
    Raises:
        ValueError: shapes, dtypes or devices that do not belong together
    """
    check_wkv7(r, w, k, v, a, b, state)
    B, T, H, N = r.shape
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    S = torch.zeros(B, H, N, N, dtype=dtype, device=r.device) if state is None else state.to(dtype)
    ys = []
    # S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T
    for r_, d_, k_, v_, a_, b_ in zip(*(x.to(dtype).unbind(1) for x in (r, w.to(dtype).exp(), k, v, a, b))):
        Sa = S @ a_[..., None]  # (B, H, N, N) x (B, H, N, 1) -> (B, H, N, 1)
        S = S * d_[..., None, :] + Sa * b_[..., None, :] + v_[..., None] * k_[..., None, :]
        ys.append((S @ r_[..., None])[..., 0])
    return torch.stack(ys, 1).to(r.dtype), S


def wkv7_chunked(r, w, k, v, a, b, state=None, w_min=-math.inf):
    """wkv7_loop in matrix products, chunk by chunk. Same arguments and results.

    With c_t = w_1 + ... + w_t inside a chunk and u_t = S_{t-1} a_t, unrolling the recurrence gives
        S_t = S_0 e^{c_t} + sum_{s<=t} (u_s b_s^T + v_s k_s^T) e^{c_t - c_s},
    so with a~_t = a_t e^{c_{t-1}}, r~_t = r_t e^{c_t}, b~_s = b_s e^{-c_s}, k~_s = k_s e^{-c_s}
        (I - tril(a~ b~^T, -1)) U = a~ S_0^T + tril(a~ k~^T, -1) V           a triangular system
        Y = r~ S_0^T + tril(r~ b~^T) U + tril(r~ k~^T) V.
    e^{-c_s} must not overflow, so the chunk is the shorter, the faster the decay; below w = -1 and for few steps the
    loop does it.

    Args:
        w_min: what the caller knows w to be above, -e^{-1/2} for RWKV-7; if below -1, the smallest w is looked up,
            for which a GPU has to be waited for, and torch.compile breaks its graph
    """
    check_wkv7(r, w, k, v, a, b, state)
    B, T, H, N = r.shape
    if w_min < -1 and T >= 8:
        with contextlib.suppress(RuntimeError):  # a fake tensor has no values
            w_min = w.detach().min().item()
    if w_min < -1 or T < 8:
        return wkv7_loop(r, w, k, v, a, b, state)
    out_dtype, dtype = r.dtype, torch.float64 if r.dtype == torch.float64 else torch.float32
    n = -(-T // int(min(96, 60 / max(-w_min, 1e-9))))  # chunks, of L steps each
    L = -(-T // n)

    def chunks(x):  # (B, T, H, N) -> (B, H, n, L, N); zeros at the end change no state
        x = x.to(dtype) if n * L == T else F.pad(x.to(dtype), (0, 0, 0, 0, 0, n * L - T))
        return x.view(B, n, L, H, N).permute(0, 3, 1, 2, 4)

    def unchunk(y):
        y = y.permute(0, 2, 3, 1, 4).reshape(B, n * L, H, N)
        return (y if n * L == T else y[:, :T]).to(out_dtype)

    def solve(x):  # (I - tril(a~ b~^T, -1))^-1 x
        return torch.linalg.solve_triangular(-(a @ b.mT), x, upper=False, unitriangular=True)

    r, w, k, v, a, b = map(chunks, (r, w, k, v, a, b))
    c = w.cumsum(-2)
    middle = c[..., L // 2, None, :].detach()  # measured from the middle of the chunk, both signs stay small
    end = (c[..., -1:, :] - middle).exp()
    grow, decay = (middle - c).exp(), (c - middle).exp()
    r, a, b, k = r * decay, a * (c - w - middle).exp(), b * grow, k * grow
    own = (a @ k.mT).tril(-1) @ v  # what the chunk's own pairs add to the system, and below to the output
    rb, rk = (r @ b.mT).tril(), (r @ k.mT).tril()

    if n == 1 and state is None:  # no state to read: what training on short samples needs
        U = solve(own)
        S = (U.mT @ b + v.mT @ k) * end
        return unchunk(rb @ U + rk @ v), S[:, :, 0]

    W, Z = solve(torch.cat([a, own], -1)).split(N, -1)  # U = W S^T + Z
    Q, Y = r + rb @ W, rb @ Z + rk @ v  # y = Q S^T + Y
    G, X = W.mT @ b, Z.mT @ b + v.mT @ k  # S <- S (I + G) + X, as seen from the middle of the chunk
    S = torch.zeros(B, H, N, N, dtype=dtype, device=r.device) if state is None else state.to(dtype)
    starts = []
    for from_start, G_, X_, to_end in zip(*(x.unbind(2) for x in (middle.exp(), G, X, end))):
        S = S * from_start
        starts.append(S)
        S = (S + S @ G_ + X_) * to_end
    return unchunk(Q @ torch.stack(starts, 2).mT + Y), S


CHECKPOINT_EVERY = {"cpu": 32, "cuda": 16}  # steps between the states that kernel.cu keeps for its backward pass
WARNED = set()  # reasons that were printed


@functools.cache
def kernel(device_type):
    """kernel.cu, compiled and opened with ctypes; None, after one line that says why, where it cannot be."""
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernel.cu")
    try:
        if device_type not in CHECKPOINT_EVERY:
            raise InputError(f"kernel.cu is for CPUs and NVIDIA GPUs, not for {device_type}")
        library = ctypes.CDLL(compile_for_cpu(source) if device_type == "cpu" else compile_for_gpu(source))
        for function, pointers in ((library.wkv7_forward, 11), (library.wkv7_backward, 17)):
            function.argtypes = [ctypes.c_int64] * 4 + [ctypes.c_int] + [ctypes.c_void_p] * pointers
        library.wkv7_error.restype = ctypes.c_char_p
        error = library.wkv7_forward(0, 1, 1, 64, 0, *[None] * 11)  # B = 0 computes nothing: does the driver fit?
        if error:
            raise InputError(f"kernel.cu does not run here: {library.wkv7_error(error).decode()}")
        return library
    except (InputError, OSError) as e:
        warn_slow(str(e).strip().splitlines()[0])


def warn_slow(reason):
    if reason not in WARNED:
        WARNED.add(reason)
        line = f"the recurrence runs in PyTorch's own operations, which is several times slower: {reason}"
        print(line, file=sys.stderr)


def has_kernel(device_type):
    return kernel(device_type) is not None


# torch.compiler.assume_constant_result, without its import of 1.5 seconds
warn_slow._dynamo_marked_constant = has_kernel._dynamo_marked_constant = True


def compile_for_cpu(source):
    """The path of a shared library with this machine's own instructions."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)
    if not compiler:
        raise InputError("there is no C++ compiler; install g++ or clang++")
    cpu = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        cpu += next((line for line in f if line.startswith(("flags", "Features"))), "")
    base = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", "-x", "c++"]
    options = (["-march=native", "-fopenmp"], ["-march=native"], [])  # Apple's clang has no OpenMP
    return compile_once(source, [base + own for own in options], "CPU", cpu, 2)


def compile_for_gpu(source):
    """The path of a shared library for the GPUs that are here. It holds CUDA's runtime, so any nvcc will do."""
    if not torch.version.cuda:
        raise InputError("this PyTorch is built without CUDA")
    folders = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    folders += os.environ.get("PATH", "").split(os.pathsep)
    packages = importlib.util.find_spec("nvidia")  # where pip installs cuda-toolkit[nvcc,cccl]
    for folder in packages.submodule_search_locations if packages else ():
        folders += glob.glob(os.path.join(folder, "*", "bin"))
    compilers = [nvcc for folder in folders if (nvcc := shutil.which("nvcc", path=folder))]
    if not compilers:
        raise InputError('there is no nvcc; pip install "cuda-toolkit[nvcc,cccl]" brings it')
    gpus = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC"]
    options += [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}" for major, minor in gpus]
    # -L: the packages have lib, where nvcc looks in lib64
    commands = [[nvcc, *options, f"-L{os.path.dirname(os.path.dirname(nvcc))}/lib"] for nvcc in compilers]
    return compile_once(source, commands, "GPU", "", 30)


def compile_once(source, commands, processor, machine, seconds):
    """The path of the shared library that the first command to succeed makes of the source, in the user's cache.

    Its name holds a checksum of its content: what was cut short or changed since is built again.
    """

    def checksum(path):
        with open(path, "rb") as f:
            return hashlib.sha256(f.read() + repr((commands, machine)).encode()).hexdigest()[:16]

    folder, key = kernel_folder(), f"wkv7_{checksum(source)}_"
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(key) and name == f"{key}{checksum(path)}.so":
            return path
    print(f"compiling kernel.cu for this {processor}, once, about {seconds} seconds ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as partial:  # another process may be at it, too
        library = os.path.join(partial, "wkv7.so")
        for command in commands:
            done = subprocess.run([*command, source, "-o", library], capture_output=True, text=True)
            if done.returncode == 0:
                path = os.path.join(folder, f"{key}{checksum(library)}.so")
                os.replace(library, path)
                return path
    lines = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
    raise InputError(f"{command[0]} cannot compile kernel.cu: {(lines or [f'exit status {done.returncode}'])[0]}")


def kernel_folder():
    """The user's cache; a temporary folder of this process where nobody, or somebody else, too, can write to that."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.environ.get("HOME", ""), ".cache")
    folder = os.path.join(base, "modrwkv")
    if os.path.isabs(base) and os.name == "posix":
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            status = os.lstat(folder)  # a link has the mode 0777
            if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
    folder = tempfile.mkdtemp(prefix="modrwkv_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def call_kernel(name, tensors):
    """One of the two functions of kernel.cu on these tensors; None is a null pointer. The first is r."""
    r = tensors[0]
    dtype = (torch.float32, torch.bfloat16, torch.float16).index(r.dtype)
    library, stream, device = kernel(r.device.type), None, contextlib.nullcontext()
    if r.is_cuda:
        stream, device = torch.cuda.current_stream(r.device).cuda_stream, torch.cuda.device(r.device)
    with device:
        error = getattr(library, name)(*r.shape, dtype, *(None if x is None else x.data_ptr() for x in tensors), stream)
    if error:
        raise RuntimeError(f"{name} of kernel.cu, {tuple(r.shape)}, {r.dtype}: {library.wkv7_error(error).decode()}")


def kernel_outputs(r, w, k, v, a, b, state, keep):
    """Empty y, last state, and states for the backward pass."""
    B, T, H, N = r.shape
    every = CHECKPOINT_EVERY[r.device.type]
    rows = N if r.is_cuda else N + every  # on a CPU also S a of each step
    kept = r.new_empty((B, H, -(-T // every), rows, N) if keep else 0, dtype=torch.float32)
    return torch.empty_like(r), r.new_empty(B, H, N, N, dtype=torch.float32), kept


def kernel_gradients(r, *_):
    """Empty gradients of r, w, k, v, a, b and state."""
    B, T, H, N = r.shape
    dr, dk, dv, da, db = (torch.empty_like(r) for _ in range(5))
    return [dr, torch.empty_like(r, dtype=torch.float32), dk, dv, da, db, r.new_empty(B, H, N, N, dtype=torch.float32)]


@torch.library.custom_op("modrwkv::wkv7", mutates_args=())
def wkv7_kernel(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and what the backward pass needs (if keep), from contiguous tensors."""
    y, last, kept = kernel_outputs(r, w, k, v, a, b, state, keep)
    call_kernel("wkv7_forward", (r, w, k, v, a, b, state, y, last, kept if keep else None))
    return y, last, kept


@torch.library.custom_op("modrwkv::wkv7_backward", mutates_args=())
def wkv7_kernel_backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, kept: Tensor, dy: Tensor, dlast: Tensor | None
) -> list[Tensor]:
    gradients = kernel_gradients(r)
    call_kernel("wkv7_backward", (r, w, k, v, a, b, kept, dy, dlast, *gradients))
    return gradients


def wkv7_setup(ctx, inputs, output):
    *six, state, _ = inputs
    ctx.save_for_backward(*six, output[2])
    ctx.has_state = state is not None
    ctx.set_materialize_grads(False)


def wkv7_gradients(ctx, dy, dlast, _):
    saved = ctx.saved_tensors  # r, w, k, v, a, b, kept
    dy = torch.zeros_like(saved[0]) if dy is None else dy.contiguous()
    *six, dstate = wkv7_kernel_backward(*saved, dy, None if dlast is None else dlast.contiguous())
    return *six, dstate if ctx.has_state else None, None


wkv7_kernel.register_fake(kernel_outputs)
wkv7_kernel_backward.register_fake(kernel_gradients)
wkv7_kernel.register_autograd(wkv7_gradients, setup_context=wkv7_setup)


def wkv7(r, w, k, v, a, b, state=None, w_min=-math.inf):
    """The recurrence by the fastest method there is for these inputs: kernel.cu, or PyTorch's operations.

    Arguments, results and errors are those of wkv7_loop; w_min: see wkv7_chunked.
    """
    check_wkv7(r, w, k, v, a, b, state)
    if r.shape[-1] not in (16, 32, 64, 128):
        warn_slow("kernel.cu has head sizes 16, 32, 64 and 128 alone")
    elif r.dtype in (torch.float32, torch.bfloat16, torch.float16) and has_kernel(r.device.type):
        dtype = r.dtype if r.is_cuda else torch.float32
        dtypes = (dtype, torch.float32, dtype, dtype, dtype, dtype)  # the decay is sensitive
        six = [x.to(t).contiguous() for x, t in zip((r, w, k, v, a, b), dtypes)]
        state = None if state is None else state.float().contiguous()
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*six, state) if x is not None)
        y, state, _ = wkv7_kernel(*six, state, keep)
        return y.to(r.dtype), state
    with torch.autocast(r.device.type, enabled=False):  # state and sums are float32, whatever the model runs in
        return wkv7_chunked(r, w, k, v, a, b, state, w_min)


# ----------------------------------------------------------------------------------------------
# 4. Blocks of RWKV-7, then 6 and 5. Parameter names, initial values and epsilons are the official ones.


def token_shift(x, last, lengths):
    """
    x (B, T, C) -> the token before each (B, T, C), the last real one (B, C), which is `last` where there is none.

    last: (B, C), the one before x, or None for zeros.
    """
    if x.shape[1] == 1 and last is not None and lengths is None:
        return last[:, None].to(x.dtype), x[:, 0]
    x_prev = F.pad(x, (0, 0, 1, -1)) if last is None else torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)
    if lengths is None:
        return x_prev, x[:, -1].clone()  # a view would hold all of x in memory
    last = x.new_zeros(()) if last is None else last.to(x.dtype)
    new = x[torch.arange(len(x), device=x.device), (lengths - 1).clamp(min=0)]
    return x_prev, torch.where(lengths[:, None] > 0, new, last)


def padding_mask(T, lengths):
    """(B, T, 1, 1): which steps are no padding, of samples padded on the right."""
    return (torch.arange(T, device=lengths.device) < lengths[:, None])[..., None, None]


def orthogonal(rows, cols, gain):
    return nn.init.orthogonal_(torch.empty(rows, cols), gain)


def linear(n_in, n_out, gain):
    """No bias; orthogonal of this gain, or zeros, as the official initial weights."""
    layer = nn.Linear(n_in, n_out, bias=False)
    layer.weight = nn.Parameter(orthogonal(n_out, n_in, gain) if gain else torch.zeros(n_out, n_in))
    return layer


class TimeMix7(nn.Module):
    """RWKV-7 time mixing ([2], section 4.1). The numbers at line ends are [2]'s equations.

    Official code: RWKV_Tmix_x070, https://github.com/BlinkDL/RWKV-LM/blob/main/RWKV-v7/train_temp/src/model.py
    """

    def __init__(self, n_layer, n_embd, head_size, layer, ranks=None):
        super().__init__()
        C, N, H = n_embd, head_size, n_embd // head_size
        self.H, self.N = H, N
        depth0, depth1 = layer / max(1, n_layer - 1), 1 - layer / n_layer
        n = torch.arange(C)
        q, u = n / C, n / max(1, C - 1)
        ramp, zigzag = u - 0.5, (n % N - (N - 1) / 2) / ((N - 1) / 2)
        zigzag = zigzag * zigzag.abs()

        def vector(x):
            return nn.Parameter(x.view(1, 1, C))

        for name, power in dict(r=0.2, w=0.9, k=0.7, v=0.7, a=0.9, g=0.2).items():
            setattr(self, f"x_{name}", vector(1 - q ** (power * depth1)))
        w0 = -5.5 + 6 * u ** (1 + depth0**0.3) + 2.5 * zigzag
        bias = dict(w=w0, a=-0.19 + 0.3 * zigzag + 0.4 * ramp, v=0.73 - 0.4 * ramp)
        for name, factor in dict(w=2.5, a=2.5, v=1.7, g=5).items():
            if name == "v" and layer == 0:
                continue  # v_first is made here: there is nothing to mix it with
            rank = ranks[name] if ranks else max(32, round(factor * C**0.5 / 32) * 32)
            if name in bias:
                setattr(self, f"{name}0", vector(bias[name]))
            setattr(self, f"{name}1", nn.Parameter(torch.zeros(C, rank)))
            setattr(self, f"{name}2", nn.Parameter(orthogonal(rank, C, 0.1 * max(1, (rank / C) ** 0.5))))
        self.k_k = vector(0.71 - 0.1 * ramp)
        self.k_a = vector(torch.full((C,), 1.02))
        self.r_k = nn.Parameter(torch.full((H, N), -0.04))
        for name, gain in dict(receptance=1, key=0.1, value=1, output=0).items():
            setattr(self, name, linear(C, C, gain))
        self.ln_x = nn.GroupNorm(H, C, eps=64e-5)
        nn.init.constant_(self.ln_x.weight, ((layer + 1) / n_layer) ** 0.7)

    def forward(self, x, v_first, last=None, state=None, lengths=None):
        """
        Args: x (B, T, C), normalised; v_first (B, T, C), the values of layer 0 (None there); last (B, C)
        and state (B, H, N, N) of the tokens before, or None; lengths (B,) of samples padded on the right.
        Returns: (B, T, C), v_first, last, state.
        """
        B, T, C = x.shape
        heads = (B, T, self.H, self.N)
        x_prev, last = token_shift(x, last, lengths)  # (B, T, C), (B, C)
        xx = x_prev - x
        xr = torch.addcmul(x, xx, self.x_r)  # 3: lerp(x_t, x_{t-1}, mu_r), (B, T, C) as the five that follow
        xw = torch.addcmul(x, xx, self.x_w)
        xk = torch.addcmul(x, xx, self.x_k)
        xv = torch.addcmul(x, xx, self.x_v)
        xa = torch.addcmul(x, xx, self.x_a)
        xg = torch.addcmul(x, xx, self.x_g)
        iclr = torch.sigmoid(self.a0 + xa @ self.a1 @ self.a2)  # 4: a_t, in-context learning rate, (B, T, C)
        k = self.key(xk)  # 5: k_t, key precursor, (B, T, C)
        kk = F.normalize((k * self.k_k).view(heads), dim=-1)  # 6, 15: kappa-hat_t, removal key, (B, T, H, N)
        k = k * (1 + (iclr - 1) * self.k_a)  # 7: k-tilde_t = k_t * lerp(1, a_t, alpha), replacement key, (B, T, C)
        v = self.value(xv)  # 9: v'_t, value precursor, (B, T, C)
        if v_first is None:
            v_first = v  # 10, layer 0
        else:
            nu = torch.sigmoid(self.v0 + xv @ self.v1 @ self.v2)  # 8: nu_t, value residual gate, (B, T, C)
            v = v + (v_first - v) * nu  # 10: v_t, (B, T, C); the paper prints its two values in the other order
        d = self.w0 + torch.tanh(xw @ self.w1) @ self.w2  # 11: d_t, decay precursor, (B, T, C)
        w = -math.exp(-0.5) * torch.sigmoid(d.float())  # 12: log w_t, (B, T, C) in (-0.607, 0)
        r = self.receptance(xr)  # 13: r_t, (B, T, C)
        g = torch.sigmoid(xg @ self.g1) @ self.g2  # 14: g_t, (B, T, C)

        r, w, k, v, iclr = (z.view(heads) for z in (r, w, k, v, iclr))  # (B, T, C) -> (B, T, H, N)
        a, b = -kk, kk * iclr  # of the transition matrix 19: G_t = diag(w_t) + a^T b, (B, T, H, N)
        k_in = k
        if lengths is not None:  # padding leaves the state as it is
            mask = padding_mask(T, lengths)
            w, k_in, b = w * mask, k * mask, b * mask
        y, state = wkv7(r, w, k_in, v, a, b, state, w_min=-0.607)  # 17: (B, T, H, N), and wkv_T (B, H, N, N)
        y = self.ln_x(y.reshape(B * T, C)).view(B, T, C)  # 21, first term
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v  # 20: u_t = (r_t (rho * k-tilde_t)^T) v_t, (B, T, H, N)
        p = y + bonus.view(B, T, C)  # 21: p_t, (B, T, C)
        return self.output(p * g), v_first, last, state  # 22: o_t = (g_t * p_t) W_o, (B, T, C)


class ChannelMix7(nn.Module):
    """RWKV-7 channel mixing ([2], section 4.2). Official code: RWKV_CMix_x070, beside RWKV_Tmix_x070."""

    def __init__(self, n_layer, n_embd, layer, ffn_dim=None):
        super().__init__()
        self.x_k = nn.Parameter(1 - (torch.arange(n_embd) / n_embd).view(1, 1, -1) ** ((1 - layer / n_layer) ** 4))
        ffn_dim = ffn_dim or 4 * n_embd
        self.key = linear(n_embd, ffn_dim, 1)
        self.value = linear(ffn_dim, n_embd, 0)

    def forward(self, x, last=None, lengths=None):
        """x (B, T, C), normalised; last (B, C) -> (B, T, C), last"""
        x_prev, last = token_shift(x, last, lengths)
        k = self.key(torch.addcmul(x, x_prev - x, self.x_k))  # 23: k'_t, (B, T, ffn_dim)
        return self.value(torch.relu(k) ** 2), last  # 24: o'_t = relu(k'_t)^2 W_v', (B, T, C)


class TimeMix5(nn.Module):
    """RWKV-5.2 time mixing ([3], eq. 1 to 3; [5], section 4.1): what a channel forgets is a parameter, the same at each
    step. Shift weights are those of the CURRENT token. y_t reads the state before step t, plus a bonus u for step t.

    Official code: RWKV_Tmix_x052, https://github.com/BlinkDL/RWKV-LM/blob/main/RWKV-v5/src/model.py
    """

    def __init__(self, n_layer, n_embd, head_size, layer, ranks=None):
        super().__init__()
        C, N, H = n_embd, head_size, n_embd // head_size
        self.H, self.N = H, N
        depth0, depth1 = layer / max(1, n_layer - 1), 1 - layer / n_layer
        n = torch.arange(C)
        q, u = n / C, n / max(1, C - 1)
        self.time_faaaa = nn.Parameter((depth0 * (1 - u) + 0.1 * ((n + 1) % 3 - 1)).view(H, N))
        decay = -6 + 5 * u ** (0.7 + 1.3 * depth0)
        mu = {"k": q**depth1, "v": q**depth1 + 0.3 * depth0, "r": q ** (0.5 * depth1), "g": q ** (0.5 * depth1)}
        self.add_mixing(decay, mu, ranks)
        for name, gain in dict(receptance=1, key=0.1, value=1, gate=0.1, output=0).items():
            setattr(self, name, linear(C, C, gain))
        self.ln_x = nn.GroupNorm(H, C, eps=64e-5)  # of y / 8 with 1e-5 in the official file: the same
        nn.init.constant_(self.ln_x.weight, ((layer + 1) / n_layer) ** 0.7)

    def add_mixing(self, decay, mu, ranks):
        self.time_decay = nn.Parameter(decay.view(self.H, self.N))
        for name, x in mu.items():
            setattr(self, f"time_mix_{name}", nn.Parameter(x.view(1, 1, -1)))

    def mix(self, x, xx):
        """Tokens x and x_prev - x -> the inputs of r, k, v, g, and the log decay."""
        mixed = (x + xx * (1 - getattr(self, f"time_mix_{name}")) for name in "rkvg")  # [3], 1: (B, T, C) each
        return *mixed, -self.time_decay.float().exp().expand(*x.shape[:2], self.H, self.N)

    def forward(self, x, v_first, last=None, state=None, lengths=None):
        """As TimeMix7's; v_first is passed on."""
        B, T, C = x.shape
        x_prev, last = token_shift(x, last, lengths)
        xr, xk, xv, xg, w = self.mix(x, x_prev - x)
        r, k, v, w = (z.reshape(B, T, self.H, self.N) for z in (self.receptance(xr), self.key(xk), self.value(xv), w))
        bonus = (r * k * self.time_faaaa).sum(-1, keepdim=True) * v  # [3], 2 and 9: diag(u) k_t^T v_t, read by r_t
        first = torch.zeros_like(v[:, 0])  # S_0 r_1, (B, H, N)
        if state is not None:
            first = (state @ r[:, 0, :, :, None].to(state.dtype))[..., 0].to(v.dtype)
        if lengths is not None:  # padding leaves the state as it is
            mask = padding_mask(T, lengths)
            w, k = w * mask, k * mask
        zero = torch.zeros_like(k)
        r_next = F.pad(r[:, 1:], (0, 0, 0, 0, 0, 1))
        y, state = wkv7(r_next, w, k, v, zero, zero, state)  # S_t r_{t+1}, (B, T, H, N)
        y = torch.cat([first[:, None], y[:, :-1]], 1) + bonus  # [3], 2 and 9: r_t wkv_t, (B, T, H, N)
        y = self.ln_x(y.reshape(B * T, C)).view(B, T, C)
        return self.output(y * F.silu(self.gate(xg))), v_first, last, state  # [3], 3: o_t, (B, T, C)


class TimeMix6(TimeMix5):
    """RWKV-6 time mixing ([3], eq. 4 to 9; [5], section 4.2): shift weights, here of the PREVIOUS token, and the decay
    depend on the data through low-rank matrices.

    Official code: RWKV_Tmix_x060, https://github.com/BlinkDL/RWKV-LM/blob/main/RWKV-v5/src/model.py
    """

    def add_mixing(self, decay, mu, ranks):
        C = self.H * self.N
        ranks = ranks or {"maa": 64 if C >= 4096 else 32, "decay": 128 if C >= 4096 else 64}
        for name, x in (mu | {"x": mu["k"], "w": mu["k"]}).items():
            setattr(self, f"time_maa_{name}", nn.Parameter((1 - x).view(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.zeros(C, 5 * ranks["maa"]))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, ranks["maa"], C).uniform_(-0.01, 0.01))
        self.time_decay = nn.Parameter(decay.view(1, 1, C))
        self.time_decay_w1 = nn.Parameter(torch.zeros(C, ranks["decay"]))
        self.time_decay_w2 = nn.Parameter(torch.empty(ranks["decay"], C).uniform_(-0.01, 0.01))

    def mix(self, x, xx):
        z = torch.tanh((x + xx * self.time_maa_x) @ self.time_maa_w1)  # [3], 4 and 5, (B, T, 5 rank)
        mixed = {}
        for name, z_, w2 in zip("wkvrg", z.unflatten(-1, (5, -1)).unbind(2), self.time_maa_w2):
            lora = getattr(self, f"time_maa_{name}") + z_ @ w2  # [3], 4: lambda + tanh(x A) B, (B, T, C)
            mixed[name] = x + xx * lora  # [3], 5: ddlerp(x_t, x_{t-1}), (B, T, C)
        d = self.time_decay + torch.tanh(mixed["w"] @ self.time_decay_w1) @ self.time_decay_w2  # [3], 7, (B, T, C)
        return mixed["r"], mixed["k"], mixed["v"], mixed["g"], -d.float().exp()  # [3], 8: log w_t = -exp(d_t)


class ChannelMix5(nn.Module):
    """RWKV-5.2 channel mixing ([5], section 4.1), with a gate that RWKV-7 lacks. Official code: RWKV_CMix_x052."""

    def __init__(self, n_layer, n_embd, layer, ffn_dim=None):
        super().__init__()
        ffn_dim = ffn_dim or int(3.5 * n_embd) // 32 * 32
        self.add_mixing(torch.arange(n_embd).view(1, 1, -1) / n_embd, 1 - layer / n_layer)
        self.key = linear(n_embd, ffn_dim, 1)
        self.receptance = linear(n_embd, n_embd, 0)
        self.value = linear(ffn_dim, n_embd, 0)

    def add_mixing(self, q, depth1):
        self.time_mix_k, self.time_mix_r = nn.Parameter(q**depth1), nn.Parameter(q**depth1)

    def mix(self, x, xx):
        return x + xx * (1 - self.time_mix_k), x + xx * (1 - self.time_mix_r)

    def forward(self, x, last=None, lengths=None):
        """As ChannelMix7's."""
        x_prev, last = token_shift(x, last, lengths)
        xk, xr = self.mix(x, x_prev - x)  # (B, T, C)
        k = torch.relu(self.key(xk)) ** 2  # (B, T, ffn_dim)
        return torch.sigmoid(self.receptance(xr)) * self.value(k), last


class ChannelMix6(ChannelMix5):
    """RWKV-6 channel mixing: RWKV-5's, with shift weights of the previous token. Official code: RWKV_CMix_x060."""

    def add_mixing(self, q, depth1):
        self.time_maa_k, self.time_maa_r = nn.Parameter(1 - q ** (depth1**3)), nn.Parameter(1 - q ** (depth1**3))

    def mix(self, x, xx):
        return x + xx * self.time_maa_k, x + xx * self.time_maa_r


MIXERS = {5: (TimeMix5, ChannelMix5), 6: (TimeMix6, ChannelMix6), 7: (TimeMix7, ChannelMix7)}


class Block(nn.Module):
    """Time mixing, then channel mixing, each with a norm before it and a residual around it. Official code: Block."""

    def __init__(self, config, layer, ranks=None, ffn_dim=None):
        super().__init__()
        C = config.n_embd
        if layer == 0:
            self.ln0 = nn.LayerNorm(C)  # on all that enters, embeddings and picture vectors alike
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        time_mix, channel_mix = MIXERS[config.rwkv]
        self.att = time_mix(config.n_layer, C, config.head_size, layer, ranks)
        self.ffn = channel_mix(config.n_layer, C, layer, ffn_dim)

    def forward(self, x, v_first, state, lengths):
        """
        Args: x (B, T, C); v_first as TimeMix7's; state: (last token of ln1, S, last token of ln2), None at the start.
        Returns: x; v_first where it is made, else None: FSDP takes what a block returns for the block's own; state.
        """
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        y, v, x_att, S = self.att(self.ln1(x), v_first, state[0], state[1], lengths)
        x = x + y
        y, x_ffn = self.ffn(self.ln2(x), state[2], lengths)
        return x + y, v if v_first is None else None, (x_att, S, x_ffn)


# ----------------------------------------------------------------------------------------------
# 5. Encoders. Each has
#   length(x)          how many features a picture, sound or series becomes
#   collate(media)     a batch of them -> padded tensors and indices of what is no padding; on the CPU: no GPU is asked
#   forward(*tensors)  what collate made -> features (L, width), those of the first one, then those of the second, ...


def pad(arrays, value=0):
    """[(..., n)] -> (M, ..., longest n), `value` on the right of the shorter ones."""
    padded = np.full((len(arrays), *arrays[0].shape[:-1], max(x.shape[-1] for x in arrays)), value, arrays[0].dtype)
    for row, x in zip(padded, arrays):
        row[..., : x.shape[-1]] = x
    return torch.from_numpy(padded)


def length_mask(lengths):
    """(M, longest): what is no padding in M rows of these lengths, padded on the right."""
    return np.arange(max(lengths)) < np.array(lengths)[:, None]


def true_rows(mask):
    """(L,): places in the flattened mask where it is true."""
    return torch.from_numpy(np.flatnonzero(mask))


def take(x, rows):
    """Rows of x (n, C): (...) -> (..., C). Unlike that of x[rows], the backward pass is one operation."""
    return F.embedding(rows, x)


def gather(parts, rows):
    """take() from all rows of parts [(n, C)], counted from 1; row 0 is zeros."""
    zeros = parts[0].new_zeros(1, parts[0].shape[1])
    return F.embedding(rows, torch.cat([zeros, *parts]), padding_idx=0)


def kaiming_init_(*layers):
    """Initial values under which a signal neither fades nor drowns in biases: that would delay its emergence."""
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)


class PatchEncoder(nn.Module):
    """Patches of a picture, from scratch: two small convolutions, which see strokes and edges wherever they are
    (Xiao et al. 2021, https://arxiv.org/abs/2106.14881), then one linear layer a patch, as in ViT (transformers' [8]
    ViTPatchEmbeddings). The height is fixed, the width free."""

    def __init__(self, config):
        super().__init__()
        self.size, self.trim = (config.image_height, config.patch_height, config.patch_width), config.image_trim
        if config.image_height % config.patch_height or config.patch_height % 4 or config.patch_width % 4:
            raise InputError(
                f"image_height={config.image_height} has to be a multiple of patch_height={config.patch_height}, "
                f"and that and patch_width={config.patch_width} multiples of 4"
            )
        self.width = config.encoder_width
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        patch = (config.patch_height // 4, config.patch_width // 4)
        self.proj = nn.Conv2d(32, self.width, patch, patch)
        kaiming_init_(self.conv1, self.conv2, self.proj)
        self.row = nn.Parameter(torch.zeros(config.image_height // config.patch_height, self.width))
        self.col = nn.Parameter(torch.zeros(-(-config.image_height * 16 // config.patch_width), self.width))

    def length(self, image):
        return (image.shape[1] // self.size[1]) * self.columns(image)

    def columns(self, image):
        return image.shape[2] // self.size[2]

    def collate(self, images):
        """[(3, h, w) uint8] -> pixels (M, 3, h, W); rows (L,) of patches."""
        mask = length_mask([self.columns(x) for x in images])
        rows = mask[:, None].repeat(images[0].shape[1] // self.size[1], 1)  # (M, rows, columns)
        return pad([x.cpu().numpy() for x in images], 255), true_rows(rows)

    def forward(self, pixels, rows):
        """-> (L, width), patches of each picture row by row."""
        x = 1 - pixels.to(self.conv1.weight.dtype) / 255  # white paper is 0, as are the convolutions' margins
        x = F.gelu(self.conv1(x))  # (M, 16, h / 2, W / 2); no patch sees what is to its picture's right
        x = F.gelu(self.conv2(x))  # (M, 32, h / 4, W / 4)
        x = self.proj(x)  # (M, width, rows, columns)
        x = x + (self.row[:, None] + self.col[: x.shape[3]]).permute(2, 0, 1)
        return take(F.gelu(x.permute(0, 2, 3, 1)).flatten(0, 2), rows)


class MelEncoder(nn.Module):
    """Sound as Whisper's front end has it ([6], section 2.2): 100 log-mel frames a second, then convolutions, from
    scratch: two, which leave 50 features a second, and four with growing dilations, one for each channel and one for
    all, by which a feature hears 0.6 s to either side. Any length: nothing is cut to, or filled up to, 30 seconds.

    Official code: log_mel_spectrogram, https://github.com/openai/whisper/blob/main/whisper/audio.py
    """

    RATE, WINDOW, HOP, BINS = 16000, 400, 160, 80  # samples a second, in a window, from window to window; mel bins
    DILATIONS = (1, 2, 4, 8)

    def __init__(self, config):
        super().__init__()
        self.width = C = config.encoder_width
        self.conv1, self.conv2 = nn.Conv1d(self.BINS, C, 3, 1, 1), nn.Conv1d(C, C, 3, 2, 1)
        self.deep = nn.ModuleList()
        for d in self.DILATIONS:
            self.deep.append(nn.Sequential(nn.Conv1d(C, C, 5, 1, 2 * d, d, groups=C), nn.Conv1d(C, C, 1)))
        kaiming_init_(self.conv1, self.conv2, *(layer for pair in self.deep for layer in pair))

    @staticmethod
    @functools.lru_cache
    def filters(bins=BINS):
        """(bins, 201): triangles evenly spaced on Slaney's mel scale, each of area 1."""
        f = MelEncoder
        top = 15 + 27 * math.log(f.RATE / 2 / 1000) / math.log(6.4)
        mel = torch.linspace(0, top, bins + 2, dtype=torch.float64)  # linear below 1 kHz and logarithmic above
        hz = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
        low, peak, high = hz[:-2, None], hz[1:-1, None], hz[2:, None]
        at = torch.linspace(0, f.RATE / 2, f.WINDOW // 2 + 1, dtype=torch.float64)
        slopes = torch.minimum((at - low) / (peak - low), (high - at) / (high - peak)).clamp(min=0)
        return (slopes * 2 / (high - low)).float()

    @classmethod
    def log_mel(cls, x, bins=BINS):
        """Samples (n,) at 16 kHz -> (bins, ceil(n / 160) or 3 at least): logarithms to base 10, down to 8 below the
        loudest, scaled to about -1 to 1."""
        x = F.pad(x, (0, max(3 * cls.HOP - len(x), -len(x) % cls.HOP)))
        window = torch.hann_window(cls.WINDOW, device=x.device)
        spectrum = torch.stft(x, cls.WINDOW, cls.HOP, window=window, return_complex=True)  # (201, frames + 1)
        with torch.autocast(x.device.type, enabled=False):
            mel = (cls.filters(bins).to(x.device) @ spectrum[:, :-1].abs() ** 2).clamp(min=1e-10).log10()
        return (mel.clamp(min=mel.max() - 8) + 4) / 4

    def length(self, frames):
        return (frames.shape[1] + 1) // 2

    def collate(self, sounds):
        """[(80, frames)] -> frames (M, 80, T), their mask (M, 1, T), rows (L,) of the features.

        What is 40 dB below the loudest (1 in these units) counts as silence, and of each bin its mean over the sound is
        taken away, as is usual in speech recognition: both tell of room and microphone, and would drown the rest.
        """
        frames = [x.cpu().numpy() for x in sounds]
        frames = [np.maximum(x, x.max() - 1) for x in frames]
        frames = [x - x.mean(1, keepdims=True, dtype=np.float64).astype(x.dtype) for x in frames]
        mask = length_mask([x.shape[1] for x in frames])
        return pad(frames), torch.from_numpy(mask)[:, None], true_rows(mask[:, ::2])

    def forward(self, frames, mask, rows):
        """-> (L, width)"""
        x = F.gelu(self.conv1(frames.to(self.conv1.weight))) * mask  # (M, C, T); no sound hears its neighbours' lengths
        x, mask = F.gelu(self.conv2(x)), mask[..., ::2]  # (M, C, T / 2)
        for pair in self.deep:
            x = x + F.gelu(pair(x * mask))
        return take(x.mT.flatten(0, 1), rows)


class WaveNet(nn.Module):
    """A series as one feature a point: gated causal convolutions with growing dilations ([7], section 2), from scratch
    as in [1], whose code has none. Feature t knows the points up to t alone; before them there are zeros, the mean."""

    CHANNELS, DILATIONS = 8, (1, 2, 4, 8)
    CHANGE = 5  # times the change from point to point: faint fast waves were not learned without it

    def __init__(self, config):
        super().__init__()
        n, self.width = self.CHANNELS, config.encoder_width
        self.start = nn.Conv1d(3, n, 1)
        self.gates = nn.ModuleList(nn.Conv1d(n, 2 * n, 2, dilation=d) for d in self.DILATIONS)
        self.residuals = nn.ModuleList(nn.Conv1d(n, n, 1) for _ in self.DILATIONS)
        self.end = nn.Conv1d(n + 3, self.width, 1)

    def length(self, points):
        return points.shape[1]

    def window_ends(self, n):
        """Which of n points each feature ends on."""
        return range(n)

    def collate(self, series):
        """[(2, n)] -> points (M, 2, longest n), rows (L,) of the features."""
        mask = length_mask([points.shape[1] for points in series])
        return pad([points.cpu().numpy() for points in series]), true_rows(mask)

    def forward(self, points, rows):
        """-> (L, width)"""
        x = points.to(self.start.weight)
        x = torch.cat([x, self.CHANGE * F.pad(x[:, :1].diff(), (1, 0))], 1)  # (M, 3, n)
        h, skips = self.start(x), 0  # (M, channels, n)
        for dilation, gate, residual in zip(self.DILATIONS, self.gates, self.residuals):
            value, opening = gate(F.pad(h, (dilation, 0))).chunk(2, 1)
            z = value.tanh() * opening.sigmoid()
            h, skips = h + residual(z), skips + z
        y = self.end(torch.cat([skips.relu(), x], 1))  # (M, width, n)
        return take(y.mT.flatten(0, 1), rows)


class TimerLayer(nn.Module):
    """Post-norm attention and SwiGLU, as of LLaMA but for the norms."""

    def __init__(self, C, n_heads, ffn_dim):
        super().__init__()
        self.n_heads = n_heads
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(C, C, bias=name != "o") for name in "qkvo"})
        self.ffn_layer = nn.ModuleDict({name: nn.Linear(C, ffn_dim, bias=False) for name in ("gate_proj", "up_proj")})
        self.ffn_layer["down_proj"] = nn.Linear(ffn_dim, C, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)

    def rotate(self, x):
        """(B, H, n, N) -> the same, each pair of channels (j, j + N / 2) turned by n / 10000^(2 j / N)."""
        n, N = x.shape[2:]
        angle = torch.arange(n, device=x.device)[:, None] * 10000 ** (-torch.arange(0, N, 2, device=x.device) / N)
        (a, b), cos, sin = x.chunk(2, -1), angle.cos().to(x), angle.sin().to(x)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, x):
        attn, ffn = self.self_attn, self.ffn_layer
        qkv = torch.cat([attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)], -1)  # (B, n, 3 C)
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, n, N) each
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)  # (B, H, n, N)
        x = self.norm1(x + attn.o_proj(y.transpose(1, 2).flatten(2)))
        return self.norm2(x + ffn.down_proj(F.silu(ffn.gate_proj(x)) * ffn.up_proj(x)))


class Timer(nn.Module):
    """The pretrained transformer thuml/timer-base-84m (Liu et al. 2024, https://arxiv.org/abs/2402.02368) with its own
    parameter names: a feature for each 96 points, the series' first n mod 96 left out, as the newest count. Frozen.

    Official code: https://github.com/thuml/OpenLTM; used as WorldRWKV's [1] pull request 7 does
    """

    pretrained, width = True, 1024
    PATCH, LAYERS, HEADS, HIDDEN = 96, 8, 8, 2048

    def __init__(self, config):
        super().__init__()
        C = self.width
        self.model = nn.ModuleDict()
        self.model["embed_layer"] = nn.ModuleDict({"emb": nn.Linear(self.PATCH, C, bias=False)})
        self.model["layers"] = nn.ModuleList(TimerLayer(C, self.HEADS, self.HIDDEN) for _ in range(self.LAYERS))
        self.model["norm"] = nn.LayerNorm(C)
        self.lm_heads = nn.ModuleList([nn.Linear(C, self.PATCH, bias=False)])

    def length(self, points):
        return max(1, points.shape[1] // self.PATCH)

    def window_ends(self, n):
        return range(n - 1 - self.PATCH * (max(1, n // self.PATCH) - 1), n, self.PATCH)

    def collate(self, series):
        """[(2, n)] -> patches (M, longest, 96), rows (L,) of the features. Fewer than 96 points follow zeros."""
        lengths = [self.length(x) for x in series]
        recent = [x[0].cpu().numpy()[-n * self.PATCH :] for x, n in zip(series, lengths)]
        recent = [np.pad(x, (n * self.PATCH - len(x), 0)) for x, n in zip(recent, lengths)]
        return pad(recent).unflatten(1, (-1, self.PATCH)), true_rows(length_mask(lengths))

    @torch.no_grad()
    def forward(self, patches, rows):
        """-> (L, 1024)"""
        x = self.model.embed_layer.emb(patches.to(self.model.norm.weight))  # (M, longest, 1024)
        for layer in self.model.layers:
            x = layer(x)
        return take(self.model.norm(x).flatten(0, 1), rows)


def normalise(x, known=None, scale=None):
    """
    A series' points with mean 0 and about unit variance, what is unknown 0.

    Args: x (n,), NaN or infinite where unknown; known: mean and variance are those of the first so many; scale: of the
    whole series, by default the standard deviation of x: a tenth of it is added, so that a silence is not blown up.
    Returns: (2, n) float32, values clamped to +-10 and whether they are known; mean and deviation, which undo it.
    """
    mask = x.isfinite()
    first, points = x[:known][mask[:known]], x[mask]
    scale = (points.std(correction=0) if len(points) else x.new_zeros(())) if scale is None else scale
    mean = first.mean() if len(first) else x.new_zeros(())
    floor = 0.1 * scale if len(points) and scale > 1e-12 * points.abs().max() else 1.0
    deviation = (first.var(correction=0) + floor**2).sqrt() if len(first) else x.new_tensor(floor)
    points = torch.where(mask, ((x - mean) / deviation).clamp(-10, 10), 0)
    return torch.stack([points, mask.to(x)]).float(), mean.item(), deviation.item()


@dataclass
class Features:
    """In a medium's place the features (L, width) that its encoder makes of it, from the feature cache."""

    vectors: torch.Tensor


class Pretrained(nn.Module):
    """Encoders of transformers [8]: frozen, and in eval whatever train() says. A config names them, no checkpoint holds
    them: in a list they are no submodules, so that parameters() and state_dict() pass them by."""

    pretrained, cls = True, False

    def __init__(self, models, preparations):
        super().__init__()
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.preparations = preparations  # what preprocessor_config.json says, of each
        self.width = sum(model.config.hidden_size for model in models)

    def _apply(self, fn, recurse=True):  # to another device or dtype
        for model in self.models:
            model._apply(fn)
        return super()._apply(fn, recurse)

    def length(self, x):
        return len(x.vectors) if isinstance(x, Features) else self.count(x)

    def collate(self, media):
        """Media or Features -> features from the cache; rows (L,) of [encoded; cached]; what encode takes."""
        cached = np.array([isinstance(x, Features) for x in media])
        known = [x.vectors.cpu().numpy() for x in media if isinstance(x, Features)]
        order = np.argsort(np.repeat(cached, [self.length(x) for x in media]), kind="stable")
        known = np.concatenate([np.zeros((0, self.width), np.float16), *known])
        inputs = () if cached.all() else self.inputs([x for x in media if not isinstance(x, Features)])
        return torch.from_numpy(known), torch.from_numpy(np.argsort(order)), *inputs

    @torch.no_grad()
    def forward(self, cached, rows, *inputs):
        """-> (L, width)"""
        cached = cached.to(next(self.models[0].parameters()))
        return take(torch.cat([self.encode(*inputs), cached]) if inputs else cached, rows)


class Vision(Pretrained):
    """SigLIP, CLIP or DINOv2 ([1], section 3.1), the last hidden state as these models give it; CLIP and DINOv2 have
    the whole picture's vector in front. Several, over the same grid, are put side by side without it, by channel.

    Official code: siglip_encoder.py, clip_encoder.py in world/encoder of WorldRWKV [1]; several: VisualRWKV 6.11 of [3]
    """

    def __init__(self, models, preparations):
        super().__init__(models, preparations)
        self.sizes = []  # height and width of each
        for model, preparation in zip(models, preparations):
            size = preparation["crop_size" if preparation.get("do_center_crop") else "size"]
            height, width = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
            name, n = model.config.model_type, model.config.image_size
            if name != "dinov2" and (height, width) != (n, n):  # whose positions alone are stretched
                given = f"{height} x {width} as its preprocessor_config.json says"
                raise InputError(f"{name} takes pictures of {n} x {n}, not {given}")
            self.sizes.append((height, width))
        grids = [(h // m.config.patch_size, w // m.config.patch_size) for m, (h, w) in zip(models, self.sizes)]
        if len(set(grids)) > 1:
            given = " and ".join(f"{h} x {w}" for h, w in grids)
            raise InputError(f"encoders joined by + have to see the same grid of patches, not {given}")
        self.grid_h, self.grid_w = grids[0]
        self.cls = len(models) == 1 and models[0].config.model_type != "siglip_vision_model"

    def count(self, _):
        return self.grid_h * self.grid_w + self.cls

    def columns(self, _):
        return self.grid_w

    def inputs(self, pictures):
        """Mean and standard deviation (models, 2, 3, 1, 1), and of each model its pixels (M, 3, height, width)."""
        scale = np.array([[p["image_mean"], p["image_std"]] for p in self.preparations], np.float32)
        pixels = (torch.from_numpy(np.stack([x.cpu().numpy() for x in of_model])) for of_model in zip(*pictures))
        return torch.from_numpy(scale)[..., None, None], *pixels

    def encode(self, scale, *pixels):
        parts = []
        for model, p, (mean, std), x in zip(self.models, self.preparations, scale, pixels):
            x = (x * p["rescale_factor"] - mean) / std
            parts.append(model(pixel_values=x.to(next(model.parameters()))).last_hidden_state)
        return torch.cat([y[:, -self.count(0) :] for y in parts], -1).flatten(0, 1)


class Speech(Pretrained):
    """WavLM's or Whisper's encoder ([1], section 3.2), about 50 features a second, each sound by itself, since zeros
    behind a shorter one would change it. Whisper hears 30 seconds at a time, a shorter rest filled up with silence;
    what it hears in the silence is left out, as in [1]'s code.

    Official code: speech_encoder.py and whisper_encoder.py in world/encoder of WorldRWKV [1]
    """

    def __init__(self, models, preparations):
        super().__init__(models, preparations)
        self.whisper = models[0].config.model_type == "whisper"
        if self.whisper:
            self.window = 2 * models[0].config.max_source_positions * MelEncoder.HOP

    def count(self, x):
        if not self.whisper:
            return int(self.models[0]._get_feat_extract_output_lengths(len(x)))
        return sum(self.count_window(part) for part in x.split(self.window))

    def count_window(self, x):
        """Of at most 30 seconds."""
        return min(self.window // MelEncoder.HOP // 2, -(-len(x) // MelEncoder.HOP) // 2 + 1)

    def inputs(self, sounds):
        return sounds

    def encode(self, *sounds):
        [model] = self.models
        like = next(model.parameters())
        features = []
        for x in sounds:
            if not self.whisper:
                features.append(model(input_values=x[None].to(like)).last_hidden_state[0])
                continue
            for part in x.split(self.window):
                mel = MelEncoder.log_mel(F.pad(part, (0, self.window - len(part))), model.config.num_mel_bins)
                features.append(model(mel[None].to(like)).last_hidden_state[0, : self.count_window(part)])
        return torch.cat(features)


FAMILIES = {  # kind, class of transformers, where it is fetched from
    "siglip": ("image", "SiglipVisionModel", "google/siglip2-base-patch16-384"),
    "clip": ("image", "CLIPVisionModel", "openai/clip-vit-large-patch14-336"),
    "dinov2": ("image", "Dinov2Model", "facebook/dinov2-small"),
    "wavlm": ("audio", "WavLMModel", "microsoft/wavlm-base-plus"),
    "whisper": ("audio", "WhisperModel", "openai/whisper-small"),
}


def read_pretrained(kind, names):
    """The encoder of pictures or sounds in a folder or on the hub (a family's name stands for an id), as config.json
    says; pictures: also several joined by +. Raises InputError naming the flag."""
    flag, families = f"--{kind}_encoder={names}", ", ".join(FAMILIES)
    try:
        import transformers
    except ImportError as e:
        raise InputError(f'{flag} takes transformers: pip install -e ".[pretrained]"') from e
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    models, preparations = [], []
    for name in names.split("+") if kind == "image" and not os.path.isdir(names) else [names]:
        path = FAMILIES[name][2] if name in FAMILIES else name
        try:
            model, preparation = read_pretrained_model(transformers, kind, path)
        except InputError as e:
            raise InputError(f"{flag}: {path} {e}") from e
        except Exception as e:  # huggingface_hub's, safetensors' and transformers' own, OSError, ValueError
            why = (str(e).strip() or type(e).__name__).splitlines()[0]
            own = f"{', '.join([*ENCODERS[kind], 'none'])}, nor a folder or hub id of a pretrained encoder ({families})"
            raise InputError(f"{flag}: {path} is none of {own} that can be read: {why}") from e
        models.append(model)
        preparations.append(preparation)
    try:
        return (Vision if kind == "image" else Speech)(models, preparations)
    except InputError as e:
        raise InputError(f"{flag}: {e}") from e


def read_pretrained_model(transformers, kind, path):
    """(model, what its preprocessor_config.json says). Raises InputError without the path."""
    if not os.path.isdir(path) and path.count("/") != 1:
        raise OSError("no such folder")
    hf_config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)  # else it offers to run its code
    family = hf_config.model_type.removesuffix("_vision_model")
    if family not in FAMILIES or FAMILIES[family][0] != kind:
        raise InputError(f"is {family}, no encoder of {kind}s of a known family ({', '.join(FAMILIES)})")
    head = {"vision_use_head": False} if family == "siglip" else {}  # it is not used
    model, loading = getattr(transformers, FAMILIES[family][1]).from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, **head
    )
    missing = sorted(name for name in loading["missing_keys"] if "mask" not in name)  # masks are of pretraining alone
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"lacks weights: {missing[0]}{more}")
    if kind == "image":
        read, needed = transformers.ImageProcessingMixin.get_image_processor_dict, ("size", "image_mean", "image_std")
    else:
        read, needed = transformers.FeatureExtractionMixin.get_feature_extractor_dict, ()
    preparation = {"rescale_factor": 1 / 255, "resample": 3} | read(path)[0]  # older files leave these out
    for name in needed:
        if name not in preparation:
            raise InputError(f"has a preprocessor_config.json with no {name}")
    return model.get_encoder() if family == "whisper" else model, preparation


class AbsentTowers(nn.Module):
    """In the place of VisualRWKV 7.00's three vision towers: its projector is kept, and pictures are refused."""

    def __init__(self, config):
        super().__init__()
        self.width = config.encoder_width


ENCODERS = {
    "image": {"patch": PatchEncoder, "dinov2+siglip+sam": AbsentTowers},
    "audio": {"mel": MelEncoder},
    "series": {"wavenet": WaveNet, "timer": Timer},
}


# ----------------------------------------------------------------------------------------------
# 6. Adapter


class Adapter(nn.Module):
    """Conv1D(k, s) along the sequence ([1], eq. 5), then h = MLP(x) (eq. 4) and h + LayerNorm(h) (the code's pre_norm);
    or VisualRWKV's projector: linear, W x ([3]), or gated, LayerNorm(O (x * sigmoid(G x))) (its code, v7.00).

    The sequence is padded on the left so that the last window ends on the last feature:
    L' = floor((L + pad - k) / s) + 1, 577 and 576 features both give 288, 192, 144 for (3,2), (4,3), (5,4).

    Official code: VisualAdapter, https://github.com/JL-er/WorldRWKV/blob/main/world/encoder/siglip_encoder.py
    Args:
        vectors: of a series' encoder, its features of a lookback. To each vector they become a learned one is added, by
            its place counted from the end; vectors further back share the first. Without it what stood a week ago is
            found late or not at all.
    """

    def __init__(self, width, n_embd, scale, kernel, stride, kind="mlp", vectors=0):
        super().__init__()
        self.kernel, self.stride, self.kind = kernel, stride, kind
        if kernel:
            self.conv = nn.Conv1d(width, width, kernel, stride, bias=False)
        if kind == "mlp":
            self.mlp = nn.Sequential(nn.Linear(width, scale * n_embd), nn.ReLU(), nn.Linear(scale * n_embd, n_embd))
            self.pre_norm = nn.LayerNorm(n_embd)
            nn.init.zeros_(self.mlp[0].bias)  # a bias would drown a faint signal in the norm, and delay its emergence
            nn.init.zeros_(self.mlp[2].bias)
        else:
            self.o_proj = nn.Linear(width, n_embd, bias=False)
        if kind == "gated":
            self.gate, self.ln_v = nn.Linear(width, width, bias=False), nn.LayerNorm(n_embd)
        self.place = None
        if vectors:
            self.place = nn.Parameter(2 * torch.randn(self.length(vectors), n_embd))  # loud: fainter ones are used late

    def padding(self, n):
        """On the left of n features."""
        return max(self.kernel - n, (self.kernel - n) % self.stride) if self.kernel else 0

    def length(self, n):
        return (n + self.padding(n) - self.kernel) // self.stride + 1 if self.kernel else n  # eq. 5: L'

    def window_ends(self, n):
        """Which of n features each window ends on."""
        return range(self.kernel - 1 - self.padding(n), n, self.stride) if self.kernel else range(n)

    def collate(self, lengths):
        """
        Of features of these lengths: rows (M, T), by which gather() makes the Conv1D's input, padded on the left and on
        the right; kept (L',), the windows that are no padding; positions (L',), the rows of `place`.
        """
        left = np.array([self.padding(n) for n in lengths])
        mask = length_mask(left + lengths)
        mask[np.arange(mask.shape[1]) < left[:, None]] = False
        rows = np.zeros(mask.shape, np.int64)
        rows[mask] = np.arange(1, sum(lengths) + 1)
        windows, positions = [self.length(n) for n in lengths], None
        if self.place is not None:
            P = len(self.place)
            positions = torch.from_numpy(np.concatenate([np.arange(P - n, P) for n in windows]).clip(0))
        return torch.from_numpy(rows), true_rows(length_mask(windows)), positions

    def forward(self, x, rows, kept, positions=None):
        """(L, width) -> (L', n_embd)"""
        if self.kernel:
            x = self.conv(gather([x], rows).mT).mT  # eq. 5: (M, T, width) -> (M, windows, width)
            x = take(x.flatten(0, 1), kept)  # (L', width)
        y = self.project(x)
        return y if positions is None else y + take(self.place, positions)

    def project(self, x):
        if self.kind == "linear":
            return self.o_proj(x)
        if self.kind == "gated":
            return self.ln_v(self.o_proj(x * torch.sigmoid(self.gate(x))))
        h = self.mlp(x)  # eq. 4: Linear2(ReLU(Linear1(x)))
        return h + self.pre_norm(h)


class SpeechAdapter(Adapter):
    """Conv1D(3, 2), which halves the features to 25 a second, then an MLP, without a norm.

    Official code: SpeechAdapter, https://github.com/JL-er/WorldRWKV/blob/main/world/encoder/speech_encoder.py
    """

    def __init__(self, width, n_embd, scale):
        nn.Module.__init__(self)
        hidden = scale * n_embd
        self.kernel, self.place = 3, None
        self.conv = nn.Conv1d(width, hidden, 3, 2, 2)  # the zeros behind a shorter sound are those of its own padding
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, n_embd))
        kaiming_init_(self.conv, self.mlp[0], self.mlp[2])

    def padding(self, n):
        return 0  # besides the Conv1D's own

    def length(self, n):
        return (n + 1) // 2 + 1

    def project(self, x):
        return self.mlp(x)


# ----------------------------------------------------------------------------------------------
# 7. ModRWKV


SOURCE = {"answer": "text", "forecast": "series"}  # what a segment is made of, where its kind does not say so
SCANS = {"uni": 1, "bi": 2, "multi": 4}  # so many orders take turns from layer to layer: forward, backward, down, up
VOCAB_SIZES = {"bytes": 260, "gpt2": 50257}  # of tokenizers; RWKV World's: 65536
PIECE = 512  # vectors that are read at once without gradients
TRACE_AFTER = 100  # steps: by then a trace would have saved about what it costs


def scan(span, window_ends, columns):
    """The orders in which layers read a picture ([3], section 3.2.4) whose vectors have the positions `span` in the
    sequence: forward, backward, down, up. Down is by column, then by row, of the last patch in a vector's window:
    `window_ends`, as of Adapter. Official code: https://github.com/howard-hou/VisualRWKV/tree/main/VisualRWKV-v6"""
    down = sorted(span, key=lambda i: (window_ends[i - span[0]] % columns, window_ends[i - span[0]]))
    return span, span[::-1], down, down[::-1]


def reorder(x, order):
    """x (B, T, C) by order (B, T)."""
    return x.gather(1, order[..., None].expand_as(x))


class Batch(NamedTuple):
    """What ModRWKV.collate makes of a list of samples, on the CPU: a GPU is asked for no count."""

    ids: Tensor  # (n,): of all text
    media: dict  # kind -> (number of them, what its encoder takes, what its adapter takes)
    rows: Tensor  # (B, T): what stands where, as rows of [zeros; embeddings of ids; images; sounds; series]
    labels: Tensor  # (B, T): the token each position has to predict, -100 where none
    lengths: Tensor  # (B,)
    orders: list  # what the layers take turns to gather their input by: (B, T), or None for as it is
    answers: Tensor  # (m,): positions in (B T) that have a label
    forecasts: Tensor  # (f,): positions in (B T) that forecast
    targets: Tensor  # (f, horizon): the points they forecast, NaN where unknown
    n_targets: Tensor  # (m + f,): how many answers and forecasts the sample of each has
    n_samples: int  # that have any

    def to(self, device):
        return Batch(*(move(x, device) for x in self))


def move(x, device):
    """x with its tensors on a device; x may be a dict, list or tuple that holds them."""
    if isinstance(x, dict):
        return {key: move(value, device) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [move(value, device) for value in x]
    return x.to(device, non_blocking=True) if torch.is_tensor(x) else x


class ModRWKV(nn.Module):
    """The language model, with an encoder and an adapter for each kind of media ([1], figure 1).

    Official code: https://github.com/JL-er/WorldRWKV/blob/main/world/model.py
    """

    feature_cache = ""  # a folder: data/media.py
    checkpoint_activations = False  # in training keep what enters a block alone, and run it again in the backward pass

    def __init__(self, config, vocab_size=None, ranks=None, ffn_dim=None):
        """vocab_size, ranks of the low-rank matrices and ffn_dim: read off a checkpoint, else official. With ranks, the
        language model has no initial values (a minute for half a billion parameters): the checkpoint fills it."""
        super().__init__()
        check_settings(config)
        if config.n_embd % config.head_size:
            raise InputError(f"n_embd={config.n_embd} is not a multiple of head_size={config.head_size}")
        self.config = config
        V, C = vocab_size or VOCAB_SIZES.get(config.tokenizer, 65536), config.n_embd
        with torch.device("meta") if ranks else contextlib.nullcontext():
            self.emb = nn.Embedding(V, C)
            nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
            self.blocks = nn.ModuleList(Block(config, layer, ranks, ffn_dim) for layer in range(config.n_layer))
            self.ln_out = nn.LayerNorm(C)
            self.head = nn.Linear(C, V, bias=False)
            nn.init.orthogonal_(self.head.weight, 0.5 * max(1, V / C) ** 0.5)
        self.encoder, self.adapter = nn.ModuleDict(), nn.ModuleDict()
        for kind in MEDIA:
            name = getattr(config, f"{kind}_encoder")
            if name == "none":
                continue
            encoder = ENCODERS[kind][name](config) if name in ENCODERS[kind] else read_pretrained(kind, name)
            size, scale, projector = (encoder.width, C), config.adapter_scale, config.adapter_kind
            if kind == "image":
                adapter = Adapter(*size, scale, config.conv_kernel, config.conv_stride, projector)
            elif kind == "audio":
                adapter = SpeechAdapter(*size, scale)
            else:
                n, kernel, stride = (
                    len(encoder.window_ends(config.lookback)),
                    config.series_kernel,
                    config.series_stride,
                )
                adapter = Adapter(*size, scale, kernel, stride, projector, n)
                if kernel and not stride <= kernel <= n:
                    bounds = f"not 0, nor from series_stride={stride} to the {n} vectors of a lookback"
                    raise InputError(f"series_kernel={kernel} is {bounds}")
            self.encoder[kind], self.adapter[kind] = encoder, adapter
        if "series" in self.encoder:
            self.forecast_head = nn.Linear(C, config.horizon)
            nn.init.zeros_(self.forecast_head.weight)  # the first forecast is the mean
            nn.init.zeros_(self.forecast_head.bias)

    def check_series(self):
        if "series" not in self.encoder:
            raise InputError("this model has no series encoder; train one with --series_encoder=wavenet")

    def window(self, x, rng=None):
        """
        A sample that learns to forecast a stretch of a series x (n,): [("forecast", (points (2, lookback), targets))].

        Every vector predicts the `horizon` points that follow it: targets (vectors, horizon), NaN where nothing is
        to learn, also where the prediction would be of points that mean and deviation have seen. Without rng it is the
        last stretch, and the last vector alone predicts.
        """
        self.check_series()
        n, horizon = self.config.lookback, self.config.horizon
        x = F.pad(x, (max(0, n + horizon - len(x)), 0), value=math.nan)
        start, n_observed = len(x) - n - horizon, n
        if rng:
            start = rng.randint(0, start)
            blank = next((i for i in range(n) if x[start + i].isfinite()), n)  # points before the first
            n_observed = n if rng.random() < 0.15 else rng.randint(blank + (n - blank) // 3, n)
        past, x = x[: start + n_observed], x[start : start + n + horizon]
        points, *_ = normalise(x, n_observed, past[past.isfinite()].std(correction=0))
        ends = self.encoder["series"].window_ends(n)
        ends = torch.tensor([ends[i] for i in self.adapter["series"].window_ends(len(ends))])
        targets = torch.where(points[1] > 0, points[0], math.nan)[ends[:, None] + torch.arange(1, horizon + 1)]
        first = n_observed if points[1, :n].any() else math.inf  # from nothing, nothing is learned
        targets[ends + 1 < first] = math.nan
        return [("forecast", (points[:, :n], targets))]

    def length(self, sample):
        """How many vectors a sample becomes."""
        n = 0
        for kind, data in sample:
            kind, data = ("series", data[0]) if kind == "forecast" else (kind, data)
            n += len(data) if kind in ("text", "answer") else self.adapter[kind].length(self.encoder[kind].length(data))
        return n

    # -- fuse, forward, loss --

    def cls(self, kind):
        """Where media have a vector of the whole, which encoders put first: "first", "last", or None without one."""
        return self.config.cls if getattr(self.encoder[kind], "cls", False) else None

    def collate(self, samples):
        """Samples of segments -> Batch: all that can be counted beforehand, maybe by a data loader's worker."""
        if isinstance(samples, Batch):
            return samples
        found = {kind: [] for kind in ("text", *MEDIA)}
        for kind, data in itertools.chain(*samples):
            found[SOURCE.get(kind, kind)].append(data[0] if kind == "forecast" else data)
        ids = np.fromiter(itertools.chain(*found.pop("text")), np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.emb.num_embeddings:
            raise InputError(f"token {ids.max()} is beyond the model's vocabulary of {self.emb.num_embeddings}")
        next_row, media, end = {"text": 1}, {}, 1 + len(ids)
        for kind, inputs in found.items():
            if not inputs:
                continue
            if kind not in self.encoder:
                raise InputError(f"this model has no {kind} encoder")
            encoder, adapter = self.encoder[kind], self.adapter[kind]
            lengths = [encoder.length(x) for x in inputs]
            media[kind] = len(inputs), encoder.collate(inputs), adapter.collate(lengths)
            next_row[kind] = end
            end += sum(adapter.length(n) for n in lengths)

        lengths = [self.length(sample) for sample in samples]
        B, T = len(samples), max(lengths)
        rows, tokens = np.zeros((B, T), np.int64), np.full((B, T + 1), -100)
        orders = np.tile(np.arange(T), (SCANS[self.config.scan] if "image" in media else 1, B, 1))
        forecasts, targets = [np.zeros(0, np.int64)], [np.zeros((0, self.config.horizon), np.float32)]
        for i, sample in enumerate(samples):
            t = 0
            for kind, data in sample:
                n, source = self.length([(kind, data)]), SOURCE.get(kind, kind)
                rows[i, t : t + n] = np.arange(next_row[source], next_row[source] + n)
                next_row[source] += n
                if kind == "answer":
                    tokens[i, t : t + n] = data
                elif kind == "forecast":
                    target = data[1].cpu().numpy()
                    known = np.flatnonzero(~np.isnan(target).all(1))
                    forecasts.append(i * T + t + known)
                    targets.append(target[known])
                elif kind == "image" and len(orders) > 1:
                    span, scans = self.scan_image(t, data)
                    orders[:, i, span] = scans[: len(orders)]
                t += n
        labels, forecasts = tokens[:, 1:], np.concatenate(forecasts)
        answers = np.flatnonzero(labels != -100)
        sample_of = np.concatenate([answers, forecasts]) // T
        n_targets = np.bincount(sample_of, minlength=B)
        return Batch(
            ids=torch.from_numpy(ids),
            media=media,
            rows=torch.from_numpy(rows),
            labels=torch.from_numpy(labels),
            lengths=torch.from_numpy(np.array(lengths)),
            orders=[None, *torch.from_numpy(orders[1:])],
            answers=torch.from_numpy(answers),
            forecasts=torch.from_numpy(forecasts),
            targets=torch.from_numpy(np.concatenate(targets)),
            n_targets=torch.from_numpy(n_targets[sample_of]),
            n_samples=np.count_nonzero(n_targets),
        )

    def scan_image(self, t, image):
        """The positions, from t on, of a picture's vectors but that of the whole, and the orders to read them in."""
        encoder, cls = self.encoder["image"], self.cls("image")
        ends, first = self.adapter["image"].window_ends(encoder.length(image)), int(cls == "first")
        span = range(t + first, t + len(ends) - int(cls == "last"))
        return span, scan(span, [end - first for end in ends[first:]], encoder.columns(image))

    def fuse(self, samples):
        """
        Samples of segments, or a Batch, to one padded batch.

        Returns: x (B, T, C), padded on the right; labels (B, T), the token each position has to predict, -100 where
        none; lengths (B,); orders, what the layers take turns to gather their input by, (B, T) each, None for as it is.
        """
        # 1. Count what is where, on the CPU
        batch = self.collate(samples).to(self.emb.weight.device)
        # 2. Encode all media of a kind at once
        vectors = [self.emb(batch.ids), *self.encode(batch)]  # (n, C), (L', C) ...
        # 3. Place all of them by one gather
        x = gather(vectors, batch.rows)  # (B, T, C)
        return x, batch.labels, batch.lengths, batch.orders

    def encode(self, batch):
        """The vectors (L', C) of all media of a kind, for each kind that a Batch has."""
        vectors = []
        for kind, (n, encoder_inputs, adapter_inputs) in batch.media.items():
            features = self.encoder[kind](*encoder_inputs)  # (L, width)
            if self.cls(kind) == "last":
                features = features.unflatten(0, (n, -1)).roll(-1, 1).flatten(0, 1)
            vectors.append(self.adapter[kind](features, *adapter_inputs))  # (L', C)
        return vectors

    def backbone(self, x, state=None, lengths=None, orders=(None,)):
        """(B, T, C) into the blocks -> (B, T, C) out of ln_out, and the new state. A state of one sample serves B."""
        v_first, new = None, []
        state = self.fit_state(state, len(x)) if state else [(None, None, None)] * len(self.blocks)
        backs = [None if order is None else order.argsort(1) for order in orders]
        dtype = self.emb.weight.dtype  # of matrices in 16 bits the products are in 16 bits, all else is in 32
        mixed = torch.autocast(x.device.type, dtype) if dtype.itemsize == 2 else contextlib.nullcontext()
        with mixed:
            for layer, (block, s) in enumerate(zip(self.blocks, state)):
                order, back = orders[layer % len(orders)], backs[layer % len(orders)]
                if self.checkpoint_activations and torch.is_grad_enabled():
                    block = functools.partial(checkpoint, block, use_reentrant=False)
                if order is None:
                    x, v, s = block(x, v_first, s, lengths)
                    v_first = v if v_first is None else v_first
                else:  # the residual stream keeps its order between the layers
                    v = None if v_first is None else reorder(v_first, order)  # RWKV-5 and 6 have none
                    x, _, s = block(reorder(x, order), v, s, lengths)
                    x = reorder(x, back)
                new.append(s)
        return self.ln_out(x).to(dtype), new

    def fit_state(self, state, B):
        """A state for B samples, of B or of one. Raises InputError if it is another model's, or of another number."""
        n, *shape = state[0][1].shape
        att = self.blocks[0].att
        if len(state) != len(self.blocks) or shape != [att.H, att.N, att.N]:
            given = f"{len(state)} layers of {shape[0]} heads of {shape[1]}"
            raise InputError(f"the state is another model's: it has {given}")
        if n not in (1, B):
            raise InputError(f"a state of {n} samples does not fit {B} samples")
        return state if n == B else [tuple(x.expand(B, *x.shape[1:]) for x in s) for s in state]

    def forward(self, idx, state=None):
        """
        Args: idx: tokens (B, T), or a list of samples, each a list of segments; state: what an earlier call
        returned, to continue from there: per layer (x_att (B, C), S (B, H, N, N), x_ffn (B, C)).
        Returns: logits (B, T, V), of no meaning beyond a sample's length, and each sample's own state.
        """
        x, _, lengths, orders = (self.emb(idx), None, None, [None]) if torch.is_tensor(idx) else self.fuse(idx)
        x, state = self.backbone(x, state, lengths, orders)
        return self.head(x), state

    def loss(self, samples, count=None, reduction="token", l2wrap=0.0):
        """Cross-entropy of the answers' tokens; only they go through the head. Of a forecast, half Huber's and half the
        absolute error of the normalised points, a vector counting as a token.

        Args: samples: as of fuse; reduction: "token", the sum divided by `count` (by default the number of these
        tokens), or "sample", the sum of each sample's mean divided by `count` (by default the number of samples that
        have any), as VisualRWKV v6 has it; l2wrap: weight of half the square of each largest logit, which keeps logits
        from drifting (L2Wrap, [4], explicit).
        """
        batch = self.collate(samples).to(self.emb.weight.device)
        x, labels, _, orders = self.fuse(batch)
        x = self.backbone(x, orders=orders)[0].flatten(0, 1)  # (B T, C)
        logits = self.head(take(x, batch.answers)).float()  # (m, V)
        losses = F.cross_entropy(logits, labels.take(batch.answers), reduction="none")
        if l2wrap:
            losses = losses + l2wrap / 2 * logits.max(-1).values ** 2
        if len(batch.forecasts):
            points = self.forecast_head(take(x, batch.forecasts)).float()  # (f, horizon)
            known, targets = ~batch.targets.isnan(), batch.targets.nan_to_num()
            huber = F.smooth_l1_loss(points, targets, reduction="none")
            errors = (huber + F.l1_loss(points, targets, reduction="none")) / 2
            losses = torch.cat([losses, (errors * known).sum(1) / known.sum(1)])
        if reduction == "sample":
            losses = losses / batch.n_targets
        units = len(batch.n_targets) if reduction == "token" else batch.n_samples
        return losses.sum() / (count or max(1, units))

    # -- forecast and generate --

    @torch.inference_mode()
    def forecast(self, series, horizon=None, scale=None):
        """
        The next points of a batch of series, from the last `lookback` points of each.

        Args: series: tensors (n,) or lists, NaN where unknown; horizon: how many points, by default config.horizon,
        further ones from the forecast itself; scale: see `normalise`.
        Returns: (B, horizon), in the units of the series.
        """
        self.check_series()
        series, ahead, n = [torch.as_tensor(x, dtype=torch.float64) for x in series], [], self.config.lookback
        horizon = horizon or self.config.horizon
        while sum(y.shape[1] for y in ahead) < horizon:
            recent = [F.pad(x[-n:], (max(0, n - len(x)), 0), value=math.nan) for x in series]
            deviations = [scale or x[x.isfinite()].std(correction=0) for x in series]
            points, means, deviations = zip(*(normalise(x, scale=d) for x, d in zip(recent, deviations)))
            x, _ = self.read([[("series", p)] for p in points])
            y = self.forecast_head(x).cpu().double()
            means, deviations = torch.tensor([means, deviations], dtype=torch.float64)[..., None]
            ahead.append(y * deviations + means)
            series = [torch.cat([x, y]) for x, y in zip(series, ahead[-1])]
        return torch.cat(ahead, 1)[:, :horizon]

    @torch.inference_mode()
    def read(self, samples, state=None):
        """
        Reads samples in pieces of about PIECE vectors, so that memory does not grow with their length.

        Args: as forward's.
        Returns: (B, C), what ln_out gives at the last token of each sample; each sample's state.
        """
        batch = self.collate(samples)
        cuts, T = self.cuts(batch.orders, batch.rows.shape[1]), batch.rows.shape[1]
        padded = bool((batch.lengths < T).any())
        batch, hidden = batch.to(self.emb.weight.device), None
        vectors = self.encode(batch)
        for start, end in itertools.pairwise(cuts):
            x = self.embed(batch.ids, vectors, batch.rows[:, start:end])  # (B, end - start, C)
            lengths = (batch.lengths - start).clamp(0, end - start) if padded else None
            orders = [None if order is None else order[:, start:end] - start for order in batch.orders]
            y, state = self.backbone(x, state, lengths, orders)
            _, hidden = token_shift(y, hidden, lengths)
        return hidden, state

    def cuts(self, orders, T):
        """Where `read` cuts T positions: not inside a picture whose vectors are read in several `orders`."""
        farthest = np.arange(T)  # the last position that is read by then, of any sample in any order
        for order in orders[1:]:
            farthest = np.maximum(farthest, np.maximum.accumulate(order.cpu().numpy(), 1).max(0))
        cuts, last = [0], 0
        for end in np.flatnonzero(farthest == np.arange(T)) + 1:
            if end - cuts[-1] > PIECE and last > cuts[-1]:
                cuts.append(last)
            last = int(end)
        return [*cuts, T]

    def embed(self, ids, vectors, rows):
        """Step 3 of `fuse` for some of Batch.rows: only their tokens are embedded."""
        n = len(ids)
        x = gather(vectors, (rows - n).clamp(min=0)) if vectors else 0
        if not n:
            return x
        is_text = (rows <= n)[..., None]  # or padding, which nobody looks at
        return torch.where(is_text, self.emb(ids[(rows - 1).clamp(0, n - 1)]), x)

    def step(self, tokens, state):
        """Tokens (B,) -> (B, C) out of ln_out, and the new state."""
        x, state = self.backbone(self.emb(tokens)[:, None], state)
        return x[:, 0], tuple(state)

    @torch.inference_mode()
    def generate(
        self,
        samples,
        state=None,
        max_new_tokens=256,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        penalty_decay=0.996,
        seed=0,
        end=(0,),
        step=None,
    ):
        """
        Continues a batch of samples, each until a token of `end` or max_new_tokens.

        Args:
            samples: lists of segments, after `state`; or what `read` returned
            temperature, top_k, top_p: see sample_token
            presence_penalty, frequency_penalty: taken from a token's logit where it was generated before, and for each
                time it was, which counts less by penalty_decay with each token since (ChatRWKV's alpha_presence,
                alpha_frequency, alpha_decay, https://github.com/BlinkDL/ChatRWKV/blob/main/API_DEMO_CHAT.py)
            seed: of the random numbers that each sample has of its own, so that no answer depends on its neighbours;
                or a list of one a sample
            step: a faster self.step: traced_step(self) or compiled_step(self)
        Yields: at each step the list of new tokens, None for samples that ended; send() may answer which are done.
        Returns (as StopIteration.value): for a batch of one, the state after its last token, or before one of `end`.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} leaves no room for an answer")
        x, state = samples if isinstance(samples, tuple) else self.read(samples, state)
        device, B = x.device, len(x)
        seeds = seed if isinstance(seed, list) else [seed] * B
        rngs = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        penalised, step, done = presence_penalty or frequency_penalty, step or self.step, [False] * B
        counts = torch.zeros(B, len(self.head.weight) if penalised else 0, device=device)
        for n in range(1, max_new_tokens + 1):
            logits = self.head(x).float()
            if penalised:
                logits = logits - (counts > 0) * presence_penalty - counts * frequency_penalty
            tokens = torch.stack([sample_token(z, temperature, top_k, top_p, rng) for z, rng in zip(logits, rngs)])
            if penalised:
                counts = (penalty_decay * counts).scatter_add(1, tokens[:, None], torch.ones_like(counts[:, :1]))
            new = [None if rests else token for rests, token in zip(done, tokens.tolist())]
            stopped = (yield new) or [False] * B
            done = [token is None or token in end or stops for token, stops in zip(new, stopped)]
            if all(done) or n == max_new_tokens:
                break
            x, state = step(tokens, state)
        if B == 1:
            return state if new[0] in end else self.step(tokens, state)[1]


def traced_step(model):
    """model.step as a trace of TorchScript, made when it has been called TRACE_AFTER times: without Python between its
    operations a small model's step takes half as long. For a CPU, and for parameters that stay where they are."""
    step, calls = model.step, 0

    def call(tokens, state):
        nonlocal step, calls
        calls, state = calls + 1, tuple(state)
        if calls == TRACE_AFTER:
            with warnings.catch_warnings(), contextlib.suppress(Exception):  # TorchScript is deprecated, and may go
                warnings.simplefilter("ignore")
                step = torch.jit.trace_module(model, {"step": (tokens, state)}, check_trace=False).step
        return step(tokens, state)

    return call


def compiled_step(model):
    """model.step by torch.compile with CUDA graphs: one launch for all that it does."""
    step = torch.compile(model.step, fullgraph=True, mode="reduce-overhead")

    def call(tokens, state):
        torch.compiler.cudagraph_mark_step_begin()
        x, state = step(tokens, tuple(state))
        return x.clone(), [tuple(y.clone() for y in s) for s in state]  # the graph writes over its outputs

    return call


def sample_token(logits, temperature, top_k, top_p, generator):
    """One token of logits (V,): greedy at temperature 0, else of the top_k likeliest (0: all) in a mass of top_p."""
    if temperature == 0:
        return logits.argmax()
    p, index = torch.softmax(logits / temperature, -1).sort(descending=True)
    p = p[: top_k or None]
    p[1:] = p[1:] * ((p.cumsum(0) - p)[1:] < top_p)  # the likeliest always stays
    return index[torch.multinomial(p, 1, generator=generator)[0]]


# ----------------------------------------------------------------------------------------------
# 8. Optimizer


def parameter_groups(model, weight_decay, decay_lr=2.0, muon=False):
    """AdamW groups as the official ones ([4], configure_optimizers): weight decay on matrices (`.weight`); twice the
    learning rate (decay_lr) on att.w0 and att.time_decay. Each group's learning rate is to be multiplied by its
    "lr_scale". muon: a fourth group, for torch.optim.Muon, takes the matrices of blocks, encoders and adapters."""
    groups = {"decay": [], "w0": [], "rest": [], "muon": []}
    for name, p in model.named_parameters():
        if name.endswith(("att.w0", "att.time_decay")):
            group = "w0"
        elif not name.endswith(".weight") or sum(n > 1 for n in p.shape) < 2:
            group = "rest"
        elif muon and p.ndim == 2 and not name.startswith(("emb.", "head.", "forecast_head.")):
            group = "muon"
        else:
            group = "decay"
        groups[group].append(p)
    settings = {"decay": (weight_decay, 1.0), "w0": (0.0, decay_lr), "rest": (0.0, 1.0)}
    if muon:
        settings["muon"] = (weight_decay, 1.0)
    return [{"params": groups[name], "weight_decay": wd, "lr_scale": scale} for name, (wd, scale) in settings.items()]


def freeze(model, phase, names=""):
    """The papers' two phases: "adapter" trains adapters and encoders without pretrained weights, "all" everything else,
    too. names: more to freeze, as beginnings of parameter names separated by commas: "emb", "blocks.0,blocks.1"."""
    names = [name for name in names.split(",") if name]
    matched = set()
    for name, p in model.named_parameters():
        part, *rest = name.split(".")
        hits = [prefix for prefix in names if f"{name}.".startswith(f"{prefix}.")]
        matched.update(hits)
        frozen = hits or part == "encoder" and getattr(model.encoder[rest[0]], "pretrained", False)
        p.requires_grad_(not frozen and (phase == "all" or part in ("encoder", "adapter", "forecast_head")))
    for name in names:
        if name not in matched:
            raise InputError(f"--freeze: no parameter is called {name} or {name}...")


# ----------------------------------------------------------------------------------------------
# 9. Checkpoints


def write(path, contents, save_file=None):
    """Writes tensors and plain values by save_file(contents, file): all, or nothing and what was there stays."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as f:
            (save_file or torch.save)(contents, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch's writer says RuntimeError when the disk is full
        with contextlib.suppress(OSError):
            os.remove(partial)
        kept = "; the checkpoint of before is still there" if os.path.exists(path) else ""
        raise InputError(f"could not save {path}: {getattr(e, 'strerror', None) or 'is the disk full?'}{kept}") from e


def save(path, model, **more):
    """Writes model, config and `more` (tensors and plain values) to path, as `write` does."""
    write(path, {"model": model.state_dict(), "config": dataclasses.asdict(model.config), **more})


def read_file(path, mmap=False):
    """What a .pt or .pth file holds, or the ckpt.pt of a folder. mmap: tensors are the file's pages, read when needed;
    the file may be replaced by another, but not written to."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        mmap = mmap and zipfile.is_zipfile(path)  # not torch's format from before 2020
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as e:
        raise InputError(f"cannot read the checkpoint {path}: {e.strerror or e}") from e
    except Exception as e:  # pickle's, zipfile's and torch's own: whatever it is, these bytes are no checkpoint
        raise InputError(f"{path} is not a checkpoint that can be read safely, or it is cut short") from e


def own_checkpoint(data, path):
    """The contents of a checkpoint of ours, or BlinkDL's, whose names are the same, as if ours; else None."""
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no model")
    if isinstance(data.get("model"), dict) and isinstance(data.get("config"), dict):
        return data
    if not any(isinstance(name, str) and name.startswith("blocks.") for name in data):
        return None
    return {"model": data, "config": {"tokenizer": "rwkv_vocab_v20230424.txt", "image_encoder": "none"}}


def same_name(name):
    """(the name in the file, whether the matrix is transposed there) of a tensor of ours, in files with our names."""
    return name, False


def model_from_checkpoint(data, path, dtype=torch.float32, **changes):
    """The model of a checkpoint's contents; sizes are read off the tensors, `changes` go into its config. What belongs
    to an encoder that is changed to none is left out. dtype: see load."""
    parts = {kind: [f"encoder.{kind}.", f"adapter.{kind}."] for kind in MEDIA}
    parts["series"].append("forecast_head.")
    unused = [f"blocks.0.att.v{i}" for i in "012"]
    for kind in MEDIA:
        unused += parts[kind] if changes.get(f"{kind}_encoder") == "none" else []
    weights = {str(name): x for name, x in data["model"].items() if not str(name).startswith(tuple(unused))}
    original_name = data.get("original_name", same_name)
    rwkv = 6 if "blocks.0.att.time_maa_x" in weights else 5 if "blocks.0.att.time_mix_k" in weights else 7
    heads = "blocks.0.att.r_k" if rwkv == 7 else "blocks.0.att.time_faaaa"
    decay = {5: "time_decay", 6: "time_decay_w1", 7: "w1"}[rwkv]
    wrong = f"{path} is not an RWKV-{rwkv} checkpoint: "
    for name, x in weights.items():
        if not torch.is_tensor(x) or not x.is_floating_point():
            raise InputError(f"{wrong}{original_name(name)[0]} is not a tensor of floating-point numbers")
    for name in ("emb.weight", heads, f"blocks.0.att.{decay}", "blocks.0.ffn.key.weight"):
        if name not in weights:
            raise InputError(f"{wrong}it has no {original_name(name)[0]}")
        if weights[name].dim() != 2:
            raise InputError(f"{wrong}{original_name(name)[0]} is not a matrix")

    def rank(name):
        return weights[name].shape[1] if name in weights and weights[name].dim() > 1 else 0

    config = {k: v for k, v in data["config"].items() if k in Config.__dataclass_fields__} | changes
    V, config["n_embd"] = len(weights["emb.weight"]), weights[heads].numel()
    config["n_layer"] = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    config["head_size"], config["rwkv"] = weights[heads].shape[1], rwkv
    ranks = {name: rank(f"blocks.0.att.{name}1") for name in "wag"}
    ranks["v"] = rank(f"blocks.{min(1, config['n_layer'] - 1)}.att.v1")  # layer 0 has none
    ranks |= {"maa": rank("blocks.0.att.time_maa_w2"), "decay": rank("blocks.0.att.time_decay_w1")}
    model = ModRWKV(Config(**config), V, ranks, weights["blocks.0.ffn.key.weight"].shape[0])
    fresh = [part for part in itertools.chain(*parts.values()) if not any(name.startswith(part) for name in weights)]
    new = [name for name in model.state_dict() if name.startswith(tuple(fresh))]  # it may be given encoders
    load_weights(model, weights, path, new, original_name)
    return to_precision(model, weights["emb.weight"].dtype if dtype == "auto" else dtype)


def to_precision(model, dtype):
    """The model in a dtype, all but what float32 is needed for: norms and decays of the language model."""
    norms = re.compile(r"(blocks\.\d+\.)?(att\.)?ln(\d|_x|_out)")
    kept = {}
    for name, p in model.named_parameters():
        if norms.fullmatch(name.rpartition(".")[0]) or name.endswith(("att.w0", "att.time_decay")):
            kept[p] = p.detach().float()
    model.to(dtype)
    for p, x in kept.items():
        p.data = x
    for name, module in model.named_modules():
        if dtype.itemsize == 2 and norms.fullmatch(name):
            module.register_forward_pre_hook(in_float32)
    return model


def in_float32(module, inputs):
    return inputs[0].float()


def load_weights(model, weights, path, new=(), original_name=same_name):
    """Fills the model with weights {name: tensor}, all but the `new`; what is on the device "meta" becomes the tensors
    themselves, whatever their dtype. Strict; errors use the file's own tensor names."""
    own = model.state_dict()

    def sizes(x):  # (1, 1, C) and (C,) are the same
        return [n for n in x.shape if n > 1]

    wrong = [f"{original_name(name)[0]} is missing" for name in own if name not in weights and name not in new]
    wrong += [f"{original_name(name)[0]} is not expected" for name in weights if name not in own]
    for name, x in weights.items():
        if name in own and sizes(x) != sizes(own[name]):
            original, transposed = original_name(name)
            given, wanted = (tuple(y.shape)[:: -1 if transposed else 1] for y in (x, own[name]))
            wrong.append(f"{original} has shape {given}, not {wanted}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise InputError(f"{path} does not fit: {'; '.join(wrong[:4])}{more}")
    weights = {name: x.reshape(own[name].shape).contiguous() for name, x in weights.items()}
    model.load_state_dict(weights, strict=not new, assign=any(x.is_meta for x in own.values()))


def load(path, device="cpu", dtype="auto", **changes):
    """A model ready to answer, from a checkpoint of train.py (or its folder) or BlinkDL's .pth of RWKV-5.2, 6 or 7;
    data/released.py reads others. Untrusted files are safe.

    dtype: torch.float32, bfloat16 or float16; "auto" is the file's own. State, norms and decays are float32 in any.
    changes: settings of Config to override, e.g. image_encoder="none" for the language model alone.
    Raises InputError if the file cannot be read or does not fit, naming what is missing or too much.
    """
    data = own_checkpoint(read_file(path, mmap=True), path)
    if data and data.get("base"):
        raise InputError(f"{path} holds no language model: data.released.load reads {data['base']['path']}, too")
    if not data:
        others = "data.released.load reads other released models"
        raise InputError(f"{path} is neither a checkpoint of train.py nor BlinkDL's; {others}")
    return model_from_checkpoint(data, path, dtype, **changes).to(device).eval()


# ----------------------------------------------------------------------------------------------
# 10. python modrwkv.py


def check(device):
    """Prints how far each way to compute the recurrence is from wkv7_loop in float64, and how fast: medians of runs."""
    methods = {"wkv7_loop": wkv7_loop, "wkv7_chunked": wkv7_chunked}
    if has_kernel(device.type):
        methods["kernel.cu"] = wkv7
    B, T, H, N = 4, 512, 4, 64
    r, w, k, v, a, b, dy = torch.randn(7, B, T, H, N, device=device)
    kk = F.normalize(a, dim=-1)
    inputs = [x.detach().requires_grad_() for x in (r, -0.6 * torch.sigmoid(w), 0.3 * k, v, -kk, kk * torch.sigmoid(b))]
    exact = [x.detach().to("cpu", torch.float64).requires_grad_() for x in inputs]
    y64, _ = wkv7_loop(*exact)
    exact = y64, *torch.autograd.grad(y64, exact, dy.to("cpu", torch.float64))

    def now():
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return 1000 * time.perf_counter()

    times, outputs, loop = {name: [] for name in methods}, {}, 0
    for _, (name, method) in itertools.product(range(12), methods.items()):
        t0 = now()
        y, _ = method(*inputs)
        t1 = now()
        outputs[name] = y, *torch.autograd.grad(y, inputs, dy)
        times[name].append((t1 - t0, now() - t0))
    print(f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device))
    print(f"{B} x {T} steps x {H} heads of {N}, float32; largest deviation from float64, relative to the largest value")
    print(f"{'':14}{'deviation':>11}{'of gradients':>14}{'forward':>13}{'with backward':>17}{'speed':>10}")
    for name in methods:
        deviations = [((x.cpu() - e).abs().max() / e.abs().max()).item() for x, e in zip(outputs[name], exact)]
        forward, both = (statistics.median(runs) for runs in zip(*times[name][2:]))  # the first ones warm up
        if name == "wkv7_loop":
            loop = both
        print(f"{name:14}{deviations[0]:11.1e}{max(deviations[1:]):14.1e}", end="")
        print(f"{forward:10.1f} ms{both:14.1f} ms{loop / both:8.1f} x")


if __name__ == "__main__":
    check(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
