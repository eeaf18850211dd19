"""Morse code in noise: a transcription task.

    python data/morse/prepare.py [--sounds=24000] [--seed=1] [--out=data/morse]

writes train.jsonl, val.jsonl and their sounds: words, numbers and groups of random letters, 1 to 10 characters in all,
at 10 to 30 words a minute, keyed by hand (no dash is quite like another), on a tone of 400 to 900 Hz, some of it deep
in noise. No text of three characters or more is both in train and in val. 24,000 sounds take 440 MB.
"""

import argparse
import contextlib
import json
import math
import os
import random
import zlib

import numpy as np
import soundfile

CODE = dict(
    zip(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?/",
        ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.. "
        "----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----. ..--.. -..-.".split(),
    )
)
WORDS = (
    "CQ DE TNX FER CALL UR RST NAME IS QTH RIG ANT WX HW? BK 73 88 QSL QRZ? QRM QRN QSB SKED THE OF AND TO IN IT "
    "YOU THAT HE WAS FOR ON ARE WITH AS I HIS THEY BE AT ONE HAVE THIS FROM OR HAD BY HOT BUT SOME WHAT THERE WE "
    "CAN OUT OTHER WERE ALL YOUR WHEN UP USE WORD HOW SAID AN EACH SHE WHICH DO THEIR TIME IF WILL WAY ABOUT MANY "
    "THEN THEM WOULD LIKE SO THESE HER LONG MAKE THING SEE HIM TWO HAS LOOK MORE DAY COULD GO COME DID SOUND NO "
    "MOST PEOPLE MY OVER KNOW WATER THAN FIRST WHO MAY DOWN SIDE BEEN NOW FIND SHIP LIGHT HARBOUR NORTH"
).split()
RATE = 4000  # samples a second: enough for 900 Hz
LONGEST = 10  # characters


def compose(rng, held_out):
    """A text of words, call signs and random groups, of a drawn number of characters or one fewer.

    Train and val share only the shortest.
    """
    n = rng.randint(1, LONGEST)
    while True:
        words, left = [], n
        while left > 0:
            word = rng.choice(WORDS) if rng.random() < 0.5 else "".join(rng.choices(list(CODE), k=rng.randint(1, 5)))
            words.append(word[:left])
            left -= len(word) + 1
        text = " ".join(words)
        if len(text) < 3 or (zlib.crc32(text.encode()) % 10 == 0) == held_out:
            return text


def key(text, rng):
    """Samples of a text as it is keyed: a tone that comes and goes in 5 ms, with noise."""
    dot = 1.2 / rng.uniform(10, 30)  # seconds: PARIS and the space behind it are 50 dots
    unevenness, dash = rng.uniform(0, 0.12), rng.uniform(2.7, 3.4)

    def span(dots):
        return max(1, round(RATE * dot * dots * max(0.5, rng.gauss(1, unevenness))))

    envelope = [np.zeros(round(RATE * rng.uniform(0.05, 0.4)))]
    for word in text.split():
        for letter in word:
            for mark in CODE[letter]:
                envelope += [np.ones(span(dash if mark == "-" else 1)), np.zeros(span(1))]
            envelope.append(np.zeros(span(2)))
        envelope.append(np.zeros(span(4)))
    envelope.append(np.zeros(round(RATE * rng.uniform(0, 0.3))))
    envelope = np.concatenate(envelope)
    edge = np.hanning(RATE // 100 + 2)[1:-1]
    envelope = np.convolve(envelope, edge / edge.sum(), "same")
    tone = np.sin(2 * np.pi * rng.uniform(400, 900) * np.arange(len(envelope)) / RATE + rng.uniform(0, 6))
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(envelope)) * 10 ** rng.uniform(
        -2, -0.15
    )  # of a tone of power 0.5
    x = tone * envelope + noise
    return x / np.abs(x).max() * rng.uniform(0.2, 0.9)


def write(out, name, n, rng, held_out):
    os.makedirs(os.path.join(out, name), exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # it is whole or not there: its sounds are about to change
        os.remove(os.path.join(out, f"{name}.jsonl"))
    with open(os.path.join(out, f"{name}.jsonl.partial"), "w") as f:
        for i in range(n):
            text = compose(rng, held_out)
            soundfile.write(os.path.join(out, name, f"{i}.wav"), key(text, rng), RATE, "PCM_U8")
            turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": text}]
            marks = sum(len(CODE.get(c, " ")) for c in text)
            level = 1 + math.isqrt(2 * max(0, marks - 2))  # E I T A N M first, then what is a little longer each time
            record = {
                "id": f"{name}-{i}",
                "audio": f"{name}/{i}.wav",
                "task": "morse",
                "level": level,
                "conversations": turns,
            }
            f.write(json.dumps(record) + "\n")
    os.replace(f.name, f.name.removesuffix(".partial"))


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", type=int, default=24000, help="for training; a 24th as many for validation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=here)
    args = parser.parse_args()
    held_out = max(1, args.sounds // 24)
    write(args.out, "train", args.sounds, random.Random(args.seed), False)
    write(args.out, "val", held_out, random.Random(args.seed + 1), True)
    print(f"{args.sounds} sounds for training, {held_out} of other texts for validation")
