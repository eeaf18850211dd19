"""What scripts share: flags for the fields of dataclasses, what --device and --dtype name, errors as one line."""

import argparse
import contextlib
import dataclasses
import difflib
import sys

import torch

from modrwkv import InputError, check_settings

DTYPES = "auto", "float32", "bfloat16", "float16"


def run(main):
    """main(), with what the user gave wrong as one line, and Ctrl-C without a traceback."""
    try:
        main()
    except (InputError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


def find_device(name):
    """The torch.device of a --device flag; auto takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device  # "cuda" becomes "cuda:0"
    except (RuntimeError, AssertionError) as e:  # torch built without CUDA asserts
        raise InputError(f"--device={name} cannot be used here: {str(e).splitlines()[0]}") from e


def autocast_dtype(name, device):
    """The dtype of --dtype; auto: bfloat16 where the hardware multiplies in it, on older GPUs float16, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # is_bf16_supported() also says yes where it is emulated
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else torch.float32


def peak_memory(device, reset=False):
    """The most bytes that were allocated on the GPU, or that this process had, since a reset; 0 where not known."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    with contextlib.suppress(OSError), open("/proc/self/status") as f:  # Linux
        return 1024 * int(f.read().split("VmHWM:")[1].split()[0])
    return 0


def flags(about, *classes, argv=None, presets=None):
    """Command-line flags for the fields of dataclasses, made with `setting`.

    presets: a function from the value of --data to the flags that hold where they are not given.
    Returns: an instance of each class, and the set of the names that were given.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"error: {message}; see --help\n")

    def boolean(text):
        if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
            raise ValueError
        return text.lower() in ("true", "1", "yes")

    style = argparse.RawDescriptionHelpFormatter
    usage = "python %(prog)s [--name=value ...]"
    parser = Parser(usage=usage, description=about, allow_abbrev=False, add_help=False, formatter_class=style)
    parser.add_argument("-h", "--help", action="store_true", help=argparse.SUPPRESS)
    metavars, actions, values = {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT", tuple: "TEXT"}, {}, {}
    for cls in classes:
        group = parser.add_argument_group(cls.__doc__)
        for f in dataclasses.fields(cls):
            kind = {"type": boolean, "nargs": "?", "const": True} if f.type is bool else {"type": f.type}
            kind = {"action": "append"} if f.type is tuple else kind
            actions[f.name] = group.add_argument(
                f"--{f.name}", default=argparse.SUPPRESS, metavar=metavars[f.type], help=f.metadata["help"], **kind
            )
            values[f.name] = f.default
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name.lstrip("-"), values, 1)
        parser.error(f"there is no {name}" + (f": did you mean --{near[0]}?" if near else ""))
    given = vars(given)
    wants_help = given.pop("help")
    if presets:
        values |= vars(parser.parse_args(presets(given.get("data", values["data"])).split()))
    values |= given
    if wants_help:  # each flag with the value that a run will have
        for name, action in actions.items():
            value = values[name] or "" if action.metavar == "TEXT" else values[name]
            action.help = f"{action.help} [{value}]".replace("%", "%%")
        parser.print_help()
        sys.exit(0)
    settings = [cls(**{f.name: values[f.name] for f in dataclasses.fields(cls)}) for cls in classes]
    for each in settings:
        check_settings(each)
    return *settings, set(given)
