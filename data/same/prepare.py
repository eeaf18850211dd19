"""Is the number you hear the number you see? Handwriting and Morse code, which have to be understood both.

    python data/same/prepare.py [--pairs=16000] [--seed=1] [--out=data/same]

writes train.jsonl, val.jsonl, their pictures and their sounds: a number of 1 to 3 digits as data/digits draws it, and
one that data/morse keys, which is the same or differs in one digit, as often as not. The answer has its working: `407,
417: no`. The writers of val are not those of train. 16,000 pairs take 290 MB.
"""

import argparse
import contextlib
import json
import os
import random
import runpy

import soundfile
from sklearn.datasets import load_digits

HERE = os.path.dirname(os.path.abspath(__file__))
SIGHT, SOUND = (runpy.run_path(os.path.join(HERE, "..", name, "prepare.py")) for name in ("digits", "morse"))
QUESTIONS = ("The same number?", "Do you hear the number you see?")


def write(out, name, scans, labels, n, rng, augment):
    os.makedirs(os.path.join(out, name), exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # it is whole or not there: its files are about to change
        os.remove(os.path.join(out, f"{name}.jsonl"))
    with open(os.path.join(out, f"{name}.jsonl.partial"), "w") as f:
        for i in range(n):
            chosen = [rng.randrange(len(scans)) for _ in range(rng.randint(1, 3))]
            seen = heard = "".join(str(labels[j]) for j in chosen)
            if rng.random() < 0.5:
                at = rng.randrange(len(seen))
                heard = seen[:at] + rng.choice([digit for digit in "0123456789" if digit != seen[at]]) + seen[at + 1 :]
            SIGHT["draw"]([scans[j] for j in chosen], rng, augment).save(
                os.path.join(out, name, f"{i}.png"), compress_level=1
            )
            soundfile.write(os.path.join(out, name, f"{i}.wav"), SOUND["key"](heard, rng), SOUND["RATE"], "PCM_U8")
            question = rng.choice(("<image><audio>", "<audio><image>")) + "\n" + rng.choice(QUESTIONS)
            turns = [
                {"from": "human", "value": question},
                {"from": "gpt", "value": f"{seen}, {heard}: {'yes' if seen == heard else 'no'}"},
            ]
            files = {"image": f"{name}/{i}.png", "audio": f"{name}/{i}.wav"}
            record = {
                "id": f"{name}-{i}",
                **files,
                "task": f"{len(seen)} digits",
                "level": len(seen),
                "conversations": turns,
            }
            f.write(json.dumps(record) + "\n")
    os.replace(f.name, f.name.removesuffix(".partial"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16000, help="for training; a 16th as many for validation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default=HERE)
    args = parser.parse_args()
    data, cut, held_out = load_digits(), SIGHT["CUT"], max(1, args.pairs // 16)
    write(args.out, "train", data.images[:cut], data.target[:cut], args.pairs, random.Random(args.seed), True)
    write(args.out, "val", data.images[cut:], data.target[cut:], held_out, random.Random(args.seed + 1), False)
    print(f"{args.pairs} pairs for training, {held_out} by other writers for validation")
