# shellcheck shell=bash disable=SC2034,SC2154 # it is sourced: its variables are the caller's, and the caller's are its
# Functions of both calls of a visit. Sourced with `call` (first or second) and `seconds`, the time limit of the call, set.
#
# A visit's state is in $work: `steps` has one line per command, and each command's output is in a file of its own. summary.py
# reads nothing else.
set -u

gpu=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
pack=${PACK:?a packed folder: see gpu-check}
work=${VISIT_WORK:-${TMPDIR:-/var/tmp}/kimi-linear-visit}
out=${OUT:-$work/out}

# What is run and for how long; a rehearsal has other values (rehearse.sh).
backend=${VISIT_BACKEND:-cuda}
shape=${VISIT_SHAPE:-48b}
short=${VISIT_SHORT:-4K} long=${VISIT_LONG:-128K} batch=${VISIT_BATCH:-64}
prompt=${VISIT_PROMPT:-8K} long_prompt=${VISIT_LONG_PROMPT:-128K}
jobs=${VISIT_JOBS:-6} repeats=${VISIT_REPEATS:-300}
# Seconds of one operation's cases, of one case in a process of its own, and of one under a checker.
operation_limit=${VISIT_OPERATION_LIMIT:-60} case_limit=${VISIT_CASE_LIMIT:-12} check_limit=${VISIT_CHECK_LIMIT:-20}
# The name of the GPU among Vulkan's adapters, and the operations that run there; extended regular expressions.
adapter=${VISIT_ADAPTER:-NVIDIA}
on_vulkan=${VISIT_ON_VULKAN:-linear|kda_chunk|kda_step|mla_prefill|mla_decode|experts|route|select}
dry=() small=()
[ -z "${VISIT_DRY:-}" ] || dry=(--dry-run) small=(--small)

# Seconds for the summary.
reserve=10
# The end of the current stage, in seconds of this call.
deadline=$((seconds - reserve))
child='' current=''
SECONDS=0
# A core file of a process with a GPU would take longer to write than the time that is left.
ulimit -c 0
export PYTHONDONTWRITEBYTECODE=1

die() {
    echo "error: $*" >&2
    exit 1
}

# Seconds that the current stage has left.
left() { echo $((deadline - SECONDS)); }

# within LIMIT: the stage that begins ends after LIMIT seconds, or earlier with the call.
within() {
    deadline=$((SECONDS + $1))
    [ "$deadline" -le $((seconds - reserve)) ] || deadline=$((seconds - reserve))
}

# record NAME CODE FROM LIMIT FILE: one line of `steps`. CODE is an exit code, `late` or `stopped`.
record() {
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$call" "$1" "$2" $((SECONDS - $3)) "$3" "$4" "$5" >>"$work/steps"
}

# step NAME LIMIT FILE COMMAND..: runs it for at most LIMIT seconds, and not longer than its stage. stdout goes to FILE,
# stderr to FILE.err. In the background, because a shell that waits for a command in the foreground handles no signals.
step() {
    local name=$1 limit=$2 file=$3 from=$SECONDS code=0
    shift 3
    [ "$(left)" -ge "$limit" ] || limit=$(left)
    if [ "$limit" -lt 4 ]; then
        record "$name" late "$from" "$limit" "$file"
        return 99
    fi
    current=$(printf '%s\t%s\t%s' "$name" "$from" "$limit")
    timeout -k 3 "$limit" "$@" >"$file" 2>"$file.err" </dev/null &
    child=$!
    wait "$child" || code=$?
    child='' current=''
    record "$name" "$code" "$from" "$limit" "$file"
    return "$code"
}

# Ends a few seconds after a signal, and records what was running.
stop() {
    local name from limit
    trap '' TERM INT HUP
    if [ -n "$child" ]; then
        IFS=$'\t' read -r name from limit <<<"$current"
        kill -TERM "$child" 2>/dev/null
        record "$name" stopped "$from" "$limit" -
    fi
    record "the visit" stopped "$SECONDS" "$seconds" -
    exit 1
}

# The files of $out as of now, and the summary on stdout.
summary() { python3 "$gpu/summary.py" files "$work" "$pack" "$out"; }

# After each stage, so that a visit that is killed has the results so far.
keep() { summary >/dev/null 2>&1; }

finish() {
    local code=0
    trap '' TERM INT HUP
    trap - EXIT
    [ -z "${monitor:-}" ] || kill "$monitor" 2>/dev/null
    summary || code=$?
    if [ "$code" -gt 1 ]; then
        echo "error: summary.py exits with $code; the commands and how they ended:"
        tail -n 60 "$work/steps"
    fi
    exit "$code"
}

# begin: from here on there is a summary in any case.
begin() {
    mkdir -p "$work" "$out"
    touch "$work/steps"
    trap finish EXIT
    trap stop TERM INT HUP
}

# The toolkit's and Python's folders with CUDA's libraries, for our program only: PyTorch finds its own, and must not find
# others.
find_libraries() {
    local folder found=()
    while read -r folder; do
        [ -d "$folder" ] && found+=("$folder")
    done < <(
        python3 - <<'PYTHON'
import glob, site
for packages in site.getsitepackages() + [site.getusersitepackages()]:
    print(*sorted(glob.glob(packages + "/nvidia/*/lib")), sep="\n")
PYTHON
        printf '%s\n' /usr/local/cuda*/lib64 /usr/local/cuda*/targets/*/lib
    )
    libraries=$(IFS=: && echo "${found[*]:-}")
    libraries=${libraries:+$libraries:}${LD_LIBRARY_PATH:-}
}

# The program for commands: with its libraries, and its caches in $work.
find_program() {
    program=${KIMI_LINEAR:-$work/packed/kimi-linear}
    [ -x "$program" ] || die "$program is not there: gpu-check pack, or KIMI_LINEAR names the program"
    ours=(env "LD_LIBRARY_PATH=$libraries" "$program")
    export KIMI_LINEAR_CACHE=$work/cache CUDA_CACHE_PATH=$work/jit XDG_RUNTIME_DIR=$work NO_COLOR=1
}

# The operations of the list, one per line, as filters.
operations() { cut -d/ -f1 "$pack/names.txt" | sort -u | sed 's,$,/,'; }

# cases GROUP LIMIT ONE DEVICE..: the conformance cases whose names contain a line of $work/GROUP.names, one process per line
# with a limit of ONE seconds, several at a time. $work/GROUP.list has the end of each.
cases() {
    local group=$1 limit=$2 one=$3 each
    shift 3
    mkdir -p "$work/$group"
    rm -f "$work/$group.list"
    [ -s "$work/$group.names" ] || return 0
    each=$(($(nproc) / jobs))
    step "$group" "$limit" "$work/$group.out" env "RAYON_NUM_THREADS=$((each > 1 ? each : 1))" \
        xargs -d '\n' -a "$work/$group.names" -P "$jobs" -I '{}' \
        bash "$gpu/cases.sh" "$work/$group.list" "$work/$group" "$one" '{}' "${ours[@]}" conformance --verbose "$@"
}

# tool NAME: the path of one of the toolkit's programs; fails if it does not exist.
tool() {
    local found
    found=$(command -v "$1") || found=$(find /usr/local/cuda*/bin -name "$1" 2>/dev/null | head -1)
    [ -n "$found" ] && echo "$found"
}

# headline NAME LIMIT DEVICE ARGUMENTS..: one of the main results. DEVICE is several words.
headline() {
    local name=$1 limit=$2
    shift 2
    step "bench $name" "$limit" "$work/bench/$name.json" "${ours[@]}" bench --shape "$shape" --json "${dry[@]}" "$@"
}

# profiled NAME LIMIT FILE OPTIONS.. -- ARGUMENTS..: a few layers with Nsight Compute, if it exists.
profiled() {
    local name=$1 limit=$2 file=$3 ncu options=()
    shift 3
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    ncu=$(tool ncu) || return 0
    step "ncu $name" "$limit" "$work/ncu/$file" env "LD_LIBRARY_PATH=$libraries" "$ncu" --clock-control none "${options[@]}" \
        "$program" bench --shape "$shape" --backend "$backend" --layers 4 --dry-run "$@"
}

# sanitized TOOL NAME CASE: a case with compute-sanitizer, if it exists. NAME is the file's.
sanitized() {
    local checker=$1 name=$2 case=$3 sanitizer
    sanitizer=$(tool compute-sanitizer) || return 0
    step "$checker: $case" "$check_limit" "$work/sanitizer/$checker-$name" env "LD_LIBRARY_PATH=$libraries" \
        "$sanitizer" --tool "$checker" --error-exitcode 9 "$program" conformance --verbose --backend "$backend" --filter "$case"
}

# small_case OPERATION: one of its cases that is fast with a checker.
small_case() { grep "^$1/" "$pack/names.txt" | grep -v again | tail -1; }
