"""Checkpoints for others, in the layouts that data/released.py reads.

python -m data.released IN OUT [--layout=NAME] [--dtype=NAME]

IN is any checkpoint of ours or a released one. OUT is a .pt or .pth file as torch writes them, a .safetensors file, or
a folder of model.safetensors. By default *.pt has our layout, *.pth BlinkDL's, the others flash-linear-attention's.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import sys

import torch

import modrwkv
from data.flags import DTYPES, run
from data.released import AUGUST, FLA, LAYOUTS, MODALITIES, read_checkpoint, released_config, rename, safetensors, size
from modrwkv import ENCODERS, FAMILIES, MEDIA, Config, InputError, model_from_checkpoint

HOLDS = {  # what a layout holds
    "ours": "any model, with its settings",
    "blinkdl": "a language model alone",
    "fla": "a language model alone, RWKV-7 with heads of 64 channels",
    "worldrwkv": "RWKV-7 with heads of 64 channels and a pretrained image encoder's adapter (WorldRWKV, August 2025)",
}


def convert(source, target, layout=None, dtype=None):
    """Writes the checkpoint `source` as `target`; without a dtype (a torch.dtype) no number changes, nor its dtype.

    What the layout does not hold is left out, and said on stderr. Raises InputError.
    """
    kind = os.path.splitext(target)[1]
    kind = kind if kind in (".pt", ".pth", ".safetensors") else ""
    layout = layout or {".pt": "ours", ".pth": "blinkdl"}.get(kind, "fla")
    file = target if kind else os.path.join(target, "model.safetensors")
    if os.path.exists(file):
        raise InputError(f"{file} exists: choose another name")
    data = read_checkpoint(source)
    blind = {f"{kind}_encoder": "none" for kind in MEDIA}
    model = model_from_checkpoint(data, source, "auto", **blind)
    config = {name: value for name, value in data["config"].items() if name.endswith("_encoder")}
    config = dataclasses.asdict(model.config) | config
    weights = {name: data["model"][name].reshape(x.shape) for name, x in model.state_dict().items()}
    others = {name: x for name, x in data["model"].items() if name.startswith(MODALITIES)}
    if dtype:
        weights, others = to_dtype(source, weights, dtype), to_dtype(source, others, dtype)

    check_holds(layout, source, config, others)
    kept = others if layout == "ours" else {}
    if layout == "worldrwkv":
        kept = {name: x for name, x in others.items() if name.startswith("adapter.image.")}
    left_out = {re.match(r"forecast_head|\w+\.\w+", name)[0] for name in others.keys() - kept}
    if left_out:
        holds = f"the layout {layout} holds {HOLDS[layout]}; --layout=ours holds all"
        print(f"{source}: {', '.join(sorted(left_out))} left out: {holds}", file=sys.stderr)

    if layout == "fla":
        contents = dict(to_fla(name, x) for name, x in weights.items())
    elif layout == "worldrwkv":
        contents = {rename(name, AUGUST, back=True)[0]: x for name, x in (weights | kept).items()}
        say_what_readers_need(source, config, weights | kept)
    else:
        contents = weights | kept
    if not kind:
        os.makedirs(target, exist_ok=True)
        if layout == "fla":
            with open(os.path.join(target, "config.json"), "w") as f:
                json.dump(fla_config(weights), f, indent=2)
    write(file, contents, config if layout == "ours" else None)


def write(path, tensors, config=None):
    """Writes {name: tensor}, and the config of a checkpoint of ours, as torch does or as safetensors (*.safetensors),
    all or nothing."""
    for name, x in tensors.items():
        if x.untyped_storage().nbytes() > x.nbytes:  # else torch writes all that it is a part of
            tensors[name] = x.clone()
    if not str(path).endswith(".safetensors"):
        return modrwkv.write(path, {"model": tensors, "config": config} if config else tensors)
    module, metadata = safetensors(path), {"format": "pt"}
    if config:
        metadata["config"] = json.dumps(config)
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    modrwkv.write(path, tensors, lambda tensors, f: f.write(module.save(tensors, metadata)))


def to_dtype(source, weights, dtype):
    """Tensors in a dtype; raises InputError where a number is too large for it."""
    cast = {name: x.to(dtype) for name, x in weights.items()}
    for name, x in weights.items():
        if cast[name].isinf().sum() > x.isinf().sum():
            raise InputError(f"{source}: {name} has numbers that are too large for {str(dtype)[6:]}")
    return cast


def check_holds(layout, source, config, others):
    """Raises InputError unless a layout holds such a model; others: its tensors that are not the language model's."""
    encoder, own = config["image_encoder"], ""
    if layout in ("fla", "worldrwkv") and (config["rwkv"] != 7 or config["head_size"] != 64):
        own = f"RWKV-{config['rwkv']} with heads of {config['head_size']}"
    elif layout == "worldrwkv" and (encoder == "none" or encoder in ENCODERS["image"]):
        own = f"image_encoder={encoder}"
    elif layout == "worldrwkv" and "adapter.image.mlp.0.weight" not in others:
        own = f"adapter_kind={config['adapter_kind']}"
    if own:
        raise InputError(f"{source} has {own}: the layout {layout} holds {HOLDS[layout]}")


def say_what_readers_need(source, config, weights):
    """A sentence about the settings that a reader of WorldRWKV's layout, which holds none, takes otherwise."""
    [layout] = [layout for start, _, layout in LAYOUTS if start == "llm."]
    read = dataclasses.asdict(Config()) | released_config("llm.", layout, weights)
    read["image_encoder"] = FAMILIES[read["image_encoder"]][2]
    own = dict(config)
    if own["image_encoder"] in FAMILIES:
        own["image_encoder"] = FAMILIES[own["image_encoder"]][2]
    names = "tokenizer", "template", "prompt_style", "scan", "cls", "conv_stride", "image_encoder"
    need = [f"--{name}={own[name]}" for name in names if own[name] != read[name]]
    if need:
        print(f"{source}: readers need {' '.join(need)}: the layout worldrwkv holds no settings", file=sys.stderr)


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


def main(argv=None):
    """python -m data.released"""
    about = __doc__ + "\nlayouts:\n" + "".join(f"  {name}: {holds}\n" for name, holds in HOLDS.items())
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m data.released", description=about, formatter_class=style)
    parser.add_argument("source", metavar="IN")
    parser.add_argument("target", metavar="OUT")
    parser.add_argument("--layout", choices=HOLDS)
    parser.add_argument("--dtype", choices=DTYPES[1:], help="by default each tensor's own")
    given = parser.parse_args(argv)
    dtype = getattr(torch, given.dtype) if given.dtype else None
    run(functools.partial(convert, given.source, given.target, given.layout, dtype))
