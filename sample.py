"""Ask a checkpoint: one prompt, a chat, a file of questions with its score, or the next points of a series.

python sample.py --out_dir=out --image=x.png --prompt="What number is this?"
python sample.py --out_dir=out --image=x.png --chat
python sample.py --out_dir=out --eval=data/digits/val.jsonl
python sample.py --out_dir=out --info
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

from data.answers import ask, generate_text
from data.media import check_media, media_list, read_series
from data.records import question, read_records
from data.released import load, read_checkpoint
from data.scores import benchmark, draw_forecasts, report, score
from data.text import get_tokenizer
from modrwkv import MEDIA, Config, InputError, check_settings, model_from_checkpoint, setting


@dataclass
class Sample:
    """what to ask"""

    out_dir: str = setting("out", "folder of ckpt.pt, or a checkpoint: ours or a released one")
    info: bool = setting(False, "print the checkpoint's settings, sizes, and what it takes")
    prompt: str = setting("", "the question; <image>, <audio>, <series> mark where media go, else they come first")
    image: str = setting("", "picture files, separated by commas")
    audio: str = setting("", "sound files (wav, flac, ogg, mp3), separated by commas")
    series: str = setting("", ".csv files, separated by commas: the last column, or x.csv#NAME; forecast if no prompt")
    plot: str = setting("", "draw the forecast into this .png")
    horizon: int = setting(0, "points to forecast; 0 for as many as the model was made for", least=0)
    chat: bool = setting(False, "ask again and again; the state is kept between turns")
    eval: str = setting("", "a .json or .jsonl file: answer its questions; a .csv: forecast its columns; print scores")
    batch_size: int = setting(64, "questions answered at once with --eval", least=1)
    raw: bool = setting(False, "no template: the prompt is a text to go on with")
    tokenizer: str = setting("", "instead of the checkpoint's, e.g. rwkv_vocab_v20230424.txt for an official .pth")
    template: str = setting("", "instead of the checkpoint's: world, v1, v2 or v3")
    prompt_style: str = setting("", "instead of the checkpoint's: written, first, last, sandwich, before or tagged")
    image_encoder: str = setting("", "instead of the checkpoint's, e.g. the folder of a pretrained one, or none")
    audio_encoder: str = setting("", "instead of the checkpoint's, e.g. the folder of a pretrained one, or none")
    device: str = setting("auto", "auto, cpu, cuda, mps")


@dataclass
class Sampling:
    """sampling"""

    max_new_tokens: int = setting(256, "an answer is cut after so many tokens", least=1)
    temperature: float = setting(0.0, "0 always takes the likeliest token", least=0)
    top_k: int = setting(0, "choose among the so many likeliest tokens; 0 for all", least=0)
    top_p: float = setting(1.0, "choose among the likeliest tokens that hold this much of the probability", least=0)
    seed: int = setting(1, "of the choices")


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
        sys.exit(0)
    settings = [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)}) for cls in classes]
    for each in settings:
        check_settings(each)
    return *settings, set(given)


class Chat:
    """A conversation with a checkpoint: `model`, and `state`, which the next question continues, None at first."""

    def __init__(self, path, device="auto", **changes):
        """path: any checkpoint that data/released.py knows; changes: settings of Config to override."""
        if not os.path.exists(path):
            raise InputError(f"no checkpoint at {path}: train one by python train.py --out_dir={path}, or name another")
        self.model = load(path, find_device(device), **changes)
        self.state = None

    def ask(self, prompt, image=None, audio=None, series=None, stream=False, raw=False, **sampling):
        """The answer to a prompt about media, each one or a list, or, with stream, an iterator of its pieces.

        Args:
            prompt: str; media without a placeholder <image>, <audio> or <series> in it go before it
            image: a path, a PIL image, or uint8 (H, W), (H, W, 3) or (H, W, 4); floats from 0 to 1 are refused: pass
                (255 * x).astype("uint8")
            audio: a path, or floats (n,) from -1 to 1 at 16 kHz; series: a path, or numbers (n,), NaN where unknown
            raw: no template: the prompt is a text to go on with; sampling: the fields of Sampling
        Raises InputError for what cannot be used. The state moves on when the last piece has been taken.
        """
        settings = Sampling(**sampling)
        check_settings(settings)
        media = []
        for kind, given in zip(MEDIA, (image, audio, series)):
            media += [(kind, x) for x in media_list(kind, given)]
        if not isinstance(prompt, str):
            raise InputError(f"a prompt is a string, not {type(prompt).__name__}")
        if raw and media:
            raise InputError("--raw (raw=True) is for text alone: it takes no picture, sound or series")
        if raw:
            sample = [("text", get_tokenizer(self.model.config.tokenizer).encode(prompt or "\n"))]
        elif prompt.strip() or media:
            sample = question(self.model, prompt, media, first=self.state is None)
        else:
            raise InputError("nothing to answer: give a --prompt, --image, --audio or --series, or --chat or --eval")
        how = dataclasses.asdict(settings) | {"end": None if raw else ""}
        pieces = self.answer(generate_text(self.model, [sample], self.state, **how), begun=raw)
        return pieces if stream else "".join(pieces)

    def answer(self, steps, begun):
        """Yields the pieces of an answer, without spaces where it has not begun, then keeps the state after it."""
        while True:
            try:
                [piece] = next(steps)
            except StopIteration as stop:
                self.state = stop.value
                return
            piece = piece if begun else piece.lstrip()
            if piece:
                begun = True
                yield piece

    def forecast(self, series, horizon=None):
        """The next points of a series (a path, or numbers), as a list of floats in its units.

        horizon: how many; by default as many as the model was made for.
        """
        if horizon is not None and horizon < 1:
            raise InputError(f"horizon={horizon} is not at least 1")
        return self.model.forecast([read_series(check_media("series", series))], horizon)[0].tolist()

    def reset(self):
        """Forgets the conversation."""
        self.state = None


def print_info(path, changes):
    """Prints what a checkpoint is; its pretrained encoders, which it does not hold, need not be here."""
    contents = read_checkpoint(path)
    encoders = {f"{kind}_encoder": kind for kind in MEDIA}
    config = model_from_checkpoint(contents, path, **changes | dict.fromkeys(encoders, "none")).config
    for name in encoders:
        setattr(config, name, changes.get(name) or contents["config"].get(name, getattr(Config, name)))
    takes = ["text"] + [kind for name, kind in encoders.items() if getattr(config, name) != "none"]
    print(f"{path}: RWKV-{config.rwkv} of {config.n_layer} layers x {config.n_embd}; takes {', '.join(takes)}")
    weights = contents["model"]
    total = sum(x.numel() for x in weights.values())
    others = sum(x.numel() for n, x in weights.items() if n.startswith(("encoder.", "adapter.", "forecast_head.")))
    print(f"parameters: {total - others:,} of the language model, {others:,} of encoders and adapters")
    if "train" in contents:
        run = contents["train"]
        print(f"trained: {contents['step']:,} steps of {run['batch_size']} samples of {run['data']}")
    changed, same = [], []
    for f in dataclasses.fields(Config):
        value = getattr(config, f.name)
        (same if value == f.default else changed).append(f"--{f.name}={value}")
    print(f"settings that differ from the defaults: {' '.join(changed) or 'none'}")
    print(f"settings that are the defaults: {' '.join(same)}")


def print_answer(pieces):
    """Prints the pieces of an answer as they come."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def run_chat(chat, prompt, media, sampling):
    """Asks the prompt, then what is typed; `media` belong to the first question that is answered."""
    print("Ask; an empty line ends the chat. To show a picture, write its path in <> anywhere in the question: <x.png>")
    while True:
        try:
            prompt = prompt or input("> ").strip()
        except EOFError:
            break
        if not prompt:
            break
        files = {kind: list(paths) for kind, paths in media.items()}
        for path in re.findall(r"<([^<>]+\.\w+(?:#[^<>]+)?)>", prompt):
            is_sound = path.lower().endswith((".wav", ".flac", ".ogg", ".mp3", ".m4a"))
            kind = "audio" if is_sound else "series" if ".csv" in path.lower() else "image"
            prompt = prompt.replace(f"<{path}>", f"<{kind}>", 1)
            files.setdefault(kind, []).append(path)
        try:
            print_answer(chat.ask(prompt, **files, stream=True, **sampling))
            media = {}
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
        prompt = ""


def main(argv=None):
    s, sampling, _ = flags(__doc__, Sample, Sampling, argv=argv)
    sampling = dataclasses.asdict(sampling)
    changes = ("tokenizer", "template", "prompt_style", "image_encoder", "audio_encoder")
    changes = {name: getattr(s, name) for name in changes if getattr(s, name)}
    media = {kind: [path for path in getattr(s, kind).split(",") if path] for kind in MEDIA if getattr(s, kind)}
    if [s.info, s.chat, s.raw, s.eval != ""].count(True) > 1:
        raise InputError("--info, --chat, --raw and --eval exclude each other")
    if s.eval and (s.prompt or media):
        raise InputError("--eval takes no prompt, picture, sound or series")

    # what the checkpoint is
    if s.info:
        print_info(s.out_dir, changes)
        return
    chat = Chat(s.out_dir, s.device, **changes)

    # a file of questions, or a table to forecast
    if s.eval.endswith(".csv"):
        print(json.dumps(benchmark(chat.model, s.eval, 16 * s.batch_size)))
        return
    if s.eval:
        records = [record for record in read_records(s.eval) if record.get("conversations")]
        if not records:
            raise InputError(f"{s.eval} holds no conversations to answer")
        answers = ask(chat.model, records, s.batch_size, **sampling)
        report(records, answers)
        print(json.dumps(score(records, answers)))
        return

    # the next points of series
    if list(media) == ["series"] and not (s.prompt or s.chat or s.raw):
        forecasts = {path: chat.forecast(path, s.horizon or None) for path in media["series"]}
        for path, points in forecasts.items():
            print(f"{path}: " + " ".join(f"{point:.6g}" for point in points))
        if s.plot:
            draw_forecasts(s.plot, forecasts, chat.model.config.lookback)
        return

    # a chat, or one prompt
    if s.chat:
        run_chat(chat, s.prompt, media, sampling)
        return
    print_answer(chat.ask(s.prompt, **media, stream=True, raw=s.raw, **sampling))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
