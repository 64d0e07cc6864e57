#!/usr/bin/env bash
# Start SCRIPT in PROCESSES processes of this machine: bash tools/dist_launch.sh SCRIPT PROCESSES [ARGUMENTS]
# The port is PORT, or any free one if that is taken. On several machines torchrun runs on each with the
# same NNODES, MASTER_ADDR and PORT and its own NODE_RANK.
set -euo pipefail
script=$1 processes=$2
shift 2
port=${PORT:-29500} nodes=${NNODES:-1}
if [ "$nodes" = 1 ]; then
    port=$(python - "$port" <<'END'
import socket, sys
with socket.socket() as tried:
    try:
        tried.bind(("127.0.0.1", int(sys.argv[1])))
    except OSError:
        tried.bind(("127.0.0.1", 0))
    print(tried.getsockname()[1])
END
    )
fi
exec python -m torch.distributed.run --nproc-per-node "$processes" --nnodes "$nodes" \
    --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$port" \
    "$script" "$@"
