#!/usr/bin/env bash
# Runs `make test` as on six machines and prints pytest's closing line of each: threads, what torch takes the processor
# for, and where loaded weights lie (see tests/conftest.py).
#
#     tools/test_matrix.sh                                    # all six
#     tools/test_matrix.sh "1 avx2 mapped"                    # one of them, or any other combination
#     MARKS="compares and not slow" tools/test_matrix.sh      # only the tests that compare computed numbers
set -uo pipefail
cd "$(dirname "$0")/.."
combinations=("$@")
[ $# -gt 0 ] || combinations=(
  "1 avx2 mapped" "1 default copied" "2 avx2 shifted" "2 default mapped" "3 avx2 copied" "3 default shifted"
)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
for combination in "${combinations[@]}"; do
  read -r threads capability weights <<<"$combination"
  if OMP_NUM_THREADS=$threads ATEN_CPU_CAPABILITY=$capability HYDRA_TEST_WEIGHTS=$weights make test >"$log" 2>&1; then
    state=green
  else
    state=RED failed=1
    cat "$log"
  fi
  printf '%s threads, %s, %s: %s: %s\n' "$threads" "$capability" "$weights" "$state" "$(grep -E '(passed|failed|error)' "$log" | tail -1)"
done
exit $failed
