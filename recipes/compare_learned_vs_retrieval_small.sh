#!/usr/bin/env bash
# Compare learned and retrieved drafts for a small target on a laptop's CPU: SFT and SoFT drafts, REST and DReSD stores
# of the same answers, at T = 0 and 0.8, batch sizes 1 and 8, by the steps of compare_learned_vs_retrieval.sh.
# Size: small. Measured: in part, 2026-11-21.
#
#   TARGET=DIR PROMPTS=prompts.jsonl HELD_OUT=held_out.jsonl QUESTIONS=questions.jsonl OUT=DIR \
#     recipes/compare_learned_vs_retrieval_small.sh [further options of `draftsmith bench`]
#
# Measured to test the script, not to judge learned drafts (2026-11-21): on one busy thread of an AMD EPYC 9004 (load
# average 3 to 7) the three minutes of training were 42 steps of SFT and 9 of SoFT. Target of 8 x 512 (30M), bfloat16, torch
# 2.13; 400 answers (28,870 tokens), `--limit 14`, 64 tokens; greedy answers that loop (2 and 3) left out. About 50 minutes,
# stopped twice. Speedup over plain decoding (accepted_length):
#                  pld          rest         dresd        small        sd2
#   T = 0,   B = 1 1.49 (1.64)  2.50 (2.44)  2.01 (2.45)  1.24 (1.75)  1.03 (1.39)
#   T = 0,   B = 8 0.58 (1.58)  1.38 (1.97)  1.29 (1.89)  0.96 (1.50)  0.87 (1.19)
#   T = 0.8, B = 1 1.12 (1.05)  1.51 (1.42)  1.12 (1.31)  1.18 (1.34)  1.06 (1.23)
#   T = 0.8, B = 8 0.43 (1.06)  0.68 (1.23)  0.87 (1.27)  0.60 (1.19)  0.90 (1.13)
# At T = 0 every answer that differs from plain decoding's is a numeric tie, listed in the results.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TARGET=${TARGET:?name the folder of the target}
export PROMPTS=${PROMPTS:?name the prompts whose answers train drafts and fill stores}
export HELD_OUT=${HELD_OUT:?name prompts to calibrate on, none of which is in PROMPTS or QUESTIONS}
export QUESTIONS=${QUESTIONS:?name the questions, none of which is in PROMPTS} OUT=${OUT:?name the output folder}
export TEMPLATE=${TEMPLATE:-chat}
export LIMIT=${LIMIT:-400} TOKENS=${TOKENS:-96}
export CONFIG=${CONFIG:-$here/compare_learned_vs_retrieval_small.yaml}
export SFT=${SFT:-$here/train_sft_small.yaml} SOFT=${SOFT:-$here/train_soft_small.yaml}
# At this size only the depth of the draft changes the cost of a step: one layer drafts fastest.
export SFT_LAYERS=${SFT_LAYERS:-1}
export TRAINING=${TRAINING:---minutes 3}

"$here/compare_learned_vs_retrieval.sh" "$@"
