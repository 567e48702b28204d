#!/usr/bin/env bash
# Local text -> a small target from scratch, tokenizer and chat template included: to try everything without the Hub.
# Size: small. Measured: not yet.
#
#   recipes/train_target.sh out/target TEXT...
#
# Text: conversations, or plain files (Python's own library: python -c 'import os; print(os.path.dirname(os.__file__))').
# Losses: not measured yet.
set -euo pipefail
out="${1:?give a new folder}"
: "${2:?give the text: files, folders or data sets}"
recipes="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

draftsmith train target --config "$recipes/train_target.yaml" --data "${@:2}" --out "$out"
