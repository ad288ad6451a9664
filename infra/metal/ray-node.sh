#!/usr/bin/env bash
# What head.sh and worker.sh share: read by both, not run by itself.
#
# Ray runs the code of whoever knows its token, so the token is needed, and everything else is closed
# as far as Ray allows: no dashboard, and sockets and logs in a folder that only this user can enter.

export RAY_USAGE_STATS_ENABLED=0 RAY_enable_metrics_collection=0
export DASHBOARD_METRIC_PORT=-1 # else the head's metrics answer everybody, on every interface
: "${TOKEN_FILE:=${STATE_DIRECTORY:-$HOME/.config/arriero}/ray.token}"
: "${TEMP_DIR:=${STATE_DIRECTORY:-/tmp/arriero-$(id -u)}/ray}"

use_token() {
  [ -s "$TOKEN_FILE" ] || { echo "no token in $TOKEN_FILE; copy the head's to it" >&2; exit 2; }
  case $(stat -c %a "$TOKEN_FILE") in
    *00) ;;
    *) echo "others can read $TOKEN_FILE; chmod 600 it" >&2; exit 2 ;;
  esac
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$TOKEN_FILE"
  unset RAY_AUTH_TOKEN
}

close_folder() { # the same path on every machine: workers take it from the head
  local parent
  parent=$(dirname "$TEMP_DIR")
  mkdir -p "$parent"
  [ -O "$parent" ] || { echo "$parent belongs to another user; set TEMP_DIR" >&2; exit 2; }
  chmod 700 "$parent"
}

listen() { # 127.0.0.1: all of Ray's servers bind to loopback, and no machine can join
  if [ "$NODE_IP" = 127.0.0.1 ]; then export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0; fi
}

watch_start() { # a start that fails may hang at its end, and systemd would never start it again
  (
    for _ in $(seq "${START_LIMIT_S:-120}"); do
      sleep 1
      case $(ps -o stat= -p $$) in "" | Z*) exit 0 ;; esac # the start has ended
    done
    ps -o stat=,comm= --ppid $$ | grep -Eq '^[^Z ]+ +raylet' ||
      { echo "no raylet after ${START_LIMIT_S:-120} s; ending the start" >&2; kill -KILL $$; }
  ) &
}

more_files() {
  ulimit -n 65536 2>/dev/null || echo "open files stay at $(ulimit -n); Ray wants 65536" >&2
}
