#!/usr/bin/env bash
# Compare learned and retrieved drafts: a target's own answers train a draft (SFT) and a sorted draft (SoFT) and fill a
# sparse store (REST) and a dense one (DReSD); all four are measured, greedy and sampled, at batch sizes 1 and 8.
# Size: full. Measured: not yet.
#
#   PROMPTS=logs.jsonl HELD_OUT=held_out.jsonl QUESTIONS=questions.jsonl OUT=DIR recipes/compare_learned_vs_retrieval.sh
#   ... TARGET=owner/model TEMPLATE=chat LIMIT=20000 ... [further options of `draftsmith bench`]
#
# The answers to PROMPTS are trained on and stored, HELD_OUT calibrates, QUESTIONS are measured. No question may be in the
# other two, or retrieval would find its answer. One 80 GB GPU holds draft and target. If it is stopped, run it again to
# resume. The result is $OUT/report.html.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TARGET=${TARGET:-lmsys/vicuna-7b-v1.5}
TEMPLATE=${TEMPLATE:-vicuna_v1.1}
PROMPTS=${PROMPTS:?name the prompts whose answers train drafts and fill stores}
HELD_OUT=${HELD_OUT:?name prompts to calibrate on, none of which is in PROMPTS or QUESTIONS}
QUESTIONS=${QUESTIONS:?name the questions, none of which is in PROMPTS}
OUT=${OUT:?name the output folder}
LIMIT=${LIMIT:-80000}
DTYPE=${DTYPE:-bfloat16}
TOKENS=${TOKENS:-256}
COST_SECONDS=${COST_SECONDS:-60}
CONFIG=${CONFIG:-$here/compare_learned_vs_retrieval.yaml}
SFT=${SFT:-$here/train_sft.yaml}
SOFT=${SOFT:-$here/train_soft.yaml}
read -ra TRAINING <<< "${TRAINING:-}"
mkdir -p "$OUT"

# 1. The target's own answers: the best text to train drafts on and to fill stores with.
draftsmith answers --target "$TARGET" --template "$TEMPLATE" --preset nucleus --data "$PROMPTS" --limit "$LIMIT" \
  --max_new_tokens "$TOKENS" --batch_size 32 --out "$OUT/answers.jsonl"

# 2. Two learned drafts, exported in the dtype that they run in: a float32 draft takes twice as long to read.
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

# 4. At each temperature: calibrate, then measure all drafters against plain decoding, one run per batch size.
drafters="rest:$OUT/rest,dresd:$OUT/dresd,small:$OUT/sft,sd2:$OUT/soft"
runs=()
for temperature in 0 0.8; do
  calibrated="$OUT/calibrated-$temperature"
  if [ ! -e "$calibrated/results.json" ]; then
    rm -rf "$calibrated" # left unfinished by a run that was stopped
    draftsmith calibrate --target "$TARGET" --template "$TEMPLATE" --drafters "pld,$drafters" --data "$HELD_OUT" \
      --temperature "$temperature" --min_distinct 0.5 --seconds "$COST_SECONDS" --out "$calibrated"
  fi
  COST_SECONDS=0 # the cost of passes does not depend on the temperature
  for batch_size in 1 8; do
    run="$OUT/bench-T$temperature-B$batch_size"
    runs+=("$run")
    [ ! -e "$run/results.json" ] || continue
    rm -rf "$run" # unfinished
    draftsmith bench --config "$CONFIG" --target "$TARGET" --template "$TEMPLATE" --data "$QUESTIONS" \
      --drafters "pld,$drafters,oracle" --temperature "$temperature" --batch_size "$batch_size" --out "$run" "$@"
  done
done

# 5. One page: which drafter to use, and why.
draftsmith report "${runs[@]}" --out "$OUT/report.html"
