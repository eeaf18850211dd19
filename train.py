"""Train a ModRWKV on a CPU, on one GPU, or on several with torchrun.

python train.py                                             handwritten numbers, from scratch, in minutes
python train.py --data=my.jsonl --out_dir=mine              your own pictures, sounds and series
python train.py --data=my.txt --out_dir=mine                a text alone
python train.py --out_dir=mine --resume                     goes on where it was stopped or killed
torchrun --nproc_per_node=2 train.py --batch_size=128       the batch is the global one; --shard for FSDP2
"""

import contextlib
import datetime
import functools
import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # read when torch is imported: OpenMP waits politely on a busy machine

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as state_dicts
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import modrwkv
from data.batches import Batches
from data.flags import DTYPES, autocast_dtype, find_device, flags, peak_memory, run
from data.records import cache_media, find_data, presets, read_data
from data.released import MODALITIES, base_of, read_checkpoint, read_safetensors
from data.scores import draw_curve, errors, evaluate, report, sample_command
from modrwkv import ENCODERS, MEDIA, Config, InputError, ModRWKV, model_from_checkpoint, setting


@dataclass
class Train:
    """training"""

    data: str = setting(
        "digits", "data sets of data/, folders of train.jsonl and val.jsonl, .json, .jsonl or .txt: a,b"
    )
    val_data: str = setting("", "a file of held-out records; else the folders' val.jsonl, or every 20th record")
    out_dir: str = setting("out", "where ckpt.pt, log.jsonl and loss.png go")
    init_from: str = setting("", "a checkpoint to start from: ours, or a released RWKV, ModRWKV or VisualRWKV")
    timer_weights: str = setting("", "model.safetensors of thuml/timer-base-84m, for --series_encoder=timer")
    resume: bool = setting(False, "go on from out_dir/ckpt.pt, with the settings it was made with")
    phase: str = setting("all", "adapter: language model frozen; pretrained encoders always are", ("all", "adapter"))
    freeze: str = setting("", "more parameters to freeze, by the beginnings of their names: emb,blocks.0,adapter")
    max_steps: int = setting(1300, "optimizer steps", least=1)
    batch_size: int = setting(64, "samples per step, over all processes", least=1)
    grad_accum: int = setting(1, "micro-batches per step and process", least=1)
    ctx_len: int = setting(256, "a longer text is read in windows of so many tokens; conversations are whole", least=1)
    level_steps: int = setting(30, 'curriculum: a higher "level" of records joins each so many steps; 0: all at once')
    learning_rate: float = setting(2e-3, "peak learning rate")
    lr_final: float = setting(0.0, "learning rate after the last step")
    schedule: str = setting("wsd", "after the warm-up: stable and decay, or cosine", ("wsd", "cosine", "constant"))
    warmup_steps: int = setting(50, "steps from zero to the peak learning rate")
    decay_fraction: float = setting(0.5, "part of the steps in which wsd decays")
    optimizer: str = setting("adamw", "muon: for matrices inside the model, AdamW for the rest", ("adamw", "muon"))
    weight_decay: float = setting(0.1, "on matrices only")
    decay_lr: float = setting(2.0, "learning rate of att.w0, att.time_decay in units of the others'; the papers': 1")
    beta1: float = setting(0.9, "AdamW's first decay rate")
    beta2: float = setting(0.99, "AdamW's second decay rate")
    adam_eps: float = setting(1e-18, "AdamW's epsilon")
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0 for no limit")
    loss_reduction: str = setting("token", "mean over tokens, or over samples of their means", ("token", "sample"))
    l2wrap: float = setting(0.0, "weight of half the square of the largest logits; 0.0001 in official training")
    log_interval: int = setting(10, "steps between looks at the loss, each of which waits for the GPU", least=1)
    eval_interval: int = setting(325, "steps between scores on held-out records", least=1)
    eval_samples: int = setting(200, "held-out records for these scores; the last one uses all", least=1)
    eval_batch_size: int = setting(0, "held-out samples at once; 0 for a micro-batch", least=0)
    save_interval: int = setting(325, "steps between checkpoints", least=1)
    feature_cache: str = setting("", "a folder for what pretrained encoders make of each file, computed once")
    num_workers: int = setting(-1, "processes that prepare batches ahead; -1: by the number of cores", least=-1)
    checkpoint_activations: bool = setting(False, "run each block again in the backward pass: slower, less memory")
    shard: bool = setting(False, "under torchrun, keep a part of weights, gradients and moments each (FSDP2)")
    compile: bool = setting(None, "torch.compile the blocks; by default on CUDA, where Triton is installed")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", "of autocast; auto: by hardware", DTYPES)
    seed: int = setting(1, "of the initial weights and the order of the data")


def print0(*words):
    """Prints, in the process of rank 0."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def start_process(s):
    """(rank, world size, device) of this process, under torchrun or alone."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    name = s.device
    if world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # counts are exchanged on the CPU
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # others wait while the first one scores
    return rank, world, device


def read_run(path, s, given):
    """(checkpoint, settings) of the run that --resume goes on with."""
    ckpt = read_checkpoint(path, mmap=False)  # a file that is mapped cannot be replaced everywhere
    if "train" not in ckpt:
        raise InputError(f"{path} was not written by train.py: start from its weights with --init_from")
    names = asdict(s).keys() - given
    old = {name: value for name, value in ckpt["train"].items() if name in names}
    return ckpt, Train(**asdict(s) | old | {"resume": True, "out_dir": s.out_dir})


def start_model(s, config, given, records):
    """The model of --init_from, or a new one, with an encoder for each kind of media; what names its language model."""
    names, ckpt = given & asdict(config).keys(), None
    for kind in MEDIA:
        if f"{kind}_encoder" not in given:
            needed = any(record.get(kind) or kind == "series" and "target" in record for record in records)
            setattr(config, f"{kind}_encoder", next(iter(ENCODERS[kind])) if needed else "none")
    if s.init_from:
        ckpt = read_checkpoint(s.init_from)
        has = {kind for kind in MEDIA if ckpt["config"].get(f"{kind}_encoder", "none") != "none"}
        changes = names | {f"{kind}_encoder" for kind in set(MEDIA) - has}
        if not has:  # a language model alone is given encoders and adapters as a new model has them
            language = {"rwkv", "n_layer", "n_embd", "head_size", "tokenizer", "template"}
            changes |= asdict(config).keys() - language
        model = model_from_checkpoint(ckpt, s.init_from, **{name: getattr(config, name) for name in changes})
        for name in names:
            own, wanted = getattr(model.config, name), getattr(config, name)
            if own != wanted:
                raise InputError(f"{s.init_from} has {name}={own}, not {wanted}")
    else:
        model = ModRWKV(config)
    if model.config.series_encoder == "timer":
        if s.timer_weights:
            modrwkv.load_weights(model.encoder["series"], read_safetensors(s.timer_weights), s.timer_weights)
        elif not ckpt or not any(name.startswith("encoder.series.") for name in ckpt["model"]):
            advice = "name its weights with --timer_weights=model.safetensors"
            raise InputError(f"--series_encoder=timer is pretrained: {advice}")
    return model, base_of(s.init_from, ckpt) if ckpt else None


def resumed_model(path, config, given, ckpt):
    """The same of a checkpoint; of the settings `given` only the place of a pretrained encoder may differ from it."""
    old = asdict(Config()) | ckpt["config"]
    scratch = {"none", *ENCODERS["image"], *ENCODERS["audio"]}
    moved = {}
    for name in given & asdict(config).keys():
        new = getattr(config, name)
        if name in ("image_encoder", "audio_encoder") and not {old[name], new} & scratch:
            moved[name] = new
        elif new != old[name]:
            raise InputError(f"{path} was trained with {name}={old[name]}: choose another --out_dir to change that")
    return model_from_checkpoint(ckpt, path, **moved), ckpt.get("base")


class Loss(torch.nn.Module):
    """DistributedDataParallel and FSDP wrap a forward: here it is the loss."""

    def __init__(self, model, settings):
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, batch, count):
        loss = self.model.loss(batch, count, self.settings.loss_reduction, self.settings.l2wrap)
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

    def touch_all(block, inputs):
        """Touches every parameter, so that all ranks issue the same collectives whatever their samples need."""
        x, *more = inputs
        outside = [p for name, p in objective.named_parameters() if p.requires_grad and ".blocks." not in name]
        return x + 0 * sum(p.sum() for p in outside), *more

    blocks[0].register_forward_pre_hook(touch_all, prepend=True)


def learning_rate(step, s):
    """Of a step, counted from 0 ([1]'s "wsd" is what is called cosine here)."""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / s.warmup_steps
    lengths = {"wsd": s.decay_fraction * s.max_steps, "cosine": s.max_steps - s.warmup_steps, "constant": 1e-9}
    length = lengths[s.schedule]
    p = min(1, max(0, (step + 1 - (s.max_steps - length)) / max(length, 1e-9)))  # how much of the decay is done
    left = {"wsd": 1 - p, "cosine": (1 + math.cos(math.pi * p)) / 2, "constant": 1}[s.schedule]
    return s.lr_final + (s.learning_rate - s.lr_final) * left


@contextlib.contextmanager
def memory_advice():
    """Running out of memory becomes one sentence with the flags that help."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if not isinstance(e, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(e):
            raise
        less = "a larger --grad_accum, a smaller --batch_size, --checkpoint_activations, or --shard under torchrun"
        raise InputError(f"out of memory: take {less}") from e


def try_longest(objective, batches, scaler, amp, device):
    """Forward and backward of the longest micro-batch there can be, which changes nothing; a line about its memory."""
    before = peak_memory(device, reset=True)
    with memory_advice():
        with amp():
            loss = objective(batches.longest().to(device), 1)
        scaler.scale(loss).backward()
    objective.zero_grad(set_to_none=True)
    moments = sum(p.numel() for p in objective.parameters() if p.requires_grad) * 8 / 2**30
    if device.type == "cuda":
        took = f"took {peak_memory(device) / 2**30:.2f} GiB of {torch.cuda.mem_get_info(device)[1] / 2**30:.1f}"
    elif before:
        took = f"took {(peak_memory(device) - before) / 2**30:.2f} GiB more than before"
    else:
        took = "fits (what it took is not known here)"
    return f"memory: the longest micro-batch {took}; the optimizer adds {moments:.2f} GiB"


def load_optimizer_state(model, optimizers, state):
    if isinstance(state, list):  # a checkpoint of an earlier version
        for optimizer, own in zip(optimizers, state):
            optimizer.load_state_dict(own)
        return
    state_dicts.set_optimizer_state_dict(model, optimizers, state, options=WHOLE)
    untrained = {p for name, p in model.named_parameters() if name not in state["state"]}
    for optimizer in optimizers:
        for p in untrained.intersection(optimizer.state):
            del optimizer.state[p]  # made up by set_optimizer_state_dict


WHOLE = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
PARTS = [("emb.",), ("forecast_head.",), *((f"encoder.{kind}.", f"adapter.{kind}.") for kind in MEDIA)]


def count(batch, s):
    """Numbers of a batch that a step needs: targets of the loss, tokens, and which of PARTS it needs."""
    n = len(batch.n_targets) if s.loss_reduction == "token" else batch.n_samples
    needed = [len(batch.ids) > 0, len(batch.forecasts) > 0, *(kind in batch.media for kind in MEDIA)]
    return [n, int(batch.lengths.sum()), *needed]


def drop_unneeded_gradients(model, needed):
    """Zeros, which DDP, FSDP and Loss make for PARTS that no process needed, would be a step to AdamW; None is none."""
    unneeded = tuple(name for names, n in zip(PARTS, needed) if not n for name in names)
    for name, p in model.named_parameters():
        if name.startswith(unneeded):
            p.grad = None


class Log:
    """log.jsonl, a line for each step and each score. Losses stay on the GPU until `flush`, which waits for it."""

    def __init__(self, path, first, writes):
        """first: the step to go on from; what was logged after it will be done and logged again. writes: rank 0."""
        self.path, self.pending, self.file, self.loss_ema, kept = path, [], None, None, []
        with contextlib.suppress(FileNotFoundError), open(path) as f:
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= first] if first else []
        self.scored = bool(kept) and "val_loss" in json.loads(kept[-1])
        if writes:
            with open(path + ".partial", "w") as f:
                f.writelines(kept)
            os.replace(path + ".partial", path)
            self.file = open(path, "a", buffering=1)

    def write(self, **entry):
        try:
            if self.file:
                print(json.dumps(entry), file=self.file)
        except OSError as e:
            raise InputError(f"could not write {self.path}: {e.strerror}; the last checkpoint is kept") from e

    def step(self, **entry):
        self.pending.append(entry)

    def flush(self):
        """Writes the pending steps; raises InputError at a loss that is not finite."""
        values = torch.stack([torch.stack([entry["loss"], entry["grad_norm"]]) for entry in self.pending])
        for (loss, norm), entry in zip(values.tolist(), self.pending):
            if not math.isfinite(loss):
                advice = "try a lower --learning_rate; the last checkpoint is kept"
                raise InputError(f"the loss is {loss} at step {entry['step'] - 1}: {advice}")
            self.loss_ema = loss if self.loss_ema is None else 0.95 * self.loss_ema + 0.05 * loss
            # an infinite norm: float16's first steps are skipped until its scale is found
            self.write(**entry | {"loss": loss, "grad_norm": norm if math.isfinite(norm) else None})
        self.pending = []


def describe(s, model, device, dtype, world, first):
    """Prints what a run is made of."""
    settings, defaults = asdict(s) | asdict(model.config), asdict(Train()) | asdict(Config())
    changed = [f"--{name}={value}" for name, value in settings.items() if value != defaults[name]]
    print0(f"settings: {' '.join(changed)}")
    sizes = {name: p.numel() / 1e6 for name, p in model.named_parameters()}
    language = sum(n for name, n in sizes.items() if not name.startswith(MODALITIES))
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    processes = f", {world} processes" if world > 1 else ""
    size = "RWKV-{rwkv} ({n_layer} layers x {n_embd})".format(**settings)
    others = f"{sum(sizes.values()) - language:.2f} M of encoders and adapters"
    where = f"{device}, {str(dtype)[6:]}{threads}{processes}"
    print0(f"model: {language:.2f} M parameters of {size}, {others}; {where}")
    then = f", from step {first} on" if first else ""
    print0(f"training: {s.max_steps - first} steps of {s.batch_size} samples into {s.out_dir}{then}")


def main(argv=None):
    s, config, given = flags(__doc__, Train, Config, argv=argv, presets=presets)
    rank, world, device = start_process(s)
    torch.manual_seed(s.seed)

    # the run to go on with, or a new one
    ckpt_path, ckpt = os.path.join(s.out_dir, "ckpt.pt"), None
    if s.resume:
        ckpt, s = read_run(ckpt_path, s, given)
    elif os.path.exists(ckpt_path):
        raise InputError(f"{ckpt_path} exists: go on training it with --resume, or choose another --out_dir")
    if s.batch_size % (world * s.grad_accum):
        pieces = f"{world} process(es) x --grad_accum={s.grad_accum}"
        raise InputError(f"--batch_size={s.batch_size} is not a multiple of {pieces}")
    if s.shard and "shard" in given and world == 1:
        raise InputError("--shard is for several processes: torchrun --nproc_per_node=2 train.py ...")
    sharded = s.shard and world > 1  # one process may go on with a sharded run
    micro_size = s.batch_size // (world * s.grad_accum)

    # data and model; the first process makes the folder and prepares the data, the others wait
    if rank == 0:
        try:
            os.makedirs(s.out_dir, exist_ok=True)
        except OSError as e:
            raise InputError(f"--out_dir={s.out_dir} cannot be made: {e.strerror}") from e
        find_data(s.data, s.val_data)
    if world > 1:
        dist.barrier()
    paths, held_out = find_data(s.data, s.val_data)
    records, val = read_data(paths, held_out)
    names = ", ".join(map(os.path.relpath, paths))
    print0(f"data: {len(records):,} records to learn from ({names}), {len(val):,} held out")
    if any(record.get("audio") for record in val):
        errors([("a", "a")])  # better to miss jiwer now than when the answers are scored
    model, base = resumed_model(ckpt_path, config, given, ckpt) if ckpt else start_model(s, config, given, records)
    model.train()
    model.checkpoint_activations, model.feature_cache = s.checkpoint_activations, s.feature_cache
    modrwkv.freeze(model, s.phase, s.freeze)
    if any(p.requires_grad for name, p in model.named_parameters() if not name.startswith(MODALITIES)):
        base = None  # the language model will be another one
    (model.encoder if sharded else model).to(device)  # of a sharded model, each block goes there in parts
    if s.feature_cache:
        cache_media(model, (records + val)[rank::world])
        if world > 1:
            dist.barrier()
    batches = Batches(records, s, model, rank, world)

    # precision: float16 needs its gradients scaled
    dtype = autocast_dtype(s.dtype, device)
    amp = contextlib.nullcontext
    if dtype != torch.float32:
        amp = functools.partial(torch.autocast, device.type, dtype, cache_enabled=not sharded)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if sharded and dtype == torch.float16:
        raise InputError("--shard does not scale float16's gradients: take --dtype=bfloat16 or float32")

    # one process, several with the same weights (DDP), or several with a part of them each (FSDP2)
    objective = Loss(model, s)
    compiled = s.compile
    if compiled is None:  # the recurrence in PyTorch's own operations compiles for minutes
        fast = model.config.head_size in (16, 32, 64, 128) and device.type == "cuda" and modrwkv.has_kernel("cuda")
        compiled = fast and importlib.util.find_spec("triton") is not None
    if compiled:
        for block in model.blocks[1:]:  # the first one is another graph: twice the compilations, for one layer
            block.compile(dynamic=True)
    if sharded:
        shard(objective, device, world)
    elif world > 1:
        objective = DistributedDataParallel(objective, find_unused_parameters=True)

    # AdamW, and Muon for matrices
    groups = modrwkv.parameter_groups(model, s.weight_decay, s.decay_lr, s.optimizer == "muon")
    fused = device.type in ("cpu", "cuda")
    optimizers = [torch.optim.AdamW(groups[:3], betas=(s.beta1, s.beta2), eps=s.adam_eps, fused=fused)]
    optimizers += [torch.optim.Muon([group], adjust_lr_fn="match_rms_adamw") for group in groups[3:]]
    first = ckpt["step"] if ckpt else 0
    if ckpt:
        load_optimizer_state(model, optimizers, ckpt["optimizer"])
        if ckpt.get("scaler"):
            scaler.load_state_dict(ckpt["scaler"])
        torch.set_rng_state(ckpt["rng"])
    log = Log(os.path.join(s.out_dir, "log.jsonl"), first, rank == 0)
    if first > s.max_steps or first == s.max_steps and log.scored:
        raise InputError(f"{ckpt_path} has already done {first} steps: ask for more with --max_steps")

    describe(s, model, device, dtype, world, first)
    if base:
        print0(f"checkpoints: what is trained alone; they need the language model in {base['path']}")
    print0(try_longest(objective, batches, scaler, amp, device))
    ckpt = None  # its weights are the model's now

    def save_checkpoint(step):
        weights = state_dicts.get_model_state_dict(model, options=WHOLE)
        if base:  # the language model is in a file of its own
            weights = {name: x for name, x in weights.items() if name.startswith(MODALITIES)}
        state = {
            "model": weights,
            "base": base,
            "config": asdict(model.config),
            "optimizer": state_dicts.get_optimizer_state_dict(model, optimizers, options=WHOLE),
            "scaler": scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "step": step,
            "train": asdict(s),
        }
        if rank == 0:
            modrwkv.write(ckpt_path, state)

    def score_held_out(step, n):
        """Logged; a sharded model is scored by all processes at once, any other by the first one."""
        if rank > 0 and not sharded:
            return None
        if sharded:
            objective.unshard()  # what is outside of the blocks
        eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
        with eager, memory_advice():
            scores, asked, answers = evaluate(model, val, s.ctx_len, s.eval_batch_size or micro_size, amp, n)
        if sharded:
            objective.reshard()
        log.write(step=step, **scores)
        return scores, asked, answers

    steps = batches.prefetched(first, pin_memory=device.type == "cuda")
    interval = 0.5 if sys.stderr.isatty() else 30
    bar = tqdm(steps, initial=first, total=s.max_steps, disable=rank > 0, unit="step", mininterval=interval)
    t0, tokens = time.time(), 0
    try:
        for step, micro_batches in enumerate(bar, first):
            # counts over all micro-batches and processes, made on the CPU: the loss is a mean over them
            counts = torch.tensor([count(batch, s) for batch in micro_batches]).sum(0)
            if world > 1:
                dist.all_reduce(counts)
            n, n_tokens, *needed = counts.tolist()

            # forward and backward, micro-batch by micro-batch
            loss_sum = torch.zeros((), device=device)
            for i, batch in enumerate(micro_batches):
                # DDP exchanges gradients with the last one; FSDP with each, or they would be whole till then
                waits = world > 1 and not sharded and i < len(micro_batches) - 1
                with memory_advice(), objective.no_sync() if waits else contextlib.nullcontext():
                    with amp():
                        loss = objective(batch.to(device), n)
                    scaler.scale(loss * world).backward()  # DDP and FSDP average over ranks; the loss is a sum
                loss_sum += loss.detach()
            if world > 1:
                dist.all_reduce(loss_sum)
            drop_unneeded_gradients(model, needed)

            # one optimizer step
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, s) * group["lr_scale"]
                with memory_advice():
                    scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
            scaler.update()

            # log: only here does the CPU wait for the GPU
            done = step + 1
            ends = done == s.max_steps
            scores = done % s.eval_interval == 0 and not ends
            saves = done % s.save_interval == 0 or ends
            tokens += n_tokens
            seconds = time.time() - t0
            entry = {"step": done, "lr": learning_rate(step, s), "tokens": n_tokens, "seconds": seconds}
            log.step(**entry, loss=loss_sum, grad_norm=norm)
            if done % s.log_interval == 0 or scores or saves:
                log.flush()
                bar.set_postfix_str(f"loss {log.loss_ema:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)

            # score and save
            if scores and (result := score_held_out(done, s.eval_samples)):
                scores, *_ = result
                exact = f", {100 * scores['exact']:.1f} % of {scores['n']} answers exact" if scores["n"] else ""
                print0(f"step {done}: held-out loss {scores['val_loss']:.4f}{exact}")
            if saves:
                save_checkpoint(done)
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        raise InputError(f"a process that reads data ended ({str(e).splitlines()[0]}): try --num_workers=0") from e
    except KeyboardInterrupt:
        bar.close()
        again = f"go on with: python train.py --out_dir={s.out_dir} --resume"
        print0(f"stopped; {again if os.path.exists(ckpt_path) else 'before the first checkpoint'}")
        sys.exit(130)
    bar.close()

    # the score on all held-out records
    print0(f"trained in {time.time() - t0:.0f} s; scoring {len(val):,} held-out records ...")
    result = score_held_out(s.max_steps, len(val))
    if rank == 0:
        scores, asked, answers = result
        draw_curve(log.path, os.path.join(s.out_dir, "loss.png"))
        print0(f"held-out loss {scores['val_loss']:.4f}")
        report(asked, answers)
        print0(f"Next, ask it yourself:\n    python sample.py --out_dir={s.out_dir} {sample_command(val[0])}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
