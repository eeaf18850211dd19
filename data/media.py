"""Media: pictures, sounds and tables from files to tensors, as each encoder takes them; a cache of encoder outputs."""

import contextlib
import csv
import hashlib
import io
import math
import os
import re
import warnings
from numbers import Real

import librosa
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageOps
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

PICTURE_FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"  # Pillow goes by content, and EPS is a program
warnings.filterwarnings("ignore", "PySoundFile failed|.*audioread")  # librosa's, when it turns to ffmpeg
UNKNOWN = "", "-", "na", "n/a", "#n/a", "nan", "null", "none"  # cells without a value, in lower case


@contextlib.contextmanager
def reading(path, what):
    """A block that reads a file: what goes wrong becomes an InputError, which says that the file is not `what`."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as e:  # each library has its own kinds
        if isinstance(e, OSError) and e.strerror:
            raise InputError(f"cannot read {path}: {e.strerror}") from e
        reason = (str(e).strip() or "it is damaged, cut short or of a kind that cannot be read").splitlines()[0]
        raise InputError(f"{path} is not {what}: {reason}") from e


def read_picture(path):
    """A picture file, or PIL image, as RGB image, upright and on white; raises InputError naming the file."""
    with reading(path, f"a picture ({', '.join(PICTURE_FORMATS)})"):
        is_open = isinstance(path, Image.Image)
        with contextlib.nullcontext(path) if is_open else Image.open(path, formats=PICTURE_FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") and np.asarray(image).max() < 65536:  # 16 bits a pixel
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{path} has pixels of mode {image.mode}: save it with 8 or 16 bits a channel")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")


def read_sound(path, rate):
    """
    (n,) float32: the samples of a sound file, channels averaged, at `rate` a second.

    Any that libsndfile reads (wav, flac, ogg, mp3, aiff), and where ffmpeg is installed m4a and the like.
    Raises InputError naming the file if it cannot be read, is empty or cut short.
    """
    with reading(path, "a sound"):
        channels, own_rate = librosa.load(os.fspath(path), sr=None, mono=False)
        channels = np.atleast_2d(channels)
        if not channels.size:
            raise InputError(f"{path} holds no sound")
        x = channels.mean(0)
        if np.abs(x).max() < 1e-3 * np.abs(channels).max():  # they cancel each other
            x = channels[0]
        with contextlib.suppress(soundfile.SoundFileError):  # it was read by ffmpeg
            header = soundfile.info(path, verbose=True)
            if len(x) < header.frames or lacks_data(header.extra_info):
                raise InputError(f"{path} is cut short: it ends before its header says it does")
        return torch.from_numpy(librosa.resample(x, orig_sr=own_rate, target_sr=rate))


def lacks_data(log):
    """Whether libsndfile's log says that a file is shorter than its header has it."""
    if "lacks an end-of-stream" in log or "Junk after the last page" in log:  # ogg
        return True
    sizes = re.search(r"^ ?(?:data|SSND) : (\d+) \(should be (\d+)\)", log, re.M)  # of wav and aiff, in bytes
    if not sizes:
        return False
    promised, found = map(int, sizes.groups())
    return found + 44 < promised < 0x7FFFF000  # some count the header as data; more is promised by what was streamed


def read_series(series):
    """(n,) float64, NaN where unknown: numbers, a .csv file's last column, or the one named behind a #: x.csv#load."""
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

    column: the name of one, "" for the last one, None for all that begin with a number: the others are dates and words.
    Raises InputError naming file, line and column.
    """
    with reading(path, "a .csv file"), open(path, encoding="utf-8-sig", newline="") as f:
        lines = f.read().splitlines()
        delimiter = max(",;\t", key=lines[0].count) if lines else ","
        rows = [(n, row) for n, row in enumerate(csv.reader(lines, delimiter=delimiter), 1) if row]
    if len(rows) < 2:
        raise InputError(f"{path} has no rows under its header")
    names = rows.pop(0)[1]
    if None not in map(parse_number, names):
        raise InputError(f"{path} has no header: its first line has to name its columns")
    for n, row in rows:
        if len(row) != len(names):
            raise InputError(f"{path}, line {n}, has {len(row)} values, not {len(names)} as its header has")
    columns = [list(map(parse_number, cells)) for cells in zip(*(row for _, row in rows))]
    if column is None:
        chosen = [i for i, values in enumerate(columns) if begins_with_a_number(values)]
    elif column and column not in names:
        raise InputError(f"{path} has no column {column}; its columns are {', '.join(names)}")
    else:
        chosen = [names.index(column) if column else len(names) - 1]
    for i in chosen:
        if None in columns[i]:
            n, row = rows[columns[i].index(None)]
            raise InputError(
                f"{path}, line {n}: {row[i]!r} in column {names[i]} is not a number; "
                f"another column is chosen by {path}#NAME"
            )
        if all(map(math.isnan, columns[i])):
            raise InputError(f"{path}: column {names[i] or i + 1} is empty; another is chosen by {path}#NAME")
    if not chosen:
        raise InputError(f"{path} has no column of numbers")
    return [names[i] for i in chosen], torch.tensor([columns[i] for i in chosen], dtype=torch.float64).T.contiguous()


def parse_number(cell):
    """A cell's number, NaN where it says that there is none, None for anything else."""
    if cell.strip().lower() in UNKNOWN:
        return math.nan
    try:
        return None if "_" in cell else float(cell)  # Python's own 1_000 is none of a spreadsheet's
    except ValueError:
        return None


def begins_with_a_number(values):
    """Of parse_number's values: whether the first that is there is one."""
    return next((x is not None for x in values if x is None or not math.isnan(x)), False)


def load_patches(encoder, path):
    """A picture as uint8 (3, image_height, width), the width a multiple of patch_width.

    The empty border is cut away if image_trim is set, the aspect ratio is kept, and pictures wider
    than 16 times their height are made to fit.
    """
    image = read_picture(path)
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = tuple(int(c) for c in np.median(edge, 0))
    if encoder.trim:
        contrast = ImageChops.difference(image, Image.new("RGB", image.size, background))
        image = image.crop(contrast.point(lambda c: c > 64 and 255).getbbox())  # all of it where nothing stands out
    height, _, patch_width = encoder.size
    scale = min(height / image.height, 16 * height / image.width)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    canvas = Image.new("RGB", (math.ceil(size[0] / patch_width) * patch_width, height), background)
    canvas.paste(image.resize(size, Image.BILINEAR), (0, (height - size[1]) // 2))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def load_pretrained_picture(encoder, path):
    """A picture as [uint8 (3, height, width)], for each of the encoders as its own processor scales and cuts it."""
    image, pixels = read_picture(path), []
    for preparation, (height, width) in zip(encoder.preparations, encoder.sizes):
        x, size = image, preparation["size"]
        if preparation.get("do_resize", True):
            if isinstance(size, dict) and "height" in size:
                new_size = size["width"], size["height"]
            else:  # the shorter side
                shortest, n = min(x.size), size["shortest_edge"] if isinstance(size, dict) else size
                new_size = [n if side == shortest else int(n * side / shortest) for side in x.size]
            x = x.resize(new_size, preparation["resample"])
        left, top = (x.width - width) // 2, (x.height - height) // 2
        x = np.array(x.crop((left, top, left + width, top + height)))
        pixels.append(torch.from_numpy(x).permute(2, 0, 1))
    return pixels


def load_samples(sound):
    """A sound file, or samples, as samples (n,) at 16 kHz."""
    if isinstance(sound, str | os.PathLike):
        return read_sound(sound, MelEncoder.RATE)
    return torch.as_tensor(sound, dtype=torch.float32)


def load_mel(encoder, sound):
    """A sound file, or samples (n,) at 16 kHz, as log-mel frames (80, frames), 100 a second."""
    return encoder.log_mel(load_samples(sound))


def load_pretrained_sound(encoder, sound):
    """A sound file, or samples (n,) at 16 kHz, as samples, which WavLM has with mean 0 and variance 1."""
    x = load_samples(sound)
    if encoder.whisper:
        return x
    if encoder.preparations[0].get("do_normalize", True):
        x = (x - x.mean()) / (x.var(correction=0) + 1e-7).sqrt()
    return F.pad(x, (0, max(0, 400 - len(x))))  # the receptive field of the first feature


def load_series(encoder, series):
    """A .csv file's column (see read_series), or numbers, as normalised points (2, n): see `normalise`."""
    return normalise(read_series(series))[0]


def load_nothing(encoder, path):
    raise InputError(
        f"{path}: VisualRWKV 7.00 sees through SAM ViT-B, DINOv2-L and SigLIP-so400m at once, which are not here; "
        "without pictures it answers"
    )


LOADERS = {
    PatchEncoder: load_patches,
    Vision: load_pretrained_picture,
    AbsentTowers: load_nothing,
    MelEncoder: load_mel,
    Speech: load_pretrained_sound,
    WaveNet: load_series,
    Timer: load_series,
}


def load_media(encoder, path):
    """What an encoder's forward takes of a file (or PIL image, samples, numbers); raises InputError naming the file."""
    return LOADERS[type(encoder)](encoder, path)


TAKES = {
    "image": "a picture is a path, a PIL image, or uint8 from 0 to 255 of shape (H, W), (H, W, 3) or (H, W, 4)",
    "audio": "a sound is a path, or finite floats of shape (n,) at 16 kHz, from -1 to 1",
    "series": "a series is a path, or numbers of shape (n,)",
}


def media_list(kind, given):
    """A picture, sound or series, a list of several, or None, as the list that load_media takes; raises InputError."""
    several = isinstance(given, list | tuple) and not all(isinstance(x, Real | None) for x in given)
    items = given if several else [given]  # a list of numbers is one
    return [] if given is None else [check_media(kind, x) for x in items]


def check_media(kind, x):
    """A path, PIL image or array (n,), of a path, PIL image, array, tensor or list of numbers; raises InputError."""
    if isinstance(x, str | os.PathLike) or kind == "image" and isinstance(x, Image.Image):
        return x
    try:
        array = np.asarray(x, np.float64 if kind == "series" else None)  # of a series None becomes NaN
    except (TypeError, ValueError, RuntimeError) as e:  # lists of unequal lengths, a tensor on a GPU
        raise InputError(f"{TAKES[kind]}, not {type(x).__name__}") from e
    fits = array.ndim == 1
    if kind == "image":
        fits = array.dtype == np.uint8 and array.ndim in (2, 3) and array.shape[2:] in ((), (3,), (4,))
    elif kind == "audio":
        fits = fits and array.dtype.kind == "f" and np.isfinite(array).all()
    if not fits or not array.size:
        found = f"{array.dtype} of shape {array.shape}" if array.ndim else type(x).__name__
        raise InputError(f"{TAKES[kind]}, not {found}")
    return Image.fromarray(array) if kind == "image" else array


def fingerprint(encoder):
    """A key, equal for equal weights, config and preparation, wherever they lie; copies without weights keep it."""
    if not hasattr(encoder, "fingerprint"):
        values = [
            p.flatten()[:: max(1, p.numel() // 64)].float().cpu().numpy().tobytes()
            for model in encoder.models
            for p in model.parameters()
        ]
        configs = [model.config.to_dict() | {"_name_or_path": ""} for model in encoder.models]
        values.append(repr((configs, encoder.preparations)).encode())
        encoder.fingerprint = hashlib.sha256(b"".join(values)).hexdigest()
    return encoder.fingerprint


def feature_file(encoder, path, folder):
    """Where the features of a file are kept: elsewhere when weights, config, preparation, or the file have changed."""
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
    """Encodes the files that --feature_cache does not have yet; of what is no file its record will complain."""
    fingerprint(encoder)  # now, for copies of the encoder without weights
    paths = [path for path in dict.fromkeys(paths) if os.path.exists(path)]
    new = [path for path in paths if not os.path.exists(feature_file(encoder, path, folder))]
    batches = [new[i : i + batch_size] for i in range(0, len(new), batch_size)]
    device = next(encoder.models[0].parameters()).device
    for batch in tqdm(batches, desc="encoding", unit="batch", leave=False, disable=len(new) < 100):
        media = [load_media(encoder, path) for path in batch]
        inputs = [x.to(device) for x in encoder.collate(media)]
        for path, features in zip(batch, encoder(*inputs).split([encoder.length(x) for x in media])):
            write_features(feature_file(encoder, path, folder), features)
