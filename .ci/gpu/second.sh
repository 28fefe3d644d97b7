#!/usr/bin/env bash
# second.sh [SECONDS]: the second call, on the machine of the first, with its state. It examines failed cases; then why
# kernels are slow, races, the same GPU through Vulkan, and fla's kernels alternating with ours.
set -u

call=second seconds=${1:-205}
# shellcheck source=.ci/gpu/visit.sh
. "$(dirname "${BASH_SOURCE[0]}")/visit.sh"

[ -e "$work/steps" ] || die "no first call left its state in $work: on a fresh machine, gpu-check first"
begin
# A repeated second call replaces the one before in the summary.
sed -i '/^second\t/d' "$work/steps"
mkdir -p "$work"/{tries,loader}
find_libraries
find_program
if [ -e "$work/kernels" ]; then
    KIMI_LINEAR_KERNELS=$(cat "$work/kernels")
    export KIMI_LINEAR_KERNELS
fi

# attempts WAY SETTING: the failed cases in one other way, which an environment variable sets.
attempts() {
    local number
    for number in "${!failed[@]}"; do
        step "$1: ${failed[number]}" "$case_limit" "$work/tries/$1-$number" env "$2" \
            "${ours[@]}" conformance --verbose --backend "$backend" --filter "${failed[number]}"
    done
}

# One failed case of each operation, six at most: without graphs, without programmatic dependent launch, waiting for each
# launch, with code that the driver compiles from PTX instead of ptxas's, and with the checkers.
isolate() {
    local failed=() number checker
    within 110
    mapfile -t failed < <(python3 "$gpu/summary.py" failed "$work" "$pack")
    attempts graphs-off KIMI_LINEAR_GRAPHS=0
    attempts early-off KIMI_LINEAR_PDL=0
    attempts blocking CUDA_LAUNCH_BLOCKING=1
    attempts PTX "KIMI_LINEAR_KERNELS=$work/ptx"
    for checker in memcheck racecheck; do
        for number in "${!failed[@]}"; do
            sanitized "$checker" "failed-$number" "${failed[number]}"
        done
    done
    within "$seconds"
}

# What limits the kernels of a prefill and of a decode.
sections() {
    local common=(--page details --section SpeedOfLight --section Occupancy --section WarpStateStats --section MemoryWorkloadAnalysis)
    profiled "prefill, sections" 50 prefill.txt "${common[@]}" -k 'regex:kda_prepare|kda_scan|mla_prefill|experts_many|route_scores' \
        -c 10 -- --prefill "$prompt"
    profiled "decode, sections" 40 decode.txt "${common[@]}" -k 'regex:kda_decode|experts_few|mla_|linear_few' -c 14 -- --context "$short"
}

# What kernels gain that start before those in front of them have ended: the first headline without and with them.
early() {
    ours=(env KIMI_LINEAR_PDL=0 "LD_LIBRARY_PATH=$libraries" "$program")
    headline decode-4k-early-off 30 --backend "$backend" --context "$short"
    ours=(env "LD_LIBRARY_PATH=$libraries" "$program")
    headline decode-4k-again 30 --backend "$backend" --context "$short"
}

# number: the index of the GPU among wgpu's adapters, with these environment variables; empty if it is not found.
find_adapter() {
    step "adapters" 20 "$work/adapters" env "$@" "$program" devices
    number=$(sed -nE "s/^--backend wgpu --device ([0-9]+) .*($adapter).*/\1/p" "$work/adapters" | head -1)
    [ -n "$number" ]
}

# The same GPU through its Vulkan driver. The loader may have to come from the pack, and be given the driver's path.
vulkan() {
    local number='' found='' settings=("LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}") file
    if ! PATH="$PATH:/sbin" ldconfig -p | grep -q 'libvulkan\.so\.1'; then
        for file in "$pack"/loader/*.deb; do
            [ ! -e "$file" ] || dpkg -x "$file" "$work/loader"
        done
        found=$(find "$work/loader" -name 'libvulkan.so.1' -printf '%h\n' | head -1)
        settings=("LD_LIBRARY_PATH=$found:${LD_LIBRARY_PATH:-}")
    fi
    for file in '' /etc/vulkan/icd.d/nvidia*.json /usr/share/vulkan/icd.d/nvidia*.json /usr/local/nvidia/share/vulkan/icd.d/nvidia*.json; do
        [ -z "$file" ] || [ -e "$file" ] || continue
        [ -z "$file" ] || settings=("${settings[0]}" "VK_DRIVER_FILES=$file")
        find_adapter "${settings[@]}" && break
    done
    if [ -z "$number" ]; then
        record "wgpu: no adapter is named $adapter" none "$SECONDS" 0 "$work/adapters"
        return
    fi
    ours=(env "${settings[@]}" "$program")
    operations | grep -E "^($on_vulkan)/" >"$work/wgpu.names"
    cases wgpu 40 30 --backend wgpu --device "$number"
    headline wgpu-decode-4k 45 --backend wgpu --device "$number" --context "$short" --by-layer
    ours=(env "LD_LIBRARY_PATH=$libraries" "$program")
}

# Our recurrence and fla's Triton kernels alternating: one case, because Triton tunes its kernels at the first call.
turns() {
    local wheel site=$work/site wrapper=$work/kimi-linear-with-libraries
    for wheel in "$pack"/wheels/*.whl; do
        [ ! -e "$wheel" ] || python3 -m zipfile -e "$wheel" "$site"
    done
    # PyTorch must not find the toolkit's libraries, and the program that it starts must.
    printf '#!/bin/sh\nexport LD_LIBRARY_PATH="%s"\nexec "%s" "$@"\n' "$libraries" "$program" >"$wrapper"
    chmod +x "$wrapper"
    step "turns with fla" "${VISIT_TURNS_LIMIT:-70}" "$work/turns" \
        env "PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 "TRITON_CACHE_DIR=$work/triton" \
        python3 "$gpu/turns.py" "$wrapper" "$work/bench/turns.md" --backend "$backend" --case 0 "${dry[@]}"
}

races() {
    local operation case
    for operation in kda_chunk mla_prefill mla_decode experts; do
        case=$(small_case "$operation")
        [ -z "$case" ] || sanitized racecheck "$operation" "$case"
    done
}

isolate
keep
sections
keep
early
keep
vulkan
keep
turns
keep
races
headline prefill-128k-again 50 --backend "$backend" --prefill "$long_prompt"
