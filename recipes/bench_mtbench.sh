#!/usr/bin/env bash
# Drafters on MT-Bench, sampled at temperature 0.7 and top_p 0.8 as in REST's paper (arXiv 2311.08252), two turns each.
# Size: full. Measured: not yet.
#
#   TARGET=owner/model QUESTIONS=mt_bench.jsonl recipes/bench_mtbench.sh [further options of `draftsmith bench`]
#   TARGET=... QUESTIONS=... DRAFTERS=pld,rest:stores/rest_chat_small,small:DRAFT recipes/bench_mtbench.sh
#
# QUESTIONS is MT-Bench's question.jsonl or Spec-Bench's; every question in the file is asked.
# On a 7B chat model not measured: it waits for a GPU with 24 GB.
set -euo pipefail
TARGET=${TARGET:?name the target: a folder, or owner/model on the Hub}
QUESTIONS=${QUESTIONS:?name the questions: a file in the format of MT-Bench or Spec-Bench}
DRAFTERS=${DRAFTERS:-pld}
here=$(dirname "$0")

draftsmith bench --config "$here/bench_mtbench.yaml" --target "$TARGET" --data "$QUESTIONS" --drafters "$DRAFTERS" "$@"
