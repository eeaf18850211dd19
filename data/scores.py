"""Scores: exact match and error rates of answers, and long-term forecasting beside naive methods."""

import itertools
import json
import os
import random
import re
import shlex
import sys
import unicodedata
from collections import Counter

import torch
from tqdm import tqdm

from data.answers import ask
from data.media import read_series, read_table
from data.records import held_out_samples, read_records, record_media, record_turns
from data.text import PLACEHOLDER
from modrwkv import MEDIA, InputError, normalise

WORD_ERRORS = "substitutions", "deletions", "insertions"


@torch.no_grad()
def evaluate(model, records, ctx_len, size, amp, n=None):
    """(scores, records that were asked, their answers) of the first n held-out records, `size` samples at once."""
    model.eval()
    total, n_targets = 0.0, 0
    samples = itertools.islice(held_out_samples(model, records, ctx_len), n)
    with amp():
        while part := list(itertools.islice(samples, size)):
            batch = model.collate(part)
            total += model.loss(batch, count=1).item()
            n_targets += len(batch.n_targets)
        if not n_targets:
            raise InputError(f"there is nothing to predict in the first {n} held-out records")
        asked = [record for record in records if record.get("conversations")][:n]
        answers = ask(model, asked, size)
    model.train()
    return {"val_loss": total / n_targets, **score(asked, answers)}, asked, answers


def score(records, answers):
    """
    Scores of the answers of `ask` over all, and in "tasks" by the records' "task".

    n: how many; exact: the share equal to the true answer; chars: the share of characters right, place by place, of the
    longer of the two; majority: what always giving the commonest true answer would score. Of recordings also `errors`.
    """
    tasks, audible, answers = {}, set(), iter(answers)
    for record in records:
        task = str(record.get("task", "all"))
        if record.get("audio"):
            audible.add(task)
        for _, truth in record_turns(record):
            tasks.setdefault(task, []).append((next(answers), truth.strip()))
    by_task = {}
    for task, pairs in sorted(tasks.items()):
        by_task[task] = summary(pairs) | (errors(pairs) if task in audible else {})
    return summary([pair for pairs in tasks.values() for pair in pairs]) | {"tasks": by_task}


def summary(pairs):
    """n, exact, chars and majority of (answer, truth)."""
    n = max(1, len(pairs))
    equal = sum(sum(x == y for x, y in zip(answer, truth)) for answer, truth in pairs)
    return {
        "n": len(pairs),
        "exact": sum(answer == truth for answer, truth in pairs) / n,
        "chars": equal / max(1, sum(max(len(answer), len(truth)) for answer, truth in pairs)),
        "majority": max(Counter(truth for _, truth in pairs).values(), default=0) / n,
    }


def errors(pairs):
    """
    Word and character error rates of (answer, truth) by jiwer, over all together: "wer", "cer", and the words' parts.

    Case and .,;:!"() do not count, nor spaces as characters; what has no true words is left out.
    """
    try:
        import jiwer
    except ImportError as e:
        raise InputError('word error rates are jiwer\'s: pip install -e ".[eval]"') from e
    pairs = [(spoken(answer), spoken(truth)) for answer, truth in pairs if spoken(truth)]
    if not pairs:
        return {}
    hypotheses, references = map(list, zip(*pairs))
    words = jiwer.process_words(references, hypotheses)
    characters = jiwer.process_characters(*([x.replace(" ", "") for x in texts] for texts in (references, hypotheses)))
    return {"wer": words.wer, "cer": characters.cer} | {part: getattr(words, part) for part in WORD_ERRORS}


def spoken(text):
    """A text without what is not heard."""
    return " ".join(re.sub(r'[.,;:!"()]', " ", unicodedata.normalize("NFKC", text).lower()).split())


def report(records, answers, examples=6):
    """Prints the scores as a table, and a few answers beside the truth."""
    if not answers:
        return
    print(f"{'held-out answers':20}{'n':>6}{'exact':>10}{'characters':>13}{'majority guess':>17}")
    for name, row in score(records, answers)["tasks"].items():
        exact, chars, majority = (100 * row[key] for key in ("exact", "chars", "majority"))
        print(f"{name:20}{row['n']:6}{exact:8.1f} %{chars:11.1f} %{majority:15.1f} %")
        if "wer" in row:
            cer, wer = 100 * row["cer"], 100 * row["wer"]
            parts = ", ".join(f"{row[part]} {part}" for part in WORD_ERRORS)
            print(f"  {cer:.1f} % of the characters wrong (CER), {wer:.1f} % of the words (WER: {parts})")
    turns = [(record, *turn) for record in records for turn in record_turns(record)]
    step = max(1, len(turns) // examples)
    for (record, question, truth), answer in list(zip(turns, answers))[::step][:examples]:
        paths = " ".join(os.path.relpath(path) for _, path in record_media(record) if isinstance(path, str))
        question = " ".join(PLACEHOLDER.sub("", question).split())
        mark = "ok " if answer == truth.strip() else "NO "
        print(f"  {mark} {paths}  {question}  {answer!r}, truth {truth.strip()!r}")


def sample_command(record):
    """The flags of sample.py that ask what a record asks first."""
    if not record.get("conversations"):
        return "--series=NUMBERS.csv" if "target" in record else "--raw --temperature=0.8"
    question, _ = record_turns(record)[0]
    media = list(record_media(record))[: len(PLACEHOLDER.findall(question))]
    words = []
    for kind in MEDIA:
        paths = [os.path.relpath(path) if isinstance(path, str) else "NUMBERS.csv" for k, path in media if k == kind]
        words += [f"--{kind}={shlex.quote(','.join(paths))}"] if paths else []
    prompt = PLACEHOLDER.sub("", question).strip() if len(media) == 1 and PLACEHOLDER.match(question) else question
    return " ".join(words + ([f"--prompt={shlex.quote(prompt)}"] if prompt else []))


def benchmark(model, path, batch_size):
    """
    Long-term forecasting (LTSF): every window, stride 1, of every column of a .csv's test split, lookback -> horizon.

    Columns are z-scored by the training split. Prints mean squared and mean absolute errors beside naive methods'.
    Returns: {"windows", "mse", "mae", and {"mse", "mae"} of each naive method by name}.
    """
    if "series" not in model.encoder:
        raise InputError(f"{path}: this model has no series encoder; train one with --data=series")
    lookback, horizon = model.config.lookback, model.config.horizon
    names, table = split_for_test(path, lookback, horizon)

    def forecast(x):
        return model.forecast(x, scale=1.0)

    methods = {"model": forecast} | naive_methods(lookback, horizon)
    windows = [batch for x in table.T for batch in x.unfold(0, lookback + horizon, 1).split(batch_size)]
    n_windows = sum(map(len, windows))
    sums = {method: torch.zeros(2, dtype=torch.float64) for method in methods}
    for batch in tqdm(windows, unit="batch", leave=False, disable=not sys.stderr.isatty()):
        for method, predict in methods.items():
            error = predict(batch[:, :lookback]) - batch[:, lookback:]
            sums[method] += torch.stack([(error**2).sum(), error.abs().sum()])
    scores = {method: dict(zip(("mse", "mae"), (x / n_windows / horizon).tolist())) for method, x in sums.items()}
    print(f"{n_windows:,} windows of {', '.join(names)}: {lookback} -> {horizon} points")
    for method, row in scores.items():
        print(f"  {method:30} MSE {row['mse']:.4f}   MAE {row['mae']:.4f}")
    return {"windows": n_windows, **scores.pop("model"), **scores}


def split_for_test(path, lookback, horizon):
    """
    (names, (rows, columns)): the test split of a .csv, with `lookback` rows before it, z-scored by the training split.

    Splits as in the field: ETT files 12, 4 and 4 months of 30 days, others 70, 10 and 20 %.
    """
    names, table = read_table(path)
    rows = len(table)
    train_end, test_start = int(0.7 * rows), rows - int(0.2 * rows)
    if ett := re.match(r"ett([hm])\d", os.path.basename(path).lower()):
        month = 30 * 24 * (4 if ett[1] == "m" else 1)
        if rows >= 20 * month:
            train_end, test_start, table = 12 * month, 16 * month, table[: 20 * month]
    if test_start < lookback or len(table) - test_start < horizon:
        raise InputError(f"{path}: {rows} rows are too few for a lookback of {lookback} and a horizon of {horizon}")
    missing = (~table.isfinite()).any(0)
    if missing.any():
        raise InputError(f"{path}: values are missing in column {names[int(missing.int().argmax())]}; fill them first")
    deviation = table[:train_end].std(0, correction=0)
    table = (table - table[:train_end].mean(0)) / torch.where(deviation < 1e-9, 1, deviation)
    return names, table[test_start - lookback :]


def naive_methods(lookback, horizon):
    """{name: function of (B, lookback) that returns (B, horizon)}"""

    def last_point(x):
        return x[:, -1:].expand(-1, horizon)

    def mean(x):
        return x.mean(1, keepdim=True)

    def last_day(x):
        return x[:, lookback - 24 + torch.arange(horizon) % 24]

    methods = {"repeat the last point": last_point, "mean of the lookback": mean}
    if lookback >= 24:
        methods["repeat the last 24"] = last_day
    training_set = os.path.join(os.path.dirname(os.path.abspath(__file__)), "series", "train.jsonl")
    weights = ridge(lookback, horizon, training_set) if os.path.exists(training_set) else None
    if weights is None:
        return methods

    def linear(x):
        mean, deviation = x.mean(1, keepdim=True), (x.var(1, keepdim=True, correction=0) + 0.01).sqrt()
        x = ((x - mean) / deviation).clamp(-10, 10)
        return torch.cat([x, torch.ones(len(x), 1)], 1) @ weights * deviation + mean

    return methods | {"ridge, fitted to data/series": linear}


def ridge(lookback, horizon, path, strength=3000.0, windows=20000):
    """(lookback + 1, horizon): ridge regression on windows of the series in path, each normalised by its lookback.

    None where they are too short.
    """
    rng, xs, ys = random.Random(0), [], []
    series = [read_series(record["target"]) for record in read_records(path)]
    series = [x for x in series if len(x) >= lookback + horizon]
    if not series:
        return None
    for i in range(windows):
        x = series[i % len(series)]
        start = rng.randint(0, len(x) - lookback - horizon)
        scale = x[: start + lookback].std(correction=0)
        (points, _), *_ = normalise(x[start : start + lookback + horizon], lookback, scale)
        xs.append(points[:lookback])
        ys.append(points[lookback:])
    x = torch.cat([torch.stack(xs), torch.ones(len(xs), 1)], 1).double()
    return torch.linalg.solve(x.T @ x + strength * torch.eye(lookback + 1), x.T @ torch.stack(ys).double())


def draw_curve(log, path):
    """The losses of log.jsonl as a picture, where matplotlib is installed."""
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
        if points:
            plt.plot(*zip(*points), label=key, alpha=0.9)
    plt.xlabel("step")
    plt.ylabel("cross-entropy per answer token")
    plt.yscale("log")
    plt.grid(alpha=0.3)
    plt.legend()
    plt.savefig(path, dpi=120)
    plt.close()


def draw_forecasts(path, forecasts, lookback):
    """Draws series {path: the points that follow it} behind their last `lookback` points into a .png."""
    if not path.lower().endswith(".png"):
        raise InputError(f"--plot={path} is not the name of a .png")
    try:
        import matplotlib
    except ImportError as e:
        raise InputError('--plot takes matplotlib: pip install -e ".[plot]"') from e
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(len(forecasts), squeeze=False, figsize=(10, 3 * len(forecasts)), layout="tight")
    for [axis], (name, points) in zip(axes, forecasts.items()):
        x = read_series(name)[-lookback:]
        axis.plot(range(-len(x), 0), x, label=name, lw=0.8)
        axis.plot(range(len(points)), points, label="forecast")
        axis.legend()
        axis.grid(alpha=0.3)
    plt.savefig(path, dpi=120)
    plt.close()
