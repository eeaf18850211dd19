"""Train a ModRWKV, on the CPU, a GPU, or several with torchrun.

python train.py                                             handwritten numbers, from scratch, in minutes
python train.py --data=my.jsonl --out_dir=mine              your own pictures
python train.py --data=shakespeare --out_dir=plays          text alone
python train.py --out_dir=mine --resume                     goes on where it was stopped or killed
torchrun --nproc_per_node=2 train.py --batch_size=128       the batch is the global one; --shard for what is too large for one GPU
"""

import contextlib
import copy
import datetime
import functools
import itertools
import json
import math
import os
import random
import shlex
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields

os.environ.setdefault(
    "GOMP_SPINCOUNT", "5000"
)  # read when torch is imported: a busy machine needs OpenMP to wait politely

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from data.records import (
    held_out_samples,
    learned_tokens,
    read_records,
    record_media,
    record_sample,
    record_turns,
    rough_length,
)
from data.released import read_checkpoint
from data.scores import errors, report, score
from data.text import PLACEHOLDER
from modrwkv import (
    ENCODERS,
    MEDIA,
    Config,
    InputError,
    ModRWKV,
    build,
    freeze,
    parameter_groups,
    read_timer,
    save,
    setting,
)
from sample import ask, find_device, flags


@dataclass
class Train:
    """training"""

    data: str = setting(
        "digits",
        "folders of data/ or others with train.jsonl and val.jsonl, and .json and .jsonl files, separated by commas; see SUITED",
    )
    val_data: str = setting(
        "", "a file of held-out records; by default the data folders' val.jsonl, or every 20th record"
    )
    out_dir: str = setting("out", "where ckpt.pt, log.jsonl and loss.png go")
    init_from: str = setting(
        "", "a checkpoint whose weights to start from: ours, or any that load reads (RWKV, fla, WorldRWKV, VisualRWKV)"
    )
    timer_weights: str = setting("", "model.safetensors of thuml/timer-base-84m, for --series_encoder=timer")
    resume: bool = setting(False, "go on from out_dir/ckpt.pt, with the settings it was made with")
    phase: str = setting(
        "all", "adapter: language model and pretrained encoders frozen; all: pretrained encoders frozen"
    )
    max_steps: int = setting(1300, "optimizer steps")
    batch_size: int = setting(64, "samples per step, over all processes")
    grad_accum: int = setting(1, "micro-batches per step and process")
    shard: bool = setting(
        False, "under torchrun: each process keeps its part of the weights, gradients and moments (FSDP2)"
    )
    checkpoint_activations: bool = setting(
        False, "keep only what enters each block and run it again in the backward pass: slower, much less memory"
    )
    ctx_len: int = setting(256, "a longer text is read in windows of so many tokens; conversations are read whole")
    level_steps: int = setting(
        30, 'curriculum: records with a "level" above 1 join one level after another, each so many steps later'
    )
    learning_rate: float = setting(2e-3, "peak learning rate")
    lr_final: float = setting(0.0, "learning rate after the last step")
    loss_reduction: str = setting(
        "token", "token: mean over the answers' tokens; sample: mean over samples of each one's own mean"
    )
    l2wrap: float = setting(0.0, "weight of half the square of the largest logits; 0.0001 in official training")
    feature_cache: str = setting(
        "", "a folder to keep what pretrained encoders make of each file, so that it is computed once"
    )
    freeze: str = setting("", "parameters to leave as they are, by the beginnings of their names: emb,blocks.0,adapter")
    schedule: str = setting("wsd", "wsd: warm-up, stable, linear decay; cosine: warm-up, half a cosine; constant")
    warmup_steps: int = setting(50, "steps from zero to the peak learning rate")
    decay_fraction: float = setting(0.5, "part of the steps in which wsd decays")
    optimizer: str = setting(
        "adamw",
        "adamw; or muon for the matrices of blocks, encoders and adapters, which learns sooner what is faint in the data",
    )
    weight_decay: float = setting(0.1, "on matrices only")
    decay_lr: float = setting(
        2.0, "learning rate of the decays (att.w0, att.time_decay), in units of the others'; 1 in both papers' code"
    )
    beta1: float = setting(0.9, "AdamW's first decay rate")
    beta2: float = setting(0.99, "AdamW's second decay rate")
    adam_eps: float = setting(1e-18, "AdamW's epsilon")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0 for no limit")
    eval_interval: int = setting(325, "steps between scores on held-out records")
    eval_samples: int = setting(200, "held-out records for these scores; the last one uses all")
    save_interval: int = setting(325, "steps between checkpoints")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", "float32, or bfloat16 under autocast; auto takes bfloat16 where the hardware has it")
    seed: int = setting(1, "of the initial weights and the order of the data")


# ---------------------------------------------------------------------------------------------- data

SUITED = {  # settings that suit an embedded data set, unless they are given; of several, all encoders, and else the last one's
    "digits": dict(image_encoder="patch", optimizer="muon"),
    "shapes": dict(
        image_height=48,
        patch_height=16,
        patch_width=16,
        conv_kernel=0,
        image_trim=False,
        n_layer=3,
        prompt_style="last",
    )
    | dict(
        learning_rate=1.2e-3, batch_size=32, max_steps=4000, level_steps=100, eval_interval=1000, save_interval=1000
    ),
    "morse": dict(image_encoder="none", audio_encoder="mel", optimizer="muon")
    | dict(learning_rate=1.2e-3, batch_size=32, max_steps=2600, level_steps=100, eval_interval=650, save_interval=650),
    "same": dict(image_encoder="patch", audio_encoder="mel")
    | dict(
        learning_rate=1.2e-3, batch_size=16, max_steps=4000, level_steps=400, eval_interval=1000, save_interval=1000
    ),
    "series": dict(image_encoder="none", series_encoder="wavenet", encoder_width=48, n_layer=3)
    | dict(optimizer="muon", loss_reduction="sample", max_steps=3600, eval_interval=900, save_interval=900),
    "shakespeare": dict(image_encoder="none"),
    "llava": dict(image_height=64, patch_height=16, patch_width=16, image_trim=False),
}
SUITED |= {"spoken_digits": SUITED["morse"]} | {
    name: SUITED["morse"] | {"optimizer": "adamw"} for name in ("librispeech", "aishell")
}
SUITED |= {"gift_eval": SUITED["series"] | {"optimizer": "adamw", "loss_reduction": "token"}}


def find_data(names, val):
    """Paths of training and of held-out files; an embedded data set that is not there yet is prepared."""
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
    known = sorted(d for d in os.listdir(here) if os.path.exists(os.path.join(here, d, "prepare.py")))
    paths, held_out = [], [val] if val else []
    for name in names.split(","):
        folder = os.path.join(here, name) if name in known else name
        files = [os.path.join(folder, f"{part}.jsonl") for part in ("train", "val")]
        if not all(map(os.path.exists, files)):
            if name not in known:
                if os.path.splitext(name)[1] not in (".json", ".jsonl"):
                    raise InputError(
                        f"--data={name} is no .json or .jsonl file, no folder with train.jsonl and val.jsonl, and none of {', '.join(known)}"
                    )
                paths.append(name)
                continue
            say(f"preparing data/{name} ...")
            code = subprocess.run([sys.executable, os.path.join(folder, "prepare.py")]).returncode
            if code == 2:  # argparse's: it takes a path
                raise InputError(
                    f"data/{name} is made from files of your own: python data/{name}/prepare.py --help says from which"
                )
            if code:
                raise InputError(f"data/{name}/prepare.py did not finish: see its message above")
        paths.append(files[0])
        held_out += [] if val else files[1:]
    return paths, held_out


class Batches:
    """The samples of each step: a function of (seed, step) alone, so a resumed run needs no other position.

    Every record comes once in an epoch; before that, while records of a higher level wait, draws are from the
    others, and each folder keeps its share. Within a few batches, records of like length share a batch, which leaves little padding.
    """

    WINDOW = 8  # batches

    def __init__(self, records, settings, model):
        self.records, self.settings, self.model = records, settings, model
        self.levels = [record.get("level", 0) for record in records]
        self.order = functools.lru_cache(2)(self.order)
        self.window = functools.lru_cache(2)(self.window)
        self.encoded = functools.lru_cache(16)(
            lambda i: record_sample(model, records[i])
        )  # long texts are cut anew each time

    def order(self, epoch):
        return torch.randperm(
            len(self.records), generator=torch.Generator().manual_seed(self.settings.seed * 1000003 + epoch)
        ).tolist()

    def window(self, w):
        """The batches of WINDOW steps, as lists of (place in the run, index of the record)."""
        s, rng, n = self.settings, random.Random(f"{self.settings.seed} {w}"), len(self.records)
        places = range(w * self.WINDOW * s.batch_size, (w + 1) * self.WINDOW * s.batch_size)
        top = 1 + w * self.WINDOW // s.level_steps if s.level_steps else math.inf
        drawn = [(p, self.order(p // n)[p % n]) for p in places]
        if top < max(self.levels):
            ready = {}
            for i, level in enumerate(self.levels):
                if level <= top:
                    ready.setdefault(self.records[i].get("_folder"), []).append(i)
            drawn = [(p, rng.choice(ready.get(self.records[i].get("_folder")) or [i])) for p, i in drawn]
        drawn.sort(key=lambda place: rough_length(self.records[place[1]]))
        batches = [drawn[i : i + s.batch_size] for i in range(0, len(drawn), s.batch_size)]
        rng.shuffle(batches)
        return batches

    def __call__(self, step, rank, world):
        """This rank's micro-batches of a step."""
        batch, pieces = self.window(step // self.WINDOW)[step % self.WINDOW], world * self.settings.grad_accum
        size = len(batch) // pieces
        return [[self.sample(*p) for p in batch[i * size : (i + 1) * size]] for i in range(rank, pieces, world)]

    def longest(self, n):
        """The longest n samples of a batch late in the run, when records of all levels are in."""
        length = lambda place: rough_length(self.records[place[1]])
        batch = max(
            self.window((self.settings.max_steps - 1) // self.WINDOW), key=lambda batch: sum(map(length, batch))
        )
        return [self.sample(*place) for place in sorted(batch, key=length)[-n:]]

    def sample(self, place, i):
        if self.records[i].get("conversations"):
            return record_sample(self.model, self.records[i])
        [(kind, ids)] = self.encoded(i)
        rng = random.Random(f"{self.settings.seed} {place}")
        if kind == "forecast":
            return self.model.window(ids, rng)
        start = rng.randrange(max(1, len(ids) - self.settings.ctx_len))
        return [(kind, ids[start : start + self.settings.ctx_len + 1])]


# ---------------------------------------------------------------------------------------------- training


def learning_rate(step, s):
    """Of a step, counted from 0 ([1]'s "wsd" is what is called cosine here)."""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / s.warmup_steps
    length = {"wsd": s.decay_fraction * s.max_steps, "cosine": s.max_steps - s.warmup_steps, "constant": 1e-9}[
        s.schedule
    ]
    p = min(1, max(0, (step + 1 - (s.max_steps - length)) / max(length, 1e-9)))  # how much of the decay is done
    left = {"wsd": 1 - p, "cosine": (1 + math.cos(math.pi * p)) / 2, "constant": 1}[s.schedule]
    return s.lr_final + (s.learning_rate - s.lr_final) * left


def precision(dtype, device):
    """Whether to autocast to bfloat16."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--dtype={dtype} is not one of auto, float32, bfloat16")
    if dtype == "auto":
        return (
            torch.cuda.is_bf16_supported()
            if device.type == "cuda"
            else device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        )
    return dtype == "bfloat16"


class Loss(torch.nn.Module):
    """DistributedDataParallel wraps a forward: here it is the loss."""

    def __init__(self, model, settings):
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, samples, count):
        loss = self.model.loss(samples, count, self.settings.loss_reduction, self.settings.l2wrap)
        if torch.is_grad_enabled() and not loss.requires_grad:  # texts, while adapters alone learn
            loss = loss + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return loss


def shard(objective, device, world):
    """FSDP2: each process keeps its part of every parameter, gradient and moment; a block is whole while it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes more than a second

    blocks, mesh = objective.model.blocks, init_device_mesh(device.type, (world,))
    for module in (*blocks, objective):
        fully_shard(module, mesh=mesh)

    def join(block, inputs):
        """What one process's samples do not need, another's do: with all of it in the sum, no process waits for gradients that never come."""
        x, *more = inputs
        return x + 0 * sum(
            p.sum() for name, p in objective.named_parameters() if p.requires_grad and ".blocks." not in name
        ), *more

    blocks[0].register_forward_pre_hook(join, prepend=True)


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is on: those alive `now`, and the most there were, `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(made) if torch.is_tensor(x)):
            if storage not in self.alive:
                self.alive.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return made

    def add(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)


def step_memory(model, samples, bf16, parts=1, accumulates=False):
    """
    Bytes that training takes at its most: weights, gradients and moments, and what the language model makes of a micro-batch.

    The forward and backward pass are run with torch's fake tensors, which have shapes and no numbers. What encoders and adapters make
    is not counted. parts: processes that share weights, gradients and moments; accumulates: gradients are there when a pass begins.
    """
    device, T = model.emb.weight.device, max(map(model.length, samples))
    learned, together = (
        sum(len(data) for sample in samples for kind, data in sample if kind == "answer"),
        parts == 1 and not accumulates,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        Live() as live,
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        x = torch.empty(len(samples), T, model.config.n_embd, device=device, requires_grad=True)
        y, _ = model.hidden(x)
        logits = model.head(y.flatten(0, 1)[:learned]).float()
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(learned, dtype=torch.long, device=device))
        gradients = torch.autograd.grad(loss, [x, *trained] if together else [x], allow_unused=True)[1:]
    size = lambda parameters: sum(p.numel() * p.element_size() for p in parameters)
    frozen = size(
        p for encoder in model.encoder.values() for m in getattr(encoder, "models", ()) for p in m.parameters()
    )
    uncounted = size(trained) - size(g for g in gradients if g is not None)  # gradients
    return live.peak + frozen + (size(model.parameters()) + 2 * size(trained) + uncounted) // parts


def memory(device):
    """Bytes that a process may have on a device; infinite where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no such names on Windows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return math.inf


KINDS = ("text", "answer", "forecast", *MEDIA)  # of segments
NEED = {
    "emb": ("text", "answer"),
    "forecast_head": ("forecast",),
}  # the kinds without which parameters have no part in a step
NEED |= {
    f"{part}.{kind}": (kind, "forecast") if kind == "series" else (kind,)
    for part in ("encoder", "adapter")
    for kind in MEDIA
}


def gathered(state, keep):
    """A state dict whose tensors all processes put together, on the CPU; None for them where they are not kept."""
    if isinstance(state, dict):
        return {name: gathered(x, keep) for name, x in state.items()}
    whole = state.full_tensor() if hasattr(state, "full_tensor") else state
    return whole if whole is state else whole.cpu() if keep else None


def scattered(state, optimizer):
    """An optimizer's whole state dict with this process's parts of the tensors."""
    from torch.distributed.tensor import distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    part = lambda x, p: distribute_tensor(x, p.device_mesh, p.placements) if x.shape == p.shape else x
    return state | {
        "state": {i: {name: part(x, parameters[i]) for name, x in own.items()} for i, own in state["state"].items()}
    }


def say(*words):
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def asking(record):
    """The flags of sample.py that ask what a record asks first."""
    if not record.get("conversations"):
        return "--series=NUMBERS.csv" if "target" in record else "--raw --temperature=0.8"
    question, _ = record_turns(record)[0]
    media = list(record_media(record))[: len(PLACEHOLDER.findall(question))]
    files = {
        kind: [os.path.relpath(path) if isinstance(path, str) else "NUMBERS.csv" for k, path in media if k == kind]
        for kind, _ in media
    }
    prompt = PLACEHOLDER.sub("", question).strip() if len(media) == 1 and PLACEHOLDER.match(question) else question
    return " ".join(
        [f"--{kind}={shlex.quote(','.join(paths))}" for kind, paths in files.items()]
        + [f"--prompt={shlex.quote(prompt)}"] * bool(prompt)
    )


def draw_curve(log, path):
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with open(log) as f:
        lines = [json.loads(line) for line in f]
    for key in ("loss", "val_loss"):
        points = [(x["step"], x[key]) for x in lines if key in x]
        plt.plot(*zip(*points), label=key, alpha=0.9) if points else None
    (
        plt.xlabel("step"),
        plt.ylabel("cross-entropy per answer token"),
        plt.yscale("log"),
        plt.grid(alpha=0.3),
        plt.legend(),
    )
    plt.savefig(path, dpi=120), plt.close()


def start(s, config, given, suited):
    """(checkpoint to resume or None, settings, model), after a look at what was asked for by the flags `given`."""
    ckpt_path = os.path.join(s.out_dir, "ckpt.pt")
    names = {f.name for f in fields(Config)}
    if s.resume:
        ckpt = read_checkpoint(ckpt_path)
        if "train" not in ckpt:
            raise InputError(f"{ckpt_path} was not written by train.py: start from its weights with --init_from")
        scratch = {"none", None, *ENCODERS["image"], *ENCODERS["audio"]}
        moved = {
            k: getattr(config, k)
            for k in given & {"image_encoder", "audio_encoder"}
            if not {ckpt["config"].get(k), getattr(config, k)} & scratch
        }
        wrong = [
            k
            for k in given & names - set(moved)
            if ckpt["config"].get(k, Config.__dataclass_fields__[k].default) != getattr(config, k)
        ]
        if wrong:
            raise InputError(
                f"{ckpt_path} was trained with {wrong[0]}={ckpt['config'].get(wrong[0])}: choose another --out_dir to change that"
            )
        old = {k: v for k, v in ckpt["train"].items() if k not in given}
        return ckpt, Train(**asdict(s) | old | {"resume": True, "out_dir": s.out_dir}), build(ckpt, ckpt_path, **moved)
    if os.path.exists(ckpt_path):
        raise InputError(f"{ckpt_path} exists: go on training it with --resume, or choose another --out_dir")
    if s.init_from:
        ckpt = read_checkpoint(s.init_from)
        missing = {
            k for k in suited.keys() & names if k.endswith("_encoder") and ckpt["config"].get(k, "none") == "none"
        }  # the data takes them
        if all(
            ckpt["config"].get(f"{kind}_encoder", "none") == "none" for kind in MEDIA
        ):  # a language model alone: how they are made, too
            missing |= suited.keys() & names - {"n_layer"}
        model = build(ckpt, s.init_from, **{k: getattr(config, k) for k in given & names | missing})
        timed = any(name.startswith("encoder.series.") for name in ckpt["model"])
        wrong = [k for k in given & names if getattr(model.config, k) != getattr(config, k)]
        if wrong:
            raise InputError(
                f"{s.init_from} has {wrong[0]}={getattr(model.config, wrong[0])}, not {getattr(config, wrong[0])}"
            )
    else:
        model, timed = ModRWKV(config), False
    if model.config.series_encoder == "timer" and (s.timer_weights or not timed):
        if not s.timer_weights:
            raise InputError(
                "--series_encoder=timer is pretrained: name its weights with --timer_weights=model.safetensors"
            )
        read_timer(model.encoder["series"], s.timer_weights)
    return None, s, model


def main(argv=None):
    s, config, given = flags(__doc__, Train, Config, argv=argv)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    choices = dict(
        phase=("adapter", "all"),
        schedule=("wsd", "cosine", "constant"),
        loss_reduction=("token", "sample"),
        optimizer=("adamw", "muon"),
    )
    for name, known in choices.items():
        if getattr(s, name) not in known:
            raise InputError(f"--{name}={getattr(s, name)} is not one of {', '.join(known)}")
    for name in ("max_steps", "batch_size", "grad_accum", "ctx_len", "eval_interval", "eval_samples", "save_interval"):
        if getattr(s, name) < 1:
            raise InputError(f"--{name}={getattr(s, name)} is not at least 1")
    device = find_device(
        f"cuda:{os.environ['LOCAL_RANK']}"
        if world > 1 and torch.cuda.is_available() and s.device in ("auto", "cuda")
        else s.device
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(s.seed)

    suited = {}
    for data in s.data.split(","):
        suited |= {name: value for name, value in SUITED.get(data, {}).items() if value != "none" or name not in suited}
    for name in suited.keys() - given:
        setattr(s if hasattr(s, name) else config, name, suited[name])
    ckpt, s, model = start(s, config, given, suited)
    if s.batch_size % (world * s.grad_accum):
        raise InputError(
            f"--batch_size={s.batch_size} is not a multiple of {world} process(es) x --grad_accum={s.grad_accum}"
        )
    if s.shard and "shard" in given and world == 1:
        raise InputError("--shard is for several processes: torchrun --nproc_per_node=2 train.py ...")
    sharded = s.shard and world > 1  # one process may go on with a sharded run
    if world > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1)
        )  # the first one scores alone
    if rank == 0:
        try:
            os.makedirs(s.out_dir, exist_ok=True)
        except OSError as e:
            raise InputError(f"--out_dir={s.out_dir} cannot be made: {e.strerror}") from e
        paths, held_out = find_data(s.data, s.val_data)
    if world > 1:  # the first process prepares, the others wait
        dist.barrier()
        paths, held_out = find_data(s.data, s.val_data)
    records = [record for path in paths for record in read_records(path)]
    val = [
        record for of_each in itertools.zip_longest(*map(read_records, held_out)) for record in of_each if record
    ]  # in turns
    if not val:
        val = records[::20]
        records = [r for i, r in enumerate(records) if i % 20] or records
    if any(record.get("audio") for record in val):
        errors([("a", "a")])  # better to miss jiwer now than when the answers are scored
    say(
        f"data: {len(records):,} records to learn from ({', '.join(map(os.path.relpath, paths))}), {len(val):,} held out"
    )

    model.to(device).train()
    model.checkpoint_activations, bf16 = s.checkpoint_activations, precision(s.dtype, device)
    freeze(model, s.phase, s.freeze)
    batches, parts = Batches(records, s, model), world if sharded else 1
    need = step_memory(model, batches.longest(s.batch_size // (world * s.grad_accum)), bf16, parts, s.grad_accum > 1)
    model.feature_cache = s.feature_cache
    needed = f"memory: about {need / 2**30:.2g} GiB without what encoders make, of {memory(device) / 2**30:.3g}"
    if need > memory(device):
        raise InputError(
            f"{needed}: take a larger --grad_accum, a smaller --batch_size, --checkpoint_activations, or --shard under torchrun"
        )
    objective, whole = Loss(model, s), model  # what is trained; what is scored and saved
    if sharded:
        whole = copy.deepcopy(model).cpu() if rank == 0 else None
        shard(objective, device, world)
    elif world > 1:
        objective = DistributedDataParallel(objective, find_unused_parameters=True)
    groups = parameter_groups(model, s.weight_decay, s.decay_lr, s.optimizer == "muon")
    optimizers = [
        torch.optim.AdamW(groups[:3], betas=(s.beta1, s.beta2), eps=s.adam_eps, fused=device.type in ("cpu", "cuda"))
    ]
    optimizers += [torch.optim.Muon([group], adjust_lr_fn="match_rms_adamw") for group in groups[3:]]
    first, kept = 0, []
    log_path, ckpt_path = os.path.join(s.out_dir, "log.jsonl"), os.path.join(s.out_dir, "ckpt.pt")
    if ckpt:
        first = ckpt["step"]
        for optimizer, state in zip(optimizers, ckpt["optimizer"]):
            optimizer.load_state_dict(scattered(state, optimizer) if sharded else state)
        torch.set_rng_state(ckpt["rng"])
        with (
            contextlib.suppress(FileNotFoundError),
            open(log_path) as f,
        ):  # what was logged after the checkpoint will be done and logged again
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= first]
        if first > s.max_steps or first == s.max_steps and kept and "val_loss" in json.loads(kept[-1]):
            raise InputError(f"{ckpt_path} has already done {first} steps: ask for more with --max_steps")
    if rank == 0:
        with open(log_path + ".partial", "w") as f:
            f.writelines(kept)
        os.replace(log_path + ".partial", log_path)
    log = open(log_path, "a", buffering=1) if rank == 0 else None

    def note(**entry):
        try:
            print(json.dumps(entry), file=log)
        except OSError as e:
            raise InputError(
                f"could not write {log_path}: {e.strerror}; the checkpoint of before is still there"
            ) from e

    millions = lambda part: sum(p.numel() for n, p in model.named_parameters() if part(n)) / 1e6
    language = lambda n: not n.startswith(("encoder.", "adapter.", "forecast_head."))
    say(
        f"model: {millions(language):.2f} M parameters of RWKV-{model.config.rwkv} ({model.config.n_layer} layers x {model.config.n_embd}), "
        f"{millions(lambda n: not language(n)):.2f} M of encoders and adapters; {device}, {'bfloat16' if bf16 else 'float32'}"
        + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
        + (f", {world} processes" if world > 1 else "")
    )
    say(needed)
    say(
        f"training: {s.max_steps - first} steps of {s.batch_size} samples into {s.out_dir}"
        + (f", from step {first} on" if first else "")
    )

    def gather():
        """Brings the whole model up to date; all processes have to be here."""
        if sharded:
            state = gathered(model.state_dict(), rank == 0)
            if rank == 0:
                whole.load_state_dict(state)

    def checkpoint(step):
        states = [gathered(optimizer.state_dict(), rank == 0) for optimizer in optimizers]
        if rank == 0:
            save(ckpt_path, whole, optimizer=states, rng=torch.get_rng_state(), step=step, train=asdict(s))

    @torch.no_grad()
    def evaluate(step, n):
        """Loss and score on the first n held-out records; logged, and returned for the report."""
        whole.to(device).eval()
        samples = held_out_samples(whole, val, s.ctx_len, n)
        parts = [samples[i : i + s.batch_size] for i in range(0, len(samples), s.batch_size)]
        losses = [whole.loss(part).item() for part in parts]
        counts = [sum(map(learned_tokens, part)) for part in parts]
        if not sum(counts):
            raise InputError(f"there is nothing to predict in the first {n} held-out records")
        asked = [r for r in val if r.get("conversations")][:n]
        answers = ask(whole, asked)
        whole.to("cpu" if sharded else device).train()
        result = {"val_loss": sum(a * b for a, b in zip(losses, counts)) / sum(counts), **score(asked, answers)}
        note(step=step, **result)
        return result, asked, answers

    pool = ThreadPoolExecutor(1)
    coming = pool.submit(batches, first, rank, world)
    bar = tqdm(
        range(first, s.max_steps),
        initial=first,
        total=s.max_steps,
        disable=rank > 0,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    units = (
        learned_tokens if s.loss_reduction == "token" else lambda sample: learned_tokens(sample) > 0
    )  # what the loss is a mean over
    began, tokens, smooth = time.time(), 0, None
    step = first
    try:
        for step in bar:
            micro = coming.result()
            if step + 1 < s.max_steps:
                coming = pool.submit(batches, step + 1, rank, world)
            counts = [
                [units(x), model.length(x), *(kind in dict(x) for kind in KINDS)] for batch in micro for x in batch
            ]
            counts = torch.tensor(counts, device=device).sum(0)
            if world > 1:
                dist.all_reduce(counts)
            learned, seen, *there = counts.tolist()
            loss_sum = torch.zeros((), device=device)
            for i, samples in enumerate(micro):
                last = (
                    i == len(micro) - 1
                )  # gradients are exchanged with the last micro-batch; sharded ones with each, or they would be whole till then
                quiet = contextlib.nullcontext() if world == 1 or sharded or last else objective.no_sync()
                with quiet, torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=not sharded):
                    loss = objective(samples, learned)
                (loss * world).backward()  # DDP and FSDP average over ranks, the loss is a sum over them
                loss_sum += loss.detach()
            if world > 1:
                dist.all_reduce(loss_sum)
            loss = loss_sum.item()
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss is {loss} at step {step}: try a lower --learning_rate; the checkpoint before it is kept"
                )
            for (
                name,
                p,
            ) in model.named_parameters():  # zeros, which keep the processes together, would be a step to AdamW
                if not any(
                    n
                    for kind, n in zip(KINDS, there)
                    if kind in next((NEED[part] for part in NEED if name.startswith(part + ".")), KINDS)
                ):
                    p.grad = None
            norm = gathered(torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf), True)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, s) * group["lr_scale"]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            scores, saves = ((step + 1) % n == 0 for n in (s.eval_interval, s.save_interval))
            end = step + 1 == s.max_steps
            if scores or saves or end:
                gather()
            if rank == 0:
                tokens, smooth = tokens + seen, loss if smooth is None else 0.95 * smooth + 0.05 * loss
                bar.set_postfix_str(f"loss {smooth:.3f}, {tokens / (time.time() - began):,.0f} tokens/s", refresh=False)
                note(
                    step=step + 1,
                    loss=loss,
                    lr=learning_rate(step, s),
                    grad_norm=norm.item(),
                    tokens=seen,
                    seconds=time.time() - began,
                )
                if scores and not end:
                    result, _, _ = evaluate(step + 1, s.eval_samples)
                    exact = f", {100 * result['exact']:.1f} % of {result['n']} answers exact" if result["n"] else ""
                    say(f"step {step + 1}: held-out loss {result['val_loss']:.4f}{exact}")
            if saves or end:
                checkpoint(step + 1)
    except KeyboardInterrupt:
        bar.close()
        again = (
            f"go on with: python train.py --out_dir={s.out_dir} --resume"
            if os.path.exists(ckpt_path)
            else "before the first checkpoint"
        )
        say(f"stopped; {again}")
        sys.exit(130)
    finally:
        pool.shutdown(cancel_futures=True)
    bar.close()
    if rank == 0:
        say(f"trained in {time.time() - began:.0f} s; scoring {len(val):,} held-out records ...")
        result, asked, answers = evaluate(s.max_steps, len(val))
        draw_curve(log_path, os.path.join(s.out_dir, "loss.png"))
        say(f"held-out loss {result['val_loss']:.4f}")
        report(asked, answers)
        say(f"Next, ask it yourself:\n    python sample.py --out_dir={s.out_dir} {asking(val[0])}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
