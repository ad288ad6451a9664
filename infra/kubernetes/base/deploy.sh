#!/usr/bin/env bash
# Keep the deployment of a spec serving on a Ray cluster: deploy.sh SPEC
#
# Deploys where nothing serves, rolls SPEC out where an older spec serves, and ends with 1 when Admin
# is gone for a minute, so that the next start deploys again (a head without a store was lost).
#
#   HEAD                   host:port of the GCS
#   ARRIERO_ADMIN, ARRIERO_ADMIN_TOKEN_FILE, ARRIERO_ADMIN_CA   where Admin will listen, and its token
#   RAY_AUTH_MODE, RAY_AUTH_TOKEN                               of the cluster
#   NODE_IP                this machine's address in the cluster, where Ray would choose another
#   SERVES                 file that exists while everything serves; /tmp/arriero-serves by default
set -euo pipefail
spec=${1:?give the spec}
: "${HEAD:?give host:port of the GCS}" "${ARRIERO_ADMIN:?give host:port of Admin}"
serves=${SERVES:-/tmp/arriero-serves}
ARRIERO_STATE=$(mktemp -d)
export ARRIERO_STATE RAY_USAGE_STATS_ENABLED=0
rm -f "$serves"
child=
stop() {
  trap - EXIT TERM INT
  rm -rf "$serves" "$ARRIERO_STATE"
  [ -z "$child" ] || { kill "$child" 2>/dev/null && wait "$child"; } || true
}
trap stop EXIT
trap 'exit 143' TERM INT

admin_listens() {
  timeout 3 bash -c "exec 3<>/dev/tcp/${ARRIERO_ADMIN%:*}/${ARRIERO_ADMIN##*:}" 2>/dev/null
}

pause() { sleep "$1" & wait $!; } # a signal ends `wait`, and not `sleep`

until ray health-check --address "$HEAD" 2>/dev/null; do
  echo "waiting for the head at $HEAD"
  pause 3
done
if admin_listens && arriero status --json >/dev/null; then
  echo "rolling out $spec"
  arriero rollout "$spec" # a change that needs `down` and `up` ends here, and the old spec serves on
else
  # a driver needs a node of the cluster beside it; this one offers nothing, and leaves after `up`
  ray start --block --disable-usage-stats --address "$HEAD" --num-cpus 0 --num-gpus 0 \
    --object-store-memory 100000000 --include-log-monitor false \
    ${NODE_IP:+--node-ip-address "$NODE_IP"} >"$ARRIERO_STATE/node.log" 2>&1 &
  child=$!
  until ARRIERO_ADMIN='' arriero up "$spec" --address "$HEAD"; do
    kill -0 "$child" 2>/dev/null || { tail -n 20 "$ARRIERO_STATE/node.log" >&2; exit 1; }
    echo "not up yet; trying again" # workers that have not joined, a checkpoint that is being copied
    pause 10
  done
  kill "$child" && wait "$child" || true
  child=
fi
touch "$serves"
missed=0
while [ "$missed" -lt 6 ]; do
  pause 10
  if admin_listens; then missed=0; else missed=$((missed + 1)); fi
done
echo "Admin at $ARRIERO_ADMIN is gone" >&2
exit 1
