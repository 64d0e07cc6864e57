#!/usr/bin/env bash
# Train on several GPUs: bash tools/dist_train.sh EXPERIMENT GPUS [OPTIONS OF tools/train.py]
# Port and several machines: see tools/dist_launch.sh.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: bash tools/dist_train.sh EXPERIMENT GPUS [OPTIONS OF tools/train.py]" >&2
    exit 2
fi
tools=$(dirname "$0")
exec bash "$tools/dist_launch.sh" "$tools/train.py" "$2" "$1" "${@:3}"
