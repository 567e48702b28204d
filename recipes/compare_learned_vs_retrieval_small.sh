#!/usr/bin/env bash
# Learned or retrieved, for a small target on a laptop's CPU: SFT and SoFT drafts, REST and DReSD stores of the same
# answers, at T = 0 and 0.8, batch sizes 1 and 8; steps and settings of compare_learned_vs_retrieval.sh.
# Size: small. Measured: not yet.
#
#   TARGET=DIR PROMPTS=prompts.jsonl HELD_OUT=held_out.jsonl QUESTIONS=questions.jsonl OUT=DIR \
#     recipes/compare_learned_vs_retrieval_small.sh [further options of `draftsmith bench`]
#
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export TARGET=${TARGET:?name the folder of the target}
export PROMPTS=${PROMPTS:?name the prompts that the target answers, for drafts to learn and stores to hold}
export HELD_OUT=${HELD_OUT:?name prompts to calibrate on, none of which is in PROMPTS or QUESTIONS}
export QUESTIONS=${QUESTIONS:?name the questions, none of which is in PROMPTS} OUT=${OUT:?name a folder for everything}
export TEMPLATE=${TEMPLATE:-chat}
export LIMIT=${LIMIT:-400} TOKENS=${TOKENS:-96}
export CONFIG=${CONFIG:-$here/compare_learned_vs_retrieval_small.yaml}
export SFT=${SFT:-$here/train_sft_small.yaml} SOFT=${SOFT:-$here/train_soft_small.yaml}
# At this size a step's passes cost nearly the same at any depth but the draft's: one layer drafts fastest.
export SFT_LAYERS=${SFT_LAYERS:-1}
export TRAINING=${TRAINING:---minutes 3}

"$here/compare_learned_vs_retrieval.sh" "$@"
