#!/usr/bin/env bash
# The Secrets of infra/kubernetes/base: writes what is missing into FOLDER, and manifests to stdout.
#
#   infra/kubernetes/secrets.sh FOLDER [NAME...] | kubectl apply -f -
#
# NAMEs are the host names by which clients reach the gateways. Keep FOLDER: its `ca.key` signs
# renewed certificates, and `arriero keys add TENANT --file FOLDER/keys.yaml` adds API keys to it;
# run this script again after either. NAMESPACE is `arriero` by default.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" && chmod 700 "$1"
folder=$(cd "$1" && pwd)
shift
umask 077
certs=$here/../tls/make-certs.sh
cd "$folder"
[ -e ray.token ] || openssl rand -hex 32 >ray.token
[ -e admin.token ] || openssl rand -hex 32 >admin.token
[ -e redis.password ] || openssl rand -hex 32 >redis.password
[ -e metrics.key ] || arriero keys add metrics --file keys.yaml --note "Prometheus" >metrics.key
[ -e gateway.pem ] || env FILE=gateway "$certs" . arriero-gateway localhost 127.0.0.1 "$@" >&2
[ -e link.pem ] || env FILE=link "$certs" . arriero-link >&2
[ -e admin.pem ] || env FILE=admin "$certs" . arriero-admin >&2
secret() {
  local name=$1 text files=()
  shift
  for text in "$@"; do files+=("--from-file=$text"); done
  kubectl create secret generic "$name" -n "${NAMESPACE:-arriero}" --dry-run=client -o yaml \
    "${files[@]}"
  echo ---
}
# without the line's end: it would be a part of the token
for file in ray.token admin.token redis.password metrics.key; do
  printf %s "$(cat "$file")" >".$file"
done
secret arriero-ray-token auth_token=.ray.token
secret arriero-admin token=.admin.token
secret arriero-redis password=.redis.password
secret arriero-metrics key=.metrics.key
secret arriero-keys keys.yaml
secret arriero-tls ca.pem gateway.pem gateway.key link.pem link.key admin.pem admin.key
rm -f .ray.token .admin.token .redis.password .metrics.key
