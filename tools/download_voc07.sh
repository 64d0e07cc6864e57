#!/usr/bin/env bash
# Download PASCAL VOC 2007 into datasets/VOCdevkit/VOC2007 (with --root DIR: DIR/VOCdevkit/VOC2007).
# Archives that are already in that folder, downloaded by hand for instance, are used.
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" "$project/tools/download_voc07.py" --root "$project/datasets" "$@"
