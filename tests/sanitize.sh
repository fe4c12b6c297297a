#!/bin/bash
# The native library under AddressSanitizer and UndefinedBehaviorSanitizer, and the tests that run
# all of its code. Needs gcc, an environment with torch and pytest, and 2 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
out=build/sanitize
mkdir -p "$out"
torch=$(python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)")
version=$(python -c "import runpy; print(runpy.run_path('fastkfo/kernels/build_flags.py')['TORCH_TARGET_VERSION'])")
flags=(-std=c++17 -O1 -g -w -fPIC -fopenmp -fsanitize=address,undefined
       -fno-sanitize-recover=undefined -fno-omit-frame-pointer "-DTORCH_TARGET_VERSION=$version"
       -Icsrc "-I$torch/include" "-I$torch/include/torch/csrc/api/include")
printf '%s\n' csrc/library.cpp csrc/cpu/*.cpp |
    xargs -P "$(nproc)" -I{} sh -c '"$@" -c "{}" -o "$0/$(basename "{}").o"' "$out" g++ "${flags[@]}"
g++ -shared -fopenmp -fsanitize=address,undefined "$out"/*.o "-L$torch/lib" -ltorch -ltorch_cpu \
    -lc10 "-Wl,-rpath,$torch/lib" -o "$out/_C.so"
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 FASTKFO_LIBRARY="$out/_C.so"
exec python -m pytest -p no:cacheprovider tests/test_inner_loop_fused.py tests/test_inner_loop_fused_inputs.py \
    tests/test_inner_loop_backend.py tests/test_kron.py tests/test_kron_raw.py tests/test_gram.py \
    tests/test_cross_entropy.py tests/test_layers.py tests/test_layers_inputs.py "$@"
