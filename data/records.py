"""Records: LLaVA's JSON, JSONL and texts from files, checked, and the samples that they become.

A record is {"image": path, "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": ...}]},
{"text": ...}, or {"target": numbers}, to be forecast, with the "series" that comes before it, if any. "image", "audio"
and "series" are a path or a list of them, relative to the record's file; a series may be numbers, null where unknown.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import subprocess
import sys

import torch

from data.media import cache_features, load_media, read_features, read_series, reading
from data.text import PLACEHOLDER, conversation, get_tokenizer
from modrwkv import ENCODERS, MEDIA, InputError, Pretrained


def read_records(path):
    """The records of a .txt file, a list, or a file of one a line, each with its "_at" (file, line) and "_folder"."""
    records = {}  # by where they are
    parse_float = functools.lru_cache(1 << 16)(float)  # most points of a series equal another: one object for both
    with reading(path, "a text file in UTF-8"), open(path, encoding="utf-8-sig") as f:
        if str(path).endswith(".txt"):
            records[path] = {"text": f.read()}
        elif f.read(100).lstrip().startswith("["):
            f.seek(0)
            with reading(path, "JSON"):
                for n, record in enumerate(json.load(f, parse_float=parse_float), 1):
                    records[f"{path}, record {n}"] = record
        else:
            f.seek(0)
            for n, line in enumerate(f, 1):
                at = f"{path}, line {n}"
                if line.strip():
                    with reading(f"{at},", "JSON"):
                        records[at] = json.loads(line, parse_float=parse_float)
    if not records:
        raise InputError(f"{path} holds no records")
    for at, record in records.items():
        if not isinstance(record, dict):
            raise InputError(f"{at}: a record is an object in braces, not {json.dumps(record)[:40]}")
        record["_at"], record["_folder"] = str(at), os.path.dirname(path)
        check_record(record, record["_at"])
    return list(records.values())


def check_record(record, at):
    """Raises InputError, which begins with `at`, unless it is a record as above."""
    turns = record.get("conversations")
    if not isinstance(record.get("level", 0), int):
        raise InputError(f'{at}: "level" is not a whole number')
    if turns is None and isinstance(record.get("text"), str):
        if not record["text"]:
            raise InputError(f'{at}: "text" is empty')
        if any(record.get(kind) for kind in MEDIA):
            raise InputError(f'{at}: a "text" has no media: ask about them in "conversations"')
    elif turns is None and "target" in record:
        target, context = record["target"], record_files(record, "series")
        if not is_numbers(target) or sum(x is not None and math.isfinite(x) for x in target) < 2:
            raise InputError(f'{at}: "target" is not a list of two numbers or more')
        if not are_files(context, "series") or len(context) > 1:
            raise InputError(f'{at}: "series" is neither a path nor a list of numbers')
    else:
        check_turns(turns, at)
        asked = "".join(question for question, _ in record_turns(record))
        for kind in MEDIA:
            files, n = record_files(record, kind), asked.count(f"<{kind}>")
            if not are_files(files, kind):
                more = ", nor numbers" if kind == "series" else ""
                raise InputError(f'{at}: "{kind}" is neither a path nor a list of paths{more}')
            if n != len(files):
                raise InputError(f"{at}: {n} <{kind}> in the questions, but {len(files)} {kind} file(s)")


def check_turns(turns, at):
    if not isinstance(turns, list) or not turns:
        raise InputError(f'{at}: no "conversations"')
    for i, turn in enumerate(turns):
        expected = ("human", "gpt")[i % 2]
        if not isinstance(turn, dict) or turn.get("from") != expected or not isinstance(turn.get("value"), str):
            raise InputError(f'{at}: turn {i + 1} is not {{"from": "{expected}", "value": "..."}}')
        if expected == "gpt" and not turn["value"].strip():
            raise InputError(f"{at}: the answer in turn {i + 1} is empty")
    if len(turns) % 2:
        raise InputError(f"{at}: the last question has no answer")


def is_numbers(x):
    return isinstance(x, list) and len(x) > 0 and all(isinstance(y, int | float) or y is None for y in x)


def are_files(files, kind):
    return isinstance(files, list) and all(isinstance(x, str) or kind == "series" and is_numbers(x) for x in files)


def record_files(record, kind):
    """What a record has of a kind, as a list of paths, or of lists of numbers."""
    files = record.get(kind) or []
    return [files] if isinstance(files, str) or kind == "series" and is_numbers(files) else files


def record_turns(record):
    """[(question, answer)] of a record; none of a plain text."""
    turns = [turn["value"] for turn in record.get("conversations") or ()]
    return list(zip(turns[::2], turns[1::2]))


def in_folder(record, file):
    """A file of a record as a path from here; numbers as they are."""
    return file if is_numbers(file) else os.path.join(record.get("_folder", ""), file)


def record_media(record):
    """[(kind, path or numbers)] of a record, in the order of its placeholders."""
    files = {kind: list(record_files(record, kind)) for kind in MEDIA}
    kinds = [mark[1:-1] for question, _ in record_turns(record) for mark in PLACEHOLDER.findall(question)]
    return [(kind, in_folder(record, files[kind].pop(0))) for kind in kinds]


@contextlib.contextmanager
def located(at):
    """Errors inside begin with where a record is."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{at}: {e}" if at else str(e)) from e


def segments(model, turns, media, first=True, at=""):
    """The segments of turns [(question, answer or None)] about media [(kind, path)]; errors begin with `at`."""
    media = media_segments(model, media, at)
    with located(at):
        return conversation(model.config, turns, iter(media), first)


def media_segments(model, media, at=""):
    """[(kind, what the model's encoder takes)] of media [(kind, path)]."""
    found = []
    with located(at):
        for kind, path in media:
            if kind not in model.encoder:
                name = path if isinstance(path, str | os.PathLike) else kind
                flag = f"--{kind}_encoder={next(iter(ENCODERS[kind]))}"
                raise InputError(f"{name}: this model has no {kind} encoder; train one with {flag}")
            found.append((kind, read_media(model, kind, path)))
    return found


def read_media(model, kind, path):
    """What the model's encoder takes of a file, or its Features from --feature_cache."""
    encoder = model.encoder[kind]
    features = read_features(encoder, path, model.feature_cache) if is_cached(model, kind, path) else None
    return features or load_media(encoder, path)


def is_cached(model, kind, path):
    return model.feature_cache and isinstance(path, str) and isinstance(model.encoder[kind], Pretrained)


def cache_media(model, records):
    """Encodes the media of records that --feature_cache does not have yet, so that it is done once and in batches."""
    files = {kind: [] for kind, encoder in model.encoder.items() if isinstance(encoder, Pretrained)}
    for kind, path in itertools.chain(*map(record_media, records)):
        if kind in files:
            files[kind].append(path)
    for kind, paths in files.items():
        cache_features(model.encoder[kind], paths, model.feature_cache)


def record_sample(model, record):
    """The segments of a record, to learn from; raises InputError naming the record."""
    if record.get("conversations"):
        return segments(model, record_turns(record), record_media(record), at=record.get("_at", ""))
    if "target" in record:
        series = [in_folder(record, file) for file in record_files(record, "series")] + [record["target"]]
        return [("forecast", torch.cat([read_series(x) for x in series]))]
    tokenizer = get_tokenizer(model.config.tokenizer)
    return [("answer", tokenizer.encode(record["text"]) + [tokenizer.end])]


def question(model, prompt, media=(), first=True):
    """The segments that ask `prompt` about media [(kind, path)]; those without a placeholder <image> go before it."""
    prompt, media = place(prompt, media)
    return segments(model, [(prompt, None)], media, first)


def place(prompt, media):
    """A prompt with a placeholder for each of media [(kind, path)], and these in their order."""
    files = {kind: [file for file in media if file[0] == kind] for kind in MEDIA}
    if sum(map(len, files.values())) < len(media):
        raise InputError("media are pairs (kind, path), of kind image, audio or series")
    for kind in MEDIA:
        missing = len(files[kind]) - prompt.count(f"<{kind}>")
        if missing < 0:
            raise InputError(f"the prompt has {-missing} <{kind}> more than there are {kind} files")
        prompt = f"<{kind}>\n" * missing + prompt
    return prompt, [files[mark[1:-1]].pop(0) for mark in PLACEHOLDER.findall(prompt)]


def held_out_samples(model, records, ctx_len):
    """The samples of held-out records: long texts cut into windows, of series the last points to forecast."""
    for record in records:
        sample = record_sample(model, record)
        if record.get("conversations"):
            yield sample
        elif sample[0][0] == "forecast":
            yield model.window(sample[0][1])
        else:
            [(_, ids)] = sample
            for i in range(0, len(ids) - 1, ctx_len):
                yield [("answer", ids[i : i + ctx_len + 1])]


# --------------------------------------------------------------------------------------------------- data sets

HERE = os.path.dirname(os.path.realpath(__file__))
DATA_SETS = sorted(name for name in os.listdir(HERE) if os.path.exists(os.path.join(HERE, name, "prepare.py")))
SOUND = (
    "--learning_rate=1.2e-3 --batch_size=32 --max_steps=2600 --level_steps=100 --eval_interval=650 --save_interval=650"
)
SERIES = "--encoder_width=48 --n_layer=3 --max_steps=3600 --eval_interval=900 --save_interval=900"
PRESETS = {  # flags that suit a data set, where they are not given; of several data sets the last one's count
    "digits": "--optimizer=muon",
    "shapes": "--image_height=48 --patch_height=16 --patch_width=16 --conv_kernel=0 --image_trim=False --n_layer=3 "
    "--prompt_style=last --learning_rate=1.2e-3 --batch_size=32 --max_steps=4000 --level_steps=100 "
    "--eval_interval=1000 --save_interval=1000",
    "morse": f"--optimizer=muon {SOUND}",
    "spoken_digits": f"--optimizer=muon {SOUND}",
    "librispeech": SOUND,
    "aishell": SOUND,
    "same": "--learning_rate=1.2e-3 --batch_size=16 --max_steps=4000 --level_steps=400 "
    "--eval_interval=1000 --save_interval=1000",
    "series": f"--optimizer=muon --loss_reduction=sample {SERIES}",
    "gift_eval": SERIES,
    "llava": "--image_height=64 --patch_height=16 --patch_width=16 --image_trim=False",
}


def data_set(name):
    """The data set of data/ that is meant by its name or by any path of its folder, else ""."""
    folder, base = os.path.split(os.path.realpath(name))
    known = name if name in DATA_SETS else base if folder == HERE else ""
    return known if known in DATA_SETS else ""


def presets(data):
    """The flags that suit --data."""
    return " ".join(PRESETS.get(data_set(name), "") for name in data.split(","))


def find_data(names, val=""):
    """Paths of training and of held-out files; a data set of data/ that is not there yet is prepared."""
    paths, held_out = [], [val] if val else []
    for name in names.split(","):
        known = data_set(name)
        folder = os.path.join(HERE, known) if known else name
        files = [os.path.join(folder, f"{part}.jsonl") for part in ("train", "val")]
        if known and not all(map(os.path.exists, files)):
            prepare(known)
        if all(map(os.path.exists, files)):
            paths.append(files[0])
            held_out += [] if val else files[1:]
        elif os.path.splitext(name)[1] in (".json", ".jsonl", ".txt"):
            paths.append(name)
        else:
            raise InputError(
                f"--data={name} is no .json, .jsonl or .txt file, no folder with train.jsonl and val.jsonl, "
                f"and none of {', '.join(DATA_SETS)}"
            )
    return paths, held_out


def prepare(name):
    """Runs data/<name>/prepare.py."""
    print(f"preparing data/{name} ...", flush=True)
    code = subprocess.run([sys.executable, os.path.join(HERE, name, "prepare.py")]).returncode
    if code == 2:  # argparse's: it takes a path
        advice = f"python data/{name}/prepare.py --help says from which"
        raise InputError(f"data/{name} is made from files of your own: {advice}")
    if code:
        raise InputError(f"data/{name}/prepare.py did not finish: see its message above")


def read_data(paths, held_out):
    """Records to learn from and held-out ones, of several files in turns; without files the 20th part of the others."""
    records = [record for path in paths for record in read_records(path)]
    val = [x for of_each in itertools.zip_longest(*map(read_records, held_out)) for x in of_each if x]
    if not val and len(records) == 1 and "text" in records[0]:
        [whole], n = records, max(1, len(records[0]["text"]) // 20)
        records, val = [whole | {"text": whole["text"][:-n]}], [whole | {"text": whole["text"][-n:]}]
    elif not val:
        val = records[::20]
        records = [record for i, record in enumerate(records) if i % 20] or records
    return records, val
