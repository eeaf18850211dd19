"""Checkpoints of others: the names of their tensors both ways.

python -m data.released IN OUT    OUT is *.pt (ours), *.pth (BlinkDL's), *.safetensors or a folder (flash-linear-attention's)
"""

import dataclasses
import json
import math
import os
import re
import sys

import torch

from modrwkv import MEDIA, InputError, build, own_checkpoint, read_file, read_safetensors, write

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
PREFIX, TAGGED = dict(template="v1", prompt_style="before"), dict(template="v3", prompt_style="tagged")
LAYOUTS = [  # of released files: how a name in them begins (the first that is found counts), the table, and what the model was trained with
    (
        "modality.world_encoder.adapter.conv.bias",
        WORLD.replace("image", "audio"),
        dict(audio_encoder="wavlm", **PREFIX),
    ),  # WorldRWKV
    ("modality.", WORLD, dict(image_encoder="siglip", **PREFIX)),
    ("llm.", AUGUST, dict(image_encoder="siglip", **TAGGED)),
    ("model.llm.", EXPORT, dict(image_encoder="siglip", **TAGGED)),
    ("model.", FLA, {}),  # flash-linear-attention
    (
        "proj.gate.",
        VISUAL,
        dict(image_encoder="dinov2+siglip+sam", adapter_kind="gated", prompt_style="first"),
    ),  # VisualRWKV 7.00
    (
        "rwkv.",
        VISUAL6,
        dict(image_encoder="clip", cls="last", adapter_kind="linear", prompt_style="sandwich", scan="bi"),
    ),  # VisualRWKV 6.0
]
WIDE = {
    "image": "clip",
    "audio": "microsoft/wavlm-large",
}  # of WorldRWKV's encoders, those whose vectors have 1024 channels


def rename(name, table, back=False):
    """(our name, whether the matrix is transposed) of a name by the first row of a table that fits, or the name itself; `back`: from ours to theirs."""
    for row in filter(None, table.splitlines()):
        old, new, *transposed = row.split()
        old, new = (new, old) if back else (old, new)
        if match := re.fullmatch(re.escape(old).replace(r"\*", "(.+)"), name):
            stars = iter(match.groups())
            return re.sub(r"\*", lambda _: next(stars), new), bool(transposed)
    return name, False


def read_any_file(path):
    """What read_file reads, or a .safetensors file, or a folder of model.safetensors, whole or in parts by its index."""
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.isdir(path) and not os.path.exists(index):
        found = [file for name in ("ckpt.pt", "model.safetensors") if os.path.exists(file := os.path.join(path, name))]
        if not found:
            raise InputError(f"{path} holds neither the ckpt.pt of train.py nor model.safetensors")
        path = found[0]
    if not os.path.isdir(path):
        return read_safetensors(path) if path.endswith(".safetensors") else read_file(path)
    try:
        with open(index, encoding="utf-8") as f:
            place = json.load(f)["weight_map"]
        parts = {
            file: read_safetensors(os.path.join(path, os.path.basename(file))) for file in sorted(set(place.values()))
        }
    except InputError:
        raise
    except OSError as e:
        raise InputError(f"cannot read the checkpoint {path}: {e.strerror or e}") from e
    except Exception as e:  # json's: whatever it is, this is no checkpoint
        raise InputError(f"{path} is not a checkpoint that can be read safely, or it is cut short") from e
    for name, file in place.items():
        if name not in parts[file]:
            raise InputError(f"{index} does not fit: {name} is missing in {file}")
    return {name: x for part in parts.values() for name, x in part.items()}


def begins(data, start):
    return isinstance(data, dict) and any(isinstance(name, str) and name.startswith(start) for name in data)


def read_checkpoint(path):
    """The contents of a checkpoint of ours, or of a released one as if it were ours, with "theirs", which gives back (a name as it has
    it, whether transposed); raises InputError."""
    path = str(path)
    data = read_any_file(path)
    layout = next((layout for layout in LAYOUTS if begins(data, layout[0])), None)
    if not layout:
        if contents := own_checkpoint(data, path):
            return contents
        raise InputError(
            f"{path} is from elsewhere: neither a checkpoint of train.py nor a released RWKV, ModRWKV or VisualRWKV"
        )
    start, table, config = layout
    weights, names, left_out = {}, {}, []
    for name, x in data.items():
        new, transposed = rename(str(name), table)
        if new == "-":
            left_out.append(name)
            continue
        if new in weights:
            raise InputError(f"{path} does not fit: {names[new][0]} is there twice, the other time as {name}")
        names[new] = name, transposed
        weights[new] = x.t() if transposed and torch.is_tensor(x) and x.dim() == 2 else x
    config = {"tokenizer": "rwkv_vocab_v20230424.txt", "image_encoder": "none"} | config
    size = lambda name, i: (
        weights[name].shape[i] if torch.is_tensor(weights.get(name)) and weights[name].dim() > i else 0
    )
    for kind, first in (("image", "mlp.0"), ("audio", "conv")):
        if scale := size(f"adapter.{kind}.mlp.2.weight", 1) // max(1, size("emb.weight", 1)):
            config["adapter_scale"] = scale
        if size(f"adapter.{kind}.{first}.weight", 1) == 1024:
            config[f"{kind}_encoder"] = WIDE[kind]
    if start == "modality." and config.get("adapter_scale", 0) >= 4:  # from July 2025 on, when the template had changed
        config["template"] = "v2"
    if config["image_encoder"] != "none":
        kernel = size("adapter.image.conv.weight", 2)
        config |= {"conv_kernel": kernel} | ({"conv_stride": kernel - 1} if kernel > 1 else {})
        config |= (
            {"encoder_width": size("adapter.image.gate.weight", 1)} if config.get("adapter_kind") == "gated" else {}
        )
    if left_out:
        print(
            f"{path}: {len(left_out)} tensors of its encoder ({left_out[0]} ...) are left out: an encoder is read from its own folder",
            file=sys.stderr,
        )
    eps, N = 1e-5, size("blocks.0.att.r_k", 1)
    about = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    if start.startswith("model.") and os.path.exists(about):
        with open(about, encoding="utf-8", errors="replace") as f:
            eps = float((re.findall(r'"norm_eps":\s*(\d+(?:\.\d+)?(?:e-\d+)?)', f.read()) or [eps])[0])
    if start.startswith("model.") and N and not math.isclose(N * eps, 64e-5):
        raise InputError(
            f"{path} does not fit: its heads of {N} channels have a norm with epsilon {N * eps:.2g}, not 64e-5 as BlinkDL's"
        )
    return {
        "model": weights,
        "config": config,
        "theirs": lambda name: names.get(name) or rename(name, table, back=True),
    }


def load(path, device="cpu", **changes):
    """A model ready to answer, from a checkpoint of train.py (or its folder) or a released one, recognised by the names in it: BlinkDL's .pth
    of RWKV-5.2, 6 or 7, flash-linear-attention's or WorldRWKV's .safetensors (or their folder), .pth of WorldRWKV and VisualRWKV 6.0 and 7.00.
    Untrusted files are safe.

    changes: settings of Config to override, e.g. tokenizer="rwkv_vocab_v20230424.txt" for an official .pth, template="v2",
    image_encoder="folder", or image_encoder="none" for the language model alone.
    Raises InputError if the file cannot be read or does not fit, naming what is missing or too much.
    """
    return build(read_checkpoint(path), path, **changes).to(device).eval()


def convert(source, target):
    """Writes the checkpoint `source` as `target`: *.pt in our layout, *.pth in BlinkDL's, *.safetensors or a folder (with config.json) in
    flash-linear-attention's; no number changes, nor its dtype. The last three take a language model alone."""
    kind = os.path.splitext(target)[1]
    file = target if kind in (".pt", ".pth", ".safetensors") else os.path.join(target, "model.safetensors")
    if os.path.exists(file):
        raise InputError(f"{file} exists: choose another name")
    data = read_checkpoint(source)
    model = build(data, source, **{f"{kind}_encoder": "none" for kind in MEDIA})
    weights, config = (
        {name: data["model"][name].reshape(x.shape) for name, x in model.state_dict().items()},
        model.config,
    )
    signals = {
        name: x for name, x in data["model"].items() if name.startswith(("encoder.", "adapter.", "forecast_head."))
    }
    if kind == ".pt":
        names = {name: value for name, value in data["config"].items() if name.endswith("_encoder")}
        return write(file, {"model": weights | signals, "config": dataclasses.asdict(config) | names})
    if signals:
        print(
            f"{source}: its encoders and adapters are left out: {target} takes a language model alone", file=sys.stderr
        )
    if kind == ".pth":
        return write(file, weights)
    if config.rwkv != 7 or config.head_size != 64:
        raise InputError(
            f"{source}: flash-linear-attention's layout takes RWKV-7 with heads of 64 channels, not RWKV-{config.rwkv} with {config.head_size}"
        )
    theirs = {}
    for name, x in weights.items():
        name, transposed = rename(name, FLA, back=True)
        theirs[name] = x.t() if transposed else x if ".attn.x_" in name or x.dim() < 3 else x.flatten()
    if file != target:
        ranks = {
            name: next((x.shape[1] for n, x in weights.items() if n.endswith(f"att.{name}1")), 32) for name in "wavg"
        }
        ranks = {
            f"{long}_low_rank_dim": ranks[name]
            for long, name in (("decay", "w"), ("a", "a"), ("v", "v"), ("gate", "g"))
        }
        V, C, hidden = *weights["emb.weight"].shape, len(weights["blocks.0.ffn.key.weight"])
        sizes = dict(
            vocab_size=V,
            hidden_size=C,
            intermediate_size=hidden,
            hidden_ratio=hidden / C,
            num_hidden_layers=config.n_layer,
        )
        sizes |= dict(
            head_dim=64,
            num_heads=C // 64,
            value_dim=[C] * config.n_layer,
            norm_eps=1e-5,
            norm_bias=True,
            tie_word_embeddings=False,
        )
        about = dict(
            model_type="rwkv7",
            architectures=["RWKV7ForCausalLM"],
            torch_dtype=str(weights["emb.weight"].dtype)[6:],
            bos_token_id=0,
            eos_token_id=0,
        )
        os.makedirs(target, exist_ok=True)
        with open(os.path.join(target, "config.json"), "w") as f:
            json.dump(about | sizes | ranks, f, indent=2)
    write(file, theirs)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.split("\n\n")[1].strip())
    try:
        convert(*sys.argv[1:])
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
