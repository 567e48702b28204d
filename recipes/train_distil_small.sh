#!/usr/bin/env bash
# A small target and prompts -> its own answers -> a two-layer draft distilled from it, on a laptop's CPU.
# Size: small. Measured: not yet.
#
#   recipes/train_target.sh out/target TEXT...          # where there is no target yet
#   recipes/train_distil_small.sh out/target prompts.jsonl out/distil [--minutes 3] ...
#
set -euo pipefail
target="${1:?name the folder of the target}"
prompts="${2:?name the prompts: a file or a folder}"
out="${3:?name the new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$recipes/answers.sh" "$prompts" "$out-answers.jsonl" --target "$target" --template chat --max_new_tokens 96
draftsmith train distil --config "$recipes/train_distil_small.yaml" \
  --target "$target" --data "$out-answers.jsonl" --out "$out" "${@:4}"
