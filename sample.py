"""Ask a checkpoint: one prompt, a chat, a file of questions with its score, or the next points of a series.

python sample.py --checkpoint=out --image=x.png --prompt="What number is this?"
python sample.py --checkpoint=out --image=x.png --chat
python sample.py --checkpoint=out --eval=data/digits/val.jsonl
python sample.py --checkpoint=out --info
python sample.py --checkpoint=plays --raw --prompt="ROMEO:" --temperature=0.8 --num_samples=3
python sample.py --checkpoint=out --image=x.png --save_state=x.state     then --state=x.state --prompt=... many times
python sample.py --checkpoint=series --series=load.csv --plot=load.png
python sample.py --checkpoint=series --eval=ETTh1.csv
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass

import torch

from data.answers import ask, generate_text
from data.flags import DTYPES, find_device, flags, run
from data.media import check_media, media_list, read_series
from data.records import media_segments, place, question, read_records
from data.released import MODALITIES, fingerprint, load, read_checkpoint
from data.scores import benchmark, draw_forecasts, report, score
from data.text import conversation, get_tokenizer
from modrwkv import (
    MEDIA,
    Config,
    InputError,
    check_settings,
    compiled_step,
    model_from_checkpoint,
    read_file,
    setting,
    traced_step,
    write,
)


@dataclass
class Sample:
    """what to ask"""

    checkpoint: str = setting("", "a checkpoint, ours or a released one, or the folder of one")
    out_dir: str = setting("out", "the same, as train.py calls it")
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
    num_samples: int = setting(1, "so many answers, each with random numbers of its own", least=1)
    save_state: str = setting("", "a file: the state after pictures, sounds or a --raw text goes there, for --state")
    state: str = setting("", "a file of --save_state, or of /save in a chat, to go on from")
    tokenizer: str = setting("", "instead of the checkpoint's, e.g. rwkv_vocab_v20230424.txt for an official .pth")
    template: str = setting("", "instead of the checkpoint's: world, v1, v2 or v3")
    prompt_style: str = setting("", "instead of the checkpoint's: written, first, last, sandwich, before or tagged")
    image_encoder: str = setting("", "instead of the checkpoint's, e.g. the folder of a pretrained one, or none")
    audio_encoder: str = setting("", "instead of the checkpoint's, e.g. the folder of a pretrained one, or none")
    device: str = setting("auto", "auto, cpu, cuda, mps")
    dtype: str = setting("auto", "of the weights; auto: the file's", DTYPES)
    compile: bool = setting(False, "compile what is done for each token (CUDA graphs); takes a minute at first")


@dataclass
class Sampling:
    """sampling"""

    max_new_tokens: int = setting(256, "an answer is cut after so many tokens", least=1)
    temperature: float = setting(0.0, "0 always takes the likeliest token", least=0)
    top_k: int = setting(0, "choose among the so many likeliest tokens; 0 for all", least=0)
    top_p: float = setting(1.0, "choose among the likeliest tokens that hold this much of the probability", (), 0, 1)
    presence_penalty: float = setting(0.0, "taken from the logits of tokens that were generated before")
    frequency_penalty: float = setting(0.0, "the same, for each time that they were")
    penalty_decay: float = setting(0.996, "with each token since, that time counts so much less", (), 0, 1)
    stop: tuple = setting((), "a text that ends an answer; may be given again")
    seed: int = setting(1, "of the choices")


class Chat:
    """A conversation with a checkpoint: `model`, and `state`, which the next question continues, None at first."""

    def __init__(self, path, device="auto", dtype="auto", compile=False, **changes):
        """path: any checkpoint that data/released.py knows; dtype: auto is the file's; compile: see compiled_step;
        changes: settings of Config to override."""
        if not os.path.exists(path):
            raise InputError(f"no checkpoint at {path}: train one by python train.py --out_dir={path}, or name another")
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype} is not one of {', '.join(DTYPES)}")
        dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        self.model = load(path, find_device(device), dtype, **changes)
        on_cpu = self.model.emb.weight.device.type == "cpu"
        self.step = compiled_step(self.model) if compile else traced_step(self.model) if on_cpu else None
        self.reset()

    def reset(self):
        """Forgets the conversation."""
        self.state, self.begun = None, None

    def ask(self, prompt, image=None, audio=None, series=None, stream=False, raw=False, num_samples=1, **sampling):
        """The answer to a prompt about media, each one or a list, or, with stream, an iterator of its pieces.

        Args:
            prompt: str; media without a placeholder <image>, <audio> or <series> in it go before it
            image: a path, a PIL image, or uint8 (H, W), (H, W, 3) or (H, W, 4); floats from 0 to 1 are refused: pass
                (255 * x).astype("uint8")
            audio: a path, or floats (n,) from -1 to 1 at 16 kHz; series: a path, or numbers (n,), NaN where unknown
            raw: no template: the prompt is a text to go on with; sampling: the fields of Sampling
            num_samples: with 2 or more, a list of so many answers, with random numbers from seed, seed + 1, ...; the
                conversation stays as it was
        Raises InputError for what cannot be used. The state moves on when the last piece has been taken.
        """
        settings = Sampling(**sampling)
        check_settings(settings)
        media = self.check(prompt, raw, image=image, audio=audio, series=series)
        if raw:
            sample = self.text(prompt or "\n")
        elif self.begun and media:
            raise InputError("the question that was begun takes no more media: ask it, or reset()")
        elif self.begun:
            before, kinds, n, first = self.begun
            sample = conversation(self.model.config, [(before + prompt, None)], ((kind, None) for kind in kinds), first)
            sample = sample[n:]  # what was read
        elif prompt.strip() or media:
            sample = question(self.model, prompt, media, first=self.state is None)
        else:
            raise InputError("nothing to answer: give a --prompt, --image, --audio or --series, or --chat or --eval")
        how = dataclasses.asdict(settings) | {"end": None if raw else "", "step": self.step}
        if num_samples > 1:
            how["seed"] = [settings.seed + i for i in range(num_samples)]
            hidden, state = self.model.read([sample], self.state)
            steps = generate_text(self.model, (hidden.expand(num_samples, -1), state), **how)
            answers = ["".join(pieces) for pieces in zip(*steps)]
            return answers if raw else [answer.lstrip() for answer in answers]
        pieces = self.answer(generate_text(self.model, [sample], self.state, **how), begun=raw)
        return pieces if stream else "".join(pieces)

    def answer(self, steps, begun):
        """Yields the pieces of an answer, without spaces where it has not begun, then keeps the state after it."""
        while True:
            try:
                [piece] = next(steps)
            except StopIteration as stop:
                self.state, self.begun = stop.value, None
                return
            piece = piece if begun else piece.lstrip()
            if piece:
                begun = True
                yield piece

    def read(self, prompt="", image=None, audio=None, series=None, raw=False):
        """
        Reads media, and a prompt that has placeholders for them, as the beginning of the next question: each of many
        questions can then be asked from the same state. raw: reads a text as it is.
        """
        media = self.check(prompt, raw, image=image, audio=audio, series=series)
        config, first = self.model.config, self.state is None
        if raw:
            sample, begun = self.text(prompt), None
        elif not media or self.begun:
            raise InputError("what is read before a question is media, once, or a --raw text")
        elif config.prompt_style in ("last", "sandwich"):
            raise InputError(f"prompt_style={config.prompt_style} has the question before the media: ask it with them")
        else:
            prompt, media = place(prompt, media)
            sample = conversation(config, [(prompt, None)], iter(media_segments(self.model, media)), first)
            n = max(i for i, (kind, _) in enumerate(sample) if kind in MEDIA) + 1
            sample, begun = sample[:n], (prompt, [kind for kind, _ in media], n, first)
        _, self.state = self.model.read([sample], self.state)
        self.begun = begun

    def check(self, prompt, raw, **media):
        """[(kind, path or array)] of media; raises InputError for what is not a prompt or media."""
        pairs = []
        for kind, given in media.items():
            pairs += [(kind, x) for x in media_list(kind, given)]
        if not isinstance(prompt, str):
            raise InputError(f"a prompt is a string, not {type(prompt).__name__}")
        if raw and pairs:
            raise InputError("--raw (raw=True) is for text alone: it takes no picture, sound or series")
        return pairs

    def text(self, prompt):
        return [("text", get_tokenizer(self.model.config.tokenizer).encode(prompt))]

    def save_state(self, path):
        """Writes the conversation so far to a file, a few kilobytes a layer."""
        if self.state is None:
            raise InputError("there is no conversation to save yet")
        state = [tuple(x.clone() for x in s) for s in self.state]
        write(path, {"state": state, "begun": self.begun, "of": fingerprint(self.model.state_dict())})

    def load_state(self, path):
        """Goes on with the conversation in a file of save_state, which was with the same model."""
        contents = read_file(path)
        if not isinstance(contents, dict) or set(contents) != {"state", "begun", "of"}:
            raise InputError(f"{path} is no file of --save_state")
        if contents["of"] != fingerprint(self.model.state_dict()):
            raise InputError(f"{path} is the state of other weights, or of these in another --dtype")
        device = self.model.emb.weight.device
        self.state = [tuple(x.to(device) for x in s) for s in contents["state"]]
        self.begun = contents["begun"]

    def forecast(self, series, horizon=None):
        """The next points of a series (a path, or numbers), as a list of floats in its units.

        horizon: how many; by default as many as the model was made for.
        """
        if horizon is not None and horizon < 1:
            raise InputError(f"horizon={horizon} is not at least 1")
        return self.model.forecast([read_series(check_media("series", series))], horizon)[0].tolist()


def print_info(path, changes):
    """Prints what a checkpoint is; its pretrained encoders, which it does not hold, need not be here."""
    contents = read_checkpoint(path)
    encoders = {f"{kind}_encoder": kind for kind in MEDIA}
    config = model_from_checkpoint(contents, path, "auto", **changes | dict.fromkeys(encoders, "none")).config
    for name in encoders:
        setattr(config, name, changes.get(name) or contents["config"].get(name, getattr(Config, name)))
    takes = ["text"] + [kind for name, kind in encoders.items() if getattr(config, name) != "none"]
    print(f"{path}: RWKV-{config.rwkv} of {config.n_layer} layers x {config.n_embd}; takes {', '.join(takes)}")
    weights = contents["model"]
    total = sum(x.numel() for x in weights.values())
    others = sum(x.numel() for name, x in weights.items() if name.startswith(MODALITIES))
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


def files_in(prompt):
    """A typed question with placeholders for the paths in <>, and {kind: paths}."""
    files = {}
    for path in re.findall(r"<([^<>]+\.\w+(?:#[^<>]+)?)>", prompt):
        is_sound = path.lower().endswith((".wav", ".flac", ".ogg", ".mp3", ".m4a"))
        kind = "audio" if is_sound else "series" if ".csv" in path.lower() else "image"
        prompt = prompt.replace(f"<{path}>", f"<{kind}>", 1)
        files.setdefault(kind, []).append(path)
    return prompt, files


def run_chat(chat, prompt, media, sampling):
    """Asks the prompt, then what is typed; `media` belong to the first question that is answered."""
    with contextlib.suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401  input() then has line editing and history
    print("Ask; an empty line ends the chat. To show a picture, write its path in <> anywhere in a question: <x.png>")
    print("/reset forgets all, /retry answers again, /save FILE is for --state=FILE, Ctrl-C stops an answer")
    last = None  # the question that /retry repeats: the state before it, and what was asked
    while True:
        try:
            line = prompt or input("> ").strip()
        except EOFError:
            break
        prompt, command, files = "", line.split(maxsplit=1), {}
        try:
            if not line:
                break
            if command[0] == "/reset":
                chat.reset()
                last = None
                continue
            if command[0] == "/save":
                file = command[1] if len(command) > 1 else "chat.state"
                chat.save_state(file)
                print(f"go on later with --state={file}")
                continue
            if command[0] == "/retry":
                if not last:
                    raise InputError("there is no question to answer again yet")
                (chat.state, chat.begun), question, files = last
                sampling = sampling | {"seed": sampling["seed"] + 1}
            else:
                question, files = files_in(line)
                for kind, paths in media.items():
                    files[kind] = [*paths, *files.get(kind, [])]
            before = chat.state, chat.begun
            print_answer(chat.ask(question, **files, stream=True, **sampling))
            last, media = (before, question, files), {}
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
            media = {} if files else media  # the next question has this one's, but for what the error is about
            for kind, path in ((kind, path) for kind, paths in files.items() for path in paths):
                if path not in str(e):
                    media.setdefault(kind, []).append(path)
        except KeyboardInterrupt:
            last, media = (before, question, files), {}
            print("\n(stopped; the conversation is as it was before this question: /retry answers it again)")


def main(argv=None):
    s, sampling, _ = flags(__doc__, Sample, Sampling, argv=argv)
    sampling = dataclasses.asdict(sampling)
    changes = ("tokenizer", "template", "prompt_style", "image_encoder", "audio_encoder")
    changes = {name: getattr(s, name) for name in changes if getattr(s, name)}
    media = {kind: [path for path in getattr(s, kind).split(",") if path] for kind in MEDIA if getattr(s, kind)}
    path = s.checkpoint or s.out_dir
    if [s.info, s.chat, s.raw, s.eval != ""].count(True) > 1:
        raise InputError("--info, --chat, --raw and --eval exclude each other")
    if s.eval and (s.prompt or media or s.state):
        raise InputError("--eval takes no prompt, picture, sound, series or state")

    if s.num_samples > 1 and (s.eval or s.chat or s.save_state):
        raise InputError("--num_samples is for one prompt")

    # what the checkpoint is
    if s.info:
        print_info(path, changes)
        return
    chat = Chat(path, s.device, s.dtype, s.compile, **changes)
    if s.state:
        chat.load_state(s.state)

    # a file of questions, or a table to forecast
    if s.eval.endswith(".csv"):
        print(json.dumps(benchmark(chat.model, s.eval, 16 * s.batch_size)))
        return
    if s.eval:
        records = [record for record in read_records(s.eval) if record.get("conversations")]
        if not records:
            raise InputError(f"{s.eval} holds no conversations to answer")
        answers = ask(chat.model, records, s.batch_size, step=chat.step, **sampling)
        report(records, answers)
        print(json.dumps(score(records, answers)))
        return

    # the next points of series
    if list(media) == ["series"] and not (s.prompt or s.chat or s.raw or s.save_state):
        forecasts = {path: chat.forecast(path, s.horizon or None) for path in media["series"]}
        for path, points in forecasts.items():
            print(f"{path}: " + " ".join(f"{point:.6g}" for point in points))
        if s.plot:
            draw_forecasts(s.plot, forecasts, chat.model.config.lookback)
        return

    # a state to ask later, a chat, or one prompt
    if s.save_state:
        chat.read(s.prompt, **media, raw=s.raw)
        chat.save_state(s.save_state)
        return
    if s.chat:
        run_chat(chat, s.prompt, media, sampling)
        return
    before = s.prompt if s.raw else ""
    if s.num_samples == 1:
        print(before, end="")
        print_answer(chat.ask(s.prompt, **media, stream=True, raw=s.raw, **sampling))
        return
    for answer in chat.ask(s.prompt, **media, raw=s.raw, num_samples=s.num_samples, **sampling):
        print(f"{before}{answer}\n{'-' * 15}")


if __name__ == "__main__":
    sys.stdin.reconfigure(errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):  # a console that is not UTF-8 shows \\u4e2d, and loses nothing
        stream.reconfigure(errors="backslashreplace")
    run(main)
