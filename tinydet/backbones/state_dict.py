"""State dicts: reading them from files safely, and loading them by tensor name."""

from __future__ import annotations

import argparse
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# Keys under which training scripts save the weights; averaged weights first, as in timm.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_RETRY = "copy or download it again"
_SAVE_TENSORS = "save the model's state_dict() alone, with torch.save"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict, alone or in a training script's checkpoint, without running pickled code.

    Args:
        path: a file written by torch.save, or a .safetensors file.

    Raises:
        ValueError: the file does not exist or has other contents; the message says which.
    """
    state_dict = _unwrapped(read_content(path))
    if not state_dict or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state_dict.items()
    ):
        raise ValueError(f"{path}: contains no state dict; {_SAVE_TENSORS}")
    return dict(state_dict)


def read_content(path: Path) -> Any:
    """Read whatever a weights file holds, tensors and plain data, without running pickled code.

    Raises:
        ValueError: as `read_tensors`.
    """
    check_weights_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # timm's training script saves its options, a Namespace. Warnings are suppressed since
        # a file that cannot be read gets one error message.
        allowed = torch.serialization.safe_globals([argparse.Namespace])
        with allowed, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # The readers raise many types on damaged files.
        raise ValueError(f"{path}: {_describe_unreadable(path)}") from error


def check_weights_file(path: Path) -> None:
    """Check that a path is a file and that its first bytes may be those of a weights file.

    Raises:
        ValueError: it is not; the message says what it is and what to do.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the weights file in it")
    if not path.is_file():
        raise ValueError(f'{path}: no such file; give a state-dict file, "imagenet" or "random"')
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty (0 bytes); {_RETRY}")
    if start.startswith(b"<"):
        raise ValueError(
            f"{path}: is a web page (HTML), such as a login or error page, not a weights file; "
            "download the file itself"
        )
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a Git LFS pointer, not the file itself; run git lfs pull")
    if start.startswith((b"{", b"[")):
        raise ValueError(f"{path}: is JSON text, not weights; give a .pth or .safetensors file")


def _unwrapped(loaded: Any) -> Mapping[Any, Any]:
    """Return the innermost dict under the keys `_WRAPPERS`; empty if there is no dict."""
    for _ in range(len(_WRAPPERS)):  # Bounded, since a file can contain a cycle.
        inner = [loaded[k] for k in _WRAPPERS if isinstance(loaded, Mapping) and k in loaded]
        loaded = next((value for value in inner if isinstance(value, Mapping)), loaded)
    return loaded if isinstance(loaded, Mapping) else {}


def _describe_unreadable(path: Path) -> str:
    """Describe a file that torch and safetensors cannot read.

    Their own messages advise to load it with `weights_only=False`, which runs code in it.
    """
    with path.open("rb") as file:
        start = file.read(9)
    is_safetensors = start[8:] == b"{"  # 8 bytes of header length, then JSON.
    if is_safetensors != (path.suffix == ".safetensors"):
        kind = ".safetensors" if is_safetensors else ".pth"
        if is_safetensors or zipfile.is_zipfile(path):
            return f"is a {kind} file under another name; rename it"
        return f"is not a safetensors file, or is damaged; {_RETRY}"
    if is_safetensors:
        return f"is damaged, truncated, or of a dtype that torch lacks; {_RETRY}"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                return "is a zip archive, but not one of torch's; unpack it and give the file in it"
        return (
            "is damaged, or contains Python objects or code besides tensors, such as a whole "
            f"model, which are never loaded; {_SAVE_TENSORS}"
        )
    if start.startswith(b"PK"):
        return f"is damaged or truncated; {_RETRY}"
    if start.startswith(b"\x80"):
        return (
            "is a pickle that is damaged or contains Python objects or code, which are never "
            f"loaded; {_SAVE_TENSORS}"
        )
    return "is neither a torch nor a .safetensors file; give a state-dict file"


def without_prefix(
    tensors: Mapping[str, Tensor], known: Iterable[str]
) -> tuple[dict[str, Tensor], str]:
    """Remove a common prefix of wrappers from tensor names: `module.`, `backbone.` and so on.

    Args:
        tensors: a state dict.
        known: names of the network's tensors, at least some of which the file should have.

    Returns:
        The tensors whose names start with the prefix, under their names without it; and the prefix,
        which ends in a dot or is empty. It is the one whose removal makes most names known.
    """
    wanted = {_plain(name) for name in known}
    counts: Counter[str] = Counter()
    for name in tensors:
        for start in (0, *(i + 1 for i, letter in enumerate(name) if letter == ".")):
            if _plain(name[start:]) in wanted:
                counts[name[:start]] += 1
    prefix = max(counts, key=lambda p: (counts[p], -len(p)), default="")
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return found, prefix


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> str:
    """Load every tensor of a feature extractor, or raise and load none.

    Args:
        module: made by timm with `features_only`, which writes `stages_0` for `stages.0`. Layers of
            the experiment's own may keep their initial values.
        tensors: of the whole network or of such an extractor; tensors unknown to it are ignored.
        source: where the tensors come from and for which network, for messages.

    Returns:
        Remarks on a removed prefix, on tensors that were ignored, and on layers of the experiment's
        own that keep their initial values; empty if there are none.

    Raises:
        ValueError: a tensor is missing, has another shape, or has integers instead of floats.
    """
    # Two of timm's wrappers hold the network as their only child.
    children = dict(module.named_children())
    body = next(iter(children.values())) if set(children) in ({"model"}, {"body"}) else module
    own = body.state_dict()
    found, prefix = without_prefix(tensors, own)
    by_plain_name = {_plain(name): tensor for name, tensor in found.items()}
    given = {name: found.get(name, by_plain_name.get(_plain(name))) for name in own}
    problems = {name: _mismatch(given[name], own[name]) for name in own}
    initial = {name for name in own_tensors(body) if given[name] is None}
    # Old files lack these counters, which are not used.
    needed = [n for n in own if n not in initial and not n.endswith("num_batches_tracked")]
    wrong = [name for name in needed if problems[name]]
    if wrong:
        raise ValueError(
            f"{source}: {len(wrong)} of the {len(needed)} tensors needed are missing or have "
            f"another shape or dtype, e.g. {wrong[0]} {problems[wrong[0]]}; the first name in the "
            f"file is {next(iter(tensors), 'none')}"
            + (f", and removing the prefix {prefix} is not enough" if prefix else "")
            + ". Is the file for this model?"
        )
    body.load_state_dict({name: own[name] if problems[name] else given[name] for name in own})
    known = {_plain(name) for name in own}
    unused = [name for name in found if _plain(name) not in known]
    remarks = [f"removed the prefix {prefix} from its tensor names"] if prefix else []
    if unused:
        remarks.append(
            f"{len(unused)} tensors of the file are of layers that this backbone does not have, "
            f"e.g. {unused[0]}"
        )
    if initial:
        example = min(initial)
        remarks.append(f"{len(initial)} tensors of own layers are initial, e.g. {example}")
    return "; ".join(remarks)


def own_tensors(module: nn.Module) -> set[str]:
    """Return the names of the tensors of layers whose classes are the experiment's own."""
    libraries = ("torch", "timm", "torchvision", "tinydet")
    return {
        f"{name}.{key}".removeprefix(".")
        for name, layer in module.named_modules()
        if type(layer).__module__.partition(".")[0] not in libraries
        for key in (*layer._parameters, *layer._buffers)
    }


def _plain(name: str) -> str:
    return name.replace("_", ".")


def _mismatch(given: Tensor | None, own: Tensor) -> str:
    if given is None:
        return "is missing"
    if given.shape != own.shape:
        return f"has the shape {tuple(given.shape)}, not {tuple(own.shape)}"
    # 8-bit values of a quantized network are meaningless without their scales.
    is_float = given.is_floating_point() and given.dtype.itemsize > 1
    if own.is_floating_point() and not is_float:
        return f"has the dtype {given.dtype}, not {own.dtype}"
    return ""
