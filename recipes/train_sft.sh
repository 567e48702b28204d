#!/usr/bin/env bash
# Vicuna-7B and a chat corpus -> a draft of 12 layers, ready for draftsmith, transformers and vLLM.
# Size: full. Measured: not yet.
#
#   recipes/train_sft.sh sharegpt.json out/vicuna-7b-sft [--target T] [--num_layers K] ...
#
# Hardware, time, losses and accepted_length of a whole run: not measured yet.
# Run it again after a break, and it goes on where it stopped.
set -euo pipefail
data="${1:?name the conversations: a file, a folder or a data set}"
out="${2:?name the new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# What will be learned: rows read and skipped, one conversation as it is served, with the loss mask in colour.
draftsmith data "$data" --tokenizer lmsys/vicuna-7b-v1.5 --template vicuna_v1.1 --limit 1000

# Loss and accepted_length per exit go to metrics.csv and curves.png.
# What is finished is not trained again.
grep -qs '"state": "finished"' "$out/run.json" || draftsmith train sft --config "$recipes/train_sft.yaml" --data "$data" --out "$out" "${@:3}"

# A folder for other people: the draft, a model card with what was measured, the target's licence.
draftsmith export "$out" --out "$out-export" --dtype bfloat16
