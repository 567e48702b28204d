#!/usr/bin/env bash
# A target and prompts -> the target's own answers -> Medusa heads trained on them, for `--drafters medusa:HEADS`.
# Size: full. Measured: not yet.
#
#   recipes/train_medusa.sh lmsys/vicuna-7b-v1.5 prompts.jsonl out/vicuna-7b-medusa [--num_heads 5] ...
#
# With --features FOLDER the target reads the answers once and its states are kept on disk (the size is printed first),
# which pays off from about two epochs. A whole run is not measured: it waits for a GPU with 80 GB.
# Run it again after an interruption and it resumes.
set -euo pipefail
target="${1:?give the target: a folder or a Hub name}"
prompts="${2:?give the prompts: a file, a folder or a data set}"
out="${3:?give a new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# Heads are used on text that the target writes, so they learn from such text.
"$recipes/answers.sh" "$prompts" "$out-answers.jsonl" --target "$target"

# Loss by head and accepted_length go to metrics.csv and curves.png. A finished run is not repeated.
grep -qs '"state": "finished"' "$out/run.json" || draftsmith train medusa --config "$recipes/train_medusa.yaml" \
  --target "$target" --data "$out-answers.jsonl" --out "$out" "${@:4}"
