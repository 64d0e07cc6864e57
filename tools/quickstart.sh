#!/usr/bin/env bash
# The whole path on synthetic images: train, test, fold, export, time, draw. Nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; "$@"; }

say python tools/train.py experiments/quickstart.py
run=$(ls -td runs/quickstart/*/ | head -n 1)
say python tools/test.py experiments/quickstart.py "${run}best.pt" --eval mAP
say python deploy/reparam.py "${run}best.pt"
say python deploy/export_onnx.py "${run}deploy.pt"
say python tools/speed.py experiments/quickstart.py "${run}best.pt" --images 300
image=datasets/shapes/JPEGImages/$(head -n 1 datasets/shapes/ImageSets/Main/test.txt).jpg
say python tools/image_demo.py "$image" experiments/quickstart.py "${run}deploy.pt" \
    --out "${run}detections.jpg"

cat <<END

Done. In ${run}
  report.html        curves, classes, worst images, problems found in the data, in a browser
  metrics.json       the same numbers for scripts
  log.jsonl          losses and accuracy, a line each; TensorBoard events beside it
  best.pt, last.pt   checkpoints in training form
  deploy.pt          the folded network
  deploy.onnx        the same, from uint8 pixels to boxes
  detections.jpg     what it sees in $image
END
