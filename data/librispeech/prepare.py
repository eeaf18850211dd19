"""LibriSpeech: English books read aloud: a transcription task.

    python data/librispeech/prepare.py PATH [PATH ...] [--skip_missing] [--out=data/librispeech]

PATH is a published archive (train-clean-100.tar.gz), which is unpacked into the folder of --out, or a folder in which
they are unpacked (LibriSpeech/train-clean-100/19/198/19-198-0000.flac, beside 19-198.trans.txt). Writes train.jsonl of
the parts train-*, val.jsonl of dev-* and test.jsonl of test-*: a record an utterance, in lower case, with its part as
its task, by which scores are grouped.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tarfile
import zlib
from pathlib import Path


def unpack(archive, folder):
    """Unpacks a .tar.gz into a folder of its own, which is there only when it is whole."""
    if os.path.exists(folder):
        return
    shutil.rmtree(f"{folder}.partial", ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            safe = {"filter": "data"}
            if not hasattr(tarfile, "data_filter"):  # Python before 3.10.12 and 3.11.4
                inside = [x for x in tar if x.isreg() and not x.name.startswith("/") and ".." not in x.name]
                safe = {"members": inside}
            tar.extractall(f"{folder}.partial", **safe)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
        shutil.rmtree(f"{folder}.partial", ignore_errors=True)
        sys.exit(f"error: {archive} cannot be unpacked, it may be cut short: {e}")
    os.replace(f"{folder}.partial", folder)


def utterances(folder):
    """[(name, part, path of the sound, text)] of a folder."""
    found = []
    for path in sorted(Path(folder).absolute().rglob("*.trans.txt")):
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            name, _, text = line.strip().partition(" ")
            if not text:
                sys.exit(f"error: {path}, line {n}, is not the name of a sound and what is said in it")
            found.append((name, path.parts[-4], path.parent / f"{name}.flac", text.lower()))
    return found


def write(out, found, skip_missing):
    """Writes train.jsonl, val.jsonl and test.jsonl of [(name, part, path of the sound, text)]."""
    missing = [str(sound) for *_, sound, _ in found if not sound.exists()]
    if missing and not skip_missing:
        sys.exit(
            f"error: {len(missing):,} of {len(found):,} sounds are missing, of them {', '.join(missing[:3])}: "
            "unpack them, or leave them out with --skip_missing"
        )
    lines = {"train": [], "val": [], "test": []}
    for name, part, sound, text in found:
        turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": text}]
        record = {"id": name, "audio": os.path.relpath(sound, out), "task": part, "conversations": turns}
        if not missing or sound.exists():
            lines[{"dev": "val"}.get(part.split("-")[0], part.split("-")[0])].append(
                json.dumps(record, ensure_ascii=False) + "\n"
            )
    for name in lines:
        path = os.path.join(out, f"{name}.jsonl")
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        if lines[name]:
            with open(f"{path}.partial", "w", encoding="utf-8") as f:
                f.writelines(lines[name])
            os.replace(f.name, path)
    print(
        ", ".join(f"{len(lines[name]):,} for {name}" for name in lines)
        + (f"; {len(missing):,} without their sound left out" if missing else "")
    )


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="PATH", nargs="+")
    parser.add_argument("--skip_missing", action="store_true", help="leave out what has no sound")
    parser.add_argument("--out", default=here)
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    found = []
    for path in args.paths:
        folder = path
        if not os.path.isdir(path):
            folder = os.path.join(args.out, os.path.basename(path).split(".")[0])
            unpack(path, folder)
        found += utterances(folder)
    if not found or any(part.split("-")[0] not in ("train", "dev", "test") for _, part, *_ in found):
        sys.exit(
            f"error: {' '.join(args.paths)} should hold train-clean-100/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt, "
            "or dev-clean, test-clean and the like"
        )
    write(args.out, found, args.skip_missing)
