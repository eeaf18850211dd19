"""Checkpoints of others: the names of their tensors, and what is read from files. data/convert.py writes them:

python -m data.released IN OUT [--layout=NAME] [--dtype=NAME]
"""

import hashlib
import json
import math
import os
import re
import sys

import torch

from data.media import reading
from data.text import look_beside
from modrwkv import InputError, model_from_checkpoint, own_checkpoint, read_file

# The tables of released files: their names, our names, * the same in both, - left out; the first row that fits counts.
FLA = """
model.embeddings.weight                    emb.weight
model.norm.*                               ln_out.*
lm_head.weight                             head.weight
model.layers.*.pre_norm.*                  blocks.*.ln0.*
model.layers.*.attn_norm.*                 blocks.*.ln1.*
model.layers.*.ffn_norm.*                  blocks.*.ln2.*
model.layers.*.attn.r_proj.*               blocks.*.att.receptance.*
model.layers.*.attn.k_proj.*               blocks.*.att.key.*
model.layers.*.attn.v_proj.*               blocks.*.att.value.*
model.layers.*.attn.o_proj.*               blocks.*.att.output.*
model.layers.*.attn.g_norm.*               blocks.*.att.ln_x.*
model.layers.*.attn.*_lora.lora.2.bias     blocks.*.att.*0
model.layers.*.attn.*_lora.lora.0.weight   blocks.*.att.*1  transposed
model.layers.*.attn.*_lora.lora.2.weight   blocks.*.att.*2  transposed
model.layers.*.attn.*                      blocks.*.att.*
model.layers.*.ffn.*                       blocks.*.ffn.*
"""
WORLD = """
modality.world_encoder.adapter.proj.*      adapter.image.mlp.*
modality.world_encoder.adapter.*           adapter.image.*
modality.world_encoder.model.*             -
"""
AUGUST = """
proj.*                                     adapter.image.*
encoder.model.*                            -
llm.*                                      *
"""
EXPORT = """
model.proj.*                               adapter.image.*
model.encoder.*                            -
""" + FLA.replace("model.", "model.llm.")
VISUAL = """
vit.*                                      -
proj.*                                     adapter.image.*
rwkv.*                                     *
"""
VISUAL6 = "proj.weight adapter.image.o_proj.weight" + VISUAL
PREFIX, TAGGED = {"template": "v1", "prompt_style": "before"}, {"template": "v3", "prompt_style": "tagged"}
SANDWICH = {"adapter_kind": "linear", "prompt_style": "sandwich", "cls": "last", "scan": "bi"}
LAYOUTS = [  # how a name in a file begins (the first that is found counts), its table, and the config of its training
    # WorldRWKV, speech and pictures; pictures from August 2025 on; the same as exported for transformers
    ("modality.world_encoder.adapter.conv.bias", WORLD.replace("image", "audio"), {"audio_encoder": "wavlm"} | PREFIX),
    ("modality.", WORLD, {"image_encoder": "siglip"} | PREFIX),
    ("llm.", AUGUST, {"image_encoder": "siglip"} | TAGGED),
    ("model.llm.", EXPORT, {"image_encoder": "siglip"} | TAGGED),
    ("model.", FLA, {}),  # flash-linear-attention
    # VisualRWKV 7.00 and 6.0
    ("proj.gate.", VISUAL, {"image_encoder": "dinov2+siglip+sam", "adapter_kind": "gated", "prompt_style": "first"}),
    ("rwkv.", VISUAL6, {"image_encoder": "clip"} | SANDWICH),
]
WIDE = {"image": "clip", "audio": "microsoft/wavlm-large"}  # of WorldRWKV's encoders, those of width 1024
MODALITIES = ("encoder.", "adapter.", "forecast_head.")  # how the names begin of what is not the language model


def rename(name, table, back=False):
    """(our name, whether the matrix is transposed) by the first row of a table that fits; back: from our name."""
    for row in filter(None, table.splitlines()):
        old, new, *transposed = row.split()
        old, new = (new, old) if back else (old, new)
        if match := re.fullmatch(re.escape(old).replace(r"\*", "(.+)"), name):
            stars = iter(match.groups())
            return re.sub(r"\*", lambda _: next(stars), new), bool(transposed)
    return name, False


def safetensors(path):
    """The module that reads and writes .safetensors files such as path."""
    try:
        import safetensors.torch

        return safetensors.torch
    except ImportError as e:
        raise InputError(f'{path} takes safetensors: pip install -e ".[pretrained]"') from e


def read_safetensors(path):
    """{name: tensor} of a .safetensors file; tensors are the file's pages, read when needed."""
    module = safetensors(path)
    try:
        return module.load_file(path)
    except Exception as e:  # safetensors' own, and OSError
        raise InputError(f"cannot read {path}: {e}") from e


def read_whole_safetensors(path):
    """{name: tensor} of a .safetensors file; of one of ours, which has a config, what a checkpoint holds."""
    tensors = read_safetensors(path)
    with safetensors(path).safe_open(path, "pt") as f:
        config = (f.metadata() or {}).get("config")
    if not config:
        return tensors
    with reading(f"the config in {path}", "a JSON object"):
        return {"model": tensors, "config": dict(json.loads(config))}


def read_any_file(path, mmap):
    """What read_file reads, a .safetensors file, or a folder of model.safetensors, whole or in parts by its index."""
    if path.endswith(".safetensors"):
        return read_whole_safetensors(path)
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, "ckpt.pt")):
        return read_file(path, mmap)
    whole, index = (os.path.join(path, f"model.safetensors{end}") for end in ("", ".index.json"))
    if not os.path.exists(index):
        if not os.path.exists(whole):
            raise InputError(f"{path} holds neither the ckpt.pt of train.py nor model.safetensors")
        return read_whole_safetensors(whole)
    with reading(index, "an index of .safetensors files"), open(index, encoding="utf-8") as f:
        file_of = {name: os.path.basename(file) for name, file in json.load(f)["weight_map"].items()}
    parts = {file: read_safetensors(os.path.join(path, file)) for file in sorted(set(file_of.values()))}
    for name, file in file_of.items():
        if name not in parts[file]:
            raise InputError(f"{index} does not fit: {name} is missing in {file}")
    return {name: x for part in parts.values() for name, x in part.items()}


def find_layout(data):
    """The row of LAYOUTS of what a file holds, or None."""
    names = [name for name in data if isinstance(name, str)] if isinstance(data, dict) else []
    return next((row for row in LAYOUTS if any(name.startswith(row[0]) for name in names)), None)


def read_checkpoint(path, mmap=True):
    """A checkpoint of ours, or a released one as if ours: {"model": {name: tensor}, "config": {name: value}, ...}.

    A released one has "original_name": of a name of ours, (the name in the file, whether it is transposed there).
    One that holds adapters alone is given the language model that its "base" names. mmap: see modrwkv.read_file; a
    file that will be written anew is read without. Untrusted files are safe. Raises InputError naming the file.
    """
    path = str(path)
    contents = read_one(path, mmap)
    if contents.get("base"):
        contents["model"] = read_base(path, contents["base"]) | contents["model"]
    look_beside(path)
    return contents


def read_one(path, mmap):
    """What read_checkpoint returns, without the language model of a "base"."""
    data = read_any_file(path, mmap)
    layout = find_layout(data)
    if not layout:
        if contents := own_checkpoint(data, path):
            return contents
        known = "a checkpoint of train.py nor a released RWKV, ModRWKV or VisualRWKV"
        raise InputError(f"{path} is from elsewhere: neither {known}")
    start, table, config = layout
    weights, originals, left_out = {}, {}, []
    for name, x in data.items():
        new, transposed = rename(str(name), table)
        if new == "-":
            left_out.append(name)
            continue
        if new in weights:
            raise InputError(f"{path} does not fit: {originals[new][0]} is there twice, the other time as {name}")
        originals[new] = name, transposed
        weights[new] = x.t() if transposed and torch.is_tensor(x) and x.dim() == 2 else x
    if left_out:
        tensors = f"{len(left_out)} tensors of its encoder ({left_out[0]} ...)"
        print(f"{path}: {tensors} are left out: an encoder is read from its own folder", file=sys.stderr)
    if start.startswith("model."):
        check_epsilon(path, weights)

    def original_name(name):
        return originals.get(name) or rename(name, table, back=True)

    return {"model": weights, "config": released_config(start, config, weights), "original_name": original_name}


def size(weights, name, dim):
    """The size of a tensor along a dimension; 0 where there is none."""
    x = weights.get(name)
    return x.shape[dim] if torch.is_tensor(x) and x.dim() > dim else 0


def released_config(start, config, weights):
    """The config of a released model: its layout's, and what the shapes of its tensors say."""
    config = {"tokenizer": "rwkv_vocab_v20230424.txt", "image_encoder": "none"} | config
    for kind, first in (("image", "mlp.0"), ("audio", "conv")):
        if scale := size(weights, f"adapter.{kind}.mlp.2.weight", 1) // max(1, size(weights, "emb.weight", 1)):
            config["adapter_scale"] = scale
        if size(weights, f"adapter.{kind}.{first}.weight", 1) == 1024:
            config[f"{kind}_encoder"] = WIDE[kind]
    if start == "modality." and config.get("adapter_scale", 0) >= 4:  # from July 2025 on, when the template had changed
        config["template"] = "v2"
    if config["image_encoder"] != "none":
        config["conv_kernel"] = kernel = size(weights, "adapter.image.conv.weight", 2)
        if kernel > 1:
            config["conv_stride"] = kernel - 1
        if config.get("adapter_kind") == "gated":
            config["encoder_width"] = size(weights, "adapter.image.gate.weight", 1)
    return config


def check_epsilon(path, weights):
    """Raises InputError unless the heads' norm has BlinkDL's epsilon; transformers' config.json has it per channel."""
    epsilon, N = 1e-5, size(weights, "blocks.0.att.r_k", 1)
    hf_config = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if os.path.exists(hf_config):
        with reading(hf_config, "a model's config.json"), open(hf_config, encoding="utf-8") as f:
            epsilon = float(json.load(f).get("norm_eps", epsilon))
    if N and not math.isclose(N * epsilon, 64e-5):
        norm = f"a norm with epsilon {N * epsilon:.2g}, not 64e-5"
        raise InputError(f"{path} does not fit: its heads of {N} channels have {norm}")


def fingerprint(weights):
    """A key of a language model in {name: tensor}: of 64 numbers of each tensor, in whatever file and precision."""
    digest = hashlib.sha256()
    for name in sorted(map(str, weights)):
        x = weights[name]
        unused = re.fullmatch(r"blocks\.0\.att\.v[012]", name)  # layer 0 has none, but some files do
        if torch.is_tensor(x) and not name.startswith(MODALITIES) and not unused:
            digest.update(f"{name} {x.numel()}".encode())
            digest.update(x.reshape(-1)[:: max(1, x.numel() // 64)].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def base_of(path, contents):
    """What names the language model of a checkpoint in those that will hold adapters of it alone.

    None of a run's own ckpt.pt, which will be another one when the run goes on.
    """
    if "train" in contents or contents.get("base"):
        return contents.get("base")
    return {"path": os.path.abspath(path), "fingerprint": fingerprint(contents["model"])}


def read_base(path, base):
    """{name: tensor} of the language model that `base` names for the checkpoint at path: where it was, or beside it.

    The place is only ever read. Raises InputError where there is none, or another one.
    """
    with reading(path, "a checkpoint of adapters and the file of their language model"):
        name, wanted = str(base["path"]), base["fingerprint"]
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    own = {os.path.realpath(path), os.path.realpath(os.path.join(path, "ckpt.pt"))}
    places = dict.fromkeys([name, os.path.join(folder, os.path.basename(name))])
    found = [x for x in places if (os.path.isfile(x) or os.path.isdir(x)) and os.path.realpath(x) not in own]
    for place in found:
        weights = read_one(place, mmap=True)["model"]
        if fingerprint(weights) == wanted:
            look_beside(place)
            return {name: x for name, x in weights.items() if not str(name).startswith(MODALITIES)}
    holds = f"{path} holds adapters of the language model {name}"
    if found:
        raise InputError(f"{holds}, but {found[0]} is another one: put the one that they were trained with there")
    raise InputError(f"{holds}, which is gone: put it there, or beside {path}")


def load(path, device="cpu", dtype="auto", **changes):
    """A model ready to answer, from a checkpoint of train.py (or its folder) or a released one, told by its names.

    These are BlinkDL's .pth of RWKV-5.2, 6 and 7, .safetensors of flash-linear-attention and WorldRWKV (or a folder),
    and .pth of WorldRWKV and VisualRWKV 6.0 and 7.00. Untrusted files are safe.
    dtype: torch.float32, bfloat16 or float16; "auto" is the file's own. State, norms and decays are float32 in any.
    changes: settings of Config to override, e.g. tokenizer="bytes", template="v2", image_encoder="folder", or
    image_encoder="none" for the language model alone.
    Raises InputError if the file cannot be read or does not fit, naming what is missing or too much.
    """
    return model_from_checkpoint(read_checkpoint(path), path, dtype, **changes).to(device).eval()


if __name__ == "__main__":
    from data.convert import main

    main()
