#!/usr/bin/env bash
# The conformance suite over CPU kernels built with ASan and UBSan: `make sanitize`.
#
# Works on a copy of the tree under build/, so that the kernels in use stay as they are. Builds the
# portable variant, the one of AVX2, whose products have headers of their own, and the best one of
# this CPU. With SANITIZERS=thread the kernels' threads are watched by TSan instead.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
copy=build/sanitize
rm -rf $copy
mkdir -p $copy
cp -r pyproject.toml src kernels shards cluster router tests $copy
cd $copy
rm -f kernels/cpu/*.so
suffix=$($python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
avx512="-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
sanitizers=${SANITIZERS:-address,undefined}
build() {
  g++ -shared -fPIC -std=c++20 -O1 -g -ffp-contract=off -fvisibility=hidden -pthread -Wno-psabi \
    "-fsanitize=$sanitizers" -fno-sanitize-recover=undefined ${*:2} \
    "kernels/cpu/native/$1.cpp" -o "kernels/cpu/_$1$suffix"
}
builds=()
build portable & builds+=($!)
if grep -qw avx2 /proc/cpuinfo; then build avx2 -mavx2 -mfma -mf16c & builds+=($!); fi
if grep -q avx512_bf16 /proc/cpuinfo; then build avx512bf16 $avx512 -mavx512bf16 & builds+=($!); fi
for build in "${builds[@]}"; do wait "$build"; done
# The interpreter itself was not built with a sanitizer: its library must come first, and leaks are
# not ours to count.
if [ "$sanitizers" = thread ]; then
  export LD_PRELOAD="$(g++ -print-file-name=libtsan.so)" TSAN_OPTIONS=halt_on_error=1
else
  export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
  export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
fi
export PYTHONPATH=src OMP_NUM_THREADS=1
exec "$python" -m pytest tests/kernels tests/kernels_cpu -q -k 'cpu and not triton' "$@"
