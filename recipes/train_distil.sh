#!/usr/bin/env bash
# A target and prompts -> the target's own answers -> a wide shallow draft distilled from it, ready for draftsmith,
# transformers and vLLM.
# Size: full. Measured: not yet.
#
#   recipes/train_distil.sh lmsys/vicuna-7b-v1.5 prompts.jsonl out/vicuna-7b-wide [--preset wide-3] ...
#
# With --teacher FOLDER the target reads the answers once and what it says is kept on disk (the size is told before),
# which pays from about two epochs on. Hardware, time and accepted_length of a whole run: not measured yet.
# Run it again after a break, and it goes on where it stopped.
set -euo pipefail
target="${1:?name the target: a folder or a Hub name}"
prompts="${2:?name the prompts: a file, a folder or a data set}"
out="${3:?name the new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# A draft is asked in texts that the target writes, so it learns on those.
"$recipes/answers.sh" "$prompts" "$out-answers.jsonl" --target "$target"

# Loss and accepted_length go to metrics.csv and curves.png.
# What is finished is not trained again.
grep -qs '"state": "finished"' "$out/run.json" || draftsmith train distil --config "$recipes/train_distil.yaml" \
  --target "$target" --data "$out-answers.jsonl" --out "$out" "${@:4}"

# A folder for other people: the draft, a model card with what was measured, the target's licence.
draftsmith export "$out" --out "$out-export" --dtype bfloat16
