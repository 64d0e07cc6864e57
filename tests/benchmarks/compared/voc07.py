"""The base of what is tried on VOC 2007: experiments/voc07_cpu.py.

python tools/compare.py tests/benchmarks/compared/voc07.py tests/benchmarks/compared/voc07_*.py
"""

from tinydet.experiment_file import load_experiment

PLACES = "blocks.2 blocks.3 blocks.4 blocks.5 blocks.6"
CONVS = f"3x3 5x5 {PLACES}"
experiment = load_experiment("experiments/voc07_cpu.py")
