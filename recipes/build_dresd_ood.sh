#!/usr/bin/env bash
# Build an out-of-distribution DReSD store of a public corpus, keyed by the target's states.
# Size: full. Measured: not yet.
#
#   TARGET=owner/model recipes/build_dresd_ood.sh                # UltraChat, 80,000 conversations
#   TARGET=owner/model CORPUS=code recipes/build_dresd_ood.sh    # EvolInstructCode, 80,000 pairs
#
# If it is stopped, run it again to resume.
# Disk space while building: 256 bytes per key, plus the states of a million keys (8 GB for a 4096-wide target in bfloat16).
set -euo pipefail
TARGET=${TARGET:?name the target: a folder, or owner/model on the Hub}
CORPUS=${CORPUS:-chat}
OUT=${OUT:-runs/dresd_ood_$CORPUS}
here=$(dirname "$0")
mkdir -p "$(dirname "$OUT")"

case $CORPUS in
  chat) data=() ;;
  code) data=(--data nickrosh/Evol-Instruct-Code-80k-v1:train) ;;
  *) echo "CORPUS is chat or code, not $CORPUS" >&2; exit 2 ;;
esac
draftsmith store build dresd --config "$here/build_dresd_ood.yaml" --target "$TARGET" --out "$OUT" "${data[@]}" "$@"
