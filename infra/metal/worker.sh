#!/usr/bin/env bash
# Join this machine to a Ray cluster, in the foreground.
#
#   HEAD      host:port of the head's GCS (needed)
#   NODE_IP   this machine's address on the cluster's network (needed)
#   IFACE     its network interface there, for NCCL and gloo
#   TOKEN_FILE  file with the cluster's token, alike on every machine; without one, whoever reaches
#             the cluster's network can run code on it
set -euo pipefail
: "${HEAD:?give host:port of the head}"
: "${NODE_IP:?give this machine address on the network of the cluster}"
export RAY_USAGE_STATS_ENABLED=0
if [ -n "${TOKEN_FILE:-}" ]; then
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$TOKEN_FILE"
else  # else Ray's head would take a token that lies in ~/.ray, and its workers would not
  export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"
fi
if [ -n "${IFACE:-}" ]; then
  export NCCL_SOCKET_IFNAME="$IFACE" GLOO_SOCKET_IFNAME="$IFACE"
fi
ulimit -n 65536 || echo "open files stay at $(ulimit -n); Ray wants 65536" >&2
exec ray start --block --disable-usage-stats --address "$HEAD" --node-ip-address "$NODE_IP"
