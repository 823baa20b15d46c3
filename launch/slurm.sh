#!/usr/bin/env bash
# A run on GPU nodes of a SLURM cluster: one process a node, or one a GPU.
#
#     export PARTITION=gpu NODES=2 GPUS_PER_NODE=8
#     launch/slurm.sh [--print] --config=configs/opsd.py:qwen3_1_7b --workdir=/home/me/W [...]
#     launch/slurm.sh [--print] delete
#
# All other arguments go to `python -m copsd_jax.main`. Queues a job; SLURM queues it again when it
# is preempted or a node dies, and the job itself when its time is up; the run then continues. The
# same command again does nothing while a job of this NAME is queued or running, and continues the
# run afterwards. This folder, PYTHON (pip install -e '.[gpu]') and the work directory have to be on
# a disk that all nodes share: SHARED.
#
# Cost: GPUs x hours on the cluster's account; rented, an H100 was about USD 2 to 4 an hour in 2025,
# so the 16 GPUs of two nodes some USD 50. Prices differ by provider and change: look them up.
# Duration: as long as the queue is; then the run's own time, with some minutes of compilation at
# each start. What a preempted step had done since the last checkpoint (train.save_every) is lost.
# Written from the documentation of SLURM and the cluster detection of jax 0.10; never run on SLURM.
set -euo pipefail
cd "$(dirname "$0")/.."

# ---- settings, each also from the environment ----------------------------------------------------
NAME=${NAME-copsd}                    # of the job
PARTITION=${PARTITION-}               # "" for the cluster's default
ACCOUNT=${ACCOUNT-}                   # "" for the user's default
NODES=${NODES-1}
GPUS_PER_NODE=${GPUS_PER_NODE-8}
PROCESSES=${PROCESSES-node}           # one per node, or per gpu
CPUS_PER_GPU=${CPUS_PER_GPU-8}
TIME=${TIME-24:00:00}                 # of one job; then the run goes on in the next
NOTICE=${NOTICE-120}                  # seconds before its time is up, a job queues itself again
SHARED=${SHARED-$HOME}                # a folder on the disk that all nodes share
PYTHON=${PYTHON-.venv/bin/python}
SETUP=${SETUP-}                       # a line of shell before the run, as: module load cuda
# --------------------------------------------------------------------------------------------------

# shellcheck source=launch/arguments.sh
source launch/arguments.sh

check() {
  label NAME
  [[ $ACTION == delete ]] || check_run
  need sbatch "run this on a login node of the cluster"
}

check_run() {
  local name
  for name in NODES GPUS_PER_NODE CPUS_PER_GPU NOTICE; do
    whole "$name"
  done
  one_of PROCESSES node gpu
  [[ $TIME =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
    fail "TIME is '$TIME': it must be SLURM's, as 24:00:00 or 2-00:00:00"
  for name in PARTITION ACCOUNT; do
    [[ ${!name} =~ ^[A-Za-z0-9_,.-]*$ ]] || fail "$name is '${!name}': that is no name"
  done
  [[ $PWD =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || fail "the folder $PWD has a space or a sign in its name"
  check_program "$SHARED"
  [[ $PRINT || -x $PYTHON ]] ||
    fail "PYTHON is '$PYTHON': there is no such program; it comes from pip install -e '.[gpu]'"
}

# Processes of a node, CPUs and environment of each. On SLURM jax gives a process the GPU of its
# number on the node alone: so the process of a whole node has to name them all, and where there is
# one for each GPU, all have to see all (--gpu-bind=none).
tasks() {
  TASKS=1 CPUS=$((CPUS_PER_GPU * GPUS_PER_NODE)) ENVIRONMENT=()
  if [[ $PROCESSES == gpu ]]; then
    TASKS=$GPUS_PER_NODE CPUS=$CPUS_PER_GPU
    return
  fi
  local gpu gpus=0
  for ((gpu = 1; gpu < GPUS_PER_NODE; gpu++)); do
    gpus+=,$gpu
  done
  ENVIRONMENT=(env JAX_LOCAL_DEVICE_IDS="$gpus")
}

directive() {
  printf '#SBATCH %s\n' "$@"
}

# What SLURM runs on the first node. A job whose time is nearly up gets USR1, and queues itself.
batch() {
  echo '#!/bin/bash'
  directive --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$TASKS" \
    --gpus-per-node="$GPUS_PER_NODE" --cpus-per-task="$CPUS" \
    --time="$TIME" --exclusive --requeue --open-mode=append --signal="B:USR1@$NOTICE" \
    --output="$PWD/runs/slurm-$NAME-%j.log"
  [[ -z $PARTITION ]] || directive --partition="$PARTITION"
  [[ -z $ACCOUNT ]] || directive --account="$ACCOUNT"
  [[ -z $SETUP ]] || printf '%s\n' "$SETUP"
  quoted cd "$PWD"
  echo
  echo "program() {"
  printf '  exec %s\n' "$(quoted srun --kill-on-bad-exit=1 --cpus-per-task="$CPUS" --cpu-bind=none \
    --gpu-bind=none ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"} "$PYTHON" "${PROGRAM[@]}")"
  cat << 'END'
}

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
program &
code=0
while kill -0 $! 2> /dev/null; do
  code=0
  wait $! || code=$?
done
exit "$code"
END
}

run() {
  local looking=(squeue --me --noheader --name="$NAME" --format=%i) there text
  tasks
  text=$(batch)
  if [[ $PRINT ]]; then
    note "if this says nothing, no job of this name is queued or running:"
    quoted "${looking[@]}"
    quoted mkdir -p runs
    printf "sbatch << 'JOB'\n%s\nJOB\n" "$text"
    return
  fi
  there=$("${looking[@]}") || fail "squeue cannot look at the queue"
  if [[ $there ]]; then
    echo "$NAME is queued or running as job $there: another run needs another NAME"
    return
  fi
  mkdir -p runs
  sbatch <<< "$text"
  echo "$((NODES * TASKS)) processes on $NODES x $GPUS_PER_NODE GPUs; the run: $WORKDIR;" \
    "log: runs/slurm-$NAME-*.log"
}

parse "$@"
check
if [[ $ACTION == delete ]]; then
  step scancel --me --name="$NAME"
else
  run
fi
