"""Checkpoints of others: the names of their tensors both ways.

python -m data.released IN OUT    *.pt (ours), *.pth (BlinkDL's), *.safetensors or a folder (flash-linear-attention's)
"""

import dataclasses
import json
import math
import os
import re
import sys

import torch

import modrwkv
from data.media import reading
from data.text import look_beside
from modrwkv import MEDIA, InputError, model_from_checkpoint, own_checkpoint, read_file

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
    """{name: tensor} of a .safetensors file."""
    module = safetensors(path)
    try:
        return module.load_file(path)
    except Exception as e:  # safetensors' own, and OSError
        raise InputError(f"cannot read {path}: {e}") from e


def write(path, contents):
    """Writes tensors (and plain values) as torch does, or as safetensors (*.safetensors); see modrwkv.write."""
    if not str(path).endswith(".safetensors"):
        return modrwkv.write(path, contents)
    module = safetensors(path)
    tensors = {name: x.contiguous() for name, x in contents.items()}
    modrwkv.write(path, tensors, lambda tensors, f: f.write(module.save(tensors, {"format": "pt"})))


def read_any_file(path):
    """What read_file reads, a .safetensors file, or a folder of model.safetensors, whole or in parts by its index."""
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, "ckpt.pt")):
        return read_file(path)
    whole, index = (os.path.join(path, f"model.safetensors{end}") for end in ("", ".index.json"))
    if not os.path.exists(index):
        if not os.path.exists(whole):
            raise InputError(f"{path} holds neither the ckpt.pt of train.py nor model.safetensors")
        return read_safetensors(whole)
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


def read_checkpoint(path):
    """A checkpoint of ours, or a released one as if ours: {"model": {name: tensor}, "config": {name: value}, ...}.

    A released one has "original_name": of a name of ours, (the name in the file, whether it is transposed there).
    Untrusted files are safe. Raises InputError naming the file.
    """
    path = str(path)
    look_beside(path)
    data = read_any_file(path)
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


def load(path, device="cpu", dtype="auto", **changes):
    """A model ready to answer, from a checkpoint of train.py (or its folder) or a released one, told by its names.

    These are BlinkDL's .pth of RWKV-5.2, 6 and 7, .safetensors of flash-linear-attention and WorldRWKV (or a folder),
    and .pth of WorldRWKV and VisualRWKV 6.0 and 7.00. Untrusted files are safe.
    dtype: see modrwkv.load
    changes: settings of Config to override, e.g. tokenizer="rwkv_vocab_v20230424.txt" for an official .pth,
    template="v2", image_encoder="folder", or image_encoder="none" for the language model alone.
    Raises InputError if the file cannot be read or does not fit, naming what is missing or too much.
    """
    return model_from_checkpoint(read_checkpoint(path), path, dtype, **changes).to(device).eval()


def convert(source, target):
    """Writes the checkpoint `source` as `target`; no number changes, nor its dtype.

    *.pt is our layout, *.pth BlinkDL's, *.safetensors or a folder (with config.json) flash-linear-attention's. The last
    three take a language model alone.
    """
    kind = os.path.splitext(target)[1]
    file = target if kind in (".pt", ".pth", ".safetensors") else os.path.join(target, "model.safetensors")
    if os.path.exists(file):
        raise InputError(f"{file} exists: choose another name")
    data = read_checkpoint(source)
    model = model_from_checkpoint(data, source, **{f"{kind}_encoder": "none" for kind in MEDIA})
    config = model.config
    modalities = ("encoder.", "adapter.", "forecast_head.")
    weights = {name: data["model"][name].reshape(x.shape) for name, x in model.state_dict().items()}
    others = {name: x for name, x in data["model"].items() if name.startswith(modalities)}
    if kind == ".pt":
        encoders = {name: value for name, value in data["config"].items() if name.endswith("_encoder")}
        return write(file, {"model": weights | others, "config": dataclasses.asdict(config) | encoders})
    if others:
        print(f"{source}: encoders and adapters are left out: {target} takes a language model alone", file=sys.stderr)
    if kind == ".pth":
        return write(file, weights)
    if config.rwkv != 7 or config.head_size != 64:
        own = f"RWKV-{config.rwkv} with {config.head_size}"
        raise InputError(f"{source}: flash-linear-attention's layout takes RWKV-7 with heads of 64 channels, not {own}")
    if file != target:
        os.makedirs(target, exist_ok=True)
        with open(os.path.join(target, "config.json"), "w") as f:
            json.dump(fla_config(weights), f, indent=2)
    write(file, dict(to_fla(name, x) for name, x in weights.items()))


def to_fla(name, x):
    """(name, tensor) of flash-linear-attention's layout for one of ours."""
    name, transposed = rename(name, FLA, back=True)
    if transposed:
        return name, x.t()
    return name, x.flatten() if x.dim() == 3 and ".attn.x_" not in name else x


def fla_config(weights):
    """The config.json of flash-linear-attention for an RWKV-7's weights."""
    (vocab_size, C), ffn_dim = weights["emb.weight"].shape, len(weights["blocks.0.ffn.key.weight"])
    n_layer = sum(name.endswith(".ln1.weight") for name in weights)
    config = {
        "model_type": "rwkv7",
        "architectures": ["RWKV7ForCausalLM"],
        "torch_dtype": str(weights["emb.weight"].dtype).removeprefix("torch."),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "vocab_size": vocab_size,
        "hidden_size": C,
        "intermediate_size": ffn_dim,
        "hidden_ratio": ffn_dim / C,
        "num_hidden_layers": n_layer,
        "head_dim": 64,
        "num_heads": C // 64,
        "value_dim": [C] * n_layer,
        "norm_eps": 1e-5,
        "norm_bias": True,
        "tie_word_embeddings": False,
    }
    for name, matrix in (("decay", "w1"), ("a", "a1"), ("v", "v1"), ("gate", "g1")):
        layer = min(1, n_layer - 1) if name == "v" else 0  # layer 0 has none
        config[f"{name}_low_rank_dim"] = size(weights, f"blocks.{layer}.att.{matrix}", 1) or 32
    return config


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__.split("\n\n")[1].strip())
    try:
        convert(*sys.argv[1:])
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
