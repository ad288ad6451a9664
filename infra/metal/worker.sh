#!/usr/bin/env bash
# Join this machine to a Ray cluster, in the foreground.
#
#   HEAD        host:port of the head's GCS (needed)
#   NODE_IP     this machine's address on the cluster's network (needed)
#   IFACE       its network interface there, for NCCL and gloo
#   CPUS, GPUS  offered to slices; all of the machine by default
#   TOKEN_FILE  the cluster's token: a copy of the head's file
#   TEMP_DIR    as the head's
#   START_LIMIT_S  as the head's
set -euo pipefail
: "${HEAD:?give host:port of the head}"
: "${NODE_IP:?give this machine address on the network of the cluster}"
. "$(dirname "$(readlink -f "$0")")/ray-node.sh"
use_token
close_folder
listen
more_files
watch_start
if [ -n "${IFACE:-}" ]; then
  export NCCL_SOCKET_IFNAME="$IFACE" GLOO_SOCKET_IFNAME="$IFACE"
fi
export RAY_gcs_rpc_server_reconnect_timeout_s="${RECONNECT_S:-600}" # a head with REDIS comes back
exec ray start --block --disable-usage-stats --include-log-monitor false \
  --address "$HEAD" --node-ip-address "$NODE_IP" \
  ${CPUS:+--num-cpus "$CPUS"} ${GPUS:+--num-gpus "$GPUS"}
