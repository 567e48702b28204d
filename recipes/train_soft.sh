#!/usr/bin/env bash
# Vicuna-7B and a chat corpus -> a sorted draft (exits after 6, 9 and 12 layers), ready for draftsmith, transformers and vLLM.
# Size: full. Measured: not yet.
#
#   recipes/train_soft.sh sharegpt.json out/vicuna-7b-soft [--target T] [--num_layers K] ...
#
# Not measured: a whole run waits for a GPU with 80 GB.
# Run it again after an interruption and it resumes.
set -euo pipefail
data="${1:?give the conversations: a file, a folder or a data set}"
out="${2:?give a new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# The training data: rows read and skipped, one rendered conversation with its loss mask in colour.
draftsmith data "$data" --tokenizer lmsys/vicuna-7b-v1.5 --template vicuna_v1.1 --limit 1000

# Loss and accepted_length per exit go to metrics.csv and curves.png.
# A finished run is not repeated.
grep -qs '"state": "finished"' "$out/run.json" || draftsmith train soft --config "$recipes/train_soft.yaml" --data "$data" --out "$out" "${@:3}"

# A folder to publish: the draft, a model card with the measurements, the target's licence.
draftsmith export "$out" --out "$out-export" --dtype bfloat16
