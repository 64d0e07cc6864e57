#!/usr/bin/env bash
# Train, fold, export, draw and time, on synthetic images. Nothing is downloaded.
# Options of tools/train.py may follow.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '\n== %s\n' "$*"; "$@"; }

say python tools/train.py experiments/quickstart.py "$@"
run=$(ls -td runs/quickstart/*/ | head -n 1)
say python deploy/reparam.py "${run}best.pt"
say python deploy/export_onnx.py "${run}deploy.pt"
say python tools/image_demo.py 'datasets/shapes/JPEGImages/test_0000[0-8].jpg' "${run}deploy.onnx" \
    --score-threshold 0.45 --out "${run}detections.jpg"
say python tools/speed.py "${run}best.pt" --images 200

cat <<END

Done. Written to ${run}
  detections.jpg     what it finds in nine images that it was not trained on
  report.html        curves, accuracy per class, images with their errors, problems in the data; open it in a browser
  best.pt            the trained network
  deploy.onnx        the same network, folded, from uint8 pixels to boxes

Next: does an idea help? And your own images, in VOC's layout:
  python tools/compare.py experiments/quickstart.py experiments/quickstart_leak.py --seeds 3 --budget 2m
  python tools/train.py experiments/custom_voc.py --set data.root=FOLDER
END
