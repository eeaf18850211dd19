"""The papers' tables: trains each row of one with three seeds, and prints it.

python -m data.ablate NAME [--flags of train.py]        data (generations), prompt, scan, adapter or conv
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch

from modrwkv import Config, InputError
from sample import find_device, flags
from train import Train, find_data, presets

TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")


def rows(**flags):  # the first values, the second ones, ...
    return [dict(zip(flags, values)) for values in zip(*flags.values(), strict=True)]


ABLATIONS = {  # the flags of each row of a table
    "data": rows(
        rwkv=(5, 6, 6, 7), scan=("uni", "uni", "bi", "bi"), prompt_style=("first", "first", "sandwich", "sandwich")
    ),  # VisualRWKV's table 1
    "prompt": rows(rwkv=(6, 6, 6), scan=("bi", "bi", "bi"), prompt_style=("first", "last", "sandwich")),  # 3
    "scan": rows(rwkv=(6, 6, 6), scan=("uni", "bi", "multi"), prompt_style=("sandwich", "sandwich", "sandwich")),  # 4
    "adapter": rows(adapter_scale=(2, 4, 8)),  # ModRWKV's table 5
    "conv": rows(conv_kernel=(0, 3, 4, 5), conv_stride=(1, 2, 3, 4)),  # 7
}


def ablate(table, s, settings):
    """Trains each row of a table with three seeds, each run a process of its own into a folder of out_dir, and prints the table: % of
    the held-out answers exact (or the loss, where nothing is asked) and milliseconds of training a sample, mean and standard deviation.
    A run that is there already is not done again, one that was stopped goes on. settings: {name: value} for all of them.
    On a CPU, runs go side by side, a thread each, which wastes nothing."""

    def run(row, seed):
        """{column: number} of a row of ABLATIONS."""
        folder = os.path.join(
            s.out_dir, "_".join(map(str, (os.path.basename(s.data), *itertools.chain(*row.items()), seed)))
        )

        def log():
            with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, "log.jsonl")) as f:
                return [json.loads(line) for line in f]
            return []

        if not log() or "tasks" not in log()[-1] or log()[-1]["step"] < s.max_steps:
            own = row | {"seed": seed, "out_dir": folder, "resume": os.path.exists(os.path.join(folder, "ckpt.pt"))}
            command = [
                sys.executable,
                TRAIN,
                *(f"--{name}={value}" for name, value in (settings | own).items()),
            ]
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "said.txt"), "a") as out:
                if subprocess.run(
                    command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=out
                ).returncode:
                    raise InputError(f"the run into {folder} did not finish: {out.name} says why")
        *steps, last = log()
        ends = [x["seconds"] for x in steps if "seconds" in x]
        score = (
            {name: 100 * part["exact"] for name, part in {"all": last, **last["tasks"]}.items()}
            if last["n"]
            else {"loss": last["val_loss"]}
        )
        print(f"{folder}: " + ", ".join(f"{name} {value:.4g}" for name, value in score.items()))
        return score | {
            "ms a sample": 1000 / s.batch_size * statistics.median([b - a for a, b in zip(ends, ends[1:])] or ends)
        }

    find_data(s.data, s.val_data)  # prepared once
    seeds = 1, 2, 3
    pool = ThreadPoolExecutor(torch.get_num_threads() if find_device(s.device).type == "cpu" else 1)
    try:
        scores = list(pool.map(run, *zip(*itertools.product(table, seeds))))
    finally:
        pool.shutdown(cancel_futures=True)
    print(
        f"| {'' if 'loss' in scores[0] else '% exact on '}{s.data} | {' | '.join(scores[0])} |\n{'|---' * (len(scores[0]) + 1)}|"
    )
    for i, row in enumerate(table):
        of_row = [[run[name] for run in scores[len(seeds) * i : len(seeds) * (i + 1)]] for name in scores[0]]
        digits = {name: 4 if name == "loss" else 1 for name in scores[0]}.values()
        cells = [f"{statistics.mean(x):.{n}f} ± {statistics.stdev(x):.{n}f}" for n, x in zip(digits, of_row)]
        print(f"| {', '.join(f'{name} {value}' for name, value in row.items())} | {' | '.join(cells)} |")


def main(argv=None):
    name, *argv = (sys.argv[1:] if argv is None else argv) or ["no name"]
    if name not in ABLATIONS:
        raise InputError(
            f"{name} is not one of {', '.join(ABLATIONS)}: python -m data.ablate NAME [--flags of train.py]"
        )
    s, config, given = flags(__doc__, Train, Config, argv=argv, presets=presets)
    settings = {flag: value for flag, value in (asdict(s) | asdict(config)).items() if flag in given}
    ablate(ABLATIONS[name], s, settings)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
