#!/usr/bin/env bash
# Build an in-distribution DReSD store: the target answers prompts, 128 tokens each, and its states are the keys.
# Size: full. Measured: not yet.
#
#   TARGET=owner/model recipes/build_dresd_id.sh                 # UltraChat's prompts
#   TARGET=owner/model CORPUS=code recipes/build_dresd_id.sh     # EvolInstructCode's
#   TARGET=owner/model PROMPTS=my_logs.jsonl HELD_OUT=later.jsonl recipes/build_dresd_id.sh
#
# PRESET=nucleus samples the answers (temperature 0.7, top_p 0.95): use it if the target will be served that way.
# If it is stopped, run it again to resume.
set -euo pipefail
TARGET=${TARGET:?name the target: a folder, or owner/model on the Hub}
CORPUS=${CORPUS:-chat}
case $CORPUS in
  chat) PROMPTS=${PROMPTS:-HuggingFaceH4/ultrachat_200k:train_sft} ;;
  code) PROMPTS=${PROMPTS:-nickrosh/Evol-Instruct-Code-80k-v1:train} ;;
  *) echo "CORPUS is chat or code, not $CORPUS" >&2; exit 2 ;;
esac
LIMIT=${LIMIT:-80000}
PRESET=${PRESET:-greedy}
OUT=${OUT:-runs/dresd_id_$CORPUS}
here=$(dirname "$0")
mkdir -p "$OUT"

draftsmith answers --target "$TARGET" --data "$PROMPTS" --limit "$LIMIT" --preset "$PRESET" --max_new_tokens 128 \
  --batch_size "${BATCH_SIZE:-32}" --out "$OUT/answers.jsonl"
if [ ! -e "$OUT/store" ]; then
  draftsmith store build dresd --config "$here/build_dresd_id.yaml" --target "$TARGET" --data "$OUT/answers.jsonl" \
    --out "$OUT/store" "$@"
fi
if [ -n "${HELD_OUT:-}" ]; then
  draftsmith answers --target "$TARGET" --data "$HELD_OUT" --preset "$PRESET" --max_new_tokens 128 \
    --out "$OUT/held_out.jsonl"
  draftsmith store quality "$OUT/store" --target "$TARGET" --data "$OUT/held_out.jsonl"
fi
