#!/usr/bin/env bash
# A target and prompts -> the target's own answers -> an EAGLE-3 head trained on them, for `--drafters eagle:HEAD`.
# Size: full. Measured: not yet.
#
#   recipes/train_eagle.sh meta-llama/Llama-3.1-8B-Instruct prompts.jsonl out/llama-8b-eagle [--unrolls 3] ...
#
# With --features FOLDER the target reads the answers once and its states are kept on disk (the size is printed first: four
# states of every token), which pays off from about two epochs. A whole run is not measured: it waits for a GPU with 80 GB.
# Run it again after an interruption and it resumes.
set -euo pipefail
target="${1:?give the target: a folder or a Hub name}"
prompts="${2:?give the prompts: a file, a folder or a data set}"
out="${3:?give a new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# A head is used on text that the target writes, so it learns from such text.
"$recipes/answers.sh" "$prompts" "$out-answers.jsonl" --target "$target"

# Loss by unroll and accepted_length go to metrics.csv and curves.png. A finished run is not repeated.
grep -qs '"state": "finished"' "$out/run.json" || draftsmith train eagle --config "$recipes/train_eagle.yaml" \
  --target "$target" --data "$out-answers.jsonl" --out "$out" "${@:4}"
