#!/usr/bin/env bash
# Learned or retrieved: one target's own answers train a draft (SFT) and a sorted one (SoFT) and fill a sparse store
# (REST) and a dense one (DReSD); then all four draft for it, greedy and sampled, one question at a time and eight.
# Size: full. Measured: not yet.
#
#   PROMPTS=logs.jsonl HELD_OUT=held_out.jsonl QUESTIONS=questions.jsonl OUT=DIR recipes/compare_learned_vs_retrieval.sh
#   ... TARGET=owner/model TEMPLATE=chat LIMIT=20000 ... [further options of `draftsmith bench`]
#
# PROMPTS are answered, learned and stored; HELD_OUT calibrates; QUESTIONS are asked. No question may stand in the others,
# or retrieval draws on the answer itself. One 80 GB GPU holds draft and target. Stopped at any moment, it goes on where
# it was when it is run again. Read $OUT/report.html.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TARGET=${TARGET:-lmsys/vicuna-7b-v1.5}
TEMPLATE=${TEMPLATE:-vicuna_v1.1}
PROMPTS=${PROMPTS:?name the prompts that the target answers, for drafts to learn and stores to hold}
HELD_OUT=${HELD_OUT:?name prompts to calibrate on, none of which is in PROMPTS or QUESTIONS}
QUESTIONS=${QUESTIONS:?name the questions, none of which is in PROMPTS}
OUT=${OUT:?name a folder for everything}
LIMIT=${LIMIT:-80000}
DTYPE=${DTYPE:-bfloat16}
TOKENS=${TOKENS:-256}
COST_SECONDS=${COST_SECONDS:-60}
CONFIG=${CONFIG:-$here/compare_learned_vs_retrieval.yaml}
SFT=${SFT:-$here/train_sft.yaml}
SOFT=${SOFT:-$here/train_soft.yaml}
read -ra TRAINING <<< "${TRAINING:-}"
mkdir -p "$OUT"

# 1. What the target itself says: what drafts learn best from, and what stores draft best from.
draftsmith answers --target "$TARGET" --template "$TEMPLATE" --preset nucleus --data "$PROMPTS" --limit "$LIMIT" \
  --max_new_tokens "$TOKENS" --batch_size 32 --out "$OUT/answers.jsonl"

# 2. Two learned drafts. Kept in the dtype that they run in: a float32 draft would be read twice as slowly.
finished() { grep -qs '"state": "finished"' "$1/run.json"; }
learn() { # KIND CONFIG [further options]
  local kind=$1 config=$2
  [ ! -e "$OUT/$kind" ] || return 0
  finished "$OUT/train-$kind" || draftsmith train "$kind" --config "$config" --target "$TARGET" \
    --data "$OUT/answers.jsonl" --text.template "$TEMPLATE" --out "$OUT/train-$kind" "${@:3}"
  draftsmith export "$OUT/train-$kind" --target "$TARGET" --dtype "$DTYPE" --out "$OUT/$kind"
}
learn sft "$SFT" ${SFT_LAYERS:+--num_layers "$SFT_LAYERS"} ${TRAINING[@]+"${TRAINING[@]}"}
learn soft "$SOFT" ${TRAINING[@]+"${TRAINING[@]}"}

# 3. Two stores of the same answers.
[ -e "$OUT/rest" ] || draftsmith store build rest --target "$TARGET" --template "$TEMPLATE" --data "$OUT/answers.jsonl" \
  --out "$OUT/rest"
[ -e "$OUT/dresd" ] || draftsmith store build dresd --target "$TARGET" --template "$TEMPLATE" \
  --data "$OUT/answers.jsonl" --out "$OUT/dresd"

# 4. At each temperature: what confidence is worth there, then all drafters beside plain decoding in one run per batch size.
drafters="rest:$OUT/rest,dresd:$OUT/dresd,small:$OUT/sft,sd2:$OUT/soft"
runs=()
for temperature in 0 0.8; do
  calibrated="$OUT/calibrated-$temperature"
  if [ ! -e "$calibrated/results.json" ]; then
    rm -rf "$calibrated" # left half-way by a run that was stopped
    draftsmith calibrate --target "$TARGET" --template "$TEMPLATE" --drafters "$drafters" --data "$HELD_OUT" \
      --temperature "$temperature" --min_distinct 0.5 --seconds "$COST_SECONDS" --out "$calibrated"
  fi
  COST_SECONDS=0 # what passes cost does not depend on the temperature
  for batch_size in 1 8; do
    run="$OUT/bench-T$temperature-B$batch_size"
    runs+=("$run")
    [ ! -e "$run/results.json" ] || continue
    rm -rf "$run" # likewise
    draftsmith bench --config "$CONFIG" --target "$TARGET" --template "$TEMPLATE" --data "$QUESTIONS" \
      --drafters "pld,$drafters,oracle" --temperature "$temperature" --batch_size "$batch_size" --out "$run" "$@"
  done
done

# 5. One page: what to use, and why.
draftsmith report "${runs[@]}" --out "$OUT/report.html"
