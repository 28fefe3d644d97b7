#!/usr/bin/env bash
# What Dynamo adds to a request: the same load against the server alone, against the frontend with one worker, and against the frontend with
# a prefill and a decode worker, one after the other, with the resident memory of each process afterwards.
#
#   cluster/overhead.sh [requests] [per second]       after `make demo` and `make cluster`
set -euo pipefail
cd "$(dirname "$0")/.."
requests=${1:-200} rate=${2:-4} port=18950
program=target/release/kimi-linear bin=cluster/target/release out=$(mktemp -d)
export DYN_LOG=${DYN_LOG:-error} KIMI_LINEAR_LOG=error
running=()
stop() {
    for pid in "${running[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${running[@]}"; do wait "$pid" 2>/dev/null || true; done
    running=()
}
trap 'stop; rm -rf "$out"' EXIT
start() {
    "$@" >>"$out/log" 2>&1 &
    running+=($!)
}
measure() {
    local name=$1 pid
    for _ in $(seq 600); do
        curl -sf "http://127.0.0.1:$port/health" >/dev/null && break
        sleep 0.1
    done
    echo "## $name"
    "$program" bench serve --url "http://127.0.0.1:$port" --rate "$rate" --num-requests 20 >/dev/null
    "$program" bench serve --url "http://127.0.0.1:$port" --rate "$rate" --num-requests "$requests" --input-length 256 --output-length 64 --ignore-eos
    for pid in "${running[@]}"; do
        printf '%s: %s MiB resident\n' "$(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -d' ' -f1-3 | sed 's|.*/||')" \
            "$(($(awk '/VmRSS/ {print $2}' "/proc/$pid/status") / 1024))"
    done
    stop
}
found="file:$out/discovery"
mkdir -p "$out/discovery"
start "$program" serve --backend cpu --port $port
measure "the server alone"
start "$bin/kimi-linear-worker" --role both --backend cpu --discovery "$found"
start "$bin/kimi-linear-frontend" --port $port --discovery "$found" --status-port 0
measure "frontend and one worker"
start "$bin/kimi-linear-worker" --role prefill --backend cpu --discovery "$found"
start "$bin/kimi-linear-worker" --role decode --backend cpu --discovery "$found"
start "$bin/kimi-linear-frontend" --port $port --discovery "$found" --status-port 0
measure "frontend, prefill and decode worker"
