#!/usr/bin/env bash
# Evaluate on several GPUs: [PORT=N] bash tools/dist_test.sh EXPERIMENT CHECKPOINT GPUS [OPTIONS OF tools/test.py]
set -euo pipefail
if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: bash tools/dist_test.sh EXPERIMENT CHECKPOINT GPUS [OPTIONS OF tools/test.py]" >&2
    exit 2
fi
tools=$(dirname "$0")
exec python "$tools/dist_launch.py" "$3" "$tools/test.py" "$1" "$2" "${@:4}"
