#!/usr/bin/env bash
# Several machines, this script on each. MASTER_ADDR is one of them, and every other one can reach it.
#   static:   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/multi_node.sh --recipe accurate   (NODE_RANK=1 on the other)
#   elastic:  NNODES=1:4 MASTER_ADDR=host0 launch/multi_node.sh --recipe accurate             (the same on each)
# Static is simple: any failure ends the job, and rank 0, on node 0, alone touches the run directory. Elastic goes on
# with the machines that are left, and takes in those that come (back), from the newest checkpoint; any of them may be
# given rank 0, so RUN_DIR must lie on a disk that they share. MASTER_ADDR itself must stay.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

: "${NNODES:?how many machines: 2, or 1:4 for an elastic job}" "${MASTER_ADDR:?the name or address of one of the machines}"
MASTER_PORT=${MASTER_PORT:-29500}
NPROC_PER_NODE=${NPROC_PER_NODE:-auto} # one process per GPU; without GPUs one per core
recipe=$(sed -nE 's/.*--recipe[= ]([a-z0-9_]+).*/-\1/p' <<<"$*")
RUN_DIR=${RUN_DIR:-runs/multi-node$recipe} # one directory, one run: the same command continues it

export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 # schedulers' SIGUSR1 reaches the ranks, too
# After a restart torch 2.13 meets the keys of the ranks before in the launcher's store, and can wait for them for ever:
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [[ "$NNODES" == *:* ]]; then
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RDZV_ID:-mnist}"
        --rdzv-conf "${RDZV_CONF:-join_timeout=600,last_call_timeout=30}" --max-restarts "${MAX_RESTARTS:-10}")
else
    : "${NODE_RANK:?which of the machines this is: 0, 1, ...}"
    rendezvous=(--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --node-rank "$NODE_RANK")
fi

# LOCAL_ADDR: what the others call this machine, where its own name does not resolve.
exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "${rendezvous[@]}" \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    "$root/train_ddp.py" --run-dir "$RUN_DIR" "$@"
