#!/usr/bin/env bash
# A certificate authority and a gateway's certificate, for trials and for private networks.
#
#   infra/tls/make-certs.sh FOLDER NAME [NAME...]
#
# NAMEs are the host names or addresses that clients use. Writes ca.pem, ca.key, gateway.pem and
# gateway.key; an authority that is there already is kept, so that a certificate can be renewed.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
folder=$1; shift
mkdir -p "$folder"
umask 077
cd "$folder"
if [ ! -e ca.key ]; then
  openssl ecparam -name prime256v1 -genkey -noout -out ca.key
  openssl req -x509 -new -key ca.key -sha256 -days 3650 -subj "/CN=arriero authority" \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -out ca.pem
fi
names=""
for name in "$@"; do
  case $name in
    *[!0-9.:]*) kind=DNS ;;
    *) kind=IP ;;
  esac
  names="$names${names:+,}$kind:$name"
done
openssl ecparam -name prime256v1 -genkey -noout -out gateway.key
openssl req -new -key gateway.key -subj "/CN=$1" -out gateway.csr
printf '%s\n' "subjectAltName=$names" "extendedKeyUsage=serverAuth" "basicConstraints=CA:FALSE" \
  > gateway.ext
openssl x509 -req -in gateway.csr -CA ca.pem -CAkey ca.key -CAcreateserial -sha256 -days 365 \
  -extfile gateway.ext -out gateway.pem
rm -f gateway.csr gateway.ext
chmod 644 ca.pem gateway.pem
