"""Pictures of coloured shapes, with questions that take both the picture and the question to answer.

    python data/shapes/prepare.py [--pictures=12000] [--seed=1] [--out=data/shapes]

writes train.jsonl, val.jsonl and their pictures: a grid of 3 x 3 cells with 1 to 5 shapes. Each question gets each of
its answers about equally often, so that its text alone gives nothing away. Each colour and shape has a place where
training never draws the two together; every question of val is about such a thing (UNDRAWN).
"""

import argparse
import contextlib
import json
import math
import os
import random
from collections import Counter

from PIL import Image, ImageDraw


def ring(corners, *radii, turn=0.0):
    """The corners of a polygon around (0, 0), the first one at the top, at these distances in turn."""
    angles = [2 * math.pi * (i + turn) / corners for i in range(corners)]
    return [
        (radii[i % len(radii)] * math.sin(angle), -radii[i % len(radii)] * math.cos(angle))
        for i, angle in enumerate(angles)
    ]


SHAPES = {
    "circle": ring(32, 1),
    "square": ring(4, 1.2, turn=0.5),
    "triangle": [(x, y + 0.2) for x, y in ring(3, 1.15)],
    "star": ring(10, 1.15, 0.45),
    "cross": [
        (x / 3, y / 3)
        for x, y in zip((-1, 1, 1, 3, 3, 1, 1, -1, -1, -3, -3, -1), (-3, -3, -1, -1, 1, 1, 3, 3, 1, 1, -1, -1))
    ],
}
COLOURS = {
    "red": (215, 45, 40),
    "green": (45, 160, 70),
    "blue": (50, 85, 215),
    "yellow": (240, 190, 30),
    "black": (45, 45, 50),
}
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (rows down, columns to the right)
UNDRAWN = {
    cell: [(c, s) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES) if (5 * i + j) % 9 == cell]
    for cell in range(9)
}
CELL, FINE = 16, 4  # pixels of a cell; drawn so many times larger, then reduced, which smooths the edges


def arrange(n, rng, held_out):
    """n things, {cell: (colour, shape)}, often alike in colour, in shape or in both."""
    things, cells = {}, rng.sample(range(9), n)
    while len(things) < n:
        cell = cells[len(things)]
        new = (
            rng.choice(UNDRAWN[cell])
            if held_out and rng.random() < 0.5
            else (rng.choice(list(COLOURS)), rng.choice(list(SHAPES)))
        )
        old = rng.choice(list(things.values()) or [new])
        new = rng.choice((new, (old[0], new[1]), (new[0], old[1]), old))
        if held_out or new not in UNDRAWN[cell]:
            things[cell] = new
    return things


def ask(way, things, rng):
    """(question, answer, the cells it is about), or None where that would be ambiguous, or about nothing."""
    here, (colour, shape) = rng.choice(list(things.items()))
    side, (down, right) = rng.choice(list(SIDES.items()))
    beyond = {
        cell: down * (cell // 3 - here // 3) + right * (cell % 3 - here % 3) for cell in things
    }  # how far on that side
    other = (
        rng.choice(list(things.values()))
        if rng.random() < 0.8
        else (rng.choice(list(COLOURS)), rng.choice(list(SHAPES)))
    )
    others, like = (
        " ".join(other) + ("es" if other[1] == "cross" else "s"),
        [cell for cell in things if things[cell] == other],
    )
    single = list(things.values()).count((colour, shape)) == 1
    if way in ("colour", "shape"):
        return f"What {way} is {PLACES[here]}?", colour if way == "colour" else shape, [here]
    if way == "position" and single:
        return f"Where is the {colour} {shape}?", PLACES[here], [here]
    if way == "count":
        return f"How many {others}?", str(len(like)), like or things
    if way == "next to" and single and beyond.get(next_to := here + 3 * down + right) == 1:
        return f"What is just {side} the {colour} {shape}?", things[next_to][1], [here, next_to]
    if way == "count beyond" and other[1] != shape and [s for _, s in things.values()].count(shape) == 1:
        there = [cell for cell in like if beyond[cell] > 0]  # in any row further up is "above"
        return f"How many {others} are {side} the {shape}?", str(len(there)), [here, *like]


WAYS = {  # way to ask: (task, how often, of how many things at least, how much later it joins a curriculum, answers)
    "colour": ("colour", 4, 1, 0, COLOURS),
    "shape": ("shape", 4, 1, 0, SHAPES),
    "position": ("position", 5, 1, 1, PLACES),
    "count": ("count", 5, 3, 0, "0123"),
    "next to": ("relation", 4, 2, 3, SHAPES),
    "count beyond": ("relation", 2, 3, 4, "012"),
}


def ask_all(ways, things, rng, held_out, asked):
    """[(question, answer)], one a way, with answers that these questions had least often so far, or nearly; or None."""
    found = []
    for way in ways:
        for question, answer, about in filter(None, (ask(way, things, rng) for _ in range(12))):
            text = way if held_out else question  # in val each question by itself may have one answer
            if answer in WAYS[way][4] and held_out == any(things[cell] in UNDRAWN[cell] for cell in about):
                if asked[text, answer] <= 2 + 1.05 * min(asked[text, other] for other in WAYS[way][4]):
                    found.append((text, question, answer))
                    break
        else:
            return None
    asked.update((text, answer) for text, _, answer in found)
    return [pair for _, *pair in found]


def draw(things, rng):
    """The things, each a little moved, resized and tinted, on a grid of grey lines, which trimming leaves in place."""
    fine = CELL * FINE
    picture = Image.new("RGB", (3 * fine, 3 * fine), (rng.randint(240, 255),) * 3)
    pen = ImageDraw.Draw(picture)
    for at in (0, fine, 2 * fine, 3 * fine - FINE):
        pen.rectangle((at, 0, at + FINE - 1, 3 * fine), (150,) * 3)
        pen.rectangle((0, at, 3 * fine, at + FINE - 1), (150,) * 3)
    for cell, (colour, shape) in things.items():
        x, y = (fine * (at + 0.52) + rng.uniform(-0.7, 0.7) * FINE for at in (cell % 3, cell // 3))
        r = rng.uniform(4.8, 5.4) * FINE
        pen.polygon(
            [(x + r * dx, y + r * dy) for dx, dy in SHAPES[shape]],
            tuple(c + rng.randint(-12, 12) for c in COLOURS[colour]),
        )
    return picture.reduce(FINE)


def write(out, name, n, rng, held_out):
    os.makedirs(os.path.join(out, name), exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # it is whole or not there: its pictures are about to change
        os.remove(os.path.join(out, f"{name}.jsonl"))
    asked, each = (
        Counter(),
        1 if held_out else 3,
    )  # how often (question, answer) came, and how many records share a picture
    for cell, pairs in UNDRAWN.items():
        asked.update(
            {(f"Where is the {' '.join(pair)}?", PLACES[cell]): math.inf for pair in pairs}
        )  # never waited for
    with open(os.path.join(out, f"{name}.jsonl.partial"), "w") as f:
        for i in range(n):
            size = 1 + i % 5
            known = [way for way in WAYS if WAYS[way][2] <= size]
            talks = [1 if held_out or j % 16 else 2 for j in range(i * each, (i + 1) * each)]  # turns of each record
            talks = talks if sum(talks) <= len(known) else [1] * each
            pairs = None
            while not pairs:
                ways = sorted(known, key=lambda way: rng.random() ** (1 / WAYS[way][1]))[
                    -sum(talks) :
                ]  # drawn by weight
                things = arrange(size, rng, held_out)
                pairs = ask_all(ways, things, rng, held_out, asked)
            draw(things, rng).save(os.path.join(out, name, f"{i}.png"), compress_level=1)
            for j, length in enumerate(talks, i * each):
                level = len(things) + max(WAYS[way][3] for way in ways[:length])
                turns = [
                    {"from": who, "value": text} for pair in pairs[:length] for who, text in zip(("human", "gpt"), pair)
                ]
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
                record = {
                    "id": f"{name}-{j}",
                    "image": f"{name}/{i}.png",
                    "task": WAYS[ways[0]][0],
                    "level": level,
                    "conversations": turns,
                }
                f.write(json.dumps(record) + "\n")
                ways, pairs = ways[length:], pairs[length:]
    os.replace(f.name, f.name.removesuffix(".partial"))


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pictures", type=int, default=12000, help="for training, 3 records each; an eighth as many for validation"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=here)
    args = parser.parse_args()
    held_out = max(1, args.pictures // 8)
    write(args.out, "train", args.pictures, random.Random(args.seed), False)
    write(args.out, "val", held_out, random.Random(args.seed + 1), True)
    print(f"{args.pictures} pictures for training, {held_out} with things where those have none for validation")
