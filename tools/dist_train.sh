#!/usr/bin/env bash
# Train on several GPUs: [PORT=N] bash tools/dist_train.sh EXPERIMENT GPUS [OPTIONS OF tools/train.py]
# Several machines: on each, with the same NNODES, MASTER_ADDR and PORT and its own NODE_RANK.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: bash tools/dist_train.sh EXPERIMENT GPUS [OPTIONS OF tools/train.py]" >&2
    exit 2
fi
tools=$(dirname "$0")
exec python "$tools/dist_launch.py" "$2" "$tools/train.py" "$1" "${@:3}"
