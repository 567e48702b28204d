#!/usr/bin/env bash
# Local text -> a small target from scratch, tokenizer and chat template included: to try everything without the Hub.
# Size: small. Measured: in part, 2026-11-21.
#
#   recipes/train_target.sh out/target TEXT...
#
# Text: conversations, or plain files (Python's own library: python -c 'import os; print(os.path.dirname(os.__file__))').
# Measured at a smaller size: the quickstart's target of 12 x 128 took 277 s of one core of an AMD EPYC 9004 (2026-11-21; LOG.md). The
# 30 minutes that are set here wait for an idle machine.
set -euo pipefail
out="${1:?give a new folder}"
: "${2:?give the text: files, folders or data sets}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

draftsmith train target --config "$recipes/train_target.yaml" --data "${@:2}" --out "$out"
