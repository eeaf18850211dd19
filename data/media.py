"""Media: pictures, sounds and tables from files to tensors, as each encoder takes them; the cache of features."""

import contextlib
import csv
import functools
import hashlib
import io
import math
import os
import re
from numbers import Real

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from tqdm import tqdm

from modrwkv import (
    AbsentTowers,
    Features,
    InputError,
    MelEncoder,
    PatchEncoder,
    Speech,
    Timer,
    Vision,
    WaveNet,
    normalise,
)


def read_picture(path):
    """A picture file (or PIL image) as PIL image in RGB; raises InputError naming the file."""
    try:
        with Image.open(path) if not isinstance(path, Image.Image) else contextlib.nullcontext(path) as image:
            if image.mode in ("P", "LA", "RGBA", "PA"):  # what is transparent lies on white paper
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode.startswith("I"):  # 16 bits a pixel
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError as e:
        raise InputError(f"no such picture: {path}") from e
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f"{path} is not a picture that can be read: {e}") from e


def read_sound(path, rate):
    """The samples (n,) of a sound file, its channels averaged, at `rate` a second; raises InputError naming the file."""
    try:
        with soundfile.SoundFile(path) as f:
            x, promised, notes, own_rate = f.read(dtype="float32", always_2d=True), f.frames, f.extra_info, f.samplerate
    except FileNotFoundError as e:
        raise InputError(f"no such sound: {path}") from e
    except (soundfile.SoundFileError, OSError) as e:
        if not os.path.exists(path):
            raise InputError(f"no such sound: {path}") from e
        raise InputError(f"{path} is not a sound that can be read: {str(e) or 'it is damaged or cut short'}") from e
    data = re.search(
        r"^ ?(?:data|SSND) : (\d+) \(should be (\d+)\)", notes, re.M
    )  # of wav and aiff: what the header promises, what is there
    short = data and int(data[2]) < int(data[1]) < 0xFFFFFF00  # more is promised by what was written as a stream
    if len(x) < promised or short or "lacks an end-of-stream" in notes or "Junk after the last page" in notes:
        raise InputError(f"{path} is cut short: it ends before its header says it does")
    if not len(x):
        raise InputError(f"{path} holds no sound")
    if not np.isfinite(x).all():
        raise InputError(f"{path} holds samples that are no numbers")
    return torch.from_numpy(soxr.resample(x.mean(1), own_rate, rate))


def read_series(series):
    """Numbers, or a .csv file's last column (or the one named behind a #: x.csv#load), as (n,) float64, NaN where unknown."""
    if isinstance(series, str | os.PathLike):
        path, _, column = re.fullmatch(r"(.*?\.csv|.*?)(#(.*))?", str(series), re.I | re.S).groups("")
        return read_table(path, column)[1][:, 0]
    x = torch.tensor([math.nan if x is None else float(x) for x in series], dtype=torch.float64)
    if not x.isfinite().any():
        raise InputError("a series has no numbers")
    return x


def read_table(path, column=None):
    """
    (names, (rows, columns) float64, NaN where unknown) of a .csv file with a header.

    column: the name of one, "" for the last one, None for all that begin with a number (the others are dates and words).
    Raises InputError naming file, line and column.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            text = f.read()
        first = text.partition("\n")[0]
        rows = [
            (n, row)
            for n, row in enumerate(csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count)), 1)
            if row
        ]
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{path} is not a .csv file: {e}") from e

    def number(text):
        if text.strip().lower() in ("", "na", "nan", "null", "none", "-"):
            return math.nan
        try:
            return float(text)
        except ValueError:
            return None

    if len(rows) < 2:
        raise InputError(f"{path} has no rows under its header")
    (_, names), *rows = rows
    if all(number(name) is not None for name in names):
        raise InputError(f"{path} has no header: its first line has to name its columns")
    for n, row in rows:
        if len(row) != len(names):
            raise InputError(f"{path}, line {n}, has {len(row)} values, not {len(names)} as its header has")
    known = lambda i: next(
        (x for x in (number(row[i]) for _, row in rows) if x is None or x == x), math.nan
    )  # the first there is
    if column is None:
        columns = [i for i in range(len(names)) if (x := known(i)) is not None and x == x]
    elif column and column not in names:
        raise InputError(f"{path} has no column {column}; its columns are {', '.join(names)}")
    else:
        columns = [names.index(column) if column else len(names) - 1]
    for i in columns:
        if (x := known(i)) is not None and x != x:
            raise InputError(f"{path}: column {names[i] or i + 1} is empty; another is chosen by {path}#NAME")
        for n, row in rows:
            if number(row[i]) is None:
                raise InputError(
                    f"{path}, line {n}: {row[i]!r} in column {names[i]} is not a number; another column is chosen by {path}#NAME"
                )
    if not columns:
        raise InputError(f"{path} has no column of numbers")
    return [names[i] for i in columns], torch.tensor(
        [[number(row[i]) for i in columns] for _, row in rows], dtype=torch.float64
    )


def load_patches(encoder, path):
    """A picture file (or PIL image) as uint8 (3, image_height, width), the width a multiple of patch_width.

    The empty border is cut away if image_trim is set, the aspect ratio is kept, and pictures wider
    than 16 times their height are made to fit; raises InputError naming the file.
    """
    image = read_picture(path)
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = tuple(int(c) for c in np.median(edge, 0))
    if encoder.trim:
        contrast = ImageChops.difference(image, Image.new("RGB", image.size, paper)).point(lambda c: c > 64 and 255)
        image = image.crop(contrast.getbbox())  # all of it where nothing stands out
    height, _, patch = encoder.size
    scale = min(height / image.height, 16 * height / image.width)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    canvas = Image.new("RGB", (-(-inner[0] // patch) * patch, height), paper)
    canvas.paste(image.resize(inner, Image.BILINEAR), (0, (height - inner[1]) // 2))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def load_mel(encoder, path):
    """A sound file (wav, flac, ogg, mp3; any rate, any channels), or samples (n,) at 16 kHz, as log-mel frames (80, frames).

    Raises InputError naming the file if it cannot be read, is empty or cut short.
    """
    return encoder.log_mel(
        read_sound(path, encoder.RATE)
        if isinstance(path, str | os.PathLike)
        else torch.as_tensor(path, dtype=torch.float32)
    )


def load_series(encoder, path):
    """A .csv file (its last column), or numbers, as normalised points: see `normalise`."""
    return normalise(read_series(path))[0]


def load_vision(encoder, path):
    """A picture file as [uint8 (3, height, width)], for each encoder as its own processor scales and cuts it."""
    image, found = read_picture(path), []
    for p, (height, width) in zip(encoder.preparations, encoder.sizes):
        x, size = image, p["size"]
        if p.get("do_resize", True) and isinstance(size, dict) and "height" in size:
            x = x.resize((size["width"], size["height"]), p["resample"])
        elif p.get("do_resize", True):  # the shorter side
            n, short = size["shortest_edge"] if isinstance(size, dict) else size, min(x.size)
            x = x.resize([n if side == short else int(n * side / short) for side in x.size], p["resample"])
        left, top = (x.width - width) // 2, (x.height - height) // 2
        found.append(torch.from_numpy(np.array(x.crop((left, top, left + width, top + height)))).permute(2, 0, 1))
    return found


def load_speech(encoder, path):
    """A sound file of any rate, or samples (n,) at 16 kHz, as samples."""
    x = (
        read_sound(path, MelEncoder.RATE)
        if isinstance(path, str | os.PathLike)
        else torch.as_tensor(path, dtype=torch.float32)
    )
    if not encoder.whisper:
        if encoder.preparations[0].get("do_normalize", True):
            x = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
        x = F.pad(x, (0, max(0, 400 - len(x))))  # the first vector sees so many
    return x


def load_towers(encoder, path):
    raise InputError(
        f"{path}: VisualRWKV 7.00 sees through SAM ViT-B, DINOv2-L and SigLIP-so400m at once, which are not here; without pictures it answers"
    )


LOADERS = {
    PatchEncoder: load_patches,
    MelEncoder: load_mel,
    WaveNet: load_series,
    Timer: load_series,
    Vision: load_vision,
    Speech: load_speech,
    AbsentTowers: load_towers,
}


def load_media(encoder, path):
    """What an encoder takes, from a file; raises InputError naming the file."""
    return LOADERS[type(encoder)](encoder, path)


TAKES = {
    "image": "a picture is a path, a PIL image, or uint8 from 0 to 255 of shape (H, W), (H, W, 3) or (H, W, 4)",
    "audio": "a sound is a path, or finite floats of shape (n,) at 16 kHz, from -1 to 1",
    "series": "a series is a path, or numbers of shape (n,)",
}


def media_list(kind, given):
    """What load_media takes, as a list, of one picture, sound or series, a list of several, or None.

    Paths and PIL images stay as they are, arrays and tensors are checked; a list of numbers is one series or sound.
    Raises InputError, which says what is taken, for anything else.
    """
    if given is None:
        return []
    if isinstance(given, list | tuple) and not all(isinstance(x, Real | None) for x in given):
        return [check_media(kind, x) for x in given]
    return [check_media(kind, given)]


def check_media(kind, x):
    if isinstance(x, str | os.PathLike) or kind == "image" and isinstance(x, Image.Image):
        return x
    try:
        array = np.asarray(x)
        if kind == "series" and array.dtype == object:
            array = array.astype(np.float64)  # None becomes NaN
    except (TypeError, ValueError, RuntimeError) as e:  # lists of unequal lengths, a tensor on a GPU
        raise InputError(f"{TAKES[kind]}, not {type(x).__name__}") from e
    if kind == "image":
        fits = array.dtype == np.uint8 and array.ndim in (2, 3) and array.shape[2:] in ((), (3,), (4,))
    elif kind == "audio":
        fits = array.dtype.kind == "f" and array.ndim == 1 and np.isfinite(array).all()
    else:
        fits = array.dtype.kind in "iuf" and array.ndim == 1
    if not fits or not array.size:
        found = f"{array.dtype} of shape {array.shape}" if array.ndim else type(x).__name__
        raise InputError(f"{TAKES[kind]}, not {found}")
    return Image.fromarray(array) if kind == "image" else array


@functools.lru_cache(4)
def fingerprint(encoder):
    """What is the same for the same weights, config and preparation alone, wherever they lie."""
    values = [
        p.flatten()[:: max(1, p.numel() // 64)].float().cpu().numpy().tobytes()
        for model in encoder.models
        for p in model.parameters()
    ]
    configs = [model.config.to_dict() | {"_name_or_path": ""} for model in encoder.models]
    return hashlib.sha256(b"".join(values) + repr((configs, encoder.preparations)).encode()).hexdigest()


def feature_file(encoder, path, folder):
    """Where the features of a file are kept: another place when weights, config, preparation, or the file have changed."""
    stat = os.stat(path)
    key = f"{fingerprint(encoder)} {os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
    key = hashlib.sha256(key.encode()).hexdigest()
    return os.path.join(folder, key[:2], key)


def read_features(encoder, path, folder):
    """The Features of a file in --feature_cache, or None where there are none; damaged ones are removed."""
    with contextlib.suppress(OSError):
        file = feature_file(encoder, path, folder)
        with open(file, "rb") as f:
            checksum, body = f.read(32), f.read()
        if checksum == hashlib.sha256(body).digest():
            return Features(torch.from_numpy(np.load(io.BytesIO(body))))
        os.remove(file)
    return None


def write_features(file, features):
    """Keeps features (L, width) in float16: a value moves by less than 1 / 2,000 of itself."""
    half, body = features.half(), io.BytesIO()
    np.save(body, (half if half.isfinite().all() else features.float()).cpu().numpy())
    try:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        partial = f"{file}.{os.getpid()}"  # other processes may be at it, too
        with open(partial, "wb") as f:
            f.write(hashlib.sha256(body.getvalue()).digest() + body.getvalue())
        os.replace(partial, file)
    except OSError as e:
        raise InputError(f"could not write {file}: {e.strerror}; choose another --feature_cache") from e


@torch.no_grad()
def cache_features(encoder, paths, folder, batch_size=16):
    """Encodes the files that --feature_cache does not have yet."""
    new = [path for path in dict.fromkeys(paths) if not os.path.exists(feature_file(encoder, path, folder))]
    batches = [new[i : i + batch_size] for i in range(0, len(new), batch_size)]
    device = next(encoder.models[0].parameters()).device
    for batch in tqdm(batches, desc="encoding", unit="batch", leave=False, disable=len(new) < 100):
        media = [load_media(encoder, path) for path in batch]
        inputs = [x.to(device) for x in encoder.collate(media)]
        for path, features in zip(batch, encoder(*inputs).split([encoder.length(x) for x in media])):
            write_features(feature_file(encoder, path, folder), features)
