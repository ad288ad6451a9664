#!/usr/bin/env bash
# Start the head of a Ray cluster on this machine, in the foreground.
#
#   NODE_IP     this machine's address on the cluster's network; 127.0.0.1 by default: one machine
#   PORT        of Ray's GCS, 6379 by default
#   CPUS        logical CPUs offered to slices; 1 by default, 0 keeps groups off the head
#   GPUS        GPUs offered to slices; 0 by default
#   TOKEN_FILE  the cluster's token; made where there is none. Copy it to every other machine
#   TEMP_DIR    Ray's sockets and logs, in a folder that only this user can enter
#   START_LIMIT_S  seconds after which a start without a raylet is ended, 120 by default
#   REDIS       host:port of a Redis that keeps the GCS's tables: a head that starts again then goes
#               on where it was, and groups serve meanwhile; needs REDIS_PASSWORD_FILE
set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/ray-node.sh"
: "${NODE_IP:=127.0.0.1}"
if [ ! -e "$TOKEN_FILE" ]; then
  mkdir -p "$(dirname "$TOKEN_FILE")"
  (umask 077 && head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$TOKEN_FILE")
  echo "made a token for the cluster in $TOKEN_FILE"
fi
use_token
close_folder
listen
more_files
watch_start
store=()
if [ -n "${REDIS:-}" ]; then
  : "${REDIS_PASSWORD_FILE:?give the file with the password of REDIS}"
  export RAY_REDIS_ADDRESS="$REDIS" RAY_external_storage_namespace="${STORE_NAME:-arriero}"
  store=(--redis-password "$(cat "$REDIS_PASSWORD_FILE")") # `ps` shows it: Ray takes no file
fi
exec ray start --head --block --disable-usage-stats \
  --include-dashboard false --include-log-monitor false --no-monitor \
  --node-ip-address "$NODE_IP" --port "${PORT:-6379}" --temp-dir "$TEMP_DIR" \
  --num-cpus "${CPUS:-1}" --num-gpus "${GPUS:-0}" "${store[@]}"
