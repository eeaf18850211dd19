"""Time series to learn forecasting from: made up, and real ones if there are any at hand.

    python data/series/prepare.py [--real=a.jsonl,FOLDER] [--series=40000] [--seed=1] [--out=data/series]

writes train.jsonl and val.jsonl, {"item_id", "target"} a line. What is made up is a sum or product of seasons with
harmonics, daily and weekly profiles, trends, Gaussian processes and several kinds of noise, with breaks, bursts, gaps
and limits, and mixtures of such series. --real takes files of such lines and folders of .arrow files, as GIFT-Eval's
(which takes pyarrow): cut, stretched, turned over, mixed and drowned in noise, they make 40 % of train and half of
val, which has a tenth of them for itself. Series of the data sets of the LTSF benchmark are left out by name
(BENCHMARKS). 40,000 series take 450 MB.
"""

import argparse
import contextlib
import glob
import json
import os
import random
import re
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the matrices are small

import numpy as np
from scipy.signal import lfilter

LENGTH, HELD_OUT = 1632, 816  # points of a series of train and of val
BENCHMARKS = re.compile(
    r"(^|/)(ett[hm]?[12]?|ecl|electricity|(jena_)?weather|(sf_)?traffic|loop_seattle|sz_taxi)(?=[/._-]|$)", re.I
)
PERIODS = (4, 7, 12, 24, 24, 24, 30, 48, 52, 60, 96, 144, 168, 168, 336)


def seasons(g, t):
    """One to three periods with harmonics, their strength and their pace drifting slowly."""
    y = 0
    for _ in range(g.integers(1, 4)):
        period = g.choice(PERIODS) if g.random() < 0.75 else np.exp(g.uniform(np.log(4), np.log(500)))
        decay, drift = g.uniform(0.5, 2.5), g.uniform(0, 0.3) * (g.random() < 0.3)
        phase = 2 * np.pi * t / period + drift * smooth(g, len(t), period * 4)
        wave = sum(
            g.normal() / k**decay * np.sin(k * phase + g.uniform(0, 2 * np.pi)) for k in range(1, g.integers(2, 9))
        )
        y = y + wave * (1 + g.uniform(0, 0.6) * smooth(g, len(t), period * g.uniform(3, 15)))
    return y


def profile(g, t):
    """A day's course hour by hour, another on days off or on each day of the week, more or less of it day by day."""
    day = int(g.choice((24, 24, 24, 24, 24, 24, 48, 96)))
    shapes = np.abs([smooth(g, 3 * day, day / g.uniform(3, 10))[day : 2 * day] for _ in range(7)]) ** g.uniform(0.7, 2)
    free = g.choice((0, 1, 2), p=(0.2, 0.3, 0.5))
    days = (t // day).astype(int)

    def weekly():
        return g.exponential(0.2) * g.normal(size=7)[days % 7]

    level = 1 + g.uniform(0, 0.4) * noise(g, days.max() + 1)[days] + weekly()
    course = days % 7 if g.random() < 0.25 else (days % 7 >= 7 - free).astype(int)
    return shapes[course, (t % day).astype(int)] * level + weekly()


def smooth(g, n, scale):
    """A random curve of unit variance that turns about once in `scale` points."""
    knots = g.normal(size=int(n / max(scale, 1)) + 4)
    at = np.linspace(1, len(knots) - 2.001, n)
    i, u = at.astype(int), at % 1
    p0, p1, p2, p3 = (knots[(i + k).clip(0, len(knots) - 1)] for k in (-1, 0, 1, 2))
    y = (
        p1 + u * (p2 - p0 + u * (2 * p0 - 5 * p1 + 4 * p2 - p3 + u * (3 * (p1 - p2) + p3 - p0))) / 2
    )  # Catmull and Rom's spline
    return y / (y.std() + 1e-9)


def trend(g, t):
    n, kind = len(t), g.integers(3)
    if kind == 0:
        return g.normal() * np.linspace(-1, 1, n)
    if kind == 1:  # in pieces
        return np.cumsum(np.repeat(g.normal(size=8), n // 8 + 1)[:n]) / n * 4
    return np.tanh((np.linspace(-1, 1, n) - g.uniform(-0.7, 0.7)) * g.uniform(2, 15)) * g.normal()


def noise(g, n, kind=None):
    """Of unit variance: white, heavy-tailed, remembered for 1 to 100 points (kind 2), in bursts."""
    kind = g.integers(4) if kind is None else kind
    x = g.standard_t(g.uniform(2.5, 6), n) if kind == 1 else g.normal(size=n)
    if kind == 2:
        x = lfilter([1], [1, -np.exp(-1 / np.exp(g.uniform(0, np.log(100))))], g.normal(size=n + 1500))[-n:]
    if kind == 3:
        x = x * np.exp(g.uniform(0.3, 1) * smooth(g, n, g.uniform(20, 300)))
    return x / (x.std() + 1e-9)


def process(g, t):
    """A sample of a Gaussian process: periodic, squared exponential, rational quadratic kernels added or multiplied."""
    grid = np.arange(0, len(t) + 4, 4.0)
    apart = np.abs(grid[:, None] - grid)

    def kernel():
        kind, scale = g.integers(3), np.exp(g.uniform(np.log(10), np.log(500)))
        if kind == 0:
            return np.exp(-2 * np.sin(np.pi * apart / max(16, scale)) ** 2 / g.uniform(0.4, 2) ** 2)
        return np.exp(-((apart / scale) ** 2) / 2) if kind == 1 else (1 + (apart / scale) ** 2 / 2 / 0.8) ** -0.8

    k = kernel()
    for _ in range(g.integers(0, 3)):
        k = k * kernel() if g.random() < 0.5 else k + kernel()
    values, vectors = np.linalg.eigh(k)
    return np.interp(t, grid, vectors @ (np.sqrt(values.clip(0)) * g.normal(size=len(grid))))


def unit(x):
    return (x - x.mean()) / (x.std() + 1e-9)


def invent(g, n):
    """A made-up series of n points."""
    t = np.arange(n) + g.integers(1000)
    kind = g.random()
    y = unit(process(g, np.arange(n)) if kind < 0.05 else profile(g, t) if kind < 0.7 else seasons(g, t))
    if g.random() < 0.4:
        y = y + g.uniform(0.1, 1) * unit(profile(g, t) if g.random() < 0.5 else seasons(g, t))
    if g.random() < 0.15:
        y = y + g.exponential(0.7) * unit(trend(g, t))
    y = y + np.exp(g.uniform(np.log(0.1), np.log(3))) * noise(g, n)
    if g.random() < 0.7:
        y = y + np.exp(g.uniform(np.log(0.1), np.log(2))) * noise(g, n, kind=2)
    if g.random() < 0.15:  # what is a product is so mostly of what is positive
        y = np.exp(g.uniform(0.3, 1) * unit(y))
    if g.random() < 0.1:  # from some point on another level or another strength
        at = g.integers(n)
        y[at:] = y[at:] * np.exp(g.normal() * 0.5) + g.normal() * y.std()
    if g.random() < 0.1:
        for at in g.integers(0, n, g.integers(1, 12)):
            y[at : at + g.integers(1, 6)] += g.normal() * 4 * y.std()
    if g.random() < 0.15:  # limits
        y = y.clip(*np.quantile(y, (g.uniform(0, 0.5), 1) if g.random() < 0.7 else (0, g.uniform(0.6, 1))))
    if g.random() < 0.1:  # in steps
        step = y.std() * g.uniform(0.1, 0.7)
        y = np.round(y / step) * step
    return y


def read_series(paths):
    """(file and record, item_id, points, NaN where unknown) of each variable in .jsonl files and .arrow files' folders.

    Series of the benchmarks are left out.
    """
    left_out = set()

    def variables(record, at, name):
        if own := BENCHMARKS.search(f"{name}/{record.get('item_id', '')}"):
            left_out.add(own[0].strip("/"))
            return []
        return [
            (at, str(record.get("item_id", at)), row) for row in np.atleast_2d(np.array(record["target"], dtype=float))
        ]

    for path in paths:
        if os.path.isdir(path) or path.endswith(".arrow"):
            try:
                import pyarrow
            except ImportError:
                sys.exit('error: .arrow files take pyarrow: pip install -e ".[gift]"')
            files = (
                sorted(glob.glob(os.path.join(path, "**", "*.arrow"), recursive=True))
                if os.path.isdir(path)
                else [path]
            )
            files = [
                file for file in files if not os.path.basename(file).startswith("cache-")
            ]  # copies, which were published beside the data
            if not files:
                sys.exit(f"error: {path} has no .arrow files")
            for file in files:
                try:
                    with pyarrow.memory_map(file) as source:
                        rows = (
                            batch.slice(i, 1) for batch in pyarrow.ipc.open_stream(source) for i in range(len(batch))
                        )  # one at a time: some are long
                        for n, row in enumerate(rows):
                            yield from variables(row.to_pylist()[0], f"{file}, record {n}", os.path.abspath(file))
                except (pyarrow.ArrowInvalid, KeyError, ValueError, OSError) as e:
                    sys.exit(f"error: {file} does not hold series: {e}")
        else:
            try:
                with open(path, encoding="utf-8") as f:
                    for n, line in enumerate(f, 1):
                        try:
                            if line.strip():
                                yield from variables(json.loads(line), f"{path}, line {n}", os.path.basename(path))
                        except (ValueError, KeyError, TypeError, AttributeError) as e:
                            sys.exit(f'error: {path}, line {n}, is not {{"item_id": ..., "target": [...]}}: {e}')
            except OSError as e:
                sys.exit(f"error: cannot read {path}: {e.strerror}")
    if left_out:
        print(f"left out, as the benchmark's own: {', '.join(sorted(left_out))}")


def real_series(paths):
    """[(file and record, item_id, points)] of those that are long enough and not constant, gaps interpolated."""
    found = []
    for at, item_id, row in read_series(paths):
        there = np.isfinite(row)
        if there.sum() >= 192 and np.nanstd(row) > 0:
            found.append((at, item_id, np.interp(np.arange(len(row)), np.flatnonzero(there), row[there])))
    return found


def cut(g, series, n):
    """n points, or all there are, of one of these series; longer ones come more often, or short ones would prevail."""
    weights = np.array([len(x) ** 1.2 for *_, x in series])
    x = series[g.choice(len(series), p=weights / weights.sum())][-1]
    if g.random() < 0.4:
        pace = np.exp(g.uniform(-0.7, 0.7))
        x = np.interp(np.arange(0, len(x) - 1, pace), np.arange(len(x)), x)
    at = g.integers(max(1, len(x) - n + 1))
    return x[at : at + n] * (-1 if g.random() < 0.5 else 1)


def write(out, name, many, g, n, real, share):
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(out, f"{name}.jsonl"))

    def draw():
        return unit(cut(g, real, n) if real and g.random() < share else invent(g, n))

    with open(os.path.join(out, f"{name}.jsonl.partial"), "w") as f:
        for i in range(many):
            x = draw()
            if g.random() < 0.5:
                other, part = draw(), g.uniform(0.2, 0.8)
                n_both = min(len(x), len(other))
                x = unit(part * x[-n_both:] + (1 - part) * other[-n_both:])
            if g.random() < 0.5:
                x = unit(x + np.exp(g.uniform(np.log(0.1), np.log(2))) * noise(g, len(x), g.choice((None, 2))))
            f.write(json.dumps({"item_id": f"{name}-{i}", "target": [round(float(y), 3) for y in x]}) + "\n")
    os.replace(f.name, f.name.removesuffix(".partial"))


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", default="", help="files of series, and folders of .arrow files, separated by commas")
    parser.add_argument("--series", type=int, default=40000, help="for training; a thirtieth as many for validation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=here)
    args = parser.parse_args()
    real = real_series([path for path in args.real.split(",") if path])
    places = sorted({at for at, *_ in real})  # all variables of a record stay on one side
    held_out = set(random.Random(0).sample(places, len(places) // 10))
    os.makedirs(args.out, exist_ok=True)
    write(
        args.out,
        "train",
        args.series,
        np.random.default_rng(args.seed),
        LENGTH,
        [x for x in real if x[0] not in held_out],
        0.4,
    )
    write(
        args.out,
        "val",
        max(1, args.series // 30),
        np.random.default_rng(args.seed + 1),
        HELD_OUT,
        [x for x in real if x[0] in held_out],
        0.5,
    )
    print(
        f"{args.series} series for training, {max(1, args.series // 30)} held out; "
        f"{len(real)} real ones to cut them from"
    )
