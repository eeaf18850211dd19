"""Text alone, nanoGPT's first example: the plays of tiny Shakespeare (1.1 MB).

    python data/shakespeare/prepare.py [PATH]

PATH is a local copy of the file; without it, it is downloaded. Writes train.jsonl (the first 90 %) and val.jsonl.
"""

import argparse
import json
import os
import sys
import urllib.request

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", default=os.path.join(here, "tinyshakespeare.txt"))
    parser.add_argument("--out", default=here)
    args = parser.parse_args()
    try:
        if not os.path.exists(args.path) and args.path == parser.get_default("path"):
            print(f"downloading {URL}")
            urllib.request.urlretrieve(URL, args.path + ".partial")
            os.replace(args.path + ".partial", args.path)
        with open(args.path, encoding="utf-8") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(
            f"error: {args.path} could not be had ({e}): give a local copy, python data/shakespeare/prepare.py PATH"
        )
    if len(text) < 10:
        sys.exit(f"error: {args.path} holds no text")
    os.makedirs(args.out, exist_ok=True)
    cut = len(text) * 9 // 10
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        with open(os.path.join(args.out, f"{name}.jsonl"), "w", encoding="utf-8") as f:
            f.write(json.dumps({"id": name, "text": part}) + "\n")
    print(f"{cut:,} characters for training, {len(text) - cut:,} for validation")
