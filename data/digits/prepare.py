"""Pictures of handwritten numbers, with questions about them, from the scans that come with scikit-learn.

    python data/digits/prepare.py [--pictures=20000] [--seed=1] [--out=data/digits]

writes train.jsonl, val.jsonl and their pictures, and into train also questions about numbers in print. The 1,797 scans
(8 x 8 pixels, by 13 people) are in the order in which the writers came, form after form: those from the 1,416th on are
used in val only, so its writers were never seen in training.
"""

import argparse
import contextlib
import itertools
import json
import os
import random

from PIL import Image, ImageChops
from sklearn.datasets import load_digits


def add_up(digits):
    """407 -> 4+0=4, +7=11: with the running total on paper, no step has to add more than two numbers."""
    totals = list(itertools.accumulate(map(int, digits)))
    return digits[0] + ", ".join(f"+{digit}={total}" for digit, total in zip(digits[1:], totals[1:]))


QUESTIONS = {  # task: (ways to ask, the answer to digits such as "407")
    "read": (("What number is this?", "Read it."), str),
    "count": (("How many digits?", "Count them."), lambda digits: str(len(digits))),
    "sum": (("What is the sum?", "Add them up."), add_up),
    "largest": (("Which is the largest?", "The largest?"), max),
}
CELL = 28  # pixels a digit is high, before its own scale
CUT = 1415  # the first scan of val: a form begins 0 1 2 ... 9 0 1 2 ... 9, and so do the labels here


def draw_digit(scan, rng, bold):
    """A scan of 8 x 8 values as a grey picture (0 is paper), a little scaled, turned and slanted."""
    grey = Image.frombytes("L", (8, 8), bytes(min(255, int(16 * x)) for x in scan.flat))
    padded = Image.new("L", (12, 12))
    padded.paste(grey, (2, 2))
    size = round(CELL * 1.5 * rng.uniform(0.85, 1.15))  # of the 12 x 12 square, so the scan's 8 are about CELL
    turn, slant, wide = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15), rng.uniform(0.85, 1.15)
    step = 12 / size
    a, b, d, e = step / wide, step * (slant + turn), -step * turn, step
    c = 6 - (a + b) * size / 2
    f = 6 - (d + e) * size / 2
    grey = padded.transform((size, size), Image.AFFINE, (a, b, c, d, e, f), Image.BICUBIC)
    if bold is not None:  # another pen: ink where the grey is above a level, the lower, the bolder
        level, soft = bold
        grey = grey.point([max(0, min(255, round(128 + (x - level) * soft))) for x in range(256)])
    return grey.crop(grey.getbbox())


def draw(scans, rng, augment):
    """The scans side by side, black on white."""
    bold = (rng.uniform(60, 150), rng.uniform(2.2, 5)) if augment and rng.random() < 0.6 else None
    cells = [draw_digit(scan, rng, bold) for scan in scans]
    gap = rng.uniform(1, 14)
    lift = rng.choice((2, 4, 8)) if augment else 3
    picture = Image.new("L", (sum(c.width for c in cells) + round(30 * len(cells)) + 16, 2 * CELL))
    x = rng.uniform(2, 8)
    for cell in cells:
        y = CELL - cell.height / 2 + rng.uniform(-lift, lift)
        place = Image.new("L", picture.size)
        place.paste(cell, (round(x), round(y)))
        picture = ImageChops.lighter(picture, place)
        x += cell.width + gap * rng.uniform(0.5, 1.5)
    return ImageChops.invert(picture.crop((0, 0, min(picture.width, round(x) + 4), picture.height)))


def write(out, name, scans, labels, n, rng, augment):
    folder = os.path.join(out, name)
    os.makedirs(folder, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # it is whole or not there: its pictures are about to change
        os.remove(os.path.join(out, f"{name}.jsonl"))
    with open(os.path.join(out, f"{name}.jsonl.partial"), "w") as f:
        for i in range(n):
            chosen = [rng.randrange(len(scans)) for _ in range(rng.randint(1, 5))]
            digits = "".join(str(labels[j]) for j in chosen)
            draw([scans[j] for j in chosen], rng, augment).save(os.path.join(folder, f"{i}.png"), compress_level=1)
            tasks = rng.choices(list(QUESTIONS), (3, 1, 4, 2))
            if augment and i % 16 == 0:  # a conversation now and then, so that a model can hold one
                tasks = rng.sample(list(QUESTIONS), 2)
            level = len(digits) + 3 * (tasks != ["read"])  # reading comes first, of short numbers first
            turns = []
            for task in tasks:
                ask, answer = QUESTIONS[task]
                turns += [{"from": "human", "value": rng.choice(ask)}, {"from": "gpt", "value": answer(digits)}]
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record = {
                "id": f"{name}-{i}",
                "image": f"{name}/{i}.png",
                "task": tasks[0],
                "level": level,
                "conversations": turns,
            }
            f.write(json.dumps(record) + "\n")
            if augment and i % 4 == 0:  # a number in print: what to do with digits is learned before they can be read
                digits, task = (
                    "".join(rng.choices("0123456789", k=rng.randint(2, 5))),
                    rng.choices(list(QUESTIONS), (0, 1, 4, 2))[0],
                )
                ask, answer = QUESTIONS[task]
                turns = [
                    {"from": "human", "value": f"{digits}\n{rng.choice(ask)}"},
                    {"from": "gpt", "value": answer(digits)},
                ]
                f.write(
                    json.dumps({"id": f"{name}-{i}t", "task": task, "level": len(digits), "conversations": turns})
                    + "\n"
                )
    os.replace(f.name, f.name.removesuffix(".partial"))


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20000, help="for training; a tenth as many for validation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=here)
    args = parser.parse_args()
    data = load_digits()
    write(args.out, "train", data.images[:CUT], data.target[:CUT], args.pictures, random.Random(args.seed), True)
    write(
        args.out,
        "val",
        data.images[CUT:],
        data.target[CUT:],
        max(1, args.pictures // 10),
        random.Random(args.seed + 1),
        False,
    )
    print(f"{args.pictures} pictures for training, {max(1, args.pictures // 10)} of other writers for validation")
