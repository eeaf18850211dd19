"""AISHELL-1: Mandarin sentences read aloud: a transcription task.

    python data/aishell/prepare.py PATH [--skip_missing] [--out=data/aishell]

PATH is the published data_aishell.tgz, or the folder unpacked from it (transcript/aishell_transcript_v0.8.txt,
wav/S0002.tar.gz or wav/train/S0002/*.wav); what is packed is unpacked into the folder of --out. Writes train.jsonl,
val.jsonl (dev) and test.jsonl: a record an utterance, without spaces. Sounds that the transcript does not know are
left out.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

here = os.path.dirname(os.path.abspath(__file__))
speech = runpy.run_path(os.path.join(here, "..", "librispeech", "prepare.py"))


def utterances(folder, out):
    """[(name, part, path of the sound, text)] of a folder; speakers that are still packed are unpacked into `out`."""
    transcript = next(iter(sorted(folder.rglob("aishell_transcript_v0.8.txt"))), None)
    if not transcript:
        sys.exit(f"error: {folder} has no transcript/aishell_transcript_v0.8.txt")
    speakers = {path.parent.name for path in folder.rglob("*.wav")}
    for archive in sorted(folder.rglob("*.tar.gz")):
        if archive.name.split(".")[0] not in speakers:
            speech["unpack"](archive, os.path.join(out, "wav", archive.name.split(".")[0]))
    sounds = {
        path.stem: path for place in (folder, Path(out, "wav").absolute()) for path in sorted(place.rglob("*.wav"))
    }
    found = []
    for n, line in enumerate(transcript.read_text(encoding="utf-8").splitlines(), 1):
        name, *words = line.split() or [""]
        if not words:
            sys.exit(f"error: {transcript}, line {n}, is not the name of a sound and what is said in it")
        sound = sounds.pop(name, folder / "wav" / f"{name}.wav")
        found.append((name, sound.parts[-3], sound, "".join(words)))
    if sounds:
        print(f"{len(sounds):,} sounds that the transcript does not know left out")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--skip_missing", action="store_true", help="leave out what has no sound")
    parser.add_argument("--out", default=here)
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    folder = args.path
    if not os.path.isdir(folder):
        folder = os.path.join(args.out, os.path.basename(args.path).split(".")[0])
        speech["unpack"](args.path, folder)
    speech["write"](args.out, utterances(Path(folder).absolute(), args.out), args.skip_missing)
