"""Ask a checkpoint: one prompt, a chat, or a file of questions with its score.

python sample.py --out_dir=out --image=x.png --prompt="What number is this?"
python sample.py --out_dir=out --image=x.png --chat
python sample.py --out_dir=out --eval=data/digits/val.jsonl
python sample.py --out_dir=plays --raw --prompt="ROMEO:"
python sample.py --out_dir=series --series=load.csv --plot=load.png
python sample.py --out_dir=series --eval=ETTh1.csv
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data.media import read_series
from data.records import question, read_records, record_media, record_turns, segments
from data.released import load
from data.scores import benchmark, report, score
from data.text import PLACEHOLDER, generate_text, get_tokenizer
from modrwkv import MEDIA, InputError, check_settings, setting


@dataclass
class Sample:
    """sampling"""

    out_dir: str = setting("out", "folder of ckpt.pt, or a checkpoint: ours or a released one")
    prompt: str = setting(
        "",
        "the question; <image>, <audio> and <series> in it mark where a picture, a sound or a series goes, else they come first",
    )
    image: str = setting("", "picture files, separated by commas")
    audio: str = setting("", "sound files (wav, flac, ogg, mp3), separated by commas")
    series: str = setting(
        "",
        ".csv files, separated by commas; of each the last column, or the one named as in x.csv#load. Without a prompt they are forecast",
    )
    plot: str = setting("", "draw the forecast into this .png")
    horizon: int = setting(0, "points to forecast; 0 for as many as the model was made for")
    chat: bool = setting(False, "ask again and again; the state is kept between turns")
    eval: str = setting(
        "", "a .json or .jsonl file: answer every question in it; a .csv: forecast its columns; and print the scores"
    )
    raw: bool = setting(False, "no template: the prompt is a text to go on with")
    max_new_tokens: int = setting(256, "an answer is cut after so many tokens")
    temperature: float = setting(0.0, "0 always takes the likeliest token")
    top_k: int = setting(0, "choose among the so many likeliest tokens; 0 for all")
    top_p: float = setting(1.0, "choose among the likeliest tokens that hold this much of the probability")
    seed: int = setting(1, "of the choices")
    batch_size: int = setting(64, "questions answered at once with --eval")
    tokenizer: str = setting("", "instead of the checkpoint's, e.g. rwkv_vocab_v20230424.txt for an official .pth")
    template: str = setting("", "instead of the checkpoint's: world, v1, v2 or v3")
    prompt_style: str = setting("", "instead of the checkpoint's: written, first, last, sandwich, before or tagged")
    image_encoder: str = setting("", "instead of the checkpoint's, e.g. the folder of a pretrained one, or none")
    audio_encoder: str = setting("", "instead of the checkpoint's, e.g. the folder of a pretrained one, or none")
    device: str = setting("auto", "auto, cpu, cuda, mps")


def find_device(name):
    """The torch.device of a --device flag; auto takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device  # "cuda" becomes "cuda:0"
    except (RuntimeError, AssertionError) as e:  # torch built without CUDA asserts
        raise InputError(f"--device={name} cannot be used here: {str(e).splitlines()[0]}") from e


def flags(about, *classes, argv=None, presets=None):
    """Command-line flags for the fields of dataclasses, made with `setting`.

    presets: a function from the value of --data to the flags that hold where they are not given.
    Returns: an instance of each class, and the set of the names that were given.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"error: {message}; see --help\n")

    def boolean(text):
        if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
            raise ValueError
        return text.lower() in ("true", "1", "yes")

    style = argparse.RawDescriptionHelpFormatter
    usage = "python %(prog)s [--name=value ...]"
    parser = Parser(usage=usage, description=about, allow_abbrev=False, add_help=False, formatter_class=style)
    parser.add_argument("-h", "--help", action="store_true", help=argparse.SUPPRESS)
    metavars, actions, values = {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT"}, {}, {}
    for cls in classes:
        group = parser.add_argument_group(cls.__doc__)
        for f in dataclasses.fields(cls):
            kind = {"type": boolean, "nargs": "?", "const": True} if f.type is bool else {"type": f.type}
            actions[f.name] = group.add_argument(
                f"--{f.name}", default=argparse.SUPPRESS, metavar=metavars[f.type], help=f.metadata["help"], **kind
            )
            values[f.name] = f.default
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name.lstrip("-"), values, 1)
        parser.error(f"there is no {name}" + (f": did you mean --{near[0]}?" if near else ""))
    given = vars(given)
    wants_help = given.pop("help")
    if presets:
        values |= vars(parser.parse_args(presets(given.get("data", values["data"])).split()))
    values |= given
    if wants_help:  # each flag with the value that a run will have
        for name, action in actions.items():
            action.help = f"{action.help} [{values[name]}]".replace("%", "%%")
        parser.print_help()
        sys.exit()
    settings = [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)}) for cls in classes]
    for each in settings:
        check_settings(each)
    return *settings, set(given)


def ask(model, records, batch_size=64, **how):
    """Answers to every question of the records, in order; later turns see the true earlier answers."""
    samples = []
    for record in records:
        media, turns = list(record_media(record)), record_turns(record)
        for i in range(len(turns)):
            asked = turns[:i] + [(turns[i][0], None)]
            samples.append((asked, media[: len(PLACEHOLDER.findall("".join(q for q, _ in asked)))], record["_at"]))
    answers = []
    for i in tqdm(
        range(0, len(samples), batch_size),
        unit="batch",
        leave=False,
        disable=len(samples) <= batch_size or not sys.stderr.isatty(),
    ):
        batch = [segments(model, turns, media, at=at) for turns, media, at in samples[i : i + batch_size]]
        answers += ["".join(pieces).strip() for pieces in zip(*generate_text(model, batch, **how))]
    return answers


def forecast(model, paths, horizon, plot):
    """Prints the next points of each series, one a line, and draws them."""
    if horizon < 0 or plot and not plot.lower().endswith(".png"):
        raise InputError(
            f"--horizon={horizon} is negative" if horizon < 0 else f"--plot={plot} is not the name of a .png"
        )
    series = [read_series(path) for path in paths]
    ahead = model.forecast(series, horizon or None)
    for path, y in zip(paths, ahead.tolist()):
        print(f"{path}: " + " ".join(f"{point:.6g}" for point in y))
    if plot:
        try:
            import matplotlib
        except ImportError as e:
            raise InputError('--plot takes matplotlib: pip install -e ".[plot]"') from e
        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(len(series), squeeze=False, figsize=(10, 3 * len(series)))
        for [axis], path, x, y in zip(axes, paths, series, ahead):
            n = min(len(x), model.config.lookback)
            (
                axis.plot(range(-n, 0), x[-n:], label=path, lw=0.8),
                axis.plot(range(len(y)), y, label="forecast"),
                axis.legend(),
                axis.grid(alpha=0.3),
            )
        plt.tight_layout(), plt.savefig(plot, dpi=120), plt.close()


def stream(model, sample, state, how):
    """Prints an answer as it comes; returns the state after it."""
    pieces, begun = generate_text(model, [sample], state, **how), "end" in how
    while True:
        try:
            piece = next(pieces)[0]
            piece = piece if begun else piece.lstrip()  # the template's space before an answer
            begun = begun or bool(piece)
            print(piece, end="", flush=True)
        except StopIteration as stop:
            print()
            return stop.value


def main(argv=None):
    s, given = flags(__doc__, Sample, argv=argv)
    shown = s.image or s.audio or s.series
    if s.raw and (shown or s.chat or s.eval) or s.chat and s.eval or s.eval and (s.prompt or shown):
        raise InputError(
            "--raw, --chat and --eval=FILE exclude each other; --raw takes no picture or sound, and --eval no prompt either"
        )
    if s.batch_size < 1:
        raise InputError(f"--batch_size={s.batch_size} is not at least 1")
    if not os.path.exists(s.out_dir):
        raise InputError(
            f"no checkpoint at {s.out_dir}: train one with python train.py --out_dir={s.out_dir}, or name another with --out_dir"
        )
    own = {
        name: getattr(s, name) for name in ("tokenizer", "template", "prompt_style", "image_encoder", "audio_encoder")
    }
    model = load(s.out_dir, find_device(s.device), **{name: value for name, value in own.items() if value})
    how = dict(max_new_tokens=s.max_new_tokens, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=s.seed)

    if s.eval.endswith(".csv"):
        print(json.dumps(benchmark(model, s.eval, 16 * s.batch_size)))
        return
    if s.eval:
        records = read_records(s.eval)
        asked = [r for r in records if r.get("conversations")]
        if not asked:
            raise InputError(f"{s.eval} holds no conversations to answer")
        answers = ask(model, asked, s.batch_size, **how)
        report(asked, answers)
        print(json.dumps(score(asked, answers)))
        return
    media = [(kind, path) for kind in MEDIA for path in getattr(s, kind).split(",") if path]
    if s.series and not s.prompt and not s.chat:
        forecast(model, s.series.split(","), s.horizon, s.plot)
        return
    if s.raw:
        ids = get_tokenizer(model.config.tokenizer).encode(s.prompt or "\n")
        stream(model, [("text", ids)], None, how | {"end": None})
        return
    if not s.chat:
        if not s.prompt and not shown:
            raise InputError(
                'nothing to do: give --prompt="..." (with or without --image), --audio, --series, --chat, --raw or --eval=FILE'
            )
        stream(model, question(model, s.prompt, media), None, how)
        return
    state, prompt = None, s.prompt
    print("Ask; an empty line ends the chat. To show a picture, write its path in <> anywhere in the question: <x.png>")
    while True:
        if not prompt:
            try:
                prompt = input("> ").strip()
            except EOFError:
                break
        if not prompt:
            break
        kinds = lambda path: (
            "audio"
            if path.lower().endswith((".wav", ".flac", ".ogg", ".mp3"))
            else "series"
            if ".csv" in path
            else "image"
        )
        media += [(kinds(path), path) for path in re.findall(r"<([^<>]+\.\w+)>", prompt)]
        prompt = re.sub(r"<([^<>]+\.\w+)>", lambda path: f"<{kinds(path[1])}>", prompt)
        try:
            state = stream(model, question(model, prompt, media, state is None), state, how)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
        media, prompt = [], ""


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
