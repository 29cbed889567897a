#!/bin/bash
# Train on several nodes under Slurm: sbatch launchers/slurm.sh [key.sub=value ...]
# Saves and queues itself again five minutes before its time is over and when it is preempted; goes on after a lost node.
#SBATCH --job-name=lejepa
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

CONFIG=${CONFIG:-vitl_in1k} # a recipe's name, or a YAML file
RUNS=${RUNS:-runs}          # a directory that every node sees
PORT=${PORT:-29500}         # free on the first node
MOST_RESTARTS=${MOST_RESTARTS:-50}

# One directory for a job, whatever it is restarted for, and for each task of an array.
run_dir=$RUNS/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
restarts=${SLURM_RESTART_COUNT:-0}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# torchrun hands the warning (USR2) on to its ranks, and gives them four minutes to save.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID-$restarts" --rdzv-backend c10d --rdzv-endpoint "$first_node:$PORT" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout 240 \
    -m lejepa_scale train --config "$CONFIG" "run.dir=$run_dir" "$@"
status=$?

left=$(cat "$run_dir/exit_status" 2>/dev/null)
echo "srun left with $status, the run with ${left:-a fault}"
if [ "$left" = 75 ] && [ "$restarts" -lt "$MOST_RESTARTS" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
