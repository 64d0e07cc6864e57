#!/usr/bin/env bash
# Train, test, fold, export, time and draw, on synthetic images. Nothing is downloaded.
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

Done. Written to ${run}
  report.html        curves, accuracy per class, worst images, problems in the data; open it in a browser
  metrics.json       the same numbers for scripts
  log.jsonl          losses and accuracy, one line each; TensorBoard events are beside it
  best.pt, last.pt   checkpoints in training form
  deploy.pt          the folded network
  deploy.onnx        the same network, from uint8 pixels to boxes
  detections.jpg     the detections in $image
END
