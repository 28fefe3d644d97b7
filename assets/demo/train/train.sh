#!/bin/sh
# Train, export and score the demo model; an interrupted run goes on where it stood.
set -e
cd "$(dirname "$0")"
# Keep freed memory: returning each buffer to the system costs a tenth of the time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
python train.py run --tokens "${TOKENS:-20e6}" --decay "${DECAY:-0.4}"
python export.py run ..
python evaluate.py .. --rows 200
python questions.py ..
