"""The papers' tables: trains each row of one with three seeds, and prints it.

python -m data.ablate NAME [--flags of train.py]        NAME: data (generations), prompt, scan, adapter or conv
python -m data.ablate long|decode [--flags]             time and memory: data/long.py

Each run is a process of its own into a folder of --out_dir. One that is there already is not done again, one that was
stopped goes on. On a CPU, runs go side by side, a thread each, which wastes nothing.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from data import long
from data.flags import run
from modrwkv import InputError, read_file

HERE = os.path.dirname(os.path.abspath(__file__))
TRAIN = os.path.join(os.path.dirname(HERE), "train.py")
SEEDS = 1, 2, 3
ABLATIONS = {  # the flags of each row of a table
    "data": [  # VisualRWKV's table 1
        {"rwkv": 5, "scan": "uni", "prompt_style": "first"},
        {"rwkv": 6, "scan": "uni", "prompt_style": "first"},
        {"rwkv": 6, "scan": "bi", "prompt_style": "sandwich"},
        {"rwkv": 7, "scan": "bi", "prompt_style": "sandwich"},
    ],
    "prompt": [  # its table 3
        {"rwkv": 6, "scan": "bi", "prompt_style": "first"},
        {"rwkv": 6, "scan": "bi", "prompt_style": "last"},
        {"rwkv": 6, "scan": "bi", "prompt_style": "sandwich"},
    ],
    "scan": [  # its table 4
        {"rwkv": 6, "scan": "uni", "prompt_style": "sandwich"},
        {"rwkv": 6, "scan": "bi", "prompt_style": "sandwich"},
        {"rwkv": 6, "scan": "multi", "prompt_style": "sandwich"},
    ],
    "adapter": [{"adapter_scale": 2}, {"adapter_scale": 4}, {"adapter_scale": 8}],  # ModRWKV's table 5
    "conv": [  # its table 7
        {"conv_kernel": 0, "conv_stride": 1},
        {"conv_kernel": 3, "conv_stride": 2},
        {"conv_kernel": 4, "conv_stride": 3},
        {"conv_kernel": 5, "conv_stride": 4},
    ],
}


def prepare(names):
    """Makes the data sets of --data that are made by a script and not there yet, before several runs would."""
    for name in names.split(","):
        script = os.path.join(HERE, name, "prepare.py")
        if os.path.exists(script) and not os.path.exists(os.path.join(HERE, name, "train.jsonl")):
            if subprocess.run([sys.executable, script]).returncode:
                raise InputError(f"data/{name}/prepare.py did not finish: see its message above")


def read_log(folder):
    """The entries of a run's log; none where it is not there or broken."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, "log.jsonl")) as f:
        return [json.loads(line) for line in f]
    return []


def train(folder, flags, max_steps):
    """Trains into a folder with flags of train.py, as far as that is not done; returns (log, settings of train.py)."""
    ckpt_path, log = os.path.join(folder, "ckpt.pt"), read_log(folder)
    begun = os.path.exists(ckpt_path)
    last = log[-1] if begun and log else {}
    if "tasks" not in last or last["step"] < (max_steps or read_file(ckpt_path)["train"]["max_steps"]):
        os.makedirs(folder, exist_ok=True)
        command = [sys.executable, TRAIN, *flags, f"--out_dir={folder}", f"--resume={begun}"]
        with open(os.path.join(folder, "said.txt"), "a") as out:
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=out)
        if done.returncode:
            raise InputError(f"the run into {folder} did not finish: {out.name} says why")
    return read_log(folder), read_file(ckpt_path)["train"]


def measure(log, batch_size):
    """{column: number} of a run: % of the held-out answers exact, or the loss where nothing is asked, and its speed."""
    *steps, last = log
    if last["n"]:
        scores = {name: 100 * part["exact"] for name, part in {"all": last, **last["tasks"]}.items()}
    else:
        scores = {"loss": last["val_loss"]}
    ends = [step["seconds"] for step in steps if "seconds" in step]
    seconds = statistics.median([b - a for a, b in zip(ends, ends[1:])] or ends)
    return scores | {"ms a sample": 1000 * seconds / batch_size}


def ablate(table, data, out_dir, device, max_steps, flags):
    """Trains each row of a table, and prints mean and standard deviation over the seeds. flags: of all runs."""

    def run(row, seed):
        values = os.path.basename(data), *itertools.chain(*row.items()), seed
        folder = os.path.join(out_dir, "_".join(map(str, values)))
        own = [f"--{name}={value}" for name, value in (row | {"seed": seed}).items()]
        log, settings = train(folder, flags + own, max_steps)
        scores = measure(log, settings["batch_size"])
        print(f"{folder}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()), flush=True)
        return scores

    prepare(data)
    on_cpu = device == "cpu" or device == "auto" and not torch.accelerator.is_available()
    pool = ThreadPoolExecutor(torch.get_num_threads() if on_cpu else 1)
    try:
        runs = list(pool.map(run, *zip(*itertools.product(table, SEEDS))))
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"| {'' if 'loss' in runs[0] else '% exact on '}{data} | {' | '.join(runs[0])} |")
    print("|---" * (len(runs[0]) + 1) + "|")
    for i, row in enumerate(table):
        of_row = runs[i * len(SEEDS) : (i + 1) * len(SEEDS)]
        cells = [", ".join(f"{name} {value}" for name, value in row.items())]
        for name in runs[0]:
            values, digits = [scores[name] for scores in of_row], 4 if name == "loss" else 1
            cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        print(f"| {' | '.join(cells)} |")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["long"], ["decode"]):
        return long.main(argv)
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data.ablate", None, __doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("name", choices=ABLATIONS)
    for name, default in (("data", "digits"), ("out_dir", "out"), ("device", "auto")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--max_steps", type=int, default=0)
    s, _ = parser.parse_known_args(argv)
    flags = [arg for arg in argv if arg != s.name]
    ablate(ABLATIONS[s.name], s.data, s.out_dir, s.device, s.max_steps, flags)


if __name__ == "__main__":
    run(main)
