#!/usr/bin/env bash
# Which draft is worth training for this target, on this machine? Nothing is trained and no weights are loaded: random
# ones take as long. Run it first; then train the shape that comes first (train_sft.sh, train_soft.sh), measure its
# acceptance (draftsmith bench ... --json > bench.json), and give that as the second argument.
#
#   recipes/plan.sh TARGET [ACCEPTANCE] [further options of `draftsmith plan`]
#
# TARGET is a folder, a Hub name or a config.json. ACCEPTANCE is a share of drafted tokens (0.7), shares by depth
# (0.8,0.7,0.6), or a result of bench or replay as FILE:DRAFTER. The costs are left in costs.json, for
# `draftsmith replay --latency costs.json`, and the curves in plan.png.
#
# MEASURED
set -euo pipefail
target="${1:?name the target: a folder, a Hub name or a config.json}"
acceptance="${2:-0.7}"

draftsmith plan --target "$target" --acceptance "$acceptance" --out costs.json --plot plan.png "${@:3}"
