#!/usr/bin/env bash
# Download PASCAL VOC 2007 into datasets/VOCdevkit/VOC2007 (--root DIR: into DIR/VOCdevkit/VOC2007).
# An interrupted download continues where it stopped; archives put into the folder by hand are used.
set -euo pipefail

project="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m tinydet.data.download --root "$project/datasets" "$@"
