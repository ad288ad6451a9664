#!/usr/bin/env bash
# A certificate authority and certificates from it, for trials and for private networks.
#
#   infra/tls/make-certs.sh FOLDER NAME [NAME...]
#   FILE=link  infra/tls/make-certs.sh FOLDER arriero-link     (links of gateways and leaders)
#   FILE=admin infra/tls/make-certs.sh FOLDER NAME [NAME...]   (Admin)
#
# NAMEs are the host names or addresses that clients use. Writes ca.pem, ca.key, and FILE.pem and
# FILE.key (gateway by default); an authority that is there already is kept, so that a certificate
# can be renewed: gateways and Admin take it from their next connection on.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }
folder=$1; shift
file=${FILE:-gateway}
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
# both ends of a link show their certificate
openssl ecparam -name prime256v1 -genkey -noout -out "$file.key.new"
openssl req -new -key "$file.key.new" -subj "/CN=$1" -out "$file.csr"
printf '%s\n' "subjectAltName=$names" "extendedKeyUsage=serverAuth,clientAuth" \
  "basicConstraints=CA:FALSE" > "$file.ext"
openssl x509 -req -in "$file.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -sha256 -days 365 \
  -extfile "$file.ext" -out "$file.pem.new"
mv "$file.key.new" "$file.key"
mv "$file.pem.new" "$file.pem"
rm -f "$file.csr" "$file.ext"
chmod 644 ca.pem "$file.pem"
