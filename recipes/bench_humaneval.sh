#!/usr/bin/env bash
# Drafters on HumanEval, sampled at temperature 0.8 and top_p 0.95 as in REST's paper (arXiv 2311.08252).
# Size: full. Measured: not yet.
#
#   TARGET=owner/model QUESTIONS=humaneval.jsonl recipes/bench_humaneval.sh [further options of `draftsmith bench`]
#   TARGET=... QUESTIONS=... DRAFTERS=pld,rest:stores/rest_code_small,small:DRAFT recipes/bench_humaneval.sh
#
# QUESTIONS holds the function heads as turns, in Spec-Bench's format, or as `prompt`, as HumanEval is published. They
# are rendered with the chat template; --template '{prompt}' continues the code itself.
# On a code model not measured: a 7B one waits for a GPU with 24 GB.
set -euo pipefail
TARGET=${TARGET:?name the target: a folder, or owner/model on the Hub}
QUESTIONS=${QUESTIONS:?name the questions: a file of function heads}
DRAFTERS=${DRAFTERS:-pld}
here=$(dirname "$0")

draftsmith bench --config "$here/bench_humaneval.yaml" --target "$TARGET" --data "$QUESTIONS" --drafters "$DRAFTERS" "$@"
