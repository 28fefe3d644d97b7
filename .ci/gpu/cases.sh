#!/usr/bin/env bash
# cases.sh LIST FOLDER LIMIT FILTER COMMAND..: runs COMMAND --filter FILTER within LIMIT seconds, with its output in a file of
# FOLDER, and adds its end to LIST: exit code, seconds, limit, file, filter.
#
# It runs in the foreground of its group, so that a signal to the whole stage reaches it. It always exits with 0, so that
# xargs continues.
set -u

list=$1 folder=$2 limit=$3 filter=$4
shift 4
file=$folder/$(printf '%s' "$filter" | tr -c 'a-zA-Z0-9_.-' '_' | cut -c1-60)-$(printf '%s' "$filter" | cksum | cut -d' ' -f1)
code=0
SECONDS=0
timeout --foreground -k 3 "$limit" "$@" --filter "$filter" >"$file" 2>"$file.err" </dev/null || code=$?
printf '%s\t%s\t%s\t%s\t%s\n' "$code" "$SECONDS" "$limit" "$file" "$filter" >>"$list"
exit 0
