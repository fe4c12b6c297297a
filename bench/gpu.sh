#!/usr/bin/env bash
# Everything a CUDA machine is asked for, in one go and without a network: bench/gpu.sh OUT
#
# Builds fastkfo for the system's python, runs the GPU tests and the CPU suite, then, if both pass,
# the benchmarks; packs the records into OUT/records.tar.gz. The archive is renewed after every step,
# so that a run cut short leaves what it had. Exits with the first failure's status.
#
#   PYTHON                python3
#   TORCH_CUDA_ARCH_LIST  9.0a
#   STEPS                 gpu cpu sanitize bench    which of the tests and benchmarks
#   LIMIT_S               530               seconds for all: benchmarks get what is left, and stop there
#   WORKERS               0                 processes of pytest, where pytest-xdist is there
#   PREBUILT              0                 1: the libraries that lie in fastkfo/, nothing is built
#   BENCH_ARGS            options of `fastkfo bench` beside --device cuda
#   LEARN2LEARN_SRC       an unpacked learn2learn 0.2.0 (default: .cache/learn2learn-0.2.0 if there)
set -uo pipefail

[ $# -eq 1 ] || { echo "usage: bench/gpu.sh OUT" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}
if [ -z "${LEARN2LEARN_SRC:-}" ] && [ -d .cache/learn2learn-0.2.0 ]; then
  LEARN2LEARN_SRC=$PWD/.cache/learn2learn-0.2.0
fi
[ -z "${LEARN2LEARN_SRC:-}" ] || export LEARN2LEARN_SRC

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
records=$scratch/records
steps=${STEPS:-gpu cpu sanitize bench}
limit=${LIMIT_S:-530}
mkdir "$records"
touch "$scratch/start"
status=0

pack() {
  if [ -d bench/results ]; then
    find bench/results -type f -newer "$scratch/start" -exec cp --parents -t "$records" {} +
  fi
  tar -C "$scratch" -czf "$out/.records.partial" records &&
    mv "$out/.records.partial" "$out/records.tar.gz"
}

# step NAME COMMAND...: runs it into NAME.log, keeps the first failure, packs.
step() {
  local name=$1 code
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$records/$name.log"
  code=${PIPESTATUS[0]}
  echo "$name $code" >>"$records/status.txt"
  [ "$status" -ne 0 ] || status=$code
  pack
  return "$code"
}

environment() {
  date -u +%Y-%m-%dT%H:%M:%SZ
  git rev-parse HEAD 2>/dev/null && git status --short
  uname -srm
  lscpu | grep -E '^(Model name|CPU\(s\)|Flags)' || true
  nvidia-smi
  nvcc --version
  "$python" -c 'import sys, torch; print(sys.version); print(torch.__config__.show())'
  "$python" -c 'import torch; print(torch.__version__, torch.version.cuda)'
  "$python" -m pip list --format=freeze
}

# Without a GPU every test below would be skipped, and pass.
cuda_is_there() {
  "$python" -c 'import torch; print(torch.cuda.get_device_name())'
}

install() {
  [ "${PREBUILT:-0}" = 0 ] || export FASTKFO_BUILD_NATIVE=0
  "$python" -m pip install --no-build-isolation --no-deps -e . &&
    "$python" -c 'import fastkfo; print(fastkfo.backends())'
}

tests() {
  local name=$1
  shift
  local workers=()
  [ "${WORKERS:-0}" = 0 ] || workers=(-n "$WORKERS")
  "$python" -m pytest --require-native --junitxml="$records/$name.xml" "${workers[@]}" "$@"
}

# compute-sanitizer is slow: every kernel once or twice, all tools at a time. Where the machine has
# none, that is said.
sanitize() {
  command -v compute-sanitizer || return 1
  local tool code=0
  for tool in memcheck racecheck synccheck initcheck; do
    checked "$tool" fastkfo tests/test_inner_loop_fused_gpu.py -k "test_options or test_every_model and 3" &
  done
  checked memcheck _kernel "${TRITON_TESTS[@]}" -k "$TRITON_SUBSET" &
  checked racecheck _kernel "${TRITON_TESTS[@]}" -k "$TRITON_SUBSET" &
  for _ in 1 2 3 4 5 6; do
    wait -n || code=$?
  done
  return "$code"
}

TRITON_TESTS=(tests/test_triton_{conv,norm,pool,kron,gram}.py)
TRITON_SUBSET="cuda and float32 and not large and not elements"

# checked TOOL KERNELS TESTS...
checked() {
  local tool=$1 kernels=$2
  shift 2
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --kernel-name kernel_substring="$kernels" "$python" -m pytest -q -p no:cacheprovider "$@" \
    >"$records/$tool-$kernels.log" 2>&1
  local code=$?
  echo "$tool $kernels: exit $code; $(grep 'ERROR SUMMARY' "$records/$tool-$kernels.log")"
  return "$code"
}

wanted() {
  [[ " $steps " == *" $1 "* ]]
}

# Interrupted at the limit, a run leaves its finished rows. Without BENCH_ARGS: the rows of docs/gpu.md,
# a record each, the quickest first.
benchmarks() {
  if [ -n "${BENCH_ARGS:-}" ]; then
    # shellcheck disable=SC2086 # BENCH_ARGS is words
    timed 10 $BENCH_ARGS
    return
  fi
  local peers=(--method kfo --peer fastkfo --peer inner_loop)
  timed 0.6 "${peers[@]}" --peer vmap --name small --workload anil-head --workload sine-mlp &&
    timed 1 "${peers[@]}" --name cifarfs --workload cifarfs-cnn-2 --tasks 16 &&
    timed 1.2 "${peers[@]}" --name omniglot --workload omniglot-cnn --tasks 32 &&
    timed 1 "${peers[@]}" --name miniimagenet --workload miniimagenet-cnn4
}

# timed MINUTES ARGUMENTS...: no row is begun after the minutes, and nothing goes on after the limit.
timed() {
  local minutes=$1 left=$((limit - SECONDS))
  shift
  if [ "$left" -lt 30 ]; then
    echo "no time left for benchmarks: run them alone, with STEPS=bench" >&2
    return 1
  fi
  timeout --signal=INT "$left" "$python" -m bench --device cuda --minutes "$minutes" "$@"
}

# The benchmarks come last and only after green tests: no number without them.
step environment environment || status=0 # a tool may be missing: not a failure
if step cuda cuda_is_there; then
  if step install install; then
    wanted gpu && step gpu tests gpu -m gpu
    wanted cpu && step cpu tests cpu -m "not gpu and not slow" --hypothesis-profile=quick -q
    wanted sanitize && step sanitize sanitize
    wanted bench && [ "$status" -eq 0 ] && step bench benchmarks
  fi
fi

echo "records: $out/records.tar.gz"
exit "$status"
