#!/usr/bin/env bash
# A small target and prompts -> its own answers -> Hydra heads trained on them, on a laptop's CPU in minutes.
# Size: small. Measured: not yet.
#
#   recipes/train_target.sh out/target TEXT...          # if there is no target yet
#   recipes/train_hydra_small.sh out/target prompts.jsonl out/hydra [--minutes 3] ...
#
set -euo pipefail
target="${1:?give the folder of the target}"
prompts="${2:?give the prompts: a file or a folder}"
out="${3:?give a new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$recipes/answers.sh" "$prompts" "$out-answers.jsonl" --target "$target" --template chat --max_new_tokens 96
draftsmith train hydra --config "$recipes/train_hydra_small.yaml" \
  --target "$target" --data "$out-answers.jsonl" --out "$out" "${@:4}"
