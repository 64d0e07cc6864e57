"""Reads official YOLOv5 checkpoints without running code in them.

Such a file is a pickle of a whole model object. Loading it the usual way imports the project it was
trained with and calls any function that the file names. Here every class and function in the pickle
is replaced by an inert record of its name and arguments, and the tensors are collected from these.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinydet.backbones.state_dict import without_prefix

# Storage class in torch's zip format -> dtype.
_DTYPES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")

_LAYERS = 10  # layers of the backbone; those of the neck and head follow
# Layer and part in the official names -> our name; N is the index of a bottleneck.
_PATHS = {
    "0": "stem",
    "9.cv1": "stages.3.pyramid.reduce",
    "9.cv2": "stages.3.pyramid.merge",
}
for _stage in range(4):
    _csp = 2 * _stage + 2
    _PATHS |= {
        f"{_csp - 1}": f"stages.{_stage}.downsample",
        f"{_csp}.cv1": f"stages.{_stage}.csp.main",
        f"{_csp}.cv2": f"stages.{_stage}.csp.side",
        f"{_csp}.cv3": f"stages.{_stage}.csp.merge",
        f"{_csp}.m.cv1": f"stages.{_stage}.csp.blocks.N.reduce",
        f"{_csp}.m.cv2": f"stages.{_stage}.csp.blocks.N.conv",
    }


class _Inert:
    """Stands for an object of the pickle: records its arguments and state, and does nothing."""

    path = ""  # module and name of the class or function it stands for
    args: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **_: Any) -> _Inert:
        self = super().__new__(cls)
        self.args = args
        self.state = {}
        self.items = {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def extend(self, values: Any) -> None:
        """Ignore the elements of a list subclass, which are not needed."""

    append = extend

    def __call__(self, *args: Any, **_: Any) -> _Inert:
        return _Inert(*args)


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Inert]:
        return type("_Inert", (_Inert,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load_official(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of an official YOLOv5 checkpoint without running code in it.

    The averaged weights ("ema") are preferred if present, as in the project itself.

    Args:
        path: a checkpoint of YOLOv5 (`yolov5s.pt`, or a training's `last.pt`), or a plain state
            dict, in torch's zip format.

    Returns:
        The tensors of the whole network under the names in the file, officially
        "model.0.conv.weight" and so on; floating-point ones are converted to float32.

    Raises:
        ValueError: the file does not exist or is not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a YOLOv5 checkpoint (.pt)")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: not in torch's zip format, or truncated ({error}); download it again"
        ) from error
    # A malicious pickle can raise anything.
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path}: not a YOLOv5 checkpoint ({type(error).__name__}: {reason}); "
            "give a .pt file of release 6.0 or later"
        ) from error


def convert_official(path: str | Path) -> dict[str, Tensor]:
    """Read the backbone of an official YOLOv5 checkpoint (release 6.0 or later).

    The official weights are published under the AGPL-3.0, which may apply to derived weights.

    Args:
        path: see `load_official`; already converted files and names with a prefix are read too.

    Returns:
        A state dict with the names of `tinydet.backbones.yolov5.YoloV5`.

    Raises:
        ValueError: the file does not exist, or is not a checkpoint of this network.
    """
    names = ("model.0.conv.weight", "stem.conv.weight")
    tensors, _ = without_prefix(load_official(path), names)
    if "stem.conv.weight" in tensors:
        return tensors
    try:
        return rename_official(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_official(state_dict: Mapping[str, Any]) -> bool:
    """Return whether a state dict has the names of the YOLOv5 project."""
    return any(re.match(r"model\.\d+\.", name) for name in state_dict)


def rename_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors under our names, without those of the neck and head.

    Args:
        state_dict: with the official names, "model.0.conv.weight" and so on.

    Raises:
        ValueError: the layers are not those of YOLOv5 6.0 or later, with batch norms.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        layer = re.match(r"model\.(\d+)\.", name)
        if layer and int(layer[1]) < _LAYERS:
            renamed[_our_name(name)] = tensor
    for theirs, ours in _PATHS.items():
        if f"{ours.replace('N', '0')}.conv.weight" not in renamed:
            raise ValueError(
                f"the layer model.{theirs.replace('m', 'm.0')} of YOLOv5 6.0 is missing"
            )
    return renamed


def _our_name(name: str) -> str:
    pattern = r"model\.(\d)(?:(\.m)\.(\d+))?(\.cv\d)?\.(conv\.weight|bn\.\w+)"
    if found := re.fullmatch(pattern, name):
        layer, block, number, part, tensor = found.groups("")
        if path := _PATHS.get(f"{layer}{block}{part}"):
            return f"{path.replace('N', number)}.{tensor}"
    raise ValueError(
        f"{name} is not a tensor of the backbone of YOLOv5 6.0 or later; older releases, models "
        "with folded batch norms and other networks are not supported"
    )


def _read(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise ValueError("contains no data.pkl")
    folder = pickles[0].split("/")[0]
    order = f"{folder}/byteorder"
    if order in archive.namelist() and _stored(archive, order) != b"little":
        raise ValueError("written on a big-endian machine")
    checkpoint = _InertUnpickler(io.BytesIO(_stored(archive, pickles[0]))).load()
    tensors = {
        name: _tensor(record, archive, folder) for name, record in _records(_network(checkpoint))
    }
    if not tensors:
        raise ValueError("contains no network or state dict")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    # Torch never compresses, and a small compressed file could expand beyond the memory.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


def _entries(value: Any) -> dict[Any, Any]:
    """Return the items of a dict or of the record of an OrderedDict."""
    if isinstance(value, _Inert):
        return value.items
    return value if isinstance(value, dict) else {}


def _network(checkpoint: Any) -> Any:
    """Return the record of the network, or the mapping of its tensors."""
    for key in ("ema", "state_dict_ema", "model_ema", "model", "state_dict"):
        if found := _entries(checkpoint).get(key):
            return found
    return checkpoint


def _records(network: Any) -> Iterator[tuple[str, _Inert]]:
    """Yield the names and records of a module's tensors, or those of a mapping."""
    for name, record in _entries(network).items():
        if isinstance(name, str) and _is_tensor(record):
            yield name, record
    waiting = [("", network)]
    seen = set()  # a pickle can contain a cycle
    while waiting:
        prefix, module = waiting.pop()
        if not isinstance(module, _Inert) or id(module) in seen:
            continue
        seen.add(id(module))
        state = _entries(module.state)
        for kind in ("_parameters", "_buffers"):
            for name, record in _entries(state.get(kind)).items():
                if _is_tensor(record):
                    yield f"{prefix}{name}", record
        children = _entries(state.get("_modules")).items()
        waiting.extend((f"{prefix}{name}.", child) for name, child in reversed(children))


def _is_tensor(record: Any) -> bool:
    return isinstance(record, _Inert) and record.path in (_TENSOR, *_PARAMETERS)


def _tensor(record: _Inert, archive: zipfile.ZipFile, folder: str) -> Tensor:
    """Build the tensor of a record, as a copy."""
    if record.path in _PARAMETERS:
        record = record.args[0]
    (kind, storage_class, key, _, count), offset, size, stride = record.args[:4]
    if record.path != _TENSOR or kind != "storage" or storage_class.path not in _DTYPES:
        raise ValueError(f"contains a tensor of an unknown kind, {record.path}")
    dtype = _DTYPES[storage_class.path]
    content = _stored(archive, f"{folder}/data/{key}")
    if len(content) != count * dtype.itemsize or math.prod(size) > count:
        raise ValueError(f"data/{key} does not match the size of its tensor")
    if not content:
        return torch.empty(size, dtype=dtype)
    storage = torch.frombuffer(bytearray(content), dtype=dtype)
    return torch.as_strided(storage, size, stride, offset).clone()
