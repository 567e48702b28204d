#!/usr/bin/env bash
# A small target and prompts -> its own answers -> a two-layer draft distilled from it, on a laptop's CPU.
# Size: small. Measured: in part, 2026-11-21.
#
# Measured as recipes/studies/distillation.py trains it (these settings for 120 CPU seconds; one thread of an AMD EPYC
# 9004, bf16, 2026-11-21; a 30M target, 4,783 of its own answers, three seeds): accepted_length on held-out prompts 2.32
# greedy, 2.05 sampled at temperature 1, 2.91 in a top-k tree; SFT at the same cost 2.36, 1.83, 3.05. With
# `--teacher FOLDER` already on disk 2.48, 2.00, 3.04. A further minute with `--losses '{topk: 1}' --temperature 0
# --init FOLDER`: 1.04 times KL's greedy, 1.08 in trees (LOG.md).
#
#   recipes/train_target.sh out/target TEXT...          # if there is no target yet
#   recipes/train_distil_small.sh out/target prompts.jsonl out/distil [--minutes 3] ...
#
set -euo pipefail
target="${1:?give the folder of the target}"
prompts="${2:?give the prompts: a file or a folder}"
out="${3:?give a new folder}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

"$recipes/answers.sh" "$prompts" "$out-answers.jsonl" --target "$target" --template chat --max_new_tokens 96
draftsmith train distil --config "$recipes/train_distil_small.yaml" \
  --target "$target" --data "$out-answers.jsonl" --out "$out" "${@:4}"
