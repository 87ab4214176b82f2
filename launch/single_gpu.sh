#!/usr/bin/env bash
# One GPU, which CUDA_VISIBLE_DEVICES may name:
#   CUDA_VISIBLE_DEVICES=1 RUN_DIR=runs/accurate launch/single_gpu.sh --recipe accurate --mixed-precision bf16
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

recipe=$(sed -nE 's/.*--recipe[= ]([a-z0-9_]+).*/-\1/p' <<<"$*")
RUN_DIR=${RUN_DIR:-runs/single-gpu$recipe} # one directory, one run: the same command continues it

if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "single_gpu.sh: PyTorch sees no GPU on $HOSTNAME; launch/cpu.sh trains without one" >&2
    exit 2
fi

# One process needs no launcher: signals reach it, and its exit code (75 = start me again) comes back as it is.
# With a launcher: accelerate launch --config_file launch/single_gpu.yaml train_ddp.py
exec python "$root/train_ddp.py" --run-dir "$RUN_DIR" "$@"
