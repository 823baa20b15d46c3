#!/usr/bin/env bash
# Starts a run on GPU nodes of a SLURM cluster, with one process per node or per GPU.
#
#     export PARTITION=gpu NODES=2 GPUS_PER_NODE=8
#     launch/slurm.sh [--print] --config=configs/opsd.py:qwen3_1_7b --workdir=/home/me/W [...]
#     launch/slurm.sh [--print] delete
#
# All other arguments are passed to `python -m copsd_jax.main`. The script queues a job. If the job
# is preempted or a node dies, SLURM requeues the job. If the time limit of the job is near, the run
# saves its last step, and the job requeues itself. Then the run continues. The job ends with the
# exit code of the program. The job is not queued again if the program ended by itself, or made no
# progress in several starts. While a job of this NAME is queued or running, the same command does
# nothing. After the job has ended, the same command continues the run. `delete` ends the job, and
# the run saves its last step. This folder, PYTHON (pip install -e '.[gpu]') and the work directory
# must be on a disk that all nodes share. SHARED names this disk.
#
# Cost: GPUs x hours on the account of the cluster. In 2025, a rented H100 cost about USD 2 to 4 per
# hour, so 16 GPUs on two nodes cost about USD 50 per hour. Look up current prices, which differ by
# provider.
# Duration: the time in the queue, then the time of the run, with some minutes of compilation at
# each start. After a preemption, the steps since the last checkpoint (train.save_every) are
# repeated.
# Written from the documentation of SLURM, and for the cluster detection of JAX 0.10. This script
# was never run on SLURM.
set -euo pipefail
cd "$(dirname "$0")/.."

# ---- settings, which environment variables override ----------------------------------------------
NAME=${NAME-copsd}                    # name of the job
PARTITION=${PARTITION-}               # "" for the default of the cluster
ACCOUNT=${ACCOUNT-}                   # "" for the default of the user
NODES=${NODES-1}
GPUS_PER_NODE=${GPUS_PER_NODE-8}
PROCESSES=${PROCESSES-node}           # node: one process per node; gpu: one per GPU
CPUS_PER_GPU=${CPUS_PER_GPU-8}
TIME=${TIME-24:00:00}                 # time limit of a job; the next job continues the run
NOTICE=${NOTICE-120}                  # a job requeues itself so many seconds before its time limit
KILL_WAIT=${KILL_WAIT-30}             # KillWait of the cluster: seconds from TERM to KILL
MAX_TRIES_WITHOUT_PROGRESS=${MAX_TRIES_WITHOUT_PROGRESS-3} # starts in a row that may fail
SHARED=${SHARED-${HOME-}}             # a folder on a disk that all nodes share
PYTHON=${PYTHON-.venv/bin/python}
SETUP=${SETUP-}                       # a shell command before the run, such as module load cuda
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
  for name in NODES GPUS_PER_NODE CPUS_PER_GPU NOTICE KILL_WAIT; do
    whole "$name"
  done
  one_of PROCESSES node gpu
  [[ $TIME =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] ||
    fail "TIME is '$TIME': it must be a time of SLURM, such as 24:00:00 or 2-00:00:00"
  local seconds
  seconds=$(time_seconds "$TIME")
  ((seconds == 0 || seconds > NOTICE)) || # SLURM reads 0 as no limit
    fail "TIME is '$TIME', which is $seconds seconds: it must be longer than NOTICE=$NOTICE seconds," \
      "because a job requeues itself NOTICE seconds before its limit"
  for name in PARTITION ACCOUNT; do
    [[ ${!name} =~ ^[A-Za-z0-9_,.-]*$ ]] || fail "$name is '${!name}': it must be a name"
  done
  [[ $PWD =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || fail "$PWD has a special character: move this folder"
  [[ $SHARED == /* ]] || fail "SHARED is '$SHARED': it must be the path of a disk that nodes share"
  check_program "${SHARED%/}"
  tell_grace KILL_WAIT
  given PYTHON "set it to the Python that has this package, for example .venv/bin/python"
  [[ $PRINT || -x $PYTHON ]] ||
    fail "PYTHON is '$PYTHON': it does not exist; install it with pip install -e '.[gpu]'"
}

# Prints the seconds of a time of SLURM: minutes, minutes:seconds, hours:minutes:seconds,
# days-hours, days-hours:minutes or days-hours:minutes:seconds.
time_seconds() {
  local days=0 parts
  IFS=: read -ra parts <<< "${1#*-}"
  if [[ $1 == *-* ]]; then
    days=${1%%-*}
    parts+=(0 0)
  elif ((${#parts[@]} == 1)); then
    parts=(0 "${parts[0]}" 0)
  elif ((${#parts[@]} == 2)); then
    parts=(0 "${parts[@]}")
  fi
  echo $((((10#$days * 24 + 10#${parts[0]}) * 60 + 10#${parts[1]}) * 60 + 10#${parts[2]}))
}

# Sets TASKS per node, and the CPUS and ENVIRONMENT of each process. On SLURM, JAX gives process
# number n of a node only GPU number n. So with one process per node, JAX_LOCAL_DEVICE_IDS must list
# all GPUs. With one process per GPU, every process must see all GPUs (--gpu-bind=none).
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

# Prints the script that SLURM runs on the first node. If the time limit of a job is near, SLURM
# sends USR1. Then the script sends TERM to the run, waits until the run has saved and ended, and
# requeues the job. `scancel --signal` is needed because srun kills the run if srun itself gets
# TERM. If SLURM sends TERM to the whole job, the run gets the TERM too, so the script only waits
# for the run. SLURM counts the restarts of a job in SLURM_RESTART_COUNT.
batch() {
  echo '#!/bin/bash'
  directive --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$TASKS" \
    --gpus-per-node="$GPUS_PER_NODE" --cpus-per-task="$CPUS" \
    --time="$TIME" --exclusive --requeue --open-mode=append --signal="B:USR1@$NOTICE" \
    --output="$PWD/runs/slurm-$NAME-%j.log"
  [[ -z $PARTITION ]] || directive --partition="$PARTITION"
  [[ -z $ACCOUNT ]] || directive --account="$ACCOUNT"
  [[ -z $SETUP ]] || printf '%s\n' "$SETUP"
  printf '%s || exit 2\n\n' "$(quoted cd "$PWD")"
  echo "tries() {"
  printf '  %s %s\n}\n\n' "$(quoted "$PYTHON" "${TRIES[@]}")" "--attempt=\"\$1\""
  echo "program() {"
  printf '  exec %s\n' "$(quoted srun --kill-on-bad-exit=1 --cpus-per-task="$CPUS" --cpu-bind=none \
    --gpu-bind=none ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"} "$PYTHON" "${PROGRAM[@]}")"
  cat << 'END'
}

attempt=${SLURM_RESTART_COUNT:-0}
tries "$attempt" || exit
again= signal=
trap 'again=1 signal=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'signal=1' TERM
program &
while true; do
  code=0 signal=
  wait $! || code=$?
  [[ $signal ]] || break # a signal to this script has ended the wait
done
case $code in
  [0-4]) again= ;; # the program ended by itself
esac
if [[ $again ]] && tries "$((attempt + 1))"; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
END
}

run() {
  local looking=(squeue --me --noheader --name="$NAME" --format=%i) there text
  tasks
  text=$(batch)
  if [[ $PRINT ]]; then
    note "if this command prints nothing, no job of this name is queued or running:"
    quoted "${looking[@]}"
    quoted mkdir -p runs
    printf "sbatch << 'JOB'\n%s\nJOB\n" "$text"
    return
  fi
  there=$("${looking[@]}") || fail "squeue cannot read the queue"
  if [[ $there ]]; then
    echo "$NAME is queued or running as job ${there//$'\n'/, }; use another NAME for another run"
    return
  fi
  mkdir -p runs
  sbatch <<< "$text"
  echo "$((NODES * TASKS)) processes on $NODES x $GPUS_PER_NODE GPUs; work directory: $WORKDIR;" \
    "log: runs/slurm-$NAME-*.log"
}

parse "$@"
check
if [[ $ACTION == delete ]]; then
  step scancel --me --name="$NAME"
else
  run
fi
