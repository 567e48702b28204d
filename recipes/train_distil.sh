#!/usr/bin/env bash
# A target and prompts -> the target's own answers -> a wide shallow draft distilled from it, ready for draftsmith,
# transformers and vLLM.
# Size: full. Measured: not yet.
#
#   recipes/train_distil.sh lmsys/vicuna-7b-v1.5 prompts.jsonl out/vicuna-7b-wide [--preset wide-3] ...
#
# With --teacher FOLDER the target reads the answers once and its distributions are kept on disk (the size is printed
# first), which pays off from about two epochs. A whole run is not measured: it waits for a GPU with 80 GB.
# Run it again after an interruption and it resumes.
set -euo pipefail
target="${1:?give the target: a folder or a Hub name}"
prompts="${2:?give the prompts: a file, a folder or a data set}"
out="${3:?give a new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# A draft is used on text that the target writes, so it learns from such text.
"$recipes/answers.sh" "$prompts" "$out-answers.jsonl" --target "$target"

# Loss and accepted_length go to metrics.csv and curves.png.
# A finished run is not repeated.
grep -qs '"state": "finished"' "$out/run.json" || draftsmith train distil --config "$recipes/train_distil.yaml" \
  --target "$target" --data "$out-answers.jsonl" --out "$out" "${@:4}"

# A folder to publish: the draft, a model card with the measurements, the target's licence.
draftsmith export "$out" --out "$out-export" --dtype bfloat16
