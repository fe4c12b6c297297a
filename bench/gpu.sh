#!/usr/bin/env bash
# Everything a CUDA machine is asked for, in one go and without a network: bench/gpu.sh OUT
#
# Builds fastkfo for the system's python, runs the GPU tests and the CPU suite, then, if both pass,
# the benchmarks; packs the records into OUT/records.tar.gz. The archive is renewed after every step,
# so that a run cut short leaves what it had. Exits with the first failure's status. Every step ends
# when the time of all is over, every benchmark at a limit of its own; what then has no time left is
# said, and can be run alone.
#
#   PYTHON                python3
#   TORCH_CUDA_ARCH_LIST  9.0a
#   STEPS                 gpu cpu sanitize bench    also: kernels launches sweeps
#   ROWS                  small fc omniglot cifarfs miniimagenet    of bench; also: compile
#   SWEEPS                tasks:sine-mlp tasks:anil-head tasks:omniglot-cnn steps:sine-mlp
#                         steps:omniglot-cnn    AXIS:WORKLOAD each
#   OPS                   of kernels: options of `python -m bench.kernels` beside --device cuda
#   TOOLS                 memcheck racecheck synccheck initcheck    of sanitize
#   LIMIT_S               530               seconds for all
#   WORKERS               0                 processes of pytest, where pytest-xdist is there
#   PREBUILT              0                 1: the libraries that lie in fastkfo/, nothing is built
#   BENCH_ARGS            options of `fastkfo bench` beside --device cuda, instead of ROWS
#   LEARN2LEARN_SRC       an unpacked learn2learn 0.2.0 (default: .cache/learn2learn-0.2.0 if there)
# shellcheck disable=SC2329 # functions are called by `step`
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

# known WHAT GIVEN NAMES: a misspelt one would be left out, and the run would pass.
known() {
  local one
  for one in $2; do
    [[ " $3 " == *" $one "* ]] || { echo "$1: expected some of $3, got $one" >&2; exit 2; }
  done
}

records=$scratch/records
steps=${STEPS:-gpu cpu sanitize bench}
rows=${ROWS:-small fc omniglot cifarfs miniimagenet}
sweeps=${SWEEPS:-tasks:sine-mlp tasks:anil-head tasks:omniglot-cnn steps:sine-mlp steps:omniglot-cnn}
tools=${TOOLS:-memcheck racecheck synccheck initcheck}
limit=${LIMIT_S:-530}
known STEPS "$steps" "gpu cpu sanitize bench kernels launches sweeps"
known ROWS "$rows" "small fc omniglot cifarfs miniimagenet compile"
known TOOLS "$tools" "memcheck racecheck synccheck initcheck"
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

# bounded MOST COMMAND...: ends after so many seconds, and when the time of all is over. An
# interrupted benchmark leaves the rows that it finished.
bounded() {
  local most=$1 left=$((limit - SECONDS))
  shift
  if [ "$left" -lt 15 ]; then
    echo "no time left: run it alone, by STEPS" >&2
    return 124
  fi
  timeout --signal=INT --kill-after=20 $((left < most ? left : most)) "$@"
}

tests() {
  local name=$1
  shift
  local workers=()
  [ "${WORKERS:-0}" = 0 ] || workers=(-n "$WORKERS")
  bounded 3600 "$python" -m pytest --require-native --junitxml="$records/$name.xml" \
    "${workers[@]}" "$@"
}

# compute-sanitizer is slow: every kernel once or twice, all tools at a time. Where the machine has
# none, that is said.
sanitize() {
  command -v compute-sanitizer || return 1
  local tool job jobs=() code=0
  for tool in $tools; do
    checked "$tool" fastkfo tests/test_inner_loop_fused_gpu.py -k "$FUSED_SUBSET" &
    # Rows that pad a tape are computed from whatever lies there: docs/gpu.md.
    [ "$tool" = initcheck ] || jobs+=($!)
    checked "$tool" kron tests/test_kron_gpu.py &
    jobs+=($!)
    if [ "$tool" = memcheck ] || [ "$tool" = racecheck ]; then
      checked "$tool" _kernel "${TRITON_TESTS[@]}" -k "$TRITON_SUBSET" &
      jobs+=($!)
    fi
  done
  for job in "${jobs[@]}"; do
    wait "$job" || code=$?
  done
  wait
  return "$code"
}

FUSED_SUBSET="test_options or test_adapted or test_every_model and 3"
TRITON_TESTS=(tests/test_triton_{conv,norm,pool,kron,gram}.py)
TRITON_SUBSET="cuda and float32 and not large and not elements"

# checked TOOL KERNELS TESTS...
checked() {
  local tool=$1 kernels=$2
  shift 2
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 bounded 3600 compute-sanitizer --tool "$tool" \
    --error-exitcode 9 --kernel-name kernel_substring="$kernels" \
    "$python" -m pytest -q -p no:cacheprovider "$@" >"$records/$tool-$kernels.log" 2>&1
  local code=$?
  echo "$tool $kernels: exit $code; $(grep 'ERROR SUMMARY' "$records/$tool-$kernels.log")"
  return "$code"
}

wanted() {
  [[ " $steps " == *" $1 "* ]]
}

# row NAME: one record beside learn2learn. No row of it is begun after its minutes.
row() {
  local peers=(--method kfo --peer fastkfo --peer inner_loop --peer vmap)
  case $1 in
    small) table 200 2 small "${peers[@]}" --peer jax --workload anil-head --workload sine-mlp ;;
    fc) table 110 0.8 fc "${peers[@]}" --workload omniglot-fc ;;
    omniglot) table 150 1.2 omniglot "${peers[@]}" --workload omniglot-cnn --tasks 32 ;;
    cifarfs) table 110 1 cifarfs "${peers[@]}" --workload cifarfs-cnn-2 --tasks 16 ;;
    miniimagenet) table 110 1 miniimagenet "${peers[@]}" --workload miniimagenet-cnn4 ;;
    # Minutes of compiling, in both precisions.
    compile) table 420 6 compile "${peers[@]}" --peer compile --workload anil-head \
      --workload sine-mlp ;;
  esac
}

# table MOST MINUTES NAME ARGUMENTS...
table() {
  local most=$1 minutes=$2 name=$3
  shift 3
  bounded "$most" "$python" -m bench --device cuda --minutes "$minutes" --name "$name" "$@"
}

# sweep AXIS:WORKLOAD: how it scales, a record of its own.
sweep() {
  local axis=${1%%:*} workload=${1#*:} sizes=()
  [ "$1" != steps:omniglot-cnn ] || sizes=(--tasks 32)
  table 120 1.3 "scaling-$axis-$workload" --method kfo --peer inner_loop --peer inner_loop_adjoint \
    --sweep "$axis" --workload "$workload" "${sizes[@]}"
}

kernels() {
  # shellcheck disable=SC2086 # OPS is words
  bounded 270 "$python" -m bench.kernels --device cuda --minutes 3.5 ${OPS:-}
}

launches() {
  bounded 120 "$python" -m bench.launches --device cuda --minutes 1.2
}

benchmarks() {
  local one
  if wanted bench && [ -n "${BENCH_ARGS:-}" ]; then
    # shellcheck disable=SC2086 # BENCH_ARGS is words
    step bench bounded 3600 "$python" -m bench --device cuda --minutes 10 $BENCH_ARGS
  elif wanted bench; then
    for one in $rows; do step "bench-$one" row "$one"; done
  fi
  wanted kernels && step kernels kernels
  wanted launches && step launches launches
  wanted sweeps && for one in $sweeps; do step "sweep-${one/:/-}" sweep "$one"; done
}

# The benchmarks come last and only after green tests: no number without them.
step environment environment || status=0 # a tool may be missing: not a failure
if step cuda cuda_is_there; then
  if step install install; then
    wanted gpu && step gpu tests gpu -m gpu
    wanted cpu && step cpu tests cpu -m "not gpu and not slow" --hypothesis-profile=quick -q
    wanted sanitize && step sanitize sanitize
    [ "$status" -eq 0 ] && benchmarks
  fi
fi

echo "records: $out/records.tar.gz"
exit "$status"
