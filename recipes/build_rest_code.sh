#!/usr/bin/env bash
# Build code stores for the rest drafter: small (answers to code instructions) and large (Python source files; several
# billion tokens, so set --limit by disk space: 6 bytes per token for vocabularies of up to 65,535 ids, 8 beyond).
# Size: small or full. Measured: not yet.
#
# Time, memory and latency by size: see build_rest_chat.sh. If it is stopped, run it again to resume.
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
