#!/usr/bin/env bash
# Start the head of a Ray cluster on this machine, in the foreground.
#
#   NODE_IP   this machine's address on the cluster's network (needed)
#   PORT      of Ray's GCS, 6379 by default
#   CPUS      logical CPUs offered to slices; 0 keeps groups off the head
#   TOKEN_FILE  file with the cluster's token, alike on every machine; without one, whoever reaches
#             the cluster's network can run code on it
set -euo pipefail
: "${NODE_IP:?give this machine address on the network of the cluster}"
export RAY_USAGE_STATS_ENABLED=0
if [ -n "${TOKEN_FILE:-}" ]; then
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$TOKEN_FILE"
else  # else Ray's head would take a token that lies in ~/.ray, and its workers would not
  export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"
fi
ulimit -n 65536 || echo "open files stay at $(ulimit -n); Ray wants 65536" >&2
exec ray start --head --block --disable-usage-stats \
  --node-ip-address "$NODE_IP" --port "${PORT:-6379}" \
  --num-cpus "${CPUS:-1}" --num-gpus 0 \
  --dashboard-host 127.0.0.1
