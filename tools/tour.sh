#!/usr/bin/env bash
# The commands of the README in small: two epochs on synthetic images, nothing downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; "$@"; }

quickstart=experiments/quickstart.py
short=(train.epochs=2 train.eval_every=2)

say python tools/train.py $quickstart --set "${short[@]}" model.freeze_stages=0 model.expand=repvgg
run=$(ls -td runs/quickstart/*/ | head -n 1)
say python deploy/reparam.py
say python deploy/export_onnx.py
say python deploy/quantize.py --images 16 --budget 1
say python tools/speed.py --images 50
say python tools/flops.py $quickstart --shape 160 160
say python tools/image_demo.py datasets/shapes/JPEGImages/test_00000.jpg --out "${run}detections.jpg"

# A folder in VOC layout, as your own data would be.
say python tools/train.py experiments/custom_voc.py --set data.root=datasets/shapes "${short[@]}" \
    data.image_size=160
say python tools/compare.py $quickstart experiments/quickstart_leak.py --seeds 2 --budget 2epochs
say python tools/errors.py experiments/quickstart_leak.py "$run" runs/quickstart_leak/1 --out runs/changed

echo
echo "Done. The comparison is in runs/compare/, the images that changed most are in runs/changed/."
