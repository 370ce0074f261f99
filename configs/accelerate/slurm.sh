#!/bin/bash
# Several nodes of a SLURM cluster, every GPU of each; partition, account and times are yours to set:
#     sbatch --nodes 2 configs/accelerate/slurm.sh configs/coco/r101_r50_12.yaml --per_device_train_batch_size 1
# Call it in the repository, on a disk that all nodes share, where `accelerate` is on the PATH. Five minutes before the
# time is over all processes are told to stop: they end after their step with a checkpoint, and the job queues again and
# goes on from it, as it does after preemption and after the failure of a node. scancel ends it for good.
#SBATCH --job-name=d3etr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=d3etr-%j.log
#SBATCH --signal=B:USR1@300

set -euo pipefail

# what a launcher leaves its processes for the step and the checkpoint before it kills them; 30 seconds by default
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MAIN_NODE=${NODES[0]}
PORT=$((20000 + SLURM_JOB_ID % 10000))
export MAIN_NODE PORT

out_of_time=false
# once: bash may take a second signal for the end of the step
trap 'trap "" USR1; out_of_time=true; interrupted=true; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# one launcher a node, which starts a process a GPU
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file configs/accelerate/two_machines.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_NODE" --main_process_port "$PORT" \
    scripts/distill.py "$@"' launcher "$@" &
step=$!
interrupted=true
while $interrupted; do # a signal ends the wait, not the step
    interrupted=false
    code=0
    wait "$step" || code=$?
done
if $out_of_time && ((code != 0)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
