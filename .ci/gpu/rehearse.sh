#!/usr/bin/env bash
# rehearse.sh OUT: both calls on the CPU backend, with tiny shapes, without timings, with the program that was built here or
# that is in KIMI_LINEAR. Tools for GPUs (Nsight Compute, compute-sanitizer) are used if they are in the PATH.
# shellcheck disable=SC2317 # what traps call is reached
set -u

gpu=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$gpu/../.." && pwd)
[ -n "${1:-}" ] || { echo "error: rehearse OUT: a folder for the files" >&2; exit 2; }
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
KIMI_LINEAR=${KIMI_LINEAR:-${CARGO_TARGET_DIR:-$root/target}/release/kimi-linear}
[ -x "$KIMI_LINEAR" ] || { echo "error: $KIMI_LINEAR is not there: cargo build --release, or KIMI_LINEAR names the program" >&2; exit 2; }
temporary=$(mktemp -d)
child=''

# The contents that `pack` would create.
PACK=$temporary/pack
mkdir -p "$PACK/kernels" "$PACK/wheels" "$PACK/loader"
ln -s "$root/tests/reference" "$PACK/models"
git -C "$root" rev-parse HEAD >"$PACK/commit" 2>/dev/null || echo unknown >"$PACK/commit"
echo "a rehearsal on the CPU, no timings" >"$PACK/note"

export OUT PACK KIMI_LINEAR
export VISIT_WORK=${VISIT_WORK:-$temporary/work} VISIT_BACKEND=cpu VISIT_SHAPE=tiny VISIT_DRY=yes
export VISIT_SHORT=64 VISIT_LONG=128 VISIT_BATCH=2 VISIT_PROMPT=40 VISIT_LONG_PROMPT=80
export VISIT_JOBS=2 VISIT_REPEATS=3
export VISIT_OPERATION_LIMIT=12 VISIT_CASE_LIMIT=5 VISIT_CHECK_LIMIT=5
# Any adapter will do, including a software adapter.
export VISIT_ADAPTER=. VISIT_ON_VULKAN='route|select'

end() {
    trap '' TERM INT HUP
    rm -rf "$temporary"
}
stop() {
    trap '' TERM INT HUP
    if [ -n "$child" ]; then
        kill -TERM "$child"
        wait "$child"
    fi
    exit 1
}
trap end EXIT
trap stop TERM INT HUP

"$KIMI_LINEAR" conformance --verbose --backend cpu | sed -nE 's/^(ok|skip|FAIL) +//p' | sed -E 's/  .*//' >"$PACK/names.txt"

wrong=0
for call in first second; do
    bash "$gpu/$call.sh" &
    child=$!
    wait "$child" || wrong=1
    child=''
done
exit "$wrong"
