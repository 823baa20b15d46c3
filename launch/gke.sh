#!/usr/bin/env bash
# Starts a run on one or more TPU slices of a GKE cluster, as a JobSet.
#
#     export IMAGE=REGISTRY/copsd_jax SHARED=pvc:copsd TPU=v5e TOPOLOGY=4x4
#     launch/gke.sh [--print] --config=configs/opsd.py:qwen3_1_7b --workdir=/mnt/shared/W [...]
#     launch/gke.sh [--print] delete
#
# All other arguments are passed to `python -m copsd_jax.main`. The script fills in
# launch/gke_jobset.yaml and applies it. If a signal ends a process or machines are taken away, the
# cluster restarts all processes, and the run continues. If the program ends with an error, or made
# no progress in several starts, the JobSet fails. While the run is active, the same command does
# nothing. After the run has stopped, the same command continues the run. `delete` ends the run, and
# the run saves its last step.
#
# Set up once: the image (launch/Dockerfile), and JobSet 0.6 or later in the cluster
# (see https://jobset.sigs.k8s.io). Except in Autopilot clusters, create a node pool for each slice:
#
#     gcloud container node-pools create slice-0 --cluster=C --location=L --node-locations=Z \
#       --machine-type=ct5lp-hightpu-4t --tpu-topology=4x4 --num-nodes=4 [--spot]
#
# The work directory must be on a disk that all Pods share. SHARED names this disk: a volume claim
# (Filestore), an NFS export, or a bucket. A checkpoint becomes valid when its folder is renamed.
# Therefore a bucket needs a hierarchical namespace. SERVICE_ACCOUNT needs write access to the
# bucket.
#
# Cost: the price of the nodes while they exist, even if unused, and a fee for the cluster. List
# prices in the US in 2025, per chip and hour, were about USD 1.20 (v5e), 2.70 (v6e) and 4.20 (v5p).
# So 16 chips of v5e cost about USD 19 per hour. Spot machines cost about half of that or less. Look
# up current prices, which differ by region. `delete` ends the run. Delete node pools separately,
# unless they scale down to zero automatically.
# Duration: minutes to days until nodes are available, and minutes to pull the image. Then follows
# the time of the run, with some minutes of compilation at each start.
# Written from the documentation of GKE and JobSet, and for the cluster detection of JAX 0.10. This
# script was never run on GKE. GKE sets the variables MEGASCALE_*, by which slices find each other.
set -euo pipefail
cd "$(dirname "$0")/.."

# ---- settings, which environment variables override ----------------------------------------------
NAME=${NAME-copsd}                        # name of the JobSet
NAMESPACE=${NAMESPACE-default}
CONTEXT=${CONTEXT-}                       # context of kubectl; "" for the current context
IMAGE=${IMAGE-}                           # image that contains the program
TPU=${TPU-v5e}                            # v4, v5e, v5p, v6e, tpu7x
TOPOLOGY=${TOPOLOGY-4x4}                  # chips of a slice: 2 sides for v5e and v6e, else 3
CHIPS_PER_HOST=${CHIPS_PER_HOST-4}        # 8 for ct5lp-hightpu-8t and ct6e-standard-8t
SLICES=${SLICES-1}                        # number of slices, connected by the data centre network
SPOT=${SPOT-0}                            # 1: cheaper nodes that may be taken away at any time
HOST_NETWORK=${HOST_NETWORK-1}            # 0 for Autopilot clusters, which forbid 1
GRACE=${GRACE-25}                         # seconds to save; spot nodes allow at most 25
MAX_TRIES_WITHOUT_PROGRESS=${MAX_TRIES_WITHOUT_PROGRESS-3} # starts in a row that may fail
SHARED=${SHARED-}                         # pvc:CLAIM, host:/export of an NFS server, or gs://bucket
MOUNT=${MOUNT-/mnt/shared}                # path of SHARED in the Pods
SERVICE_ACCOUNT=${SERVICE_ACCOUNT-}       # account of the Pods; "" for the namespace default
# --------------------------------------------------------------------------------------------------

# shellcheck source=launch/arguments.sh
source launch/arguments.sh

check() {
  label NAME
  label NAMESPACE
  [[ $ACTION == delete ]] || check_run
  need kubectl "install it, for example with gcloud components install kubectl"
}

check_run() {
  whole SLICES
  whole CHIPS_PER_HOST
  whole GRACE
  one_of TPU v4 v5e v5p v6e tpu7x
  one_of CHIPS_PER_HOST 1 4 8
  one_of SPOT 0 1
  one_of HOST_NETWORK 0 1
  given IMAGE "launch/Dockerfile says how to build it"
  [[ $IMAGE =~ ^[A-Za-z0-9._:/@-]+$ ]] || fail "IMAGE is '$IMAGE': it must be the name of an image"
  [[ -z $SERVICE_ACCOUNT ]] || label SERVICE_ACCOUNT
  [[ $MOUNT =~ ^(/[A-Za-z0-9._-]+)+$ ]] || fail "MOUNT is '$MOUNT': it must be an absolute path"
  check_program "$MOUNT"
  tell_grace GRACE
  check_sent
}

# Sets ACCELERATOR, the node label of the chips, and DIMENSIONS, the number of sides of a topology.
# shellcheck disable=SC2034 # the manifest uses ACCELERATOR
accelerator() {
  case $TPU in
    v4) ACCELERATOR=tpu-v4-podslice DIMENSIONS=3 ;;
    v5e) ACCELERATOR=tpu-v5-lite-podslice DIMENSIONS=2 ;;
    v5p) ACCELERATOR=tpu-v5p-slice DIMENSIONS=3 ;;
    v6e) ACCELERATOR=tpu-v6e-slice DIMENSIONS=2 ;;
    tpu7x) ACCELERATOR=tpu7x DIMENSIONS=3 ;;
  esac
}

# Sets HOSTS per slice and CHIPS per host. A slice of 4x4 with 4 chips per host has 4 hosts.
size() {
  local sides side chips=1
  [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
    fail "TOPOLOGY is '$TOPOLOGY': it must be sides separated by x, such as 4x4 or 2x2x2"
  IFS=x read -ra sides <<< "$TOPOLOGY"
  ((${#sides[@]} == DIMENSIONS)) ||
    fail "TOPOLOGY is '$TOPOLOGY': slices of $TPU have $DIMENSIONS sides"
  for side in "${sides[@]}"; do
    chips=$((chips * side))
  done
  CHIPS=$((chips < CHIPS_PER_HOST ? chips : CHIPS_PER_HOST))
  ((chips % CHIPS == 0)) ||
    fail "TOPOLOGY is '$TOPOLOGY': $chips chips do not divide by CHIPS_PER_HOST=$CHIPS_PER_HOST"
  HOSTS=$((chips / CHIPS))
  ((SLICES == 1 || HOSTS > 1)) ||
    fail "SLICES is '$SLICES': GKE connects slices of several hosts only, and $TOPOLOGY is one host"
}

# Sets VOLUME, the line of the manifest that names the disk.
volume() {
  local name='[a-z0-9][a-z0-9.-]*'
  if [[ $SHARED =~ ^pvc:($name)$ ]]; then
    VOLUME="persistentVolumeClaim: {claimName: ${BASH_REMATCH[1]}}"
  elif [[ $SHARED =~ ^gs://([a-z0-9._-]+)$ ]]; then
    # If the time of the lease were cached, a run that is alive could look dead.
    local FUSE=implicit-dirs,metadata-cache:ttl-secs:0
    VOLUME="csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes:"
    VOLUME+=" {bucketName: \"${BASH_REMATCH[1]}\", mountOptions: \"$FUSE\"}}"
  elif [[ $SHARED =~ ^([A-Za-z0-9.-]+):(/[A-Za-z0-9._/-]*)$ ]]; then
    VOLUME="nfs: {server: \"${BASH_REMATCH[1]}\", path: \"${BASH_REMATCH[2]}\"}"
  else
    fail "SHARED is '$SHARED': it must name a disk, as pvc:CLAIM, host:/export or gs://NAME"
  fi
}

# Prints the arguments as a YAML list of JSON strings. $(...) is escaped, since Kubernetes expands
# it.
yaml_list() {
  local word list=''
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || fail "the argument $(quoted "$word") has a control character"
    word=${word//\\/\\\\} word=${word//\$\(/\$\$\(}
    list+="${list:+, }\"${word//\"/\\\"}\""
  done
  printf '[%s]' "$list"
}

# Tells whether a line that ends in `# if $1` is kept.
holds() {
  case $1 in
    spot) ((SPOT)) ;;
    bucket) [[ $SHARED == gs://* ]] ;;
    account) [[ $SERVICE_ACCOUNT ]] ;;
    'host network') ((HOST_NETWORK)) ;;
    *) fail "launch/gke_jobset.yaml has '# if $1', but launch/gke.sh has no such condition" ;;
  esac
}

# Prints the manifest with all values filled in. Kubernetes expands ATTEMPT, the number of the
# start.
# shellcheck disable=SC2034 # the manifest uses ARGUMENTS
manifest() {
  local line name ARGUMENTS=''
  ARGUMENTS=$(yaml_list "${TRIES[@]}" -- "${PROGRAM[@]}")
  ARGUMENTS=${ARGUMENTS/, \"--\",/, \"--attempt=\$(ATTEMPT)\", \"--\",}
  while IFS= read -r line; do
    if [[ $line =~ ^(.*[^ ])' # if '(.*)$ ]]; then
      line=${BASH_REMATCH[1]}
      holds "${BASH_REMATCH[2]}" || continue
    fi
    if [[ $line != \#* && $line =~ ^([^$]*)\$\{([A-Z_]+)\}(.*)$ ]]; then
      name=${BASH_REMATCH[2]}
      line="${BASH_REMATCH[1]}${!name}${BASH_REMATCH[3]}"
    fi
    [[ $line == \#* ]] || printf '%s\n' "$line"
  done < launch/gke_jobset.yaml
}

commands() {
  local kubectl=(kubectl --namespace="$NAMESPACE")
  [[ -z $CONTEXT ]] || kubectl+=(--context="$CONTEXT")
  LOOKING=("${kubectl[@]}" get jobset "$NAME" --ignore-not-found
    --output='jsonpath={.status.terminalState}')
  DELETE=("${kubectl[@]}" delete jobset "$NAME" --ignore-not-found)
  APPLY=("${kubectl[@]}" apply --filename=-)
  FOLLOW=("${kubectl[@]}" logs --follow "job/$NAME-slice-0")
}

run() {
  local text ended
  text=$(manifest)
  if [[ $PRINT ]]; then
    note "if this command prints Completed or Failed:"
    quoted "${LOOKING[@]}"
    note "run this command first:"
    quoted "${DELETE[@]}"
    printf "%s << 'MANIFEST'\n%s\nMANIFEST\n" "$(quoted "${APPLY[@]}")" "$text"
    return
  fi
  ended=$("${LOOKING[@]}") ||
    fail "kubectl cannot list the JobSets of namespace $NAMESPACE: install JobSet in the cluster"
  if [[ $ended ]]; then
    echo "$NAME is $ended and is started again"
    "${DELETE[@]}"
  fi
  "${APPLY[@]}" <<< "$text"
  echo "$((SLICES * HOSTS)) processes on $SLICES x $TPU $TOPOLOGY; $WORKDIR on $SHARED. Log:"
  quoted "${FOLLOW[@]}"
}

parse "$@"
check
commands
if [[ $ACTION == delete ]]; then
  step "${DELETE[@]}"
else
  accelerator
  size
  volume
  run
fi
