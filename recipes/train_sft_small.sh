#!/usr/bin/env bash
# A small target and local conversations -> a draft of 4 layers, on a laptop's CPU in ten minutes.
# Size: small. Measured: in part, 2026-11-21.
#
#   recipes/train_target.sh out/target TEXT...          # if there is no target yet
#   recipes/train_sft_small.sh out/target chats.jsonl out/sft [--minutes 3] ...
#
# Measured with the first layers, AdamW 1e-3 and 80 steps of 4 rows of 512 (`python -m draftsmith.recipes.studies.sorted_training`; one
# thread of an AMD EPYC 9004, bf16, 2026-11-21; a 30M target, its own answers, three seeds): accepted_length 2.69 on held-out prompts
# with 4 layers (LOG.md). Muon and even layers, as set here, wait for an hour of an idle core.
set -euo pipefail
target="${1:?give the folder of the target}"
data="${2:?give the conversations: a file or a folder}"
out="${3:?give a new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

draftsmith train sft --config "$recipes/train_sft_small.yaml" \
  --target "$target" --data "$data" --out "$out" "${@:4}"
