#!/usr/bin/env bash
# The kernel tests over the AVX-512 and AMX variants on a CPU without them: `make emulate`.
#
# Works on a copy of the tree under build/, so that the kernels in use stay as they are. The
# instructions come from SIMDe and from tests/kernels_cpu/emulated/; the CPU needs AVX2, FMA and
# F16C. VARIANTS names the variants to build and test.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
variants=${VARIANTS:-avx512 avx512bf16 amx}
if ! echo '#include <simde/x86/avx512.h>' | g++ -E -x c++ - >/dev/null 2>&1; then
  echo 'make emulate: skipped: SIMDe is not installed (Debian: apt install libsimde-dev)' >&2
  exit 0
fi
copy=build/emulate
rm -rf $copy
mkdir -p $copy
cp -r pyproject.toml src kernels shards cluster router tests $copy
cd $copy
rm -f kernels/cpu/*.so
suffix=$($python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
build() {
  g++ -shared -fPIC -std=c++20 -O1 -g0 -ffp-contract=off -fno-math-errno -fvisibility=hidden \
    -pthread -Wno-psabi ${*:2} "kernels/cpu/native/$1.cpp" -o "kernels/cpu/_$1$suffix"
}
emulated="-mavx2 -mfma -mf16c -include tests/kernels_cpu/emulated/instructions.h"
declare -A flags=(
  [avx512]=""
  [avx512bf16]="-DARRIERO_EMULATED_BF16"
  [amx]="-DARRIERO_EMULATED_BF16 -DARRIERO_EMULATED_AMX"
)
build portable
for variant in $variants; do
  build "$variant" $emulated ${flags[$variant]}
done
# In this copy the CPU has every instruction.
printf '\n\ndef cpu_flags() -> set[str]:\n    return set().union(*_FLAGS.values())\n' >>kernels/cpu/library.py
export PYTHONPATH=src OMP_NUM_THREADS=1
"$python" -m pytest tests/kernels_cpu -q "$@"
for variant in $variants; do
  ARRIERO_CPU_VARIANT=$variant "$python" -m pytest tests/kernels tests/kernels_cpu/test_threads.py \
    -q -k 'cpu and not triton' "$@"
done
