#!/usr/bin/env bash
# Start the head of a Ray cluster on this machine, in the foreground.
#
#   NODE_IP   this machine's address on the cluster's network (needed)
#   PORT      of Ray's GCS, 6379 by default
#   CPUS      logical CPUs offered to slices; 0 keeps groups off the head
set -euo pipefail
: "${NODE_IP:?give this machine address on the network of the cluster}"
export RAY_USAGE_STATS_ENABLED=0
ulimit -n 65536 || echo "open files stay at $(ulimit -n); Ray wants 65536" >&2
exec ray start --head --block --disable-usage-stats \
  --node-ip-address "$NODE_IP" --port "${PORT:-6379}" \
  --num-cpus "${CPUS:-1}" --num-gpus 0 \
  --dashboard-host 127.0.0.1
