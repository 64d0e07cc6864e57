"""Try one small model of every family of timm's as a backbone, and print which fit as a table.

A family is a module of timm's. Weights are random; nothing is trained or fetched. It takes a
minute or two. Run from the project's root:
python tests/benchmarks/backbones_that_fit.py [MODEL ...]
"""

from __future__ import annotations

import re
import sys
from collections import Counter

import timm
from timm_models import family_of

from tinydet.backbones.factory import create_backbone
from tinydet.config import ConfigError

FEATURES = ("C5", "C4", "DC5")
# A small one of every family that has one of at most 30 M parameters, and both kinds of MaxxViT.
MODELS = [
    "halonet_h1", "repvgg_a0", "cait_xxs24_224", "coat_tiny", "convit_tiny", "convmixer_768_32",
    "convnext_atto", "cpubone_nano", "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s",
    "cspnext_tiny", "davit_tiny", "deit_tiny_patch16_224", "densenet121", "dla46x_c", "dpn48b",
    "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0", "tf_efficientnet_lite0",
    "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb",
    "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050",
    "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "sam2_hiera_tiny", "hrnet_w18_small",
    "iformer_t", "inception_next_atto", "inception_v3", "lcnetv2_small", "levit_128s",
    "lowformer_b0", "mambaout_femto", "coatnet_pico_rw_224", "maxvit_nano_rw_256",
    "poolformerv2_s12", "gmlp_ti16_224", "mobilenetv3_small_050", "mobilevit_xxs", "mvitv2_tiny",
    "nest_tiny", "nf_resnet26", "pit_ti_224", "pvt_v2_b0", "rdnet_tiny", "regnetx_002",
    "repghostnet_050", "repvit_m1", "res2next50", "resnest14d", "resnet18", "resnetv2_18",
    "rexnet_100", "legacy_seresnet18", "sequencer2d_s", "shufflenetv2_x0_5", "shvit_s1",
    "skresnet18", "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224",
    "twins_svt_small", "visformer_tiny", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224",
    "test_vit_relpos", "vitamin_small_224", "volo_d1_224", "ese_vovnet19b_slim_dw",
    "legacy_xception", "xception41p", "xcit_nano_12_p8_224", "yolov5n",
]  # fmt: skip


def outcome(name: str, feature: str) -> str:
    """Return "yes", or why a model cannot be the backbone."""
    try:
        create_backbone(name, "random", feature)
    except ConfigError as error:
        reason = str(error).removeprefix(f"model.backbone={name}: ")
        if found := re.search(r"must have the shape (.*)\. Choose", reason):
            return f"some sizes only: {found[1]}"
        if strides := re.search(r"its strides are (.*)", reason):
            return f"no such stride: {strides[1]}"
        return "not dilated" if "cannot dilate" in reason else reason
    except Exception as error:
        return f"FAULT, not refused: {type(error).__name__}: {error}"
    return "yes"


def main() -> None:
    """Print a row for each model, named or ours, the totals, and the families not tried."""
    names = sys.argv[1:] or MODELS
    print("| family | model | " + " | ".join(FEATURES) + " |")
    print("|---" * (2 + len(FEATURES)) + "|", flush=True)
    totals = {feature: Counter() for feature in FEATURES}
    for name in names:
        found = [outcome(name, feature) for feature in FEATURES]
        print(f"| {family_of(name)} | {name} | " + " | ".join(found) + " |", flush=True)
        for feature, word in zip(FEATURES, found, strict=True):
            totals[feature][word.split(":")[0]] += 1
    for feature, words in totals.items():
        print(f"\n{feature}: " + ", ".join(f"{n} {word}" for word, n in words.most_common()))
    print("\nnot tried: " + ", ".join(sorted({*timm.list_modules()} - {*map(family_of, names)})))


if __name__ == "__main__":
    main()
