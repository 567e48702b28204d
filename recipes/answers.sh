#!/usr/bin/env bash
# Write a target's own answers to prompts, with their token ids, as one JSONL file.
# Size: full. Measured: in part, 2026-11-21.
#
#   recipes/answers.sh prompts.jsonl answers.jsonl [--target T] [--server URL --model NAME --target null] ...
#
# 4,982 prompts on one of 2 cores of an AMD EPYC 9004, shared, with a target of 30M parameters (bfloat16, 96 new tokens,
# batch 32, 2026-11-21): 310 to 330 tokens/s. Larger targets wait for a GPU.
# If it is stopped, run it again to resume.
set -euo pipefail
prompts="${1:?name the prompts: a file, a folder or a data set}"
out="${2:?name the file to write}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

draftsmith answers --config "$recipes/answers.yaml" --data "$prompts" --out "$out" "${@:3}"
