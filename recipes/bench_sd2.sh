#!/usr/bin/env bash
# Compare the rules by which a sorted draft chooses its exits, in one interleaved run: by cost, each fixed exit, the
# published thresholds (per node, and per level as published), and chains. It calibrates first, on other prompts.
# Size: small or full. Measured: small, 2026-11-21.
#
#   TARGET=T DRAFT=D EXITS="1 2 4" HELD_OUT=calibration.jsonl QUESTIONS=questions.jsonl OUT=DIR recipes/bench_sd2.sh
#
# Store the draft in the dtype that it will run in (`draftsmith export --dtype bfloat16`). For a slower target with the
# same output: python -m draftsmith.recipes.studies.slow_target --target T --blocks 24 --out SLOW.
#
# Measured (2 cores of an AMD EPYC 9004, shared; bfloat16, greedy, batch 1, torch 2.13, 2026-11-21). Draft: 4 x 512, exits
# 1/2/4, SoFT for 150 steps on its target's answers. Speedup over plain decoding, accepted_length in parentheses,
# without questions whose plain answer loops.
#   target 8 x 512 (40 questions, 64 tokens)      cost 1.36 (2.51)  exits 1.34 1.25 1.01  threshold 1.05  level 1.12  chain 1.25
#   the same + 24 idle layers (26, 48 tokens)     cost 1.96 (2.83)  exits 1.92 1.95 1.87  threshold 1.72  level 1.85  chain 1.80
# cost over the best fixed exit, all questions: 1.00 [0.96, 1.03] and 1.00 [0.96, 1.04].
set -euo pipefail
TARGET=${TARGET:?name the target: a folder, or owner/model on the Hub}
DRAFT=${DRAFT:?name the sorted draft: a folder or a Hub name}
EXITS=${EXITS:?name the exits of the draft, such as "6 9 12"}
HELD_OUT=${HELD_OUT:?name prompts to calibrate on, none of which is in QUESTIONS}
QUESTIONS=${QUESTIONS:?name the questions}
OUT=${OUT:?name a new folder for the run}
here=$(dirname "$0")

draftsmith calibrate --target "$TARGET" --drafters "sd2:$DRAFT" --data "$HELD_OUT" --min_distinct 0.5

drafters="cost=sd2:$DRAFT,threshold=sd2:$DRAFT[selection=threshold],level=sd2:$DRAFT[selection=level_threshold]"
for exit in $EXITS; do
  drafters+=",exit$exit=sd2:$DRAFT[selection=fixed,exit=$exit],chain$exit=sd2:$DRAFT[selection=fixed,exit=$exit,top_k=1]"
done
draftsmith bench --config "$here/bench_sd2.yaml" --target "$TARGET" --data "$QUESTIONS" --drafters "$drafters" --out "$OUT" "$@"
for exit in $EXITS; do
  draftsmith compare "$OUT/answers/exit$exit.jsonl" "$OUT/answers/cost.jsonl"
done
