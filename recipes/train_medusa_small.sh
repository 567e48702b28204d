#!/usr/bin/env bash
# A small target and prompts -> its own answers -> Medusa heads trained on them, on a laptop's CPU in minutes.
# Size: small. Measured: in part, 2026-11-22.
#
# Measured as recipes/studies/head_training trains it (these settings for 60 CPU seconds on 700 answers, a 30M target, three
# seeds; one core of an AMD EPYC without AVX-512, float32, 2026-11-22): accepted_length on held-out prompts, trees of 16 nodes, 1.74
# greedy and 1.33 at temperature 0.8; EAGLE-3 1.99 and 1.42, Hydra 1.90 and 1.40.
#
#   recipes/train_target.sh out/target TEXT...          # if there is no target yet
#   recipes/train_medusa_small.sh out/target prompts.jsonl out/medusa [--minutes 3] ...
#
set -euo pipefail
target="${1:?give the folder of the target}"
prompts="${2:?give the prompts: a file or a folder}"
out="${3:?give a new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$recipes/answers.sh" "$prompts" "$out-answers.jsonl" --target "$target" --template chat --max_new_tokens 96
draftsmith train medusa --config "$recipes/train_medusa_small.yaml" \
  --target "$target" --data "$out-answers.jsonl" --out "$out" "${@:4}"
