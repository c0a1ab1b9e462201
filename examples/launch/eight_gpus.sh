#!/bin/bash
# All GPUs of one machine: one rank each. Weights and optimizer are shared over the ranks (train.sharding=full on GPUs).
#   bash eight_gpus.sh RECIPE.yaml [key=value …]        RANKS=4 for fewer
set -euo pipefail
recipe=${1:?usage: eight_gpus.sh RECIPE.yaml [key=value …]}
shift
exec prefloop run "$recipe" "$@" --out "${OUT:-runs/eight-gpus}" --nproc "${RANKS:-8}"
