"""Scores: of answers and of forecasts."""

import os
import random
import re
import sys
import unicodedata
from collections import Counter

import torch
from tqdm import tqdm

from data.media import read_series, read_table
from data.records import read_records, record_media, record_turns, segments
from data.text import MARK, generate_text
from modrwkv import InputError, normalise


def ask(model, records, batch_size=64, **sampling):
    """Answers to every question of the records, in order; later turns see the true earlier answers."""
    samples = []
    for record in records:
        media, turns = list(record_media(record)), record_turns(record)
        for i in range(len(turns)):
            asked = turns[:i] + [(turns[i][0], None)]
            n = len(MARK.findall("".join(question for question, _ in asked)))
            samples.append((asked, media[:n], record["_at"]))
    answers = []
    quiet = len(samples) <= batch_size or not sys.stderr.isatty()
    for i in tqdm(range(0, len(samples), batch_size), unit="batch", leave=False, disable=quiet):
        batch = [segments(model, turns, media, at=at) for turns, media, at in samples[i : i + batch_size]]
        steps = generate_text(model, batch, **sampling)
        answers += ["".join(pieces).strip() for pieces in zip(*steps)]
    return answers


def score(records, answers):
    """
    Of the answers of `ask`, over all and by the records' "task": n, exact (the share equal to the true answer),
    chars (the share of characters right, place by place, out of the longer of the two), and majority (what always
    giving the commonest true answer would score). Of what was heard also wer and cer, the errors per word and per character of
    the truth, and their parts.
    """
    tasks, answers, heard = {}, iter(answers), set()
    for record in records:
        heard |= {record.get("task", "all")} if record.get("audio") else set()
        for _, truth in record_turns(record):
            tasks.setdefault(record.get("task", "all"), []).append((next(answers), truth.strip()))

    def summary(pairs):
        return {
            "n": len(pairs),
            "exact": sum(a == t for a, t in pairs) / max(1, len(pairs)),
            "chars": sum(x == y for a, t in pairs for x, y in zip(a, t))
            / max(1, sum(max(len(a), len(t)) for a, t in pairs)),
            "majority": max(Counter(t for _, t in pairs).values(), default=0) / max(1, len(pairs)),
        }

    of_task = {task: summary(pairs) | (errors(pairs) if task in heard else {}) for task, pairs in sorted(tasks.items())}
    return summary([p for pairs in tasks.values() for p in pairs]) | {"tasks": of_task}


def errors(pairs):
    """Word and character error rates of (answer, truth) by jiwer, over all together; case and .,;:!"() do not count, spaces not as characters."""
    try:
        import jiwer
    except ImportError as e:
        raise InputError('word error rates are jiwer\'s: pip install -e ".[eval]"') from e
    plain = lambda text: " ".join(re.sub(r'[.,;:!"()]', " ", unicodedata.normalize("NFKC", text).lower()).split())
    pairs = [(plain(answer), plain(truth)) for answer, truth in pairs if plain(truth)]
    if not pairs:
        return {}
    hypotheses, references = map(list, zip(*pairs))
    words = jiwer.process_words(references, hypotheses)
    characters = jiwer.process_characters(
        *([text.replace(" ", "") for text in texts] for texts in (references, hypotheses))
    )
    parts = {name: getattr(words, name) for name in ("substitutions", "deletions", "insertions")}
    return {"wer": words.wer, "cer": characters.cer, **parts}


def report(records, answers, examples=6):
    """Prints the scores as a table, and a few answers beside the truth."""
    if not answers:
        return
    result = score(records, answers)
    print(f"{'held-out answers':20}{'n':>6}{'exact':>10}{'characters':>13}{'majority guess':>17}")
    for name, row in result["tasks"].items():
        print(
            f"{name:20}{row['n']:6}{100 * row['exact']:8.1f} %{100 * row['chars']:11.1f} %{100 * row['majority']:15.1f} %"
        )
        if "wer" in row:
            parts = ", ".join(f"{row[part]} {part}" for part in ("substitutions", "deletions", "insertions"))
            print(
                f"  {100 * row['cer']:.1f} % of the characters wrong (CER), {100 * row['wer']:.1f} % of the words (WER: {parts})"
            )
    rows = [(r, q, t) for r in records for q, t in record_turns(r)]
    step = max(1, len(rows) // examples)
    for (record, question, truth), answer in list(zip(rows, answers))[::step][:examples]:
        paths = " ".join(os.path.relpath(path) for _, path in record_media(record) if isinstance(path, str))
        question = " ".join(MARK.sub("", question).split())
        print(
            f"  {'ok ' if answer == truth.strip() else 'NO '} {paths}  {question}  {answer!r}, truth {truth.strip()!r}"
        )


def ridge(lookback, horizon, path, strength=3000.0, windows=20000):
    """Weights (lookback + 1, horizon) of the linear forecast fitted to windows of the series in `path`, each normalised by its own lookback."""
    rng, xs, ys = random.Random(0), [], []
    series = [read_series(record["target"]) for record in read_records(path)]
    series = [x for x in series if len(x) >= lookback + horizon]
    for i in range(windows if series else 0):
        x = series[i % len(series)]
        start = rng.randint(0, len(x) - lookback - horizon)
        points = normalise(x[start : start + lookback + horizon], lookback, x[: start + lookback].std(correction=0))[0][
            0
        ]
        xs.append(points[:lookback]), ys.append(points[lookback:])
    if not xs:
        return None
    x = torch.cat([torch.stack(xs), torch.ones(len(xs), 1)], 1).double()
    return torch.linalg.solve(x.T @ x + strength * torch.eye(lookback + 1), x.T @ torch.stack(ys).double())


def benchmark(model, path, batch_size):
    """
    Long-term forecasting as the field scores it: every window (stride 1) of every column of the test split, z-scored by the
    training split, lookback -> horizon. ETT files: 12, 4 and 4 months; others: 70, 10 and 20 %.

    Returns: {"windows", "mse", "mae", and the same of each naive forecast by name}.
    """
    if "series" not in model.encoder:
        raise InputError(f"{path}: this model has no series encoder; train one with --data=series")
    names, table = read_table(path)
    n, horizon, rows = model.config.lookback, model.config.horizon, len(table)
    if (ett := re.match(r"ett([hm])\d", os.path.basename(path).lower())) and rows >= (
        most := 20 * 30 * 24 * (4 if ett[1] == "m" else 1)
    ):
        learned, table = most * 12 // 20, table[:most]
        test = most * 16 // 20
    else:
        learned, test = int(0.7 * rows), rows - int(0.2 * rows)
    if test < n or len(table) - test < horizon:
        raise InputError(f"{path}: {rows} rows are too few for a lookback of {n} and a horizon of {horizon}")
    if not table.isfinite().all():
        raise InputError(
            f"{path}: values are missing in column {names[(~table.isfinite()).any(0).nonzero()[0, 0]]}; fill them first"
        )
    deviation = table[:learned].std(0, correction=0)
    table = (table - table[:learned].mean(0)) / torch.where(deviation < 1e-9, 1, deviation)
    mix = os.path.join(os.path.dirname(os.path.abspath(__file__)), "series", "train.jsonl")
    weights = ridge(n, horizon, mix) if os.path.exists(mix) else None
    naive = {
        "repeat the last point": lambda x: x[:, -1:].expand(-1, horizon),
        "mean of the lookback": lambda x: x.mean(1, keepdim=True).expand(-1, horizon),
    }
    if n >= 24:
        naive["repeat the last 24"] = lambda x: x[:, n - 24 + torch.arange(horizon) % 24]
    if weights is not None:

        def linear(x):
            mean, deviation = x.mean(1, keepdim=True), (x.var(1, keepdim=True, correction=0) + 0.01).sqrt()
            x = ((x - mean) / deviation).clamp(-10, 10)
            return torch.cat([x, torch.ones(len(x), 1)], 1) @ weights * deviation + mean

        naive["ridge, fitted to data/series"] = linear
    ways = {"model": lambda x: model.forecast(x, scale=1.0)} | naive
    windows = [batch for column in table.T for batch in column[test - n :].unfold(0, n + horizon, 1).split(batch_size)]
    many = sum(map(len, windows))
    errors = {way: torch.zeros(2, dtype=torch.float64) for way in ways}
    for batch in tqdm(windows, unit="batch", leave=False, disable=not sys.stderr.isatty()):
        for way, predict in ways.items():
            error = predict(batch[:, :n]) - batch[:, n:]
            errors[way] += torch.stack([(error**2).sum(), error.abs().sum()])
    scores = {way: dict(zip(("mse", "mae"), (e / many / horizon).tolist())) for way, e in errors.items()}
    print(f"{many:,} windows of {', '.join(names)}: {n} -> {horizon} points")
    for way, row in scores.items():
        print(f"  {way:30} MSE {row['mse']:.4f}   MAE {row['mae']:.4f}")
    return {"windows": many, **scores.pop("model"), **scores}


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
