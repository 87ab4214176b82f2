#!/usr/bin/env bash
# All GPUs of one machine, or NUM_PROCESSES of them, one process each:
#   NUM_PROCESSES=4 RUN_DIR=runs/accurate launch/multi_gpu.sh --recipe accurate --mixed-precision bf16
# Without GPUs a NUM_PROCESSES given by hand starts as many processes on the CPU: a rehearsal.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NUM_PROCESSES=${NUM_PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count())')}
recipe=$(sed -nE 's/.*--recipe[= ]([a-z0-9_]+).*/-\1/p' <<<"$*")
RUN_DIR=${RUN_DIR:-runs/multi-gpu$recipe} # one directory, one run: the same command continues it

if [[ "$NUM_PROCESSES" == 0 ]]; then
    echo "multi_gpu.sh: PyTorch sees no GPU on $HOSTNAME; launch/cpu.sh trains without one" >&2
    exit 2
fi

export PET_LOCAL_ADDR=localhost # else torchrun's code waits for minutes where the machine's own name does not resolve
# MAX_RESTARTS=3 starts all ranks anew when one dies; they go on from the newest checkpoint.
exec accelerate launch --config_file "$root/launch/multi_gpu.yaml" \
    --num_processes "$NUM_PROCESSES" --max_restarts "${MAX_RESTARTS:-0}" \
    "$root/train_ddp.py" --run-dir "$RUN_DIR" "$@"
