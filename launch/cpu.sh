#!/usr/bin/env bash
# Several processes on the CPUs of one machine (gloo):
#   NUM_PROCESSES=4 RUN_DIR=runs/lenet5 launch/cpu.sh --recipe lenet5
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NUM_PROCESSES=${NUM_PROCESSES:-2}
RUN_DIR=${RUN_DIR:-runs/cpu} # one directory, one run: the same command continues it

# Not `accelerate launch --cpu --num_processes 4`, which starts one process. --standalone takes any free port.
exec torchrun --standalone --nproc-per-node "$NUM_PROCESSES" \
    "$root/train_ddp.py" --cpu --run-dir "$RUN_DIR" "$@"
