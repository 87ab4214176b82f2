#!/usr/bin/env bash
# Several processes on the CPUs of one machine (gloo):
#   NUM_PROCESSES=4 RUN_DIR=runs/lenet5 launch/cpu.sh --recipe lenet5
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NUM_PROCESSES=${NUM_PROCESSES:-2}
recipe=$(sed -nE 's/.*--recipe[= ]([a-z0-9_]+).*/-\1/p' <<<"$*")
RUN_DIR=${RUN_DIR:-runs/cpu$recipe} # one directory, one run: the same command continues it

# Not `accelerate launch --cpu --num_processes 4`, which starts one process. --standalone takes any free port;
# without --local-addr it waits for minutes where the machine's own name does not resolve.
exec torchrun --standalone --local-addr localhost --nproc-per-node "$NUM_PROCESSES" \
    "$root/train_ddp.py" --cpu --run-dir "$RUN_DIR" "$@"
