#!/usr/bin/env bash
# Which draft is worth training for this target, on this machine? Nothing is trained and no weights are loaded: random
# weights take as long. Run it first; then train the best shape (train_sft.sh, train_soft.sh), measure its acceptance
# (draftsmith bench ... --json > bench.json), and give that file as the second argument.
# Size: small or full. Measured: small, 2026-11-21.
#
#   recipes/plan.sh TARGET [ACCEPTANCE] [further options of `draftsmith plan`]
#
# TARGET is a folder, a Hub name or a config.json. ACCEPTANCE is a share of drafted tokens (0.7), shares by depth
# (0.8,0.7,0.6), or a result of bench or replay as FILE:DRAFTER. Costs are written to costs.json, for
# `draftsmith replay --latency costs.json`, and the curves to plan.svg.
#
# Measured (2 cores of an AMD EPYC, bfloat16, torch 2.13, 2026-11-21; three minutes): for a Llama of 8 x 512 and an
# acceptance of 0.66, one layer of the target's width drafting 3 tokens is best at batch size 1 (1.61x; a 5 x 512 gets
# 1.05x), two layers of half the width drafting 2 at batch sizes 8 and 32 (1.51x, 1.54x).
# `python -m draftsmith.recipes.studies.plan --target TARGET`: 20 of 20 predictions, for shapes and lengths that were
# not measured, are within 15 % of the real loop, for this target and one of 16 x 768, at batch sizes 1 and 8; the worst
# is 12 % off.
set -euo pipefail
target="${1:?name the target: a folder, a Hub name or a config.json}"
acceptance="${2:-0.7}"

draftsmith plan --target "$target" --acceptance "$acceptance" --out costs.json --plot plan.svg "${@:3}"
