"""LLaVA's conversations about pictures: captions to learn seeing from, and instructions.

    python data/llava/prepare.py FILE.json [--images=FOLDER] [--skip_missing] [--skip_text] [--max_rounds=20]
        [--val=500] [--out=data/llava]

FILE is blip_laion_cc_sbu_558k.json (LLaVA-Pretrain), chat.json (LLaVA-CC3M-Pretrain-595K) or llava_v1_5_mix665k.json,
--images the folder in which the pictures' paths begin (00000/000000010.jpg, coco/train2017/...) or images.zip, which
is unpacked into the folder of --out. Writes train.jsonl and val.jsonl. Mended, and counted: questions without an
answer are dropped, a picture that no question has a mark for comes first, and a tag such as <audio> in a text about
web pages is written <audio >, for it is no mark. Of llava_v1_5_mix665k.json 40,688 are text alone. It takes some
gigabytes of memory.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import re
import sys
import zipfile

SHORT_ANSWER = "Answer the question using a single word or phrase."


def unzip(archive, folder):
    """Unpacks images.zip into a folder, which is there only when it is whole."""
    if not os.path.exists(folder):
        try:
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(f"{folder}.partial")
        except (zipfile.BadZipFile, EOFError, OSError) as e:
            sys.exit(f"error: {archive} cannot be unpacked, it may be cut short: {e}")
        os.replace(f"{folder}.partial", folder)


def pictures(record):
    """The paths in a record, none if it is text alone."""
    files = record.get("image") or []
    return [files] if isinstance(files, str) else files


def rounds(turns):
    """[(question, answer)] of a conversation, without what is not answered or answers nothing."""
    found, question = [], None
    for turn in turns:
        if turn["from"] == "human":
            question = turn["value"]
        elif question is not None and turn["value"].strip():
            found.append((question, turn["value"]))
            question = None
    return found


def mark(questions, n):
    """The questions with exactly n marks <image>: those that lack come first, what else looks like a mark is none."""

    def keep(match):
        nonlocal n
        n -= match[1] == "image"
        return match[0] if match[1] == "image" and n >= 0 else f"<{match[1]} >"

    questions = [re.sub("<(image|audio|series)>", keep, question) for question in questions]
    return ["<image>\n" * max(0, n) + questions[0], *questions[1:]]


def pieces(record, max_rounds):
    """A record's conversation in pieces of max_rounds (0: in one), each with its pictures and wish for a short one."""
    found = rounds(record["conversations"])
    for start in range(0, len(found), max_rounds or len(found) or 1):
        questions, answers = zip(*found[start : start + max_rounds if max_rounds else None])
        if start and SHORT_ANSWER in found[0][0] and SHORT_ANSWER not in questions[0]:
            questions = [f"{questions[0]}\n{SHORT_ANSWER}", *questions[1:]]
        turns = [
            turn
            for q, a in zip(mark(questions, len(pictures(record))), answers)
            for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": a})
        ]
        yield record | {"conversations": turns} | ({"id": f"{record.get('id')}-{start}"} if start else {})


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.json")
    parser.add_argument("--images", default="", help="a folder or images.zip; by default the folder of FILE")
    parser.add_argument("--skip_missing", action="store_true", help="leave out records whose picture is missing")
    parser.add_argument("--skip_text", action="store_true", help="leave out records without a picture")
    parser.add_argument("--max_rounds", type=int, default=0, help="split longer conversations; 0 for not at all")
    parser.add_argument(
        "--val",
        type=int,
        default=500,
        help="so many pictures, and texts, are held out with all that is said about them",
    )
    parser.add_argument("--out", default=here)
    args = parser.parse_args()
    try:
        with open(args.file, encoding="utf-8") as f:
            records = json.load(f)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {args.file} is not a list of records in JSON: {e}")
    os.makedirs(args.out, exist_ok=True)
    images = args.images or os.path.dirname(args.file)
    if images.endswith(".zip"):
        unzip(images, os.path.join(args.out, "images"))
        images = os.path.join(args.out, "images")

    done, untold = [], 0
    for n, record in enumerate(records, 1):
        try:
            if pictures(record) or not args.skip_text:
                split = list(pieces(record, args.max_rounds))
                untold += len(record["conversations"]) - sum(len(piece["conversations"]) for piece in split)
                done += split
        except (AttributeError, KeyError, TypeError) as e:
            sys.exit(
                f"error: {args.file}, record {n}, is not "
                f'{{"image": ..., "conversations": [{{"from": ..., "value": ...}}, ...]}}: {e!r}'
            )
    names = sorted({name for record in done for name in pictures(record)})
    if names and not os.path.exists(os.path.join(images, names[0])) and os.path.isdir(os.path.join(images, "images")):
        images = os.path.join(images, "images")

    @functools.cache
    def exists(name):
        return os.path.exists(os.path.join(images, name))

    missing = [name for name in names if not exists(name)]
    if missing and not args.skip_missing:
        sys.exit(
            f"error: {len(missing):,} of {len(names):,} pictures are missing in {images or '.'}, "
            f"of them {', '.join(missing[:3])}: say where they are with --images, "
            "or leave their records out with --skip_missing"
        )
    kept = [record for record in done if all(map(exists, pictures(record)))]

    about = [
        " ".join(pictures(record)) or str(record.get("id")) for record in kept
    ]  # what is known of val must not be in train
    held_out = set(random.Random(0).sample(sorted(set(about)), min(args.val, len(set(about)) // 2)))
    if not held_out:
        sys.exit(f"error: {args.file} has {len(kept)} records that can be used, which is too few to hold some out")
    for part in ("train", "val"):
        path = os.path.join(args.out, f"{part}.jsonl")
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        with open(f"{path}.partial", "w", encoding="utf-8") as f:
            for record, name in zip(kept, about):
                if (name in held_out) == (part == "val"):
                    files = [os.path.relpath(os.path.join(images, file), args.out) for file in pictures(record)]
                    record["image"] = files[0] if isinstance(record.get("image"), str) else files
                    f.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(f.name, path)
    n = sum(name in held_out for name in about)
    print(
        f"{len(kept) - n:,} records for training, {n:,} held out, "
        f"{sum(not pictures(r) for r in kept):,} of them text alone"
    )
    print(f"left out: {untold:,} turns without an answer, {len(done) - len(kept):,} records whose picture is missing")
