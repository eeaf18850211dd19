"""What a long prompt costs, beside a Transformer; what a picture costs by its Conv1D; what one token costs.

python -m data.ablate long [--flags]      VisualRWKV's figure 1 (c) and ModRWKV's figure 2, as tables and a picture
python -m data.ablate decode [--flags]    a token of ours, one of the package `rwkv`, and 8 of ours at once

Weights are random: time and memory do not depend on them. Each point of `long` is a process of its own, and is kept in
long.jsonl of --out_dir; one that is there already is not measured again.
"""

import collections
import contextlib
import ctypes
import gc
import inspect
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

from data.flags import find_device, flags, peak_memory, run
from modrwkv import TRACE_AFTER, Config, InputError, ModRWKV, load, setting, traced_step

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODELS = {"rwkv": "RWKV-7", "llama": "Llama", "static": "Llama, StaticCache"}
CONVS = (0, 1), (3, 2), (4, 3), (5, 4)  # kernel and stride, 0 for no Conv1D: ModRWKV's table 7
PICTURE = {"image_encoder": "patch", "image_height": 384, "patch_height": 16, "patch_width": 16}  # 576 features
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
QUESTION = [("text", list(range(1, 33)))]
SIZES = (4, 256, 512, torch.float32), (12, 768, 65536, torch.bfloat16)  # layers, width, vocabulary


@dataclass
class Long:
    """python -m data.ablate long, or decode"""

    tokens: str = setting("256,1024,4096,12288,24576", "lengths of the prompt, in tokens")
    new_tokens: int = setting(256, "tokens that are generated after it", least=2)
    n_layer: int = setting(8, "layers of all models", least=1)
    n_embd: int = setting(512, "width of all models, a multiple of 64", least=64)
    threads: int = setting(torch.get_num_threads(), "threads on a CPU", least=1)
    clock: str = setting("wall", "wall, or cpu: of this process alone, for a machine that is shared", tuple(CLOCKS))
    device: str = setting("auto", "cpu, cuda, cuda:1, mps")
    out_dir: str = setting("out", "folder of long.jsonl and long.png")
    point: str = setting("", "measure one point alone, here: rwkv,256 or llama,256 or static,256 or image,3,2")


# --------------------------------------------------------------------------------------------------- one point


def give_back_memory():
    """What malloc keeps would hide what is taken next."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Linux's C library
        ctypes.CDLL(None).malloc_trim(0)


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def n_bytes(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def rwkv_tokens(model, sample, n):
    """Generates n tokens after a sample, and yields at each. Returns the bytes of the state."""
    step = traced_step(model) if model.emb.weight.device.type == "cpu" else None
    state = yield from model.generate([sample], max_new_tokens=n, end=(), step=step)
    return n_bytes(itertools.chain(*state))


@torch.inference_mode()
def llama_tokens(model, sample, n, static):
    """The same of transformers' Llama. Returns the bytes of its cache, which is static, or grows with each token."""
    from transformers import DynamicCache, StaticCache

    [(_, ids)] = sample
    cache = StaticCache(model.config, len(ids) + n) if static else DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # its older name
    x = torch.tensor([ids], device=model.device)
    for _ in range(n):
        x = model(x, use_cache=True, logits_to_keep=1, **{name: cache}).logits[:, -1].argmax(-1, keepdim=True)
        yield x.tolist()
    return n_bytes(x for layer in cache.layers for x in (layer.keys, layer.values))


def llama(like):
    """transformers' Llama of as many layers, channels and parameters as a ModRWKV, with attention by SDPA."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as e:
        raise InputError('the Llama takes transformers: pip install -e ".[pretrained]"') from e
    V, L, C = like.emb.num_embeddings, like.config.n_layer, like.config.n_embd
    rest = n_parameters(like) - 2 * V * C - C - L * (4 * C * C + 2 * C)  # for the three matrices of each MLP
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=round(rest / (3 * C * L)),
        num_hidden_layers=L,
        num_attention_heads=C // like.config.head_size,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def timed(steps, now):
    """The seconds until each step of a generator, and what it returns."""
    t0, times = now(), []
    while True:
        try:
            next(steps)
        except StopIteration as e:
            return times, e.value
        times.append(now() - t0)


def measure(s):
    """The point that s.point names: first, token, total (seconds); memory, state (bytes); vectors, parameters; and
    cores, the CPU time a second, which is low where other programs disturbed it."""
    torch.manual_seed(0)
    torch.set_num_threads(s.threads)
    device = find_device(s.device)
    kind, *numbers = s.point.split(",")
    if kind == "image":
        kernel, stride = map(int, numbers)
        changes = {**PICTURE, "conv_kernel": kernel, "conv_stride": stride}
        sample = [("image", torch.randint(256, (3, 384, 384), dtype=torch.uint8)), *QUESTION]
    else:
        changes, sample = {"image_encoder": "none"}, [("text", [1 + i % 255 for i in range(int(numbers[0]))])]
    model = ModRWKV(Config(n_layer=s.n_layer, n_embd=s.n_embd, **changes))
    vectors, generate, more = model.length(sample), rwkv_tokens, ()
    if kind in ("llama", "static"):
        model, generate, more = llama(model), llama_tokens, (kind == "static",)
    model.to(device).eval()
    timed(generate(model, sample if kind == "image" else QUESTION, 4, *more), time.time)  # warms up
    give_back_memory()
    before, cpu, t0 = peak_memory(device, reset=True), time.process_time(), time.perf_counter()
    runs, peaks = [], []
    for _ in range(3 if vectors < 2000 else 1):
        times, state = timed(generate(model, sample, s.new_tokens, *more), CLOCKS[s.clock])
        token = statistics.median(b - a for a, b in itertools.pairwise(times))
        runs.append((times[0], token, times[-1]))
        peaks.append(peak_memory(device) - before)
    first, token, total = map(statistics.median, zip(*runs))
    return {
        "first": first,
        "token": token,
        "total": total,
        "memory": peaks[0],
        "state": state,
        "vectors": vectors,
        "parameters": n_parameters(model),
        "cores": (time.process_time() - cpu) / (time.perf_counter() - t0),
    }


# --------------------------------------------------------------------------------------------------- all points


def apart(point, s):
    """What `measure` says of a point, in a process of its own; kept in --out_dir."""
    names = "new_tokens", "n_layer", "n_embd", "threads", "clock", "device"
    own = [f"--point={point}", *(f"--{name}={getattr(s, name)}" for name in names)]
    path = os.path.join(s.out_dir, "long.jsonl")
    with contextlib.suppress(FileNotFoundError), open(path) as f:
        for line in f:
            if (kept := json.loads(line)).pop("flags") == own:
                return kept
    done = subprocess.run([sys.executable, "-m", "data.long", *own], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"the point {point} did not finish: see its message above")
    found = json.loads(done.stdout)
    print(f"{point}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
    with open(path, "a") as f:
        f.write(json.dumps({"flags": own, **found}) + "\n")
    return found


def print_table(head, rows):
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")


def seconds(p):
    return f"{p['first']:.2f}", f"{1000 * p['token']:.1f}", f"{p['total']:.2f}"


def long(s):
    """Measures each point, and prints the tables."""
    lengths = sorted({int(n) for n in s.tokens.split(",")})
    os.makedirs(s.out_dir, exist_ok=True)
    points = {(n, kind): apart(f"{kind},{n}", s) for n in lengths for kind in MODELS}
    convs = {conv: apart(f"image,{conv[0]},{conv[1]}", s) for conv in CONVS}
    costs = "first token, s", "a token, ms", f"{s.new_tokens} tokens, s"
    rows = []
    for (n, kind), p in points.items():
        sizes = f"{p['memory'] / 2**20:.0f}", f"{p['state'] / 2**20:.1f}"
        rows.append((str(n), f"{MODELS[kind]}, {p['parameters'] / 1e6:.2f} M", *seconds(p), *sizes))
    print_table(("prompt", "model", *costs, "memory, MiB", "state or cache, MiB"), rows)
    ours = points[lengths[-1], "rwkv"]
    for kind in ("llama", "static"):
        p = points[lengths[-1], kind]
        faster = (p["total"] - p["first"]) / (ours["total"] - ours["first"]), p["total"] / ours["total"]
        saved = 1 - ours["memory"] / max(1, p["memory"])
        print(f"{s.new_tokens} tokens after {lengths[-1]}, {MODELS[kind]} : RWKV-7: ", end="")
        print(
            f"{faster[0]:.1f} times the time, {faster[1]:.1f} with the prompt; RWKV-7 saves {saved:.1%} of the memory"
        )
    rows = []
    for (kernel, stride), p in convs.items():
        rows.append((f"({kernel}, {stride})", str(p["vectors"]), *seconds(p)))
    print_table(("Conv1D (k, s)", "a picture's and a question's vectors", *costs), rows)
    draw(os.path.join(s.out_dir, "long.png"), points, convs)


def draw(path, points, convs):
    """The tables as a picture, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print('no picture: that takes matplotlib: pip install -e ".[plot]"')
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="tight")
    columns = ("first", 1, "first token, s"), ("token", 1000, "a token, ms"), ("memory", 2**-20, "memory growth, MiB")
    for axis, (key, unit, title) in zip(axes, columns):
        for kind, name in MODELS.items():
            curve = [(n, unit * p[key]) for (n, k), p in points.items() if k == kind]
            axis.plot(*zip(*curve), marker="o", label=name)
        axis.set(title=title, xlabel="tokens of the prompt", xscale="log", yscale="log")
        axis.legend()
    curve = [(p["vectors"], p["first"]) for p in convs.values()]
    axes[3].plot(*zip(*curve), marker="o")
    for place, (kernel, stride) in zip(curve, convs):
        axes[3].annotate(f"({kernel}, {stride})", place, xytext=(4, -12), textcoords="offset points")
    axes[3].set(
        title="first token by Conv1D (k, s), s",
        xlabel="vectors of a picture and a question",
        ylim=(0, 1.2 * curve[0][1]),
    )
    plt.savefig(path)
    plt.close()
    print(path)


# --------------------------------------------------------------------------------------------------- one token


def decode(s):
    """Prints the medians of one token: ours, the package's, 8 of ours, by turns."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    rows = []
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:  # the package prints
        try:
            from rwkv.model import RWKV
        except ImportError as e:
            raise InputError("this takes the package rwkv: pip install rwkv") from e
        torch.set_num_threads(s.threads)
        for L, C, V, dtype in SIZES:
            path, strategy = os.path.join(folder, f"{L}x{C}"), "cpu fp32" if dtype == torch.float32 else "cpu bf16"
            torch.save(official_weights(L, C, V, dtype), f"{path}.pth")
            ours, package = load(f"{path}.pth"), RWKV(model=path, strategy=strategy)
            methods = our_tokens(ours, 1), their_tokens(package), our_tokens(ours, 8)
            one, other, eight = medians(CLOCKS[s.clock], *methods)
            times = f"{1000 * one:.2f}", f"{1000 * other:.2f}", f"{1000 * eight:.2f}"
            rows.append((f"{L} x {C}, {dtype}", *times, f"{one / other:.2f}", f"{eight / one:.2f}"))
    print_table(("a token, ms", "ours", "rwkv", "8 of ours", "ours : rwkv", "8 : 1"), rows)


def official_weights(L, C, V, dtype):
    """Random weights as in BlinkDL's files."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = ModRWKV(Config(n_layer=L, n_embd=C, image_encoder="none"), V).state_dict()
    shapes |= {f"blocks.0.att.v{i}": shapes[f"blocks.0.att.a{i}"] for i in "012"}  # unused, but there
    weights = {}
    for name, x in shapes.items():
        mean = 1 if "ln" in name and name.endswith("weight") else 0
        weights[name] = (mean + 0.02 * torch.randn(x.shape)).to(dtype)
    return weights


def our_tokens(model, n):
    """Does a token of n samples at each step."""
    step, tokens = traced_step(model), torch.full((n,), 3)
    _, state = model.read([QUESTION] * n)
    while True:
        x, state = step(tokens, state)
        yield model.head(x)


def their_tokens(package):
    """Does a token of one sample at each step."""
    _, state = package.forward(QUESTION[0][1], None)
    while True:
        x, state = package.forward([3], state)
        yield x


@torch.inference_mode()
def medians(now, *methods):
    """The seconds of a token of each method, by turns of three tokens, when our steps are traced."""
    for tokens in methods:
        collections.deque(itertools.islice(tokens, TRACE_AFTER + 10), 0)
    times = [[] for _ in methods]
    for _ in range(50):
        for tokens, spent in zip(methods, times):
            next(tokens)  # its weights come into the caches
            t0 = now()
            next(tokens)
            next(tokens)
            spent.append((now() - t0) / 2)
    return [statistics.median(spent) for spent in times]


def main(argv=None):
    """argv: long or decode, and flags. Without it, the process of a point."""
    name, *argv = argv or ["point", *sys.argv[1:]]
    [s, _] = flags(__doc__, Long, argv=argv)
    if s.point:
        print(json.dumps(measure(s)))
    elif name == "decode":
        decode(s)
    else:
        long(s)


if __name__ == "__main__":
    run(main)
