"""ModRWKV: one RWKV language model that reads text, pictures, sound and time series, in one file.

A signal passes an encoder, a Conv1D that shortens it, and a tiny adapter; what comes out are
vectors as wide as a token's embedding, and from there on they are tokens like any other:

    picture -> PatchEncoder -> Conv1D -> MLP --\
    sound   -> MelEncoder   -> Conv1D -> MLP ---\
    series  -> WaveNet      -> Conv1D -> MLP ---- fuse -> ln0 -> RWKV blocks -> ln_out -> head: the answer's next token
    text    -> tokenizer    -> emb ------------/                                         -> forecast_head: the series' next points

Read from top to bottom: text and conversations, the recurrence, the blocks, encoders and adapters,
the model, the optimizer's groups, checkpoints.

References
    [1] ModRWKV: Transformer Multimodality in Linear Time, Kang et al. 2025
    [2] RWKV-7 "Goose" with Expressive Dynamic State Evolution, Peng et al. 2025, arXiv:2503.14456
    [3] VisualRWKV: Exploring RWKV for Visual Language Models, Hou et al. 2024, arXiv:2406.13362
    [4] the official training code, RWKV-LM/RWKV-v7/train_temp, and the inference package `rwkv`
    [5] Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence, Peng et al. 2024, arXiv:2404.05892
    [6] Robust Speech Recognition via Large-Scale Weak Supervision (Whisper), Radford et al. 2022, arXiv:2212.04356
    [7] WaveNet: A Generative Model for Raw Audio, van den Oord et al. 2016, arXiv:1609.03499

Glossary: symbol here = symbol in [2] (in brackets: names of the official files)
    B, T, C, H, N   batch, time, n_embd, heads, head size (64)
    V               vocabulary size
    r, k, v         receptance, key (replacement key k~ after the update), value
    w               log of the decay: exp(w) = w_t, in (0.545, 1) for RWKV-7
    kk              removal key kappa^, of unit length per head
    iclr            in-context learning rate a_t
    a, b            -kk and kk * iclr: the transition is diag(w_t) - kk (kk * iclr)^T
    g               output gate
    S               state, wkv_t: (H, N, N), a row a value channel, a column a key channel
    x_*             token-shift weights mu of the PREVIOUS token
    w0..w2, a0..a2, v0..v2, g1, g2   biases and low-rank matrices of the four small MLPs
    r_k             bonus rho for the current token
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
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what and why."""


def setting(default, help, choices=(), least=None):
    """A field of Config or of a script's flags: its help, and what it may be (see check_settings)."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "least": least})


def check_settings(settings):
    """Raises InputError unless each setting is one of its choices and at least its least value."""
    for f in dataclasses.fields(settings):
        value, choices, least = getattr(settings, f.name), f.metadata["choices"], f.metadata["least"]
        if choices and value not in choices:
            raise InputError(f"{f.name}={value} is not one of {', '.join(map(str, choices))}")
        if least is not None and value < least:
            raise InputError(f"{f.name}={value} is not at least {least}")


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
        "written",
        "where a question has its pictures",
        ("written", "first", "last", "sandwich", "before", "tagged"),
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
    shape, device = r.shape, r.device
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"wkv7: r has shape (B, T, H, N), none of them 0, not {tuple(shape)}")
    for name, x in zip("wkvab", (w, k, v, a, b)):
        if x.shape != shape:
            raise ValueError(f"wkv7: {name} has the shape of r, {tuple(shape)}, not {tuple(x.shape)}")
    B, _, H, N = shape
    if state is not None and state.shape != (B, H, N, N):
        raise ValueError(f"wkv7: state has shape {(B, H, N, N)} beside r of {tuple(shape)}, not {tuple(state.shape)}")
    for name, x in zip(("r", "w", "k", "v", "a", "b", "state"), (r, w, k, v, a, b, r if state is None else state)):
        if x.device != device or not x.dtype.is_floating_point:
            raise ValueError(f"wkv7: {name} is floating point on r's device, {device}, not {x.dtype} on {x.device}")


def wkv7_loop(r, w, k, v, a, b, state=None):
    """The RWKV-7 recurrence as the paper writes it ([2], eq. 17): the oracle for every faster path.

        S_t = S_{t-1} diag(exp(w_t)) + (S_{t-1} a_t) b_t^T + v_t k_t^T          y_t = S_t r_t

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
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    longest = int(min(96, 60 / max(-w_min, 1e-9)))
    n = -(-T // longest)  # chunks, of L steps each
    L = -(-T // n)

    def chunks(x):  # (B, T, H, N) -> (B, H, n, L, N); zeros at the end change no state
        x = x.to(dtype) if n * L == T else F.pad(x.to(dtype), (0, 0, 0, 0, 0, n * L - T))
        return x.view(B, n, L, H, N).permute(0, 3, 1, 2, 4)

    def unchunk(y):
        y = y.permute(0, 2, 3, 1, 4).reshape(B, n * L, H, N)
        return (y if n * L == T else y[:, :T]).to(out_dtype)

    def solve(x):  # (I - tril(a~ b~^T, -1))^-1 x
        return torch.linalg.solve_triangular(-(a @ b.mT), x, upper=False, unitriangular=True)

    out_dtype = r.dtype
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
    except (InputError, OSError) as e:
        warn_slow(str(e).strip().splitlines()[0])
        return None
    return library


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
    options = [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}" for major, minor in gpus]
    commands = []
    for nvcc in compilers:  # -L: the packages have lib, where nvcc looks in lib64
        lib = os.path.join(os.path.dirname(os.path.dirname(nvcc)), "lib")
        commands.append([nvcc, "-O3", "-std=c++17", *options, "-shared", "-Xcompiler=-fPIC", f"-L{lib}"])
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


def kernel_outputs(r, state, keep):
    B, T, H, N = r.shape
    every = CHECKPOINT_EVERY[r.device.type]
    rows = N if r.is_cuda else N + every  # on a CPU also S a of each step
    kept = r.new_empty((B, H, -(-T // every), rows, N) if keep else 0, dtype=torch.float32)
    return torch.empty_like(r), r.new_empty(B, H, N, N, dtype=torch.float32), kept


def kernel_gradients(r, *_):
    B, T, H, N = r.shape
    dr, dk, dv, da, db = (torch.empty_like(r) for _ in range(5))
    return dr, torch.empty_like(r, dtype=torch.float32), dk, dv, da, db, r.new_empty(B, H, N, N, dtype=torch.float32)


@torch.library.custom_op(
    "modrwkv::wkv7",
    mutates_args=(),
    schema="(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
)
def wkv7_kernel(r, w, k, v, a, b, state, keep):
    """y, the last state and what the backward pass needs (if keep), from contiguous tensors."""
    y, last, kept = kernel_outputs(r, state, keep)
    call_kernel("wkv7_forward", (r, w, k, v, a, b, state, y, last, kept if keep else None))
    return y, last, kept


@torch.library.custom_op(
    "modrwkv::wkv7_backward",
    mutates_args=(),
    schema="(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor kept, Tensor dy, Tensor? dlast)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def wkv7_kernel_backward(r, w, k, v, a, b, kept, dy, dlast):
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


wkv7_kernel.register_fake(lambda *args: kernel_outputs(args[0], *args[6:]))
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
# 4. RWKV-7 blocks. Parameter names, initial values and epsilons are the official ones ([4], model.py).


def shift(x, last, lengths):
    """(the token before each, the last real token): (B, T, C), (B, C). `last` is the one before x, or None for zeros."""
    before = F.pad(x, (0, 0, 1, -1)) if last is None else torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)
    if lengths is None:
        return before, x[:, -1].clone()  # a view would hold all of x in memory
    return before, x[torch.arange(len(x), device=x.device), lengths - 1]


def real_steps(T, lengths):
    """(B, T, 1, 1): which steps of samples padded on the right are theirs."""
    return (torch.arange(T, device=lengths.device) < lengths[:, None])[..., None, None]


def orthogonal(rows, cols, gain):
    return nn.init.orthogonal_(torch.empty(rows, cols), gain)


def linear(n_in, n_out, gain):
    """No bias; orthogonal of this gain, or zeros, as the official initial weights."""
    layer = nn.Linear(n_in, n_out, bias=False)
    layer.weight = nn.Parameter(orthogonal(n_out, n_in, gain) if gain else torch.zeros(n_out, n_in))
    return layer


def lora_rank(n_embd, factor):  # [4]: a multiple of 32 near factor * sqrt(C)
    return max(32, round(factor * n_embd**0.5 / 32) * 32)


class TimeMix7(nn.Module):
    """RWKV-7 time mixing ([2], section 4.1; [4], RWKV_Tmix_x070)."""

    def __init__(self, n_layer, n_embd, head_size, layer, ranks=None):
        super().__init__()
        C, N, H = n_embd, head_size, n_embd // head_size
        self.layer, self.H, self.N = layer, H, N
        depth0, depth1 = layer / max(1, n_layer - 1), 1 - layer / n_layer
        n = torch.arange(C)
        q, u = n / C, n / max(1, C - 1)
        ramp, zigzag = u - 0.5, (n % N - (N - 1) / 2) / ((N - 1) / 2)
        zigzag = zigzag * zigzag.abs()

        def vector(x):
            return nn.Parameter(x.view(1, 1, C))

        for name, power in dict(r=0.2, w=0.9, k=0.7, v=0.7, a=0.9, g=0.2).items():
            setattr(self, f"x_{name}", vector(1 - q ** (power * depth1)))
        bias = dict(
            w=-5.5 + 6 * u ** (1 + depth0**0.3) + 2.5 * zigzag, a=-0.19 + 0.3 * zigzag + 0.4 * ramp, v=0.73 - 0.4 * ramp
        )
        ranks = ranks or {name: lora_rank(C, factor) for name, factor in dict(w=2.5, a=2.5, v=1.7, g=5).items()}
        for name in "wavg":
            rank = ranks[name]
            if name == "v" and layer == 0:
                continue  # v_first is made here: there is nothing to mix it with
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
        before, last = shift(x, last, lengths)
        d = before - x
        r = self.receptance(torch.addcmul(x, d, self.x_r))
        k = self.key(torch.addcmul(x, d, self.x_k))
        xv = torch.addcmul(x, d, self.x_v)
        v = self.value(xv)
        w = self.w0 + torch.tanh((torch.addcmul(x, d, self.x_w)) @ self.w1) @ self.w2
        w = -math.exp(-0.5) * torch.sigmoid(w.float())  # log decay, in (-0.6065, 0)
        xa = torch.addcmul(x, d, self.x_a)
        iclr = torch.sigmoid(self.a0 + xa @ self.a1 @ self.a2)
        g = torch.sigmoid((torch.addcmul(x, d, self.x_g)) @ self.g1) @ self.g2
        if self.layer == 0:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + xv @ self.v1 @ self.v2)
        kk = F.normalize((k * self.k_k).view(B, T, self.H, self.N), dim=-1)
        k = k * (1 + (iclr - 1) * self.k_a)
        r, w, k, v, iclr = (z.view(B, T, self.H, self.N) for z in (r, w, k, v, iclr))
        a, b, k_in = -kk, kk * iclr, k
        if lengths is not None:  # padding leaves the state as it is
            real = real_steps(T, lengths)
            w, k_in, b = w * real, k * real, b * real
        y, state = wkv7(r, w, k_in, v, a, b, state, w_min=-0.607)
        y = self.ln_x(y.reshape(B * T, C)).view(B, T, C)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.output((y + bonus.view(B, T, C)) * g), v_first, last, state


class ChannelMix7(nn.Module):
    """RWKV-7 channel mixing ([2], section 4.2; [4], RWKV_CMix_x070)."""

    def __init__(self, n_layer, n_embd, layer, hidden=None):
        super().__init__()
        self.x_k = nn.Parameter(1 - (torch.arange(n_embd) / n_embd).view(1, 1, -1) ** ((1 - layer / n_layer) ** 4))
        hidden = hidden or 4 * n_embd
        self.key, self.value = linear(n_embd, hidden, 1), linear(hidden, n_embd, 0)

    def forward(self, x, last=None, lengths=None):
        before, last = shift(x, last, lengths)
        h = torch.relu(self.key(torch.addcmul(x, before - x, self.x_k)))
        return self.value(h * h), last


class TimeMix5(nn.Module):
    """RWKV-5.2 time mixing ([5], section 4.1; official RWKV_Tmix_x052): what a channel forgets is a parameter, the same at
    every step. Shift weights are those of the CURRENT token. y_t reads the state before step t, plus a bonus u for step t."""

    def __init__(self, n_layer, n_embd, head_size, layer, ranks=None):
        super().__init__()
        C, N, H = n_embd, head_size, n_embd // head_size
        self.H, self.N = H, N
        depth0, depth1 = layer / max(1, n_layer - 1), 1 - layer / n_layer
        n = torch.arange(C)
        q, u = n / C, n / max(1, C - 1)
        self.time_faaaa = nn.Parameter((depth0 * (1 - u) + 0.1 * ((n + 1) % 3 - 1)).view(H, N))
        decay = -6 + 5 * u ** (0.7 + 1.3 * depth0)
        self.add_mixing(
            decay,
            {"k": q**depth1, "v": q**depth1 + 0.3 * depth0, "r": q ** (0.5 * depth1), "g": q ** (0.5 * depth1)},
            ranks,
        )
        for name, gain in dict(receptance=1, key=0.1, value=1, gate=0.1, output=0).items():
            setattr(self, name, linear(C, C, gain))
        self.ln_x = nn.GroupNorm(H, C, eps=64e-5)  # of y / 8 with 1e-5 in the official file: the same
        nn.init.constant_(self.ln_x.weight, ((layer + 1) / n_layer) ** 0.7)

    def add_mixing(self, decay, shift_weights, ranks):
        self.time_decay = nn.Parameter(decay.view(self.H, self.N))
        for name, x in shift_weights.items():
            setattr(self, f"time_mix_{name}", nn.Parameter(x.view(1, 1, -1)))

    def mix(self, x, d):
        """Tokens x and their differences d to the token before -> the inputs of r, k, v, g, and the log decay."""
        mixed = (x + d * (1 - getattr(self, f"time_mix_{name}")) for name in "rkvg")
        return *mixed, -self.time_decay.float().exp().expand(*x.shape[:2], self.H, self.N)

    def forward(self, x, v_first, last=None, state=None, lengths=None):
        """As TimeMix7's; v_first is passed on."""
        B, T, C = x.shape
        before, last = shift(x, last, lengths)
        xr, xk, xv, xg, w = self.mix(x, before - x)
        r, k, v = (z.view(B, T, self.H, self.N) for z in (self.receptance(xr), self.key(xk), self.value(xv)))
        w = w.reshape(B, T, self.H, self.N)
        bonus = (r * k * self.time_faaaa).sum(-1, keepdim=True) * v
        first = (
            torch.zeros_like(v[:, 0])
            if state is None
            else (state @ r[:, 0, :, :, None].to(state.dtype))[..., 0].to(v.dtype)
        )
        if lengths is not None:  # padding leaves the state as it is
            real = real_steps(T, lengths)
            w, k = w * real, k * real
        none = torch.zeros_like(k)
        y, state = wkv7(F.pad(r[:, 1:], (0, 0, 0, 0, 0, 1)), w, k, v, none, none, state)  # S_t, read by r_{t+1}
        y = torch.cat([first[:, None], y[:, :-1]], 1) + bonus
        y = self.ln_x(y.reshape(B * T, C)).view(B, T, C)
        return self.output(y * F.silu(self.gate(xg))), v_first, last, state


class TimeMix6(TimeMix5):
    """RWKV-6 time mixing ([5], section 4.2; official RWKV_Tmix_x060): shift weights, here of the PREVIOUS token, and the decay
    depend on the data through low-rank matrices."""

    def add_mixing(self, decay, shift_weights, ranks):
        C = self.H * self.N
        ranks = ranks or {"maa": 64 if C >= 4096 else 32, "decay": 128 if C >= 4096 else 64}
        shift_weights = shift_weights | {"x": shift_weights["k"], "w": shift_weights["k"]}
        for name, x in shift_weights.items():
            setattr(self, f"time_maa_{name}", nn.Parameter((1 - x).view(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.zeros(C, 5 * ranks["maa"]))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, ranks["maa"], C).uniform_(-0.01, 0.01))
        self.time_decay = nn.Parameter(decay.view(1, 1, C))
        self.time_decay_w1 = nn.Parameter(torch.zeros(C, ranks["decay"]))
        self.time_decay_w2 = nn.Parameter(torch.empty(ranks["decay"], C).uniform_(-0.01, 0.01))

    def mix(self, x, d):
        z = torch.tanh((x + d * self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (5, -1))  # (B, T, 5, rank)
        xw, xk, xv, xr, xg = (
            x + d * (getattr(self, f"time_maa_{name}") + z_ @ w2)
            for name, z_, w2 in zip("wkvrg", z.unbind(2), self.time_maa_w2)
        )
        w = self.time_decay + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        return xr, xk, xv, xg, -w.float().exp()


class ChannelMix5(nn.Module):
    """RWKV-5.2 channel mixing ([5], section 4.1; official RWKV_CMix_x052), with a gate that RWKV-7 has no more."""

    def __init__(self, n_layer, n_embd, layer, hidden=None):
        super().__init__()
        depth1 = 1 - layer / n_layer
        hidden = hidden or int(3.5 * n_embd) // 32 * 32
        self.add_mixing(torch.arange(n_embd).view(1, 1, -1) / n_embd, depth1)
        self.key, self.receptance, self.value = (
            linear(n_embd, hidden, 1),
            linear(n_embd, n_embd, 0),
            linear(hidden, n_embd, 0),
        )

    def add_mixing(self, q, depth1):
        self.time_mix_k, self.time_mix_r = nn.Parameter(q**depth1), nn.Parameter(q**depth1)

    def mix(self, x, d):
        return x + d * (1 - self.time_mix_k), x + d * (1 - self.time_mix_r)

    def forward(self, x, last=None, lengths=None):
        before, last = shift(x, last, lengths)
        xk, xr = self.mix(x, before - x)
        h = torch.relu(self.key(xk))
        return torch.sigmoid(self.receptance(xr)) * self.value(h * h), last


class ChannelMix6(ChannelMix5):
    """RWKV-6 channel mixing (official RWKV_CMix_x060): RWKV-5's, with shift weights of the previous token."""

    def add_mixing(self, q, depth1):
        self.time_maa_k, self.time_maa_r = nn.Parameter(1 - q ** (depth1**3)), nn.Parameter(1 - q ** (depth1**3))

    def mix(self, x, d):
        return x + d * self.time_maa_k, x + d * self.time_maa_r


MIXERS = {5: (TimeMix5, ChannelMix5), 6: (TimeMix6, ChannelMix6), 7: (TimeMix7, ChannelMix7)}


class Block(nn.Module):
    def __init__(self, config, layer, ranks=None, hidden=None):
        super().__init__()
        C = config.n_embd
        if layer == 0:
            self.ln0 = nn.LayerNorm(C)  # on all that enters, embeddings and picture vectors alike
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        time_mix, channel_mix = MIXERS[config.rwkv]
        self.att = time_mix(config.n_layer, C, config.head_size, layer, ranks)
        self.ffn = channel_mix(config.n_layer, C, layer, hidden)

    def forward(self, x, v_first, state, lengths):
        """state: (last token of ln1, S, last token of ln2), each None at the start of a sequence.
        Returns: x; v_first where it is made, else None, since FSDP takes what a block returns for the block's own; the new state."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        y, v, x_att, S = self.att(self.ln1(x), v_first, state[0], state[1], lengths)
        x = x + y
        y, x_ffn = self.ffn(self.ln2(x), state[2], lengths)
        return x + y, v if v_first is None else None, (x_att, S, x_ffn)


# ----------------------------------------------------------------------------------------------
# 5. Encoders: from a file to features
# Each has
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


def padded_rows(lengths, left=0):
    """(M, T): gather() by these makes a padded batch of features (L, C), `left` zeros before each, others behind it."""
    left = np.broadcast_to(left, len(lengths))
    mask = length_mask(left + lengths)
    mask[np.arange(mask.shape[1]) < left[:, None]] = False
    rows = np.zeros(mask.shape, np.int64)
    rows[mask] = np.arange(1, sum(lengths) + 1)
    return torch.from_numpy(rows)


def take(x, rows):
    """Rows of x (n, C): (...) -> (..., C). Unlike that of x[rows], the backward pass is one operation."""
    return F.embedding(rows, x)


def gather(parts, rows):
    """take() from all rows of parts [(n, C)], counted from 1; row 0 is zeros."""
    zeros = parts[0].new_zeros(1, parts[0].shape[1])
    return F.embedding(rows, torch.cat([zeros, *parts]), padding_idx=0)


def start_loud(*layers):
    """Initial values under which a signal neither fades from layer to layer nor drowns in biases: that would delay its emergence."""
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)


class PatchEncoder(nn.Module):
    """Patches of a picture, from scratch: two small convolutions, which see strokes and edges wherever they are
    (Xiao et al. 2021, arXiv:2106.14881), then one linear layer a patch, as in ViT. The height is fixed, the width free."""

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
        start_loud(self.conv1, self.conv2, self.proj)
        self.row = nn.Parameter(torch.zeros(config.image_height // config.patch_height, self.width))
        self.col = nn.Parameter(torch.zeros(-(-config.image_height * 16 // config.patch_width), self.width))

    def length(self, image):
        return (image.shape[1] // self.size[1]) * (image.shape[2] // self.size[2])

    def columns(self, image):
        return image.shape[2] // self.size[2]

    def collate(self, images):
        """[(3, h, w) uint8] -> pixels (M, 3, h, W); mask (M, 1, 1, W / 2) of conv1's columns; rows (L,) of patches."""
        _, height, width = self.size
        columns = np.array([self.columns(x) for x in images])
        rows = length_mask(columns)[:, None].repeat(images[0].shape[1] // height, 1)  # (M, rows, columns)
        mask = torch.from_numpy(length_mask(columns * (width // 2)))
        return pad([x.cpu().numpy() for x in images], 255), mask[:, None, None], true_rows(rows)

    def forward(self, pixels, mask, rows):
        """-> (L, width), patches of each picture row by row."""
        x = 1 - pixels.to(self.conv1.weight.dtype) / 255  # white paper is 0, as are the convolutions' margins
        x = F.gelu(self.conv1(x)) * mask  # (M, 16, h / 2, W / 2); no picture sees its neighbours' widths
        x = F.gelu(self.conv2(x))  # (M, 32, h / 4, W / 4)
        x = self.proj(x)  # (M, width, rows, columns)
        x = x + (self.row[:, None] + self.col[: x.shape[3]]).permute(2, 0, 1)
        return take(F.gelu(x.permute(0, 2, 3, 1)).flatten(0, 2), rows)


class MelEncoder(nn.Module):
    """Sound as Whisper's front end has it ([6], section 2.2): 100 log-mel frames a second, then convolutions, from scratch: two, which leave
    50 vectors a second, and four with growing dilations, one for each channel and one for all, by which a vector hears 0.6 s to
    either side. Any length: nothing is cut to, or filled up to, 30 seconds."""

    RATE, WINDOW, HOP, BINS = 16000, 400, 160, 80  # samples a second, in a window, from window to window; mel bins
    DILATIONS = (1, 2, 4, 8)

    def __init__(self, config):
        super().__init__()
        self.width = C = config.encoder_width
        self.conv1, self.conv2 = nn.Conv1d(self.BINS, C, 3, 1, 1), nn.Conv1d(C, C, 3, 2, 1)
        self.deep = nn.ModuleList(
            nn.Sequential(nn.Conv1d(C, C, 5, 1, 2 * d, d, groups=C), nn.Conv1d(C, C, 1)) for d in self.DILATIONS
        )
        start_loud(self.conv1, self.conv2, *(layer for pair in self.deep for layer in pair))

    @staticmethod
    @functools.lru_cache
    def filters(bins=BINS):
        """(bins, 201): triangles evenly spaced on Slaney's mel scale, linear below 1 kHz and logarithmic above, each of area 1."""
        f = MelEncoder
        top = 15 + 27 * math.log(f.RATE / 2 / 1000) / math.log(6.4)
        mel = torch.linspace(0, top, bins + 2, dtype=torch.float64)
        hz = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
        low, peak, high = hz[:-2, None], hz[1:-1, None], hz[2:, None]
        at = torch.linspace(0, f.RATE / 2, f.WINDOW // 2 + 1, dtype=torch.float64)
        slopes = torch.minimum((at - low) / (peak - low), (high - at) / (high - peak)).clamp(min=0)
        return (slopes * 2 / (high - low)).float()

    @classmethod
    def log_mel(cls, x, bins=BINS):
        """Samples (n,) at 16 kHz -> (bins, ceil(n / 160) or 3 at least): logarithms to base 10, down to 8 below the loudest, scaled to about -1 to 1."""
        x = F.pad(x, (0, max(3 * cls.HOP - len(x), -len(x) % cls.HOP)))
        window = torch.hann_window(cls.WINDOW, device=x.device)
        spectrum = torch.stft(x, cls.WINDOW, cls.HOP, window=window, return_complex=True)
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
    """A series as one vector a point: gated causal convolutions with growing dilations ([7], section 2), from scratch as in [1].
    Vector t knows the points up to t alone; before the series there are zeros, its mean."""

    CHANNELS, DILATIONS = 8, (1, 2, 4, 8)
    CHANGE = 5  # times the change from point to point: of a series' fast waves, which are faint, nothing was learned without it

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
        x = torch.cat([x, self.CHANGE * F.pad(x[:, :1].diff(), (1, 0))], 1)
        h, skips = self.start(x), 0
        for dilation, gate, residual in zip(self.DILATIONS, self.gates, self.residuals):
            value, opening = gate(F.pad(h, (dilation, 0))).chunk(2, 1)
            z = value.tanh() * opening.sigmoid()
            h, skips = h + residual(z), skips + z
        y = self.end(torch.cat([skips.relu(), x], 1))
        return take(y.mT.flatten(0, 1), rows)


class Timer(nn.Module):
    """The pretrained transformer thuml/timer-base-84m (Liu et al. 2024, arXiv:2402.02368) with its own parameter names: a vector for each 96
    points, the series' first n mod 96 left out, as the newest count. Frozen; post-norm, rotary positions, no dropout."""

    pretrained, width = True, 1024
    PATCH, LAYERS, HEADS, HIDDEN = 96, 8, 8, 2048

    def __init__(self, config):
        super().__init__()
        named = lambda **modules: nn.ModuleDict(modules)
        C, dense = self.width, lambda n, m, bias=False: nn.Linear(n, m, bias=bias)
        layers = [
            named(
                self_attn=named(**{f"{x}_proj": dense(C, C, x != "o") for x in "qkvo"}),
                ffn_layer=named(
                    gate_proj=dense(C, self.HIDDEN), up_proj=dense(C, self.HIDDEN), down_proj=dense(self.HIDDEN, C)
                ),
                norm1=nn.LayerNorm(C),
                norm2=nn.LayerNorm(C),
            )
            for _ in range(self.LAYERS)
        ]
        self.model = named(
            embed_layer=named(emb=dense(self.PATCH, C)), layers=nn.ModuleList(layers), norm=nn.LayerNorm(C)
        )
        self.lm_heads = nn.ModuleList([dense(C, self.PATCH)])

    def length(self, points):
        return max(1, points.shape[1] // self.PATCH)

    def window_ends(self, n):
        return range(n - 1 - self.PATCH * (max(1, n // self.PATCH) - 1), n, self.PATCH)

    def rotate(self, x):
        """(B, H, n, N) -> the same, each pair of channels (j, j + N / 2) turned by n / 10000^(2 j / N)."""
        n, N = x.shape[2:]
        angle = torch.arange(n, device=x.device)[:, None] * 10000 ** (-torch.arange(0, N, 2, device=x.device) / N)
        (a, b), cos, sin = x.chunk(2, -1), angle.cos().to(x), angle.sin().to(x)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def collate(self, series):
        """[(2, n)] -> patches (M, longest, 96), rows (L,) of the features.

        What is shorter than 96 points is preceded by zeros, its mean.
        """
        lengths = [self.length(x) for x in series]
        recent = [x[0].cpu().numpy()[-n * self.PATCH :] for x, n in zip(series, lengths)]
        recent = [np.pad(x, (n * self.PATCH - len(x), 0)) for x, n in zip(recent, lengths)]
        return pad(recent).unflatten(1, (-1, self.PATCH)), true_rows(length_mask(lengths))

    @torch.no_grad()
    def forward(self, patches, rows):
        """-> (L, 1024)"""
        x = self.model.embed_layer.emb(patches.to(self.model.norm.weight))
        heads = lambda x: x.unflatten(-1, (self.HEADS, -1)).transpose(1, 2)  # (B, n, C) -> (B, H, n, N)
        for layer in self.model.layers:
            attn, ffn = layer.self_attn, layer.ffn_layer
            q, k, v = (heads(attn[name](x)) for name in ("q_proj", "k_proj", "v_proj"))
            y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
            x = layer.norm1(x + attn.o_proj(y.transpose(1, 2).flatten(2)))
            x = layer.norm2(x + ffn.down_proj(F.silu(ffn.gate_proj(x)) * ffn.up_proj(x)))
        return take(self.model.norm(x).flatten(0, 1), rows)


def read_timer(encoder, path):
    """Fills a Timer with the published model.safetensors; raises InputError, naming what is missing or too much."""
    fit(encoder, read_safetensors(path), path)


def normalise(x, known=None, scale=None):
    """
    A series' points with mean 0 and about unit variance, what is unknown 0.

    Args: x (n,), NaN or infinite where unknown; known: mean and variance are those of the first so many; scale: of the
    whole series, by default the standard deviation of x: a tenth of it is added, so that a silence is not blown up.
    Returns: (2, n) float32, values clamped to +-10 and whether they are known; and the mean and the deviation that undo it.
    """
    there = x.isfinite()
    first = x[:known][there[:known]]
    everything = x[there]
    scale = (everything.std(correction=0) if len(everything) else x.new_zeros(())) if scale is None else scale
    mean = first.mean() if len(first) else x.new_zeros(())
    floor = 0.1 * scale if len(everything) and scale > 1e-12 * everything.abs().max() else 1.0
    deviation = (first.var(correction=0) + floor**2).sqrt() if len(first) else x.new_tensor(floor)
    points = torch.where(there, ((x - mean) / deviation).clamp(-10, 10), 0)
    return torch.stack([points, there.to(x)]).float(), mean.item(), deviation.item()


@dataclass
class Features:
    """In a signal's place the vectors (L, width) that its encoder makes of it, from the feature cache."""

    vectors: torch.Tensor


class Pretrained(nn.Module):
    """Encoders of the library `transformers`: frozen, and in eval whatever train() says. A config names them, no checkpoint holds them: in
    a list they are no submodules, so that parameters() and state_dict() pass them by."""

    pretrained, cls = True, False

    def __init__(self, models):
        super().__init__()
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.width = sum(model.config.hidden_size for model in models)

    def _apply(self, fn, recurse=True):  # to another device or dtype
        for model in self.models:
            model._apply(fn)
        return super()._apply(fn, recurse)

    def length(self, signal):
        return len(signal.vectors) if isinstance(signal, Features) else self.count(signal)

    def collate(self, media):
        """What load or cached made -> features from the cache; rows (L,) of [encoded; cached]; what encode takes."""
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
    """SigLIP, CLIP or DINOv2 ([1], section 3.1), the last hidden state as these models give it; CLIP and DINOv2 have the whole picture's vector in
    front. Several, over the same grid, are put side by side, channel by channel, without that vector ([3]'s code, v6.11 and v7.00)."""

    def __init__(self, models, preparations):
        super().__init__(models)
        self.preparations = preparations
        square = lambda x, *names: tuple(x[name] for name in names) if isinstance(x, dict) else (x, x)
        self.sizes = [
            square(p["crop_size"] if p.get("do_center_crop") else p["size"], "height", "width") for p in preparations
        ]
        for model, (height, width) in zip(models, self.sizes):
            n = model.config.image_size
            if model.config.model_type != "dinov2" and (height, width) != (n, n):  # whose positions alone are stretched
                raise InputError(
                    f"{model.config.model_type} takes pictures of {n} x {n}, not {height} x {width} as its preprocessor_config.json says"
                )
        grids = [tuple(n // model.config.patch_size for n in size) for model, size in zip(models, self.sizes)]
        if len(set(grids)) > 1:
            raise InputError(
                f"encoders joined by + have to see the same grid of patches, not {' and '.join(f'{h} x {w}' for h, w in grids)}"
            )
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
    """WavLM's or Whisper's encoder ([1], section 3.2), about 50 vectors a second, each sound by itself, since zeros behind a shorter one would
    change it. Whisper hears 30 seconds at a time, a shorter rest filled up with silence, and what it hears in the silence is left out, as in [1]'s code."""

    def __init__(self, model, preparation):
        super().__init__([model])
        self.preparations, self.whisper = [preparation], model.config.model_type == "whisper"
        if self.whisper:
            self.window = 2 * model.config.max_source_positions * MelEncoder.HOP

    def count(self, x):
        if self.whisper:
            return sum(
                min(self.window // MelEncoder.HOP // 2, -(-len(part) // MelEncoder.HOP) // 2 + 1)
                for part in x.split(self.window)
            )
        return int(self.models[0]._get_feat_extract_output_lengths(len(x)))

    def inputs(self, sounds):
        return sounds

    def encode(self, *sounds):
        [model] = self.models
        like = next(model.parameters())
        features = []
        for x in sounds:
            if not self.whisper:
                features.append(model(input_values=x[None].to(like)).last_hidden_state[0])
            for part in x.split(self.window) if self.whisper else ():
                mel = MelEncoder.log_mel(F.pad(part, (0, self.window - len(part))), model.config.num_mel_bins)
                features.append(model(mel[None].to(like)).last_hidden_state[0, : self.count(part)])
        return torch.cat(features)


HUB = {  # where a family is fetched from
    "siglip": "google/siglip2-base-patch16-384",
    "clip": "openai/clip-vit-large-patch14-336",
    "dinov2": "facebook/dinov2-small",
    "wavlm": "microsoft/wavlm-base-plus",
    "whisper": "openai/whisper-small",
}
MODELS = {
    "siglip": "SiglipVisionModel",
    "clip": "CLIPVisionModel",
    "dinov2": "Dinov2Model",
    "wavlm": "WavLMModel",
    "whisper": "WhisperModel",
}


def read_pretrained(kind, names):
    """The encoder of pictures or sounds in a folder or on the hub (a family's name stands for an id: HUB), as its config.json says; pictures:
    also several joined by +. Raises InputError naming the flag."""
    flag, known = f"--{kind}_encoder={names}", ", ".join(HUB)
    try:
        import transformers
    except ImportError as e:
        raise InputError(f'{flag} takes transformers: pip install -e ".[pretrained]"') from e
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    models, preparations = [], []
    for name in names.split("+") if kind == "image" and not os.path.isdir(names) else [names]:
        place = HUB.get(name, name)
        try:
            if not os.path.isdir(place) and place.count("/") != 1:
                raise OSError("no such folder")
            about = transformers.AutoConfig.from_pretrained(
                place, trust_remote_code=False
            )  # else it offers to run the folder's own code
            family = about.model_type.removesuffix("_vision_model")
            if family not in (("siglip", "clip", "dinov2") if kind == "image" else ("wavlm", "whisper")):
                raise InputError(f"{flag}: {place} is {family}, no encoder of {kind}s of a known family ({known})")
            head = {"vision_use_head": False} if family == "siglip" else {}  # it is not used
            model, about = getattr(transformers, MODELS[family]).from_pretrained(
                place, dtype=torch.float32, output_loading_info=True, **head
            )
            if missing := sorted(
                name for name in about["missing_keys"] if "mask" not in name
            ):  # what is masked in pretraining alone
                raise InputError(
                    f"{flag}: {place} lacks weights: {missing[0]}"
                    + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                )
            models.append(model.get_encoder() if family == "whisper" else model)
            settings_of = (
                transformers.ImageProcessingMixin.get_image_processor_dict
                if kind == "image"
                else transformers.FeatureExtractionMixin.get_feature_extractor_dict
            )
            preparations.append(
                {"rescale_factor": 1 / 255, "resample": 3} | settings_of(place)[0]
            )  # older files leave these out
            if lacking := [
                name for name in ("size", "image_mean", "image_std") if kind == "image" and name not in preparations[-1]
            ]:
                raise InputError(f"{flag}: the preprocessor_config.json of {place} has no {lacking[0]}")
        except InputError:
            raise
        except Exception as e:  # huggingface_hub's, safetensors' and transformers' own, OSError, ValueError
            why = (str(e).strip() or type(e).__name__).splitlines()[0]
            here = ", ".join([*ENCODERS[kind], "none"])
            raise InputError(
                f"{flag}: {place} is none of {here}, nor a folder or hub id of a pretrained encoder ({known}) that can be read: {why}"
            ) from e
    try:
        return Vision(models, preparations) if kind == "image" else Speech(models[0], preparations[0])
    except InputError as e:
        raise InputError(f"{flag}: {e}") from e


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
    """Conv1D(k, s) along the sequence, then y = MLP(x), y + LayerNorm(y) ([1], eq. 4 and 5; [1]'s code, pre_norm);
    or VisualRWKV's projector: linear, W x ([3]), or gated, LayerNorm(O (x * sigmoid(G x))) (its code, v7.00).

    The sequence is padded on the left so that the last window ends on the last vector:
    L' = floor((L + pad - k) / s) + 1, 577 and 576 vectors both give 288, 192, 144 for (3,2), (4,3), (5,4).

    vectors: of a series' encoder, those of a lookback. To each vector they become a learned one is added, by its place counted from the
    end; vectors further back share the first place. Without places what stood a week ago is found late or not at all.
    """

    def __init__(self, width, n_embd, scale, kernel, stride, kind="mlp", vectors=0):
        super().__init__()
        self.kernel, self.stride, self.kind = kernel, stride, kind
        if kernel:
            self.conv = nn.Conv1d(width, width, kernel, stride, bias=False)
        if kind == "mlp":
            self.mlp = nn.Sequential(nn.Linear(width, scale * n_embd), nn.ReLU(), nn.Linear(scale * n_embd, n_embd))
            self.pre_norm = nn.LayerNorm(n_embd)
            for layer in (
                self.mlp[0],
                self.mlp[2],
            ):  # a bias would drown a faint signal in the norm, and delay its emergence
                nn.init.zeros_(layer.bias)
        else:
            self.o_proj = nn.Linear(width, n_embd, bias=False)
        if kind == "gated":
            self.gate, self.ln_v = nn.Linear(width, width, bias=False), nn.LayerNorm(n_embd)
        self.place = (
            nn.Parameter(2 * torch.randn(self.length(vectors), n_embd)) if vectors else None
        )  # loud: fainter ones are used late

    def padding(self, n):  # on the left
        return max(self.kernel - n, (self.kernel - n) % self.stride)

    def length(self, n):
        return (n + self.padding(n) - self.kernel) // self.stride + 1 if self.kernel else n

    def window_ends(self, n):
        """Which of n features each window ends on."""
        return range(self.kernel - 1 - self.padding(n), n, self.stride) if self.kernel else range(n)

    def collate(self, lengths):
        """
        Of features of these lengths: rows (M, T), by which gather() makes the Conv1D's input; kept (L',), the windows
        that are no padding; positions (L',), the rows of `place`.
        """
        windows, positions = [self.length(n) for n in lengths], None
        rows = padded_rows(lengths, [self.padding(n) for n in lengths]) if self.kernel else None
        if self.place is not None:
            P = len(self.place)
            positions = torch.from_numpy(np.concatenate([np.arange(P - n, P) for n in windows]).clip(0))
        return rows, true_rows(length_mask(windows)), positions

    def forward(self, x, rows, kept, positions=None):
        """(L, width) -> (L', n_embd)"""
        if self.kernel:
            x = self.conv(gather([x], rows).mT).mT  # (M, T, width) -> (M, windows, width)
            x = take(x.flatten(0, 1), kept)
        if self.kind == "mlp":
            y = self.mlp(x)
            y = y + self.pre_norm(y)
        else:
            y = self.o_proj(x) if self.kind == "linear" else self.ln_v(self.o_proj(x * torch.sigmoid(self.gate(x))))
        return y if positions is None else y + take(self.place, positions)


class SpeechAdapter(nn.Module):
    """Conv1D(3, 2), which halves the vectors to 25 a second, then an MLP, without a norm ([1]'s code)."""

    def __init__(self, width, n_embd, scale):
        super().__init__()
        hidden = scale * n_embd
        self.conv = nn.Conv1d(width, hidden, 3, 2, 2)
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, n_embd))
        start_loud(self.conv, self.mlp[0], self.mlp[2])

    def length(self, n):
        return (n + 1) // 2 + 1

    def collate(self, lengths):
        """rows and kept, as Adapter's."""
        return padded_rows(lengths), true_rows(length_mask([self.length(n) for n in lengths]))

    def forward(self, x, rows, kept):
        """(L, width) -> (L', n_embd)"""
        x = self.conv(gather([x], rows).mT).mT  # the zeros behind a shorter sound are those of its own padding
        return self.mlp(take(x.flatten(0, 1), kept))


# ----------------------------------------------------------------------------------------------
# 7. ModRWKV


SOURCE = {"answer": "text", "forecast": "series"}  # what a segment is made of, where its kind does not say so
SCANS = {"uni": 1, "bi": 2, "multi": 4}  # so many orders take turns from layer to layer: forward, backward, down, up


def scan(span, window_ends, columns):
    """The orders in which layers read a picture ([3], section 3.3) whose vectors have the positions `span` in the sequence.
    Down is by column, then by row, of the last patch in a vector's window: `window_ends`, as of Adapter."""
    down = sorted(span, key=lambda i: (window_ends[i - span[0]] % columns, window_ends[i - span[0]]))
    return span, span[::-1], down, down[::-1]


VOCAB_SIZES = {"bytes": 260, "gpt2": 50257}  # of tokenizers; RWKV World's: 65536


def reorder(x, order):
    return x.gather(1, order[..., None].expand_as(x))


class Batch(NamedTuple):
    """What ModRWKV.collate makes of a list of samples, on the CPU: a GPU is asked for no count."""

    ids: torch.Tensor  # (n,): of all text
    media: dict  # kind -> (number of them, what its encoder takes, what its adapter takes)
    rows: torch.Tensor  # (B, T): what stands where, as rows of [zeros; embeddings of ids; images; sounds; series]
    labels: torch.Tensor  # (B, T): the token each position has to predict, -100 where none
    lengths: torch.Tensor  # (B,)
    orders: list  # what the layers take turns to gather their input by: (B, T), or None for as it is
    answers: torch.Tensor  # (m,): positions in (B T) that have a label
    forecasts: torch.Tensor  # (f,): positions in (B T) that forecast
    targets: torch.Tensor  # (f, horizon): the points they forecast, NaN where unknown
    n_targets: torch.Tensor  # (m + f,): how many answers and forecasts the sample of each has
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
    """The language model, with an encoder and an adapter for each kind of signal."""

    feature_cache = ""  # a folder: data/media.py
    checkpoint_activations = (
        False  # in training keep what enters a block alone, and run the block again in the backward pass
    )

    def __init__(self, config, vocab_size=None, ranks=None, hidden=None):
        """vocab_size, ranks of the low-rank matrices and hidden width of the FFN: read off a checkpoint, else official. With ranks,
        the language model has no initial values, which take a minute for half a billion parameters: the checkpoint fills it."""
        super().__init__()
        check_settings(config)
        if config.n_embd % config.head_size:
            raise InputError(f"n_embd={config.n_embd} is not a multiple of head_size={config.head_size}")
        self.config = config
        V, C = vocab_size or VOCAB_SIZES.get(config.tokenizer, 65536), config.n_embd
        with torch.device("meta") if ranks else contextlib.nullcontext():
            self.emb = nn.Embedding(V, C)
            nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
            self.blocks = nn.ModuleList(Block(config, layer, ranks, hidden) for layer in range(config.n_layer))
            self.ln_out = nn.LayerNorm(C)
            self.head = nn.Linear(C, V, bias=False)
            nn.init.orthogonal_(self.head.weight, 0.5 * max(1, V / C) ** 0.5)
        self.encoder, self.adapter = nn.ModuleDict(), nn.ModuleDict()
        for kind in MEDIA:
            name = getattr(config, f"{kind}_encoder")
            if kind == "series" and name not in ENCODERS[kind] and name != "none":
                raise InputError(f"{kind}_encoder={name} is not one of {', '.join(ENCODERS[kind])}, none")
            if name != "none":
                encoder = self.encoder[kind] = (
                    ENCODERS[kind][name](config) if name in ENCODERS[kind] else read_pretrained(kind, name)
                )
                convs = {
                    "image": (config.conv_kernel, config.conv_stride),
                    "series": (config.series_kernel, config.series_stride),
                }
                own = (*convs[kind], config.adapter_kind) if kind in convs else ()
                own += (len(encoder.window_ends(config.lookback)),) if kind == "series" else ()
                self.adapter[kind] = (Adapter if kind in convs else SpeechAdapter)(
                    encoder.width, C, config.adapter_scale, *own
                )
        if "series" in self.encoder:
            n, kernel = len(self.encoder["series"].window_ends(config.lookback)), config.series_kernel
            if kernel and not config.series_stride <= kernel <= n:
                raise InputError(
                    f"series_kernel={kernel} is not 0, nor from series_stride={config.series_stride} to the {n} vectors of a lookback"
                )
            self.forecast_head = nn.Linear(C, config.horizon)
            nn.init.zeros_(self.forecast_head.weight)  # the first forecast is the mean
            nn.init.zeros_(self.forecast_head.bias)

    def window(self, x, rng=None):
        """
        The sample that learns to forecast a stretch of a series x (n,): a segment ("forecast", (points (2, lookback), targets)).

        Every vector predicts the `horizon` points that follow it: targets (vectors, horizon), NaN where there is nothing to learn, which
        is also where the prediction would be of points that mean and deviation have seen. Without rng it is the last stretch, and
        the last vector alone predicts.
        """
        if "series" not in self.encoder:
            raise InputError("this model has no series encoder; train one with --series_encoder=wavenet")
        n, horizon = self.config.lookback, self.config.horizon
        x = F.pad(x, (max(0, n + horizon - len(x)), 0), value=math.nan)
        start, known = len(x) - n - horizon, n
        if rng:
            start = rng.randint(0, start)
            blank = next((i for i in range(n) if x[start + i].isfinite()), n)  # points before the first
            known = n if rng.random() < 0.15 else rng.randint(blank + (n - blank) // 3, n)
        past, x = x[: start + known], x[start : start + n + horizon]
        points, *_ = normalise(x, known, past[past.isfinite()].std(correction=0))
        ends = self.encoder["series"].window_ends(n)
        ends = torch.tensor([ends[i] for i in self.adapter["series"].window_ends(len(ends))])
        targets = torch.where(points[1] > 0, points[0], math.nan)[ends[:, None] + torch.arange(1, horizon + 1)]
        first = known if points[1, :n].any() else math.inf  # from nothing, nothing is learned
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
        """Where a signal has a vector of the whole, which its encoder puts first: "first", "last", or None if it has none."""
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
        next_row, media = {"text": 1}, {}
        end = 1 + len(ids)
        for kind, signals in found.items():
            if not signals:
                continue
            if kind not in self.encoder:
                raise InputError(f"this model has no {kind} encoder")
            encoder, adapter = self.encoder[kind], self.adapter[kind]
            lengths = [encoder.length(x) for x in signals]
            media[kind] = len(signals), encoder.collate(signals), adapter.collate(lengths)
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

        Returns: x (B, T, C), padded on the right; labels (B, T), the token each position has to predict,
        -100 where none; lengths (B,); orders, what the layers take turns to gather their input by, (B, T) each, None for as it is.
        """
        # 1. Count what is where, on the CPU
        batch = self.collate(samples).to(self.emb.weight.device)
        # 2. Encode all media of a kind at once
        vectors = [self.emb(batch.ids)]  # (n, C)
        for kind, (n, encoder_inputs, adapter_inputs) in batch.media.items():
            features = self.encoder[kind](*encoder_inputs)  # (L, width)
            if self.cls(kind) == "last":
                features = features.unflatten(0, (n, -1)).roll(-1, 1).flatten(0, 1)
            vectors.append(self.adapter[kind](features, *adapter_inputs))  # (L', C)
        # 3. Place all of them by one gather
        x = gather(vectors, batch.rows)  # (B, T, C)
        return x, batch.labels, batch.lengths, batch.orders

    def backbone(self, x, state=None, lengths=None, orders=(None,)):
        """(B, T, C) into the blocks -> (B, T, C) out of ln_out, and the new state."""
        v_first, new = None, []
        backs = [None if order is None else order.argsort(1) for order in orders]
        for layer, (block, s) in enumerate(zip(self.blocks, state or [(None, None, None)] * len(self.blocks))):
            order, back = orders[layer % len(orders)], backs[layer % len(orders)]
            if self.checkpoint_activations and torch.is_grad_enabled():
                block = functools.partial(checkpoint, block, use_reentrant=False)
            if order is None:
                x, v, s = block(x, v_first, s, lengths)
                v_first = v if v_first is None else v_first
            else:  # the residual stream keeps its order between the layers
                x, _, s = block(reorder(x, order), reorder(v_first, order) if v_first is not None else None, s, lengths)
                x = reorder(x, back)
            new.append(s)
        return self.ln_out(x), new

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
        """Cross-entropy of the answers' tokens; only they go through the head. Of a forecast, half Huber's and half the absolute
        error of the normalised points, a vector counting as a token.

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

        Args: series: tensors (n,) or lists, NaN where unknown; horizon: how many points, by default config.horizon, further
        ones from the forecast itself; scale: see `normalise`.
        Returns: (B, horizon), in the units of the series.
        """
        if "series" not in self.encoder:
            raise InputError("this model has no series encoder; train one with --series_encoder=wavenet")
        series, ahead = [torch.as_tensor(x, dtype=torch.float64) for x in series], []
        while sum(y.shape[1] for y in ahead) < (horizon or self.config.horizon):
            n = self.config.lookback
            recent = [F.pad(x[-n:], (max(0, n - len(x)), 0), value=math.nan) for x in series]
            deviations = [scale or x[x.isfinite()].std(correction=0) for x in series]
            points, means, deviations = zip(*(normalise(x, scale=d) for x, d in zip(recent, deviations)))
            x, *_ = self.fuse([[("series", p)] for p in points])
            y = self.forecast_head(self.backbone(x)[0][:, -1]).cpu().double()
            means, deviations = torch.tensor([means, deviations], dtype=torch.float64)[..., None]
            ahead.append(y * deviations + means)
            series = [torch.cat([x, y]) for x, y in zip(series, ahead[-1])]
        return torch.cat(ahead, 1)[:, : horizon or self.config.horizon]

    @torch.inference_mode()
    def generate(self, samples, state=None, max_new_tokens=256, temperature=0.0, top_k=0, top_p=1.0, seed=0, end=(0,)):
        """Continues a batch of samples (lists of segments), each until a token of `end` or max_new_tokens.

        temperature 0 is greedy. Each sample has its own random numbers, so no answer depends on its neighbours.
        Yields: at each step the list of new tokens, None for samples at rest; send() may answer with a list of which are done.
        Returns (as StopIteration.value): for a batch of one, the state after its last token, or before it if that is one of `end`.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} leaves no room for an answer")
        device, B = self.emb.weight.device, len(samples)
        rngs = [torch.Generator(device).manual_seed(seed) for _ in samples]
        x, _, lengths, orders = self.fuse(samples)
        x, state = self.backbone(x, state, lengths, orders)
        x = x[torch.arange(B, device=device), lengths - 1]
        done = [False] * B
        for step in range(max_new_tokens):
            tokens = torch.stack([pick(z, temperature, top_k, top_p, g) for z, g in zip(self.head(x).float(), rngs)])
            new = [None if rests else token for rests, token in zip(done, tokens.tolist())]
            stopped = (yield new) or [False] * B
            done = [token is None or token in end or stops for token, stops in zip(new, stopped)]
            if all(done) or step == max_new_tokens - 1:
                break
            x, state = self.backbone(self.emb(tokens)[:, None], state)
            x = x[:, 0]
        if B == 1:
            return state if new[0] in end else self.backbone(self.emb(tokens)[:, None], state)[1]


def pick(logits, temperature, top_k, top_p, generator):
    """One token from logits (V,): greedy at temperature 0, else from the top_k likeliest (0: all) within a mass of top_p."""
    if temperature == 0:
        return logits.argmax()
    p, index = torch.softmax(logits / temperature, -1).sort(descending=True)
    p = p[: top_k or None]
    p[1:] = p[1:] * ((p.cumsum(0) - p)[1:] < top_p)  # the likeliest always stays
    return index[torch.multinomial(p, 1, generator=generator)[0]]


# ----------------------------------------------------------------------------------------------
# 8. Optimizer


def parameter_groups(model, weight_decay, decay_lr=2.0, muon=False):
    """AdamW groups as the official ones ([4], configure_optimizers): weight decay on matrices named `.weight` only, twice
    the learning rate (decay_lr) on att.w0 and att.time_decay. Each group's learning rate is to be multiplied by its "lr_scale".
    muon: a fourth group, for torch.optim.Muon, takes the matrices of blocks, encoders and adapters from the first."""
    groups = {"decay": [], "w0": [], "rest": [], "muon": []}
    for name, p in model.named_parameters():
        matrix = name.endswith(".weight") and sum(n > 1 for n in p.shape) >= 2
        inside = p.ndim == 2 and not name.startswith(("emb.", "head.", "forecast_head."))
        group = (
            "w0"
            if name.endswith(("att.w0", "att.time_decay"))
            else "rest"
            if not matrix
            else "muon"
            if muon and inside
            else "decay"
        )
        groups[group].append(p)
    return [
        {"params": groups["decay"], "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": groups["w0"], "weight_decay": 0.0, "lr_scale": decay_lr},
        {"params": groups["rest"], "weight_decay": 0.0, "lr_scale": 1.0},
    ] + [{"params": groups["muon"], "weight_decay": weight_decay, "lr_scale": 1.0}] * muon


def freeze(model, phase, names=""):
    """The papers' two phases: "adapter" trains adapters and encoders without pretrained weights, "all" the language model too.

    names: more to be frozen, as beginnings of parameter names separated by commas: "emb", "blocks.0,blocks.1", "adapter".
    """
    names = [name for name in names.split(",") if name]
    starts = lambda parameter, name: parameter == name or parameter.startswith(name + ".")
    for name in names:
        if not any(starts(parameter, name) for parameter, _ in model.named_parameters()):
            raise InputError(f"--freeze: no parameter is called {name} or {name}...")
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        pretrained = part == "encoder" and getattr(model.encoder[name.split(".")[1]], "pretrained", False)
        frozen = pretrained or any(starts(name, n) for n in names)
        p.requires_grad_(not frozen and (phase == "all" or part in ("encoder", "adapter", "forecast_head")))


# ----------------------------------------------------------------------------------------------
# 9. Checkpoints


def write(path, contents):
    """Writes tensors and plain values to path, as torch does or (*.safetensors) as safetensors: all of it, or nothing and what was there stays."""
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as f:
            if str(path).endswith(".safetensors"):
                f.write(
                    safetensors(path).save({name: x.contiguous() for name, x in contents.items()}, {"format": "pt"})
                )
            else:
                torch.save(contents, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:  # torch's writer says RuntimeError when the disk is full
        with contextlib.suppress(OSError):
            os.remove(partial)
        kept = "; the checkpoint of before is still there" if os.path.exists(path) else ""
        raise InputError(f"could not save {path}: {getattr(e, 'strerror', None) or 'is the disk full?'}{kept}") from e


def save(path, model, **more):
    """Writes model, config and `more` (tensors and plain values) to path: all of it, or nothing and what was there stays."""
    write(path, {"model": model.state_dict(), "config": dataclasses.asdict(model.config), **more})


def safetensors(path):
    """The module that reads and writes .safetensors files such as path."""
    try:
        import safetensors.torch

        return safetensors.torch
    except ImportError as e:
        raise InputError(f'{path} takes safetensors: pip install -e ".[pretrained]"') from e


def read_safetensors(path):
    """{name: tensor} of a .safetensors file."""
    module = safetensors(path)
    try:
        return module.load_file(path)
    except Exception as e:  # safetensors' own, and OSError
        raise InputError(f"cannot read {path}: {e}") from e


def read_file(path):
    """What a .pt or .pth file holds, or the ckpt.pt of a folder."""
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise InputError(f"cannot read the checkpoint {path}: {e.strerror or e}") from e
    except Exception as e:  # pickle's, zipfile's and torch's own: whatever it is, these bytes are no checkpoint
        raise InputError(f"{path} is not a checkpoint that can be read safely, or it is cut short") from e


def own_checkpoint(data, path):
    """The contents of a checkpoint of ours, or of BlinkDL's, whose names are the same, as if it were ours; None if it is neither."""
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no model")
    if isinstance(data.get("model"), dict) and isinstance(data.get("config"), dict):
        return data
    if not any(isinstance(name, str) and name.startswith("blocks.") for name in data):
        return None
    return {"model": data, "config": {"tokenizer": "rwkv_vocab_v20230424.txt", "image_encoder": "none"}}


def build(data, path, **changes):
    """The model of read_checkpoint's contents; sizes are read off the tensors, `changes` go into its config. What belongs to an
    encoder that is changed to none is left out."""
    parts = {
        kind: (f"encoder.{kind}.", f"adapter.{kind}.") + ("forecast_head.",) * (kind == "series") for kind in MEDIA
    }
    unused = [f"blocks.0.att.v{i}" for i in "012"] + [
        part for kind in MEDIA if changes.get(f"{kind}_encoder") == "none" for part in parts[kind]
    ]
    weights = {str(name): x for name, x in data["model"].items() if not str(name).startswith(tuple(unused))}
    theirs = data.get("theirs", lambda name: (name, False))
    rwkv = 6 if "blocks.0.att.time_maa_x" in weights else 5 if "blocks.0.att.time_mix_k" in weights else 7
    heads = "blocks.0.att.r_k" if rwkv == 7 else "blocks.0.att.time_faaaa"
    decay = {5: "time_decay", 6: "time_decay_w1", 7: "w1"}[rwkv]
    for name, x in weights.items():
        if not torch.is_tensor(x) or not x.is_floating_point():
            raise InputError(
                f"{path} is not an RWKV-{rwkv} checkpoint: {theirs(name)[0]} is not a tensor of floating-point numbers"
            )
    for name in ("emb.weight", heads, f"blocks.0.att.{decay}", "blocks.0.ffn.key.weight"):
        if name not in weights:
            raise InputError(f"{path} is not an RWKV-{rwkv} checkpoint: it has no {theirs(name)[0]}")
        if weights[name].dim() != 2:
            raise InputError(f"{path} is not an RWKV-{rwkv} checkpoint: {theirs(name)[0]} is not a matrix")
    config = {k: v for k, v in data["config"].items() if k in Config.__dataclass_fields__} | changes
    V, config["n_embd"] = len(weights["emb.weight"]), weights[heads].numel()
    config["n_layer"] = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    config["head_size"], config["rwkv"] = weights[heads].shape[1], rwkv
    rank = lambda name: weights[name].shape[1] if name in weights and weights[name].dim() > 1 else 0
    ranks = {name: rank(f"blocks.{min(1, config['n_layer'] - 1) if name == 'v' else 0}.att.{name}1") for name in "wavg"}
    ranks |= {"maa": rank("blocks.0.att.time_maa_w2"), "decay": rank("blocks.0.att.time_decay_w1")}
    model = ModRWKV(Config(**config), V, ranks, weights["blocks.0.ffn.key.weight"].shape[0])
    fresh = tuple(
        part for both in parts.values() for part in both if not any(name.startswith(both) for name in weights)
    )
    new = [name for name in model.state_dict() if name.startswith(fresh)]  # a language model may be given eyes or ears
    fit(model, weights, path, new, theirs)
    return model.float()


def fit(model, weights, path, new=(), theirs=lambda name: (name, False)):
    """Fills the model with weights {name: tensor}, all but the `new`; raises InputError, naming what is missing or too much as the file does.
    What is on the device "meta" becomes the tensors themselves, whatever their dtype."""
    own, squeezed = model.state_dict(), lambda x: [n for n in x.shape if n > 1]  # (1, 1, C) and (C,) are the same
    shape = lambda name, x: tuple(x.shape)[:: -1 if theirs(name)[1] else 1]
    wrong = [f"{theirs(name)[0]} is missing" for name in own if name not in weights and name not in new]
    wrong += [f"{theirs(name)[0]} is not expected" for name in weights if name not in own]
    misshapen = [name for name, x in weights.items() if name in own and squeezed(x) != squeezed(own[name])]
    wrong += [
        f"{theirs(name)[0]} has shape {shape(name, weights[name])}, not {shape(name, own[name])}" for name in misshapen
    ]
    if wrong:
        raise InputError(
            f"{path} does not fit: " + "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        )
    weights = {name: x.reshape(own[name].shape).contiguous() for name, x in weights.items()}
    model.load_state_dict(weights, strict=not new, assign=any(x.is_meta for x in own.values()))


def load(path, device="cpu", **changes):
    """A model ready to answer, from a checkpoint of train.py (or its folder) or BlinkDL's .pth of RWKV-5.2, 6 or 7; data/released.py
    reads others. Untrusted files are safe.

    changes: settings of Config to override, e.g. image_encoder="none" for the language model alone.
    Raises InputError if the file cannot be read or does not fit, naming what is missing or too much.
    """
    data = own_checkpoint(read_file(path), path)
    if not data:
        raise InputError(
            f"{path} is neither a checkpoint of train.py nor BlinkDL's; data.released.load reads other released models"
        )
    return build(data, path, **changes).to(device).eval()


# ----------------------------------------------------------------------------------------------
# 10. python modrwkv.py


def check(device):
    """Prints how far each way to compute the recurrence is from wkv7_loop in float64, and how fast each is: medians of interleaved runs."""
    ways = {"wkv7_loop": wkv7_loop, "wkv7_chunked": wkv7_chunked}
    if has_kernel(device.type):
        ways["kernel.cu"] = wkv7
    B, T, H, N = 4, 512, 4, 64
    r, w, k, v, a, b, dy = torch.randn(7, B, T, H, N, device=device)
    kk = F.normalize(a, dim=-1)
    inputs = [x.detach().requires_grad_() for x in (r, -0.6 * torch.sigmoid(w), 0.3 * k, v, -kk, kk * torch.sigmoid(b))]
    exact, dy64 = [x.detach().to("cpu", torch.float64).requires_grad_() for x in inputs], dy.to("cpu", torch.float64)
    y64, _ = wkv7_loop(*exact)
    gradients64 = torch.autograd.grad(y64, exact, dy64)

    def now():
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return 1000 * time.perf_counter()

    def deviation(x, true):
        return ((x.cpu().double() - true).abs().max() / true.abs().max()).item()

    times, deviations = {way: ([], []) for way in ways}, {}
    for run, (way, recurrence) in itertools.product(range(12), ways.items()):
        start = now()
        y, _ = recurrence(*inputs)
        middle = now()
        gradients = torch.autograd.grad(y, inputs, dy)
        end = now()
        if run > 1:  # the first ones warm up
            times[way][0].append(middle - start)
            times[way][1].append(end - start)
        deviations[way] = deviation(y, y64), max(map(deviation, gradients, gradients64))
    print(f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device))
    print(
        f"{B} x {T} steps x {H} heads of {N}, float32; largest deviation from wkv7_loop in float64, relative to the largest value"
    )
    print(f"{'':14}{'deviation':>11}{'of gradients':>14}{'forward':>13}{'with backward':>17}{'speed':>10}")
    for way, (forward, both) in times.items():
        ms = statistics.median(both)
        print(
            f"{way:14}{deviations[way][0]:11.1e}{deviations[way][1]:14.1e}{statistics.median(forward):10.1f} ms{ms:14.1f} ms"
            f"{statistics.median(times['wkv7_loop'][1]) / ms:8.1f} x"
        )


if __name__ == "__main__":
    check(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
