#!/usr/bin/env bash
# Plain decoding on a CUDA device beside transformers' own fastest: `generate` with a static cache, which it compiles.
# Size: full. Measured: not yet.
#
#   recipes/bench_gpu.sh [OUT] [further options of the study]
#
# From a checkout: the study (recipes/studies/passes.py) is not installed with the package. No model is loaded; random
# weights take as long. The target is shaped like an 8B Llama: 32 layers of 4096, 32 query heads and 8 key/value heads, a
# vocabulary of 128256, bfloat16. At batch sizes 1, 8 and 32 it gives the seconds per step of both, their ratio, the
# share of the memory's read bandwidth that a step reaches, and the overhead: the share of a step outside the forward
# pass. It needs 24 GB, more for batch 32 behind a longer context.
# It has not run on a CUDA device yet, and nor have captured passes, so expect to mend something first:
#   python -m pytest -m gpu tests/infer/models tests/infer/test_lossless.py
set -euo pipefail
out="${1:-passes_gpu.json}"

draftsmith env
python -m draftsmith.recipes.studies.passes --shapes '[8B]' --batches '[1,8,32]' --device cuda --out "$out" "${@:2}"
