#!/usr/bin/env bash
# first.sh [SECONDS]: the first call on a GPU. Correctness first, then the headlines, then explanations of them; in order of
# importance, because the last stages are lost if time is short.
set -u

call=first seconds=${1:-505}
# shellcheck source=.ci/gpu/visit.sh
. "$(dirname "${BASH_SOURCE[0]}")/visit.sh"

# A state folder of an earlier visit is emptied; another folder is not touched.
if [ -d "$work" ] && [ -n "$(ls -A "$work")" ]; then
    [ -e "$work/steps" ] || die "$work is not empty and no visit's: VISIT_WORK names another folder"
    rm -rf "$work"
fi
begin
mkdir -p "$work"/{packed,ptx,bench,ncu,sanitizer,models}
printf 'backend\t%s\nshape\t%s\n' "$backend" "$shape" >"$work/settings"

unpack() {
    [ -e "$pack/names.txt" ] || die "nothing is packed in $pack: gpu-check pack"
    if [ -z "${KIMI_LINEAR:-}" ]; then
        gzip -dc "$pack/kimi-linear.gz" >"$work/packed/kimi-linear" && chmod +x "$work/packed/kimi-linear"
    fi
    [ ! -e "$pack/ptx.tar.gz" ] || tar -xzf "$pack/ptx.tar.gz" -C "$work/ptx"
    find_libraries
    find_program
}

# The machine, and in the background clocks and power, which all later numbers depend on.
facts() {
    local name path folders
    {
        echo "commit $(cat "$pack/commit"), $(date -u '+%F %R') UTC, $(uname -r), $(nproc) CPUs, $(free -g | awk 'NR == 2 { print $2 }') GiB"
        timeout 10 nvidia-smi --query-gpu=name,driver_version,memory.total,mig.mode.current,clocks.max.sm,power.limit --format=csv,noheader
        for name in nvcc ncu compute-sanitizer; do
            path=$(tool "$name") && echo "$name: $(timeout 10 "$path" --version | grep -i -E '^version|release' | head -1)"
        done
        IFS=: read -ra folders <<<"$libraries"
        find "${folders[@]}" -maxdepth 1 \( -name 'libcublasLt.so*' -o -name 'libnvrtc.so*' \)
    } >"$work/facts" 2>/dev/null
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi dmon -s pucm -d 2 >"$work/dmon" 2>/dev/null &
        monitor=$!
    fi
}

# Does anything run? Cubins first, then PTX, which the driver compiles, then NVRTC.
smoke() {
    local way folder
    for way in cubin PTX NVRTC; do
        case $way in
        cubin) folder=$pack/kernels ;;
        PTX) folder=$work/ptx ;;
        NVRTC) folder= ;;
        esac
        export KIMI_LINEAR_KERNELS=$folder
        if step "smoke: $way" 60 "$work/smoke-$way" "${ours[@]}" conformance --verbose --backend "$backend" --filter add/; then
            echo "$folder" >"$work/kernels"
            step "devices" 20 "$work/devices" "${ours[@]}" devices
            return 0
        fi
    done
    # Is the cause the program or the machine?
    step "devices" 20 "$work/devices" "${ours[@]}" devices
    step "torch" 40 "$work/torch" python3 -c 'import torch; a = torch.ones(4, device="cuda"); print(torch.__version__, (a + a).sum().item())'
    return 1
}

# One process per operation, so that a fault does not affect other operations.
conformance() {
    operations >"$work/operations.names"
    cases operations 150 "$operation_limit" --backend "$backend"
    # Cases that failed or were not reached, one by one: do they fail alone, or because of another case?
    python3 "$gpu/summary.py" todo "$work" "$pack" >"$work/alone.names"
    cases alone 45 "$case_limit" --backend "$backend"
    step "bits repeated" 45 "$work/again" "${ours[@]}" conformance --verbose --backend "$backend" --filter again --repeats "$repeats"
}

# Whole models, compared with the CPU: the engine's own thread, graphs captured and replayed, batches, sampling.
models() {
    local on model ids
    ids=$(seq -s, 1 200)
    for on in cpu "$backend"; do
        for model in tiny-a tiny-128; do
            step "score $model on $on" 15 "$work/models/score-$model.$on" "${ours[@]}" score --backend "$on" \
                --model "$pack/models/$model" --tokens "$ids" --json
        done
        step "generate on $on" 20 "$work/models/generate.$on" "${ours[@]}" generate --backend "$on" --prompt "The red box" \
            --max-tokens 64 --ignore-eos
        step "eval on $on" 30 "$work/models/eval.$on" "${ours[@]}" eval --backend "$on" --questions 2 --json
    done
}

# The published shape: all layers if they fit in the GPU's memory, else a layer of each kind.
headlines() {
    headline decode-4k 60 --backend "$backend" --context "$short"
    headline prefill-8k 45 --backend "$backend" --prefill "$prompt"
    headline batch64-4k 60 --backend "$backend" --context "$short" --batch "$batch"
    headline decode-128k 45 --backend "$backend" --context "$long"
}

# Times of kernels inside the model if Nsight Compute works, and of single ones with their floors.
kernels() {
    local metrics=(--csv --print-units base --metrics "gpu__time_duration.sum,dram__bytes.sum")
    profiled decode 40 decode.csv "${metrics[@]}" -- --context "$short"
    profiled prefill 40 prefill.csv "${metrics[@]}" -- --prefill "$prompt"
    table KDA 60
    table "MLA decode" 50
    table experts 40
}

table() {
    step "kernels: $1" "$2" "$work/bench/kernels-${1// /-}.md" "${ours[@]}" bench kernels --shape "$shape" --backend "$backend" \
        --no-operations "${dry[@]}" "${small[@]}" --filter "$1"
}

# Memory errors, over one small case of each family of kernels.
memory() {
    local operation case
    for operation in kda_chunk mla_prefill experts mla_decode kda_step linear; do
        case=$(small_case "$operation")
        [ -z "$case" ] || sanitized memcheck "$operation" "$case"
    done
}

unpack
facts
smoke || exit 1
keep
conformance
keep
models
keep
headlines
keep
kernels
keep
memory
headline prefill-128k 60 --backend "$backend" --prefill "$long_prompt"
