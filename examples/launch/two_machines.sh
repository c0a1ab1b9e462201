#!/bin/bash
# Two machines with eight GPUs each. Start this on both, with the same arguments; the order does not matter.
#   HEAD=first-machine:29500 bash two_machines.sh RECIPE.yaml [key=value …]
# The recipe, the policy's folder and OUT lie on a file system that both machines share, under the same path. The port
# is for this network only: whoever reaches it can disturb the run.
set -euo pipefail
recipe=${1:?usage: HEAD=host:port two_machines.sh RECIPE.yaml [key=value …]}
shift
exec torchrun --nnodes "${NODES:-2}" --nproc-per-node "${RANKS:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:?set HEAD to host:port of the first machine}" --rdzv-id "${ID:-prefloop}" \
  --shutdown-timeout 60 -m prefloop run "$recipe" "$@" --out "${OUT:?set OUT to a folder that all machines share}"
