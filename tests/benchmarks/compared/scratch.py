"""The base of a comparison whose verdicts are known: BCCD from random weights.

python tools/compare.py tests/benchmarks/compared/scratch.py tests/benchmarks/compared/imagenet.py \
    tests/benchmarks/compared/scratch_copy.py tests/benchmarks/compared/scratch_dbb.py \
    --budget 3m --halving

ImageNet's weights surely help, and a copy under another name surely does nothing. Run it from the
project's root; 12 runs of three minutes, and some minutes of timing and evaluation.
"""

from dataclasses import replace

from tinydet.experiment_file import load_experiment

pretrained = load_experiment("experiments/bccd_lite0.py")
experiment = replace(pretrained, name="", model=replace(pretrained.model, weights="random"))
