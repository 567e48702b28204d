#!/usr/bin/env bash
# A small target and local conversations -> a draft of 4 layers, on a laptop's CPU in ten minutes.
# Size: small. Measured: not yet.
#
#   recipes/train_target.sh out/target TEXT...          # if there is no target yet
#   recipes/train_sft_small.sh out/target chats.jsonl out/sft [--minutes 3] ...
#
# Losses and accepted_length: not measured yet.
set -euo pipefail
target="${1:?give the folder of the target}"
data="${2:?give the conversations: a file or a folder}"
out="${3:?give a new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

draftsmith train sft --config "$recipes/train_sft_small.yaml" \
  --target "$target" --data "$data" --out "$out" "${@:4}"
