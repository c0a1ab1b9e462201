#!/bin/bash
# One GPU: an ordinary run. Start it again after any stop, and it goes on.
#   bash one_gpu.sh RECIPE.yaml [key=value …]
set -euo pipefail
recipe=${1:?usage: one_gpu.sh RECIPE.yaml [key=value …]}
shift
prefloop check "$recipe" "$@"
exec prefloop run "$recipe" "$@" --out "${OUT:-runs/one-gpu}"
