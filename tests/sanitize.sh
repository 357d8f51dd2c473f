#!/usr/bin/env bash
# Run the tests of the CPU kernels under AddressSanitizer, with g++, by hand.
# Nothing may be read or written out of bounds; takes a few minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export BYOLA_FAST_CACHE="$cache" BYOLA_FAST_STRICT=1 CXX=g++
export BYOLA_FAST_CXXFLAGS="-O1 -g -fsanitize=address" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" python -m pytest -q -x \
    tests/test_log_mixup_exp.py tests/test_resize_crop.py tests/test_augment_views.py tests/test_bank_push.py \
    tests/test_ema_update.py tests/test_ema_lists.py tests/test_philox.py tests/test_normalize.py \
    tests/test_log_mel.py "$@"
