"""Numbers spoken digit by digit: a transcription task.

    python data/spoken_digits/prepare.py FOLDER [--held_out=NAME] [--sounds=20000] [--seed=1]
        [--out=data/spoken_digits]

FOLDER has recordings of single digits, called digit_speaker_index.wav, as the free-spoken-digit-dataset has. Writes
train.jsonl, val.jsonl and their sounds: strings of 1 to 6 digits by one speaker each, on noise. In train the voices
are also made higher or lower, the digits faster or slower and cut more closely, and microphone and noise are others
each time; val is the speaker who is held out, as recorded. 20,000 sounds take 680 MB.
"""

import argparse
import contextlib
import json
import os
import random
import re
import sys
from collections import defaultdict

import librosa
import numpy as np
import soundfile

RATE = 8000  # samples a second


def resample(x, rate):
    return librosa.resample(x, orig_sr=rate, target_sr=RATE, fix=False)


def recordings(folder):
    """{speaker: {digit: [samples]}} of a folder."""
    found = defaultdict(lambda: defaultdict(list))
    for name in sorted(os.listdir(folder)):
        if match := re.fullmatch(r"([0-9])_(.+)_\d+\.wav", name):
            try:
                x, rate = soundfile.read(os.path.join(folder, name), always_2d=True)
            except soundfile.SoundFileError as e:
                sys.exit(f"error: {os.path.join(folder, name)} is not a sound that can be read: {e}")
            found[match[2]][match[1]].append(resample(x.mean(1), rate))
    return found


def stretch(x, factor):
    """Samples that last `factor` times as long at the same pitch: overlapping windows, each moved to where it fits."""
    size, hop = 240, 120
    window, y = np.hanning(size), np.zeros(int(len(x) * factor) + 2 * size)
    x = np.pad(x, (80, 2 * size + 80))
    for at in range(0, len(y) - 2 * size, hop):
        start = int(at / factor) + 80
        if at and start + size + 80 < len(x):
            fits = np.correlate(x[start - 80 : start + 80 + hop], y[at : at + hop], "valid")
            start += int(fits.argmax()) - 80
        piece = x[start : start + size]
        y[at : at + len(piece)] += window[: len(piece)] * piece
    return y[: int((len(x) - 160 - 2 * size) * factor)]


def vary(x, voice, pace):
    """A digit with its pitch and formants `voice` times as high, lasting `pace` times as long."""
    return stretch(resample(x, RATE * voice), pace * voice)


def shape(x, rng, db):
    """Samples with each part of the spectrum up to `db` louder or fainter, as by another microphone."""
    gains = np.array([rng.uniform(-db, db) for _ in range(7)])
    spectrum = np.fft.rfft(x)
    at = np.linspace(0, 6, len(spectrum))
    return np.fft.irfft(spectrum * 10 ** (np.interp(at, range(7), gains) / 20), len(x))


def trim(x, below):
    """Samples from the first to the last that is at most `below` dB fainter than the loudest, over 15 ms."""
    n = RATE * 15 // 2000
    loudness = np.convolve(np.pad(x**2, n), np.hanning(2 * n + 1), "valid")
    there = np.flatnonzero(loudness >= loudness.max() * 10 ** (-below / 10))
    return x[there[0] : there[-1] + 1]


def speak(digits, of_speaker, rng, varied):
    """Samples of these digits in the recordings of one speaker."""
    noise = np.random.default_rng(rng.getrandbits(32))
    voice, pace, below = rng.uniform(0.8, 1.25), rng.uniform(0.75, 1.35), rng.uniform(8, 45)
    pieces = [np.zeros(int(RATE * rng.uniform(0.05, 0.3)))]
    for digit in digits:
        x = rng.choice(of_speaker[digit])
        x = vary(trim(x, below), voice * rng.uniform(0.96, 1.04), pace * rng.uniform(0.9, 1.1)) if varied else x
        pieces += [x / np.abs(x).max() * rng.uniform(0.6, 1), np.zeros(int(RATE * rng.uniform(0.03, 0.25)))]
    x = np.concatenate(pieces)
    hiss = noise.standard_normal(len(x)) * 10 ** rng.uniform(-4, -1 if varied else -2.5)
    x = shape(x, rng, 8) + shape(hiss, rng, 12) if varied else x + hiss
    return x / np.abs(x).max() * rng.uniform(0.2, 0.9)


def write(out, name, n, rng, speakers, varied):
    os.makedirs(os.path.join(out, name), exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # it is whole or not there: its sounds are about to change
        os.remove(os.path.join(out, f"{name}.jsonl"))
    with open(os.path.join(out, f"{name}.jsonl.partial"), "w") as f:
        for i in range(n):
            digits = rng.choices("0123456789", k=rng.randint(1, 6))
            x = speak(digits, speakers[rng.choice(sorted(speakers))], rng, varied)
            soundfile.write(os.path.join(out, name, f"{i}.wav"), x, RATE, "PCM_16")
            turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": " ".join(digits)}]
            record = {
                "id": f"{name}-{i}",
                "audio": f"{name}/{i}.wav",
                "task": "digits",
                "level": len(digits),
                "conversations": turns,
            }
            f.write(json.dumps(record) + "\n")
    os.replace(f.name, f.name.removesuffix(".partial"))


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--held_out", default="", help="the speaker of val; by default the last one of the alphabet")
    parser.add_argument("--sounds", type=int, default=20000, help="for training; a sixteenth as many for validation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=here)
    args = parser.parse_args()
    try:
        speakers = recordings(args.folder)
    except OSError as e:
        sys.exit(f"error: cannot read {args.folder}: {e.strerror}")
    held_out = args.held_out or max(speakers, default="")
    if len(speakers) < 2 or held_out not in speakers or any(len(digits) < 10 for digits in speakers.values()):
        sys.exit(
            f"error: {args.folder} needs digit_speaker_index.wav of all digits by two speakers or more; "
            f"found {', '.join(speakers) or 'none'}"
        )
    write(
        args.out,
        "train",
        args.sounds,
        random.Random(args.seed),
        {k: v for k, v in speakers.items() if k != held_out},
        True,
    )
    write(
        args.out, "val", max(1, args.sounds // 16), random.Random(args.seed + 1), {held_out: speakers[held_out]}, False
    )
    print(
        f"{args.sounds} sounds for training, {max(1, args.sounds // 16)} for validation, "
        f"by {held_out}, who is not in them"
    )
