#!/usr/bin/env bash
# Code stores for the rest drafter: small (answers to code instructions) and large (Python source files; several billion
# tokens, so set --limit to what the disk holds: 6 bytes a token up to 65,535 ids, 8 beyond).
# Size: small or full. Measured: not yet.
#
# Time, memory and latency by size: the header of build_rest_chat.sh. A run that was killed goes on when run again.
#
#   ./build_rest_code.sh [small|large] [further options of `draftsmith store build rest`]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
size=${1:-small}
shift || true

case $size in
  small) draftsmith store build rest --config "$here/build_rest_code.yaml" "$@" ;;
  large) draftsmith store build rest --config "$here/build_rest_code.yaml" --data codeparrot/codeparrot-clean:train \
           --limit 1000000 --out stores/rest_code_large "$@" ;;
  *) echo "the sizes are small and large, not $size" >&2; exit 2 ;;
esac
