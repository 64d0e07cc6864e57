"""Official YOLOv5 checkpoints, read without running anything that is in them.

Such a file is a pickle of a whole model object, and loading it the usual way imports the project
it was trained with and calls whatever the file names. Here every class and function in the pickle
becomes an inert record of its name and arguments; the tensors are found by walking the records.
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

from tinydet.backbones.tensor_names import without_prefix

# Class of a storage in torch's zip format -> type of its elements.
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

_LAYERS = 10  # the backbone's; the neck and the head follow
# Layer and part in the official names -> ours; N is the number of a bottleneck.
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
    """Stands for an object of the pickle: what it was made of, and nothing that acts."""

    path = ""  # module and name of the class or function it stands for

    def __new__(cls, *args: Any, **_: Any) -> _Inert:
        self = super().__new__(cls)
        self.args = args
        self.state: Any = {}
        self.items: dict[Any, Any] = {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def extend(self, values: Any) -> None:
        """Take the elements of a list's subclass, which nobody reads."""

    append = extend

    def __call__(self, *args: Any, **_: Any) -> _Inert:
        return _Inert(*args)


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Inert]:
        return type("_Inert", (_Inert,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load_official(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of an official YOLOv5 checkpoint; nothing in the file is run.

    The averaged weights ("ema") are taken where there are some, as the project itself does.

    Args:
        path: a checkpoint of YOLOv5 (`yolov5s.pt`, or a training's `last.pt`), or a plain state
            dict, in torch's zip format.

    Returns:
        The tensors of the whole network under the names in the file, officially
        "model.0.conv.weight" and so on. Floating-point ones are float32.

    Raises:
        ValueError: no such file, or not a checkpoint that can be understood.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a YOLOv5 checkpoint (.pt)")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: not in torch's zip format, or cut short ({error}); download it again"
        ) from error
    # A pickle made to mislead can fail in any way.
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path}: not a YOLOv5 checkpoint ({type(error).__name__}: {reason}); "
            "give a .pt file of release 6.0 or later"
        ) from error


def convert_official(path: str | Path) -> dict[str, Tensor]:
    """Read the backbone of an official YOLOv5 checkpoint (release 6.0 or later).

    The official weights are published under the AGPL-3.0, which may bind what is made of them.

    Args:
        path: see `load_official`; what was converted before is read too, and names
            with a prefix.

    Returns:
        A state dict in the names of `tinydet.backbones.yolov5.YoloV5`.

    Raises:
        ValueError: no such file, not a checkpoint, or one of another network.
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
    """Tell whether the names of a state dict are those of the YOLOv5 project."""
    return any(re.match(r"model\.\d+\.", name) for name in state_dict)


def rename_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors under our names; those of the neck and head are left out.

    Args:
        state_dict: in the official names, "model.0.conv.weight" and so on.

    Raises:
        ValueError: the layers are not those of YOLOv5 6.0 or later with batch norms.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        layer = re.match(r"model\.(\d+)\.", name)
        if layer and int(layer[1]) < _LAYERS:
            renamed[_our_name(name)] = tensor
    for theirs, ours in _PATHS.items():
        if f"{ours.replace('N', '0')}.conv.weight" not in renamed:
            raise ValueError(f"no layer model.{theirs.replace('m', 'm.0')} as YOLOv5 6.0 has it")
    return renamed


def _our_name(name: str) -> str:
    pattern = r"model\.(\d)(?:(\.m)\.(\d+))?(\.cv\d)?\.(conv\.weight|bn\.\w+)"
    if found := re.fullmatch(pattern, name):
        layer, block, number, part, tensor = found.groups("")
        if path := _PATHS.get(f"{layer}{block}{part}"):
            return f"{path.replace('N', number)}.{tensor}"
    raise ValueError(
        f"{name} is no tensor of YOLOv5's backbone of release 6.0 or later; older releases, models "
        "whose batch norms are folded already and other networks are not read"
    )


def _read(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise ValueError("no data.pkl in it")
    folder = pickles[0].split("/")[0]
    order = f"{folder}/byteorder"
    if order in archive.namelist() and _stored(archive, order) != b"little":
        raise ValueError("written on a big-endian machine")
    checkpoint = _InertUnpickler(io.BytesIO(_stored(archive, pickles[0]))).load()
    tensors = {
        name: _tensor(record, archive, folder) for name, record in _records(_network(checkpoint))
    }
    if not tensors:
        raise ValueError("no tensors where a network or a state dict has them")
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    # Torch never compresses; a few compressed bytes could unpack to more than the memory.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


def _entries(value: Any) -> dict[Any, Any]:
    """Return what a dict or the record of an OrderedDict holds."""
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
    seen = set()  # a pickle can hold a circle
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
        raise ValueError(f"a tensor of an unknown kind, {record.path}")
    dtype = _DTYPES[storage_class.path]
    content = _stored(archive, f"{folder}/data/{key}")
    if len(content) != count * dtype.itemsize or math.prod(size) > count:
        raise ValueError(f"data/{key} has not the length of its tensor")
    if not content:
        return torch.empty(size, dtype=dtype)
    storage = torch.frombuffer(bytearray(content), dtype=dtype)
    return torch.as_strided(storage, size, stride, offset).clone()
