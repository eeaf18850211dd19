"""Real time series: GIFT-Eval, its pretraining collection, LOTSA and whatever has their layout.

    python data/gift_eval/prepare.py PATH [PATH ...] [--length=1632] [--shortest=192] [--most=10000]
        [--seed=1] [--out=data/gift_eval]

PATH is a folder of data sets, or one of them (solar/H/data-00000-of-00001.arrow; it takes pyarrow), or a .jsonl of
{"item_id", "target"}. Writes train.jsonl and val.jsonl, of every 20th record: each variable as it is, to seven digits,
with null where it is unknown, in pieces of --length points at most. Pieces with fewer than --shortest known points or
of one value only are left out, and so are, by name, the data sets of the LTSF benchmark: ETT, electricity, weather,
traffic, Loop Seattle and SZ-Taxi.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import runpy
import sys

import numpy as np

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    read_series = runpy.run_path(os.path.join(here, "..", "series", "prepare.py"))["read_series"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="PATH", nargs="+")
    parser.add_argument("--length", type=int, default=1632, help="points of a piece at most")
    parser.add_argument("--shortest", type=int, default=192, help="known points of a piece at least")
    parser.add_argument("--most", type=int, default=10000, help="pieces of one data set at most, drawn at random")
    parser.add_argument("--seed", type=int, default=1, help="of that draw")
    parser.add_argument("--out", default=here)
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    paths, written = [os.path.join(args.out, f"{part}.jsonl") for part in ("train", "val")], [0, 0]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    rng, places, left_out = random.Random(args.seed), {}, 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(f"{path}.partial", "w", encoding="utf-8")) for path in paths]
        for _, of_folder in itertools.groupby(read_series(args.paths), lambda found: os.path.dirname(found[0])):
            kept, n = [], 0
            for at, item_id, row in of_folder:
                for piece in np.array_split(row, -(-len(row) // args.length)):
                    known = piece[np.isfinite(piece)]
                    if len(known) < args.shortest or known.std() == 0:
                        left_out += 1
                        continue
                    place = places.setdefault(at, len(places))  # all variables of a record stay on one side
                    if n < args.most:
                        kept.append((place, item_id, piece))
                    elif (i := rng.randrange(n + 1)) < args.most:
                        kept[i] = place, item_id, piece
                    n += 1
            for place, item_id, piece in kept:
                part = int(place % 20 == 0)
                points = [float(f"{x:.7g}") if np.isfinite(x) else None for x in piece]
                print(json.dumps({"item_id": item_id, "target": points}), file=files[part])
                written[part] += 1
    if not all(written):
        names = " ".join(args.paths)
        sys.exit(f"error: {names} has {len(places)} records that can be used, which is too few to hold some out")
    for path in paths:
        os.replace(f"{path}.partial", path)
    print(
        f"{written[0]:,} series for training, {written[1]:,} held out; "
        f"{left_out:,} left out as too short or of one value only"
    )
