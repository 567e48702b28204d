#!/usr/bin/env bash
# A small target and local conversations -> a sorted draft (exits after 1, 2 and 4 layers) on a laptop's CPU in ten minutes.
# Size: small. Measured: in part, 2026-11-21.
#
#   recipes/train_target.sh out/target TEXT...          # if there is no target yet
#   recipes/train_soft_small.sh out/target chats.jsonl out/soft [--minutes 3] ...
#
# Measured as recipes/studies/sorted_training.py trains it (first layers, AdamW 1e-3, 80 steps of 4 rows of 512; one
# thread of an AMD EPYC 9004, bf16, 2026-11-21; a 30M target, its own answers, three seeds): accepted_length 2.29, 2.47
# and 2.65 from exits 1, 2 and 4 on held-out prompts; the exits of an SFT draft 1.88, 2.13 and 2.69; drafts of one and
# two layers alone 2.34 and 2.49 (LOG.md).
# Muon and even layers, as set here, wait for an hour of an idle core.
set -euo pipefail
target="${1:?give the folder of the target}"
data="${2:?give the conversations: a file or a folder}"
out="${3:?give a new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

draftsmith train soft --config "$recipes/train_soft_small.yaml" \
  --target "$target" --data "$data" --out "$out" "${@:4}"
