"""Numbers of an independent YOLOF, and ours with its weights.

`tests/data/yolof_reference.pt.gz` is the part of `../shared/reference/yolof.pt` these tests need
(MMDetection 3.3.0's YOLOF head and neck on the CPU; its README says what each value is). Kept are
weights, inputs, matches, losses and predictions; of the outputs of convolutions, and of `grad_x`,
rows 0 to 4 of image 0; gradients of the class logits, summed over classes and over anchors;
gradients of the deltas where not zero. Anchors are flattened in the order (y, x, side).
"""

import gzip
import io
from pathlib import Path

import pytest
import torch

from tinydet.yolof.encoder import DilatedEncoder
from tinydet.yolof.head import Head

DATA = Path(__file__).parents[1] / "data" / "yolof_reference.pt.gz"
SHARED = Path(__file__).resolve().parents[2] / "../shared/reference/yolof.pt"


@pytest.fixture(scope="session")
def reference():
    return torch.load(io.BytesIO(gzip.decompress(DATA.read_bytes())), weights_only=True)


@pytest.fixture(scope="session")
def whole_reference():
    if not SHARED.is_file():
        pytest.skip("needs ../shared/reference/yolof.pt, which is not part of the project")
    return torch.load(SHARED, weights_only=True)


def head_name(name):
    """Ours for one of the reference's parameter names."""
    part, index, *rest = name.split(".")
    if part in ("cls_subnet", "bbox_subnet"):
        tower = {"cls_subnet": "cls_tower", "bbox_subnet": "reg_tower"}[part]
        return f"{tower}.{3 * int(index) + (rest[0] == 'bn')}.{rest[1]}"
    ours = {"cls_score": "cls_score", "bbox_pred": "box_delta", "object_pred": "objectness"}
    return f"{ours[part]}.{index}"


def encoder_name(name):
    for theirs, ours in (
        ("dilated_encoder_blocks", "blocks"),
        ("fpn_", "output_"),
        (".conv.", ".0."),
        (".bn.", ".1."),
    ):
        name = name.replace(theirs, ours)
    return name


@pytest.fixture(scope="session")
def names():
    """The two translations of parameter names."""
    return {"head": head_name, "encoder": encoder_name}


def load(module, weights, translate):
    result = module.load_state_dict({translate(k): v for k, v in weights.items()}, strict=False)
    assert not result.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in result.missing_keys)
    return module


@pytest.fixture
def head(reference):
    return load(Head(64, 20, 5), reference["head"]["state_dict"], head_name)


@pytest.fixture
def encoder(reference):
    return load(DilatedEncoder(96, 64, 16), reference["neck"]["state_dict"], encoder_name)


def flat(maps, values):
    """(B, 5 * values, H, W) of the reference to (B, H * W * 5, values)."""
    b, _, h, w = maps.shape
    return maps.reshape(b, 5, values, h, w).permute(0, 3, 4, 1, 2).reshape(b, h * w * 5, values)


@pytest.fixture(scope="session")
def flatten():
    return flat


@pytest.fixture(scope="session")
def outputs(reference):
    """(cls_logits, deltas) of a mode, of ours for "eval" and "train" and given for the others."""

    def get(mode):
        part = reference["head"]
        if mode in ("eval", "train"):
            module = load(Head(64, 20, 5), part["state_dict"], head_name).train(mode == "train")
            with torch.no_grad():
                return module(part["x"])
        return flat(part["extreme"]["cls_score"], 20), flat(part[mode]["bbox_pred"], 4)

    return get
