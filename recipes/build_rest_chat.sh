#!/usr/bin/env bash
# Build chat stores for the rest drafter, small and large. The target's own answers draft best: if you have a log of
# them, or time for `draftsmith answers`, give them with --data.
# Size: small or full. Measured: in part, 2026-11-21.
#
# Measured (2 shared cores, Python 3.11, November 2026): 100M tokens of 32,000 ids in 21 s (reading and tokenising apart),
# 403 MB of memory at most, 6.06 bytes per token, 0.27 ms (p50) and 0.53 ms (p99) per draft
# at min_confidence=1e-4: `python -m draftsmith.recipes.studies.rest_scale`.
# A store of 0.9M tokens of four models' answers gave an accepted_length of 2.40 on a fifth model's answers to other
# questions, where REST's own rule gave 1.71: `python -m draftsmith.recipes.studies.rest_against_peer`.
#
#   ./build_rest_chat.sh [small|large] [further options of `draftsmith store build rest`]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
size=${1:-small}
shift || true

case $size in
  small) draftsmith store build rest --config "$here/build_rest_chat.yaml" "$@" ;;
  large) draftsmith store build rest --config "$here/build_rest_chat.yaml" --limit null \
           --out stores/rest_chat_large "$@" ;;
  *) echo "the sizes are small and large, not $size" >&2; exit 2 ;;
esac
