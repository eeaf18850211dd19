"""The micro-batches of each training step, prepared ahead by worker processes."""

import contextlib
import copy
import functools
import itertools
import math
import os
import random
import signal
import sys

import soundfile
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.media import PICTURE_FORMATS
from data.records import record_media, record_sample, record_turns
from modrwkv import InputError, Pretrained


def without_weights(model):
    """A copy of the model that has shapes alone: what a worker process needs to prepare a batch."""
    frozen = [part for encoder in model.encoder.values() for part in getattr(encoder, "models", ())]
    tensors = [x for part in (model, *frozen) for x in itertools.chain(part.parameters(), part.buffers())]
    return copy.deepcopy(model, {id(x): x.detach().to("meta") for x in tensors})


def rough_length(model, record, ctx_len):
    """About how long a record is as a sequence: characters, and what headers say of its pictures and sounds."""
    n = min(len(record.get("text") or ""), ctx_len)
    n += sum(len(question) + len(answer) + 4 for question, answer in record_turns(record))
    for kind, path in record_media(record):
        with contextlib.suppress(Exception):  # reading it whole will say what is wrong
            # to a pretrained encoder all pictures have one length
            if kind == "image" and not isinstance(model.encoder[kind], Pretrained):
                with Image.open(path, formats=PICTURE_FORMATS) as image:
                    n += 5 * image.width / image.height
            elif kind == "audio":
                n += 25 * soundfile.info(path).duration
    return n


def start_worker(_):
    """Ctrl-C is for the process that trains; what its end does to a worker is nothing to speak of."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = print_nothing  # errors in a batch go another way


def print_nothing(*_):
    pass


class Batches(Dataset):
    """The micro-batches of each step: a function of (seed, step) alone, so a resumed run needs no other position.

    Every record comes once in an epoch; before that, while records of a higher level wait, draws are from the others,
    and each folder keeps its share. Within a few batches, records of like length share a batch: less padding.
    """

    BUCKET = 8  # batches

    def __init__(self, records, settings, model, rank=0, world=1):
        self.records, self.settings, self.rank, self.world = records, settings, rank, world
        self.model = without_weights(model)
        self.levels = [record.get("level", 0) for record in records]
        self.lengths = [rough_length(model, record, settings.ctx_len) for record in records]

    @functools.lru_cache(2)
    def order(self, epoch):
        generator = torch.Generator().manual_seed(self.settings.seed * 1000003 + epoch)
        return torch.randperm(len(self.records), generator=generator).tolist()

    @functools.lru_cache(2)
    def bucket(self, b):
        """The batches of BUCKET steps, as lists of (place in the run, index of the record)."""
        s, rng, n = self.settings, random.Random(f"{self.settings.seed} {b}"), len(self.records)
        places = range(b * self.BUCKET * s.batch_size, (b + 1) * self.BUCKET * s.batch_size)
        drawn = [(place, self.order(place // n)[place % n]) for place in places]
        top = 1 + b * self.BUCKET // s.level_steps if s.level_steps else math.inf
        if top < max(self.levels):
            ready = {}
            for i, level in enumerate(self.levels):
                if level <= top:
                    ready.setdefault(self.records[i].get("_folder"), []).append(i)
            drawn = [(place, rng.choice(ready.get(self.records[i].get("_folder")) or [i])) for place, i in drawn]
        drawn.sort(key=lambda place: self.lengths[place[1]])
        batches = [drawn[i : i + s.batch_size] for i in range(0, len(drawn), s.batch_size)]
        rng.shuffle(batches)
        return batches

    def prefetched(self, first, pin_memory):
        """Yields the micro-batches of each step from `first` on, prepared ahead; InputError names the record."""
        workers = self.settings.num_workers
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, len(self)),
            num_workers=workers if workers >= 0 else min(4, max(1, os.cpu_count() // self.world - 1)),
            worker_init_fn=start_worker,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )
        for micro_batches in loader:
            if isinstance(micro_batches, InputError):
                raise micro_batches
            yield micro_batches

    def __len__(self):
        return self.settings.max_steps

    def __getitem__(self, step):
        """This process's micro-batches of a step, or an InputError, which a worker would raise with a traceback."""
        batch = self.bucket(step // self.BUCKET)[step % self.BUCKET]
        pieces = self.world * self.settings.grad_accum
        size = len(batch) // pieces
        micro_batches = [batch[i * size : (i + 1) * size] for i in range(self.rank, pieces, self.world)]
        try:
            return [self.collate(places) for places in micro_batches]
        except InputError as e:
            return e

    def longest(self):
        """The longest micro-batch that there can be: so many of the longest records."""
        n = self.settings.batch_size // (self.world * self.settings.grad_accum)
        by_length = sorted(range(len(self.records)), key=self.lengths.__getitem__, reverse=True)
        return self.collate([(0, i) for i in itertools.islice(itertools.cycle(by_length), n)])

    def collate(self, places):
        return self.model.collate([self.sample(*place) for place in places])

    @functools.lru_cache(16)
    def whole(self, i):
        """A text or a series, of which each sample is a window."""
        return record_sample(self.model, self.records[i])

    def sample(self, place, i):
        """The segments of record i; of a text or a series a window, at random by its place in the run."""
        if self.records[i].get("conversations"):
            return record_sample(self.model, self.records[i])
        [(kind, data)] = self.whole(i)
        rng = random.Random(f"{self.settings.seed} {place}")
        if kind == "forecast":
            return self.model.window(data, rng)
        start = rng.randrange(max(1, len(data) - self.settings.ctx_len))
        return [(kind, data[start : start + self.settings.ctx_len + 1])]
