#!/usr/bin/env bash
# Evaluate on several GPUs: bash tools/dist_test.sh EXPERIMENT CHECKPOINT GPUS [OPTIONS OF tools/test.py]
# Port and several machines: see tools/dist_launch.sh.
set -euo pipefail
if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: bash tools/dist_test.sh EXPERIMENT CHECKPOINT GPUS [OPTIONS OF tools/test.py]" >&2
    exit 2
fi
tools=$(dirname "$0")
exec bash "$tools/dist_launch.sh" "$tools/test.py" "$3" "$1" "$2" "${@:4}"
