"""Records: LLaVA's JSON, JSONL and texts from files, checked, and the samples that they become."""

import contextlib
import functools
import itertools
import json
import math
import os

import soundfile
import torch
from PIL import Image

from data.media import cache_features, load_media, read_features, read_series
from data.text import MARK, conversation, get_tokenizer
from modrwkv import ENCODERS, MEDIA, InputError, Pretrained


def read_records(path):
    """The records of a .jsonl (one a line) or a .json file (a list, as LLaVA's), each with its "_at" (file, line) and "_folder"."""
    try:
        with open(path, encoding="utf-8") as f:
            if str(path).endswith(".json"):
                records = json.load(f)
                if not isinstance(records, list):
                    raise InputError(f"{path} does not hold a list of records")
                places = [f"{path}, record {i}" for i in range(1, len(records) + 1)]
            else:
                records, places = [], []
                number = functools.lru_cache(1 << 16)(
                    float
                )  # of a series' points most are equal to another: one object for all of these
                for n, line in enumerate(f, 1):
                    if line.strip():
                        places.append(f"{path}, line {n}")
                        records.append(json.loads(line, parse_float=number))
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}") from e
    except json.JSONDecodeError as e:
        raise InputError(f"{places[-1] if str(path).endswith('l') and places else path} is not JSON: {e}") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not a text file in UTF-8: {e}") from e
    if not records:
        raise InputError(f"{path} holds no records")
    for place, record in zip(places, records):
        if not isinstance(record, dict):
            raise InputError(f"{place}: a record is an object in braces, not {json.dumps(record)[:40]}")
        record["_at"], record["_folder"] = place, os.path.dirname(path)
        check_record(record)
    return records


def is_numbers(x):
    return isinstance(x, list) and len(x) > 0 and all(isinstance(y, int | float) or y is None for y in x)


def record_files(record, kind):
    """What a record has of a kind, as a list of paths; a series may be a list of numbers instead, null where unknown."""
    files = record.get(kind) or []
    return [files] if isinstance(files, str) or kind == "series" and is_numbers(files) else files


def record_media(record):
    """[(kind, path or numbers)] of a record, in the order of its marks; paths are relative to the record's file."""
    files = {kind: list(record_files(record, kind)) for kind in MEDIA}
    marks = [mark[1:-1] for mark in MARK.findall("".join(question for question, _ in record_turns(record)))]
    found = [(kind, files[kind].pop(0)) for kind in marks]
    return [(kind, file if is_numbers(file) else os.path.join(record["_folder"], file)) for kind, file in found]


def check_record(record):
    """Raises InputError, naming the record, unless it is {"text": ...}, {"target": [...]} (behind its "series", if any) or a conversation."""
    turns, at = record.get("conversations"), record["_at"]
    if not isinstance(record.get("level", 0), int):
        raise InputError(f'{at}: "level" is not a whole number')
    if isinstance(record.get("text"), str) and turns is None:
        if not record["text"]:
            raise InputError(f'{at}: "text" is empty')
        return
    if "target" in record and turns is None:
        if not is_numbers(record["target"]) or sum(x is not None and math.isfinite(x) for x in record["target"]) < 2:
            raise InputError(f'{at}: "target" is not a list of two numbers or more')
        past = record_files(record, "series")
        if not isinstance(past, list) or len(past) > 1 or not all(isinstance(x, str) or is_numbers(x) for x in past):
            raise InputError(f'{at}: "series" is neither a path nor a list of numbers')
        return
    if not isinstance(turns, list) or not turns:
        raise InputError(f'{at}: no "conversations"')
    marks = {kind: 0 for kind in MEDIA}
    for i, turn in enumerate(turns):
        expected = ("human", "gpt")[i % 2]
        if not isinstance(turn, dict) or turn.get("from") != expected or not isinstance(turn.get("value"), str):
            raise InputError(f'{at}: turn {i + 1} is not {{"from": "{expected}", "value": "..."}}')
        if expected == "gpt" and not turn["value"].strip():
            raise InputError(f"{at}: the answer in turn {i + 1} is empty")
        for kind in MEDIA:
            marks[kind] += turn["value"].count(f"<{kind}>") if expected == "human" else 0
    if len(turns) % 2:
        raise InputError(f"{at}: the last question has no answer")
    for kind in MEDIA:
        files = record_files(record, kind)
        if not isinstance(files, list) or not all(
            isinstance(file, str) or kind == "series" and is_numbers(file) for file in files
        ):
            raise InputError(
                f'{at}: "{kind}" is neither a path nor a list of paths' + (", nor numbers" if kind == "series" else "")
            )
        n = len(files)
        if marks[kind] != n:
            raise InputError(f"{at}: {marks[kind]} <{kind}> in the questions, but {n} {kind} file(s)")


def record_turns(record):
    """[(question, answer)] of a record; none of a plain text."""
    turns = [turn["value"] for turn in record.get("conversations") or ()]
    return list(zip(turns[::2], turns[1::2]))


def segments(model, turns, media, first=True, at=""):
    """The segments of turns [(question, answer or None)] about media [(kind, path)]; `at` is where errors say they are."""
    try:
        for kind, path in media:
            if kind not in model.encoder:
                name = path if isinstance(path, str | os.PathLike) else kind
                raise InputError(
                    f"{name}: this model has no {kind} encoder; train one with --{kind}_encoder={next(iter(ENCODERS[kind]))}"
                )
        return conversation(model.config, turns, ((kind, signal(model, kind, path)) for kind, path in media), first)
    except InputError as e:
        raise InputError(f"{at}: {e}" if at else str(e)) from e


def signal(model, kind, path):
    """What the model's encoder takes of a file, or its Features from --feature_cache."""
    encoder = model.encoder[kind]
    features = read_features(encoder, path, model.feature_cache) if is_cached(model, kind, path) else None
    return features or load_media(encoder, path)


def is_cached(model, kind, path):
    return model.feature_cache and isinstance(path, str) and isinstance(model.encoder[kind], Pretrained)


def cache_media(model, records):
    """Encodes the media of records that --feature_cache does not have yet, so that it is done once and in batches."""
    files = {kind: [] for kind in MEDIA}
    for kind, path in itertools.chain(*map(record_media, records)):
        if kind in model.encoder and is_cached(model, kind, path):
            files[kind].append(path)
    for kind, paths in files.items():
        if paths:
            cache_features(model.encoder[kind], paths, model.feature_cache)


def record_sample(model, record):
    """The segments of a record of read_records, to learn from; raises InputError naming the record."""
    if "target" in record and not record.get("conversations"):
        past = [
            file if is_numbers(file) else os.path.join(record["_folder"], file)
            for file in record_files(record, "series")
        ]
        return [("forecast", torch.cat([read_series(x) for x in (*past, record["target"])]))]
    if not record.get("conversations"):
        tokenizer = get_tokenizer(model.config.tokenizer)
        return [("answer", tokenizer.encode(record["text"]) + [tokenizer.end])]
    return segments(model, record_turns(record), record_media(record), at=record["_at"])


def question(model, prompt, media=(), first=True):
    """The segments that ask `prompt` about media [(kind, path)]; those without a mark such as <image> go before it."""
    files = {kind: [file for file in media if file[0] == kind] for kind in MEDIA}
    if sum(map(len, files.values())) < len(media):
        raise InputError("media are pairs (kind, path), of kind image, audio or series")
    for kind in MEDIA:
        missing = len(files[kind]) - prompt.count(f"<{kind}>")
        if missing < 0:
            raise InputError(f"the prompt has {-missing} <{kind}> more than there are {kind} files")
        prompt = f"<{kind}>\n" * missing + prompt
    return segments(model, [(prompt, None)], [files[mark[1:-1]].pop(0) for mark in MARK.findall(prompt)], first)


def rough_length(model, record, ctx_len):
    """About how long a record is as a sequence: characters, and what the headers alone say of its pictures and sounds."""
    n = min(len(record.get("text") or ""), ctx_len)
    n += sum(len(question) + len(answer) + 4 for question, answer in record_turns(record))
    for kind, path in record_media(record):
        with contextlib.suppress(Exception):  # reading it whole will say what is wrong
            if kind == "image" and not isinstance(
                model.encoder[kind], Pretrained
            ):  # of these all pictures have one length
                with Image.open(path) as image:
                    n += 5 * image.width / image.height
            elif kind == "audio":
                n += 25 * soundfile.info(path).duration
    return n


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
