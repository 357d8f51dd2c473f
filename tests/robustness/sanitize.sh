#!/usr/bin/env bash
# Run the tests of the CPU kernels under g++'s sanitizers. By hand; each takes some minutes.
#
#     tests/robustness/sanitize.sh [asan|ubsan|tsan|all] [arguments of pytest]
#
# asan: no access out of bounds. ubsan: no overflow, bad shift, misaligned or null access.
# tsan: no data race. OpenMP's library is not built for ThreadSanitizer and would look like a race everywhere, so parallel
# loops run on plain threads (sanitize_threads.h), which it follows exactly. Python and torch are not built for it either
# and are ignored; no report is suppressed.
set -euo pipefail
cd "$(dirname "$0")/../.."

tests=(
    tests/ops/test_log_mixup_exp.py tests/ops/test_resize_crop.py tests/ops/test_augment_views.py tests/ops/test_bank_push.py
    tests/ops/test_ema_update.py tests/ops/test_ema_lists.py tests/ops/test_philox.py tests/spectrograms/test_statistics.py
    tests/ops/test_log_mel.py tests/ops/test_conv_block.py tests/ops/test_sums.py tests/ops/test_fuzz_ops.py tests/ops/test_threads.py
)

check() {  # NAME LIBRARY FLAGS: build the kernels with these flags and run the tests
    local name=$1 library=$2 flags=$3
    shift 3
    local cache
    cache=$(mktemp -d)
    echo "$name:"
    BYOLA_FAST_CACHE="$cache" BYOLA_FAST_STRICT=1 CXX=g++ BYOLA_FAST_CXXFLAGS="-O1 -g $flags" \
        LD_PRELOAD="$(g++ -print-file-name="$library") $(g++ -print-file-name=libstdc++.so)" \
        "${prefix[@]}" python -m pytest -q -x -m "slow or not slow" "${tests[@]}" "$@" || { rm -rf "$cache"; return 1; }
    rm -rf "$cache"
}

what=${1:-all}
shift $(($# > 0))
prefix=()
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1:report_bugs=1
case $what in asan | all) check asan libasan.so "-fsanitize=address" "$@" ;; esac
# vptr needs type information that torch's libraries do not export
case $what in ubsan | all) check ubsan libubsan.so \
    "-fsanitize=undefined,float-cast-overflow -fno-sanitize=vptr -fno-sanitize-recover=all" "$@" ;; esac
case $what in tsan | all)
    if setarch "$(uname -m)" -R true 2>/dev/null; then
        prefix=(setarch "$(uname -m)" -R) # tsan's memory map needs fixed addresses
    fi
    # tsan cannot follow a forked child that starts threads
    check tsan libtsan.so "-fsanitize=thread -include $PWD/tests/robustness/sanitize_threads.h" -k "not dataloader" "$@" ;;
asan | ubsan | all) ;;
*)
    echo "expected asan, ubsan, tsan or all, got $what" >&2
    exit 2
    ;;
esac
