#!/bin/bash
# Runs a command of mfengine on all GPUs of one or more nodes:
#
#   sbatch scripts/slurm/run.sh mfengine.train xl2 --data /local/imagenet256
#   sbatch --nodes=16 scripts/slurm/run.sh mfengine.train xl2 --batch-size 4096 --replicas 16 --data /local/imagenet256
#   sbatch --time=08:00:00 scripts/slurm/run.sh mfengine.prepare import /shared/latents /shared/imagenet256 --num-classes 1000
#
# Training and preparing stop 5 minutes before the time limit, keep their work, and are requeued to continue. The same
# happens after SIGTERM from anywhere, and when a node fails. Training that crashes restarts from its newest checkpoint,
# at most three times. A dry run finds wrong input first. docs/cluster.md explains each line.
#
#SBATCH --job-name=mfengine
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u

if [ $# -eq 0 ]; then
    echo "usage: sbatch [OPTIONS] $0 mfengine.COMMAND [ARGUMENTS]" >&2
    exit 2
fi

resumable='' restarts=0
case $1 in
mfengine.train)
    set -- "$@" --resume auto
    resumable=yes restarts=3
    python -m "$@" --dry-run --ranks $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) || exit
    ;;
mfengine.prepare)
    resumable=yes
    ;;
esac

# It reaches torchrun on every node, which forwards it, but not this shell.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# Since Slurm 22.05, srun does not inherit this from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# By default, torchrun kills its processes 30 seconds after SIGTERM.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

# Like torchrun, except for the exit code after a signal, which would be 1.
torchrun='
import sys
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main
try:
    main()
except SignalException as stopped:
    sys.exit(128 + stopped.sigval)
'
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 --wait=300 python -c "$torchrun" \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 20000))" --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts="$restarts" -m "$@" &
pid=$!

# A signal ends `wait` early: wait again until the command itself has ended.
while true; do
    wait "$pid"
    code=$?
    kill -0 "$pid" 2>/dev/null || break
done

if [ -n "$resumable" ] && [ "$code" -eq $((128 + 15)) ]; then # SIGTERM
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
