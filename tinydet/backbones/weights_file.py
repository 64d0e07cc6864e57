"""Reads the tensors of a weights file without running code in it, or says what the file is."""

from __future__ import annotations

import argparse
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# Under these training scripts keep the network's tensors; averaged weights first, as timm does.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_AGAIN = "copy or download it again"
_SAVE_TENSORS = "save the model's state_dict() alone, with torch.save"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict, alone or in a training script's checkpoint.

    Args:
        path: a file of torch.save, or a .safetensors file.

    Raises:
        ValueError: there is no such file, or it holds something else; says what.
    """
    refuse_other_files(path)
    try:
        if path.suffix == ".safetensors":
            loaded = load_file(path)
        else:
            # timm's training script keeps its options in the checkpoint. Warnings of a file that
            # is then refused would be a second message.
            allowed = torch.serialization.safe_globals([argparse.Namespace])
            with allowed, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # Damaged and crafted files make the readers raise many types.
        raise ValueError(f"{path}: {_why_unread(path)}") from error
    state_dict = _unwrapped(loaded)
    if not state_dict or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state_dict.items()
    ):
        raise ValueError(f"{path}: holds no state dict; {_SAVE_TENSORS}")
    return dict(state_dict)


def refuse_other_files(path: Path) -> None:
    """Refuse a path that is no file, and a file that by its first bytes holds no tensors.

    Raises:
        ValueError: says what it is instead, and what to do.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the weights file in it")
    if not path.is_file():
        raise ValueError(f'{path}: no such file; give a state-dict file, "imagenet" or "random"')
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty (0 bytes); {_AGAIN}")
    if start.startswith(b"<"):
        raise ValueError(
            f"{path}: is a web page (HTML), such as a site's login or error page, and no weights; "
            "download the file itself"
        )
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: is a Git LFS pointer and not the file itself; run git lfs pull")
    if start.startswith((b"{", b"[")):
        raise ValueError(f"{path}: is JSON text and no weights; give a .pth or .safetensors file")


def _unwrapped(loaded: Any) -> Mapping[Any, Any]:
    """Return the innermost dict under the wrappers' names; empty where there is no dict."""
    for _ in range(len(_WRAPPERS)):  # A bound, as a crafted file can hold a circle.
        inner = [loaded[k] for k in _WRAPPERS if isinstance(loaded, Mapping) and k in loaded]
        loaded = next((value for value in inner if isinstance(value, Mapping)), loaded)
    return loaded if isinstance(loaded, Mapping) else {}


def _why_unread(path: Path) -> str:
    """Say why the readers of torch and safetensors refuse a file, by what it looks like.

    Their own messages advise to load it with the code in it.
    """
    with path.open("rb") as file:
        start = file.read(9)
    is_safetensors = start[8:] == b"{"  # The header's length in 8 bytes, then the header in JSON.
    if is_safetensors != (path.suffix == ".safetensors"):
        kind = ".safetensors" if is_safetensors else ".pth"
        if is_safetensors or zipfile.is_zipfile(path):
            return f"is a {kind} file under another name; rename it"
        return f"is no safetensors file, or damaged; {_AGAIN}"
    if is_safetensors:
        return f"is damaged, cut short, or of a type of numbers that torch lacks; {_AGAIN}"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                return "is a zip archive, but none of torch's; unpack it and give the file in it"
        return (
            "is damaged, or holds Python objects or code, such as a whole model, beside its "
            f"tensors: these are never loaded; {_SAVE_TENSORS}"
        )
    if start.startswith(b"PK"):
        return f"is damaged or cut short; {_AGAIN}"
    if start.startswith(b"\x80"):
        return (
            "is a pickle that is damaged or holds Python objects or code, which are never loaded; "
            f"{_SAVE_TENSORS}"
        )
    return "is no file of torch's and no .safetensors file; give a state-dict file"
