#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, as a JobSet: one slice or several.
#
#     export IMAGE=REGISTRY/copsd_jax SHARED=pvc:copsd TPU=v5e TOPOLOGY=4x4
#     launch/gke.sh [--print] --config=configs/opsd.py:qwen3_1_7b --workdir=/mnt/shared/W [...]
#     launch/gke.sh [--print] delete
#
# All other arguments go to `python -m copsd_jax.main`. Fills launch/gke_jobset.yaml and applies it.
# The cluster starts the run anew when a process dies or machines are taken away, and the run
# continues; the same command again does nothing while it is going, and continues it afterwards.
# Needed once: the image (launch/Dockerfile), JobSet 0.6 or later in the cluster
# (https://jobset.sigs.k8s.io says how), and, but in Autopilot clusters, a node pool for each slice:
#
#     gcloud container node-pools create slice-0 --cluster=C --location=L --node-locations=Z \
#       --machine-type=ct5lp-hightpu-4t --tpu-topology=4x4 --num-nodes=4 [--spot]
#
# The work directory has to be on a disk that all Pods share: SHARED, a claim (Filestore), an NFS
# export, or a bucket. A checkpoint becomes valid by renaming a folder, so a bucket has to have a
# hierarchical namespace, and SERVICE_ACCOUNT may write to it.
#
# Cost: that of the nodes while they exist, used or not, and a fee for the cluster. Listed in the US
# in 2025, a chip and hour: about USD 1.20 (v5e), 2.70 (v6e), 4.20 (v5p), spot about a half or less:
# 16 chips of v5e some USD 19 an hour. Prices differ by region and change: look them up. `delete`
# ends the run; node pools that do not scale to nothing by themselves have to be deleted apart.
# Duration: until there are nodes, minutes to days; minutes to pull the image; then the run's own
# time, with some minutes of compilation at each start.
# Written from the documentation of GKE and JobSet and the cluster detection of jax 0.10; never run
# on GKE. The variables MEGASCALE_*, which tell several slices of each other, come from GKE.
set -euo pipefail
cd "$(dirname "$0")/.."

# ---- settings, each also from the environment ----------------------------------------------------
NAME=${NAME-copsd}                        # of the JobSet
NAMESPACE=${NAMESPACE-default}
CONTEXT=${CONTEXT-}                       # of kubectl; "" for the current one
IMAGE=${IMAGE-}                           # with the program in its working directory
TPU=${TPU-v5e}                            # v4, v5e, v5p, v6e, tpu7x
TOPOLOGY=${TOPOLOGY-4x4}                  # chips of a slice; v5e and v6e two sides, others three
CHIPS_PER_HOST=${CHIPS_PER_HOST-4}        # 8 for ct5lp-hightpu-8t and ct6e-standard-8t
SLICES=${SLICES-1}                        # that many, connected by the data centre's network
SPOT=${SPOT-0}                            # 1: cheaper nodes that are taken away at any time
HOST_NETWORK=${HOST_NETWORK-1}            # 0 in Autopilot clusters, which forbid it
RESTARTS=${RESTARTS-3}                    # after faults; machines that are taken away do not count
SHARED=${SHARED-}                         # pvc:CLAIM, host:/export of an NFS server, or gs://bucket
MOUNT=${MOUNT-/mnt/shared}                # where the Pods see it
SERVICE_ACCOUNT=${SERVICE_ACCOUNT-}       # of the Pods; "" for the namespace's default
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
  one_of TPU v4 v5e v5p v6e tpu7x
  one_of CHIPS_PER_HOST 1 4 8
  one_of SPOT 0 1
  one_of HOST_NETWORK 0 1
  [[ $RESTARTS =~ ^[0-9]+$ ]] || fail "RESTARTS is '$RESTARTS': it must be a whole number"
  [[ $IMAGE ]] || fail "IMAGE is missing: launch/Dockerfile says how to build it"
  [[ $IMAGE =~ ^[A-Za-z0-9._:/@-]+$ ]] || fail "IMAGE is '$IMAGE': that is no name of an image"
  [[ -z $SERVICE_ACCOUNT ]] || label SERVICE_ACCOUNT
  [[ $MOUNT =~ ^(/[A-Za-z0-9._-]+)+$ ]] || fail "MOUNT is '$MOUNT': it must be an absolute path"
  check_program "$MOUNT"
  check_sent
}

# The node label of the chips, and how many sides their topologies have.
# shellcheck disable=SC2034 # the manifest has it
accelerator() {
  case $TPU in
    v4) ACCELERATOR=tpu-v4-podslice DIMENSIONS=3 ;;
    v5e) ACCELERATOR=tpu-v5-lite-podslice DIMENSIONS=2 ;;
    v5p) ACCELERATOR=tpu-v5p-slice DIMENSIONS=3 ;;
    v6e) ACCELERATOR=tpu-v6e-slice DIMENSIONS=2 ;;
    tpu7x) ACCELERATOR=tpu7x DIMENSIONS=3 ;;
  esac
}

# HOSTS of a slice and CHIPS of each: a slice of 4x4 with 4 chips a host has 4 hosts.
size() {
  local sides side chips=1
  [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
    fail "TOPOLOGY is '$TOPOLOGY': it must be sides with x between them, as 4x4 or 2x2x2"
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

# The disk, in one line of the manifest.
volume() {
  local name='[a-z0-9][a-z0-9.-]*'
  if [[ $SHARED =~ ^pvc:($name)$ ]]; then
    VOLUME="persistentVolumeClaim: {claimName: ${BASH_REMATCH[1]}}"
  elif [[ $SHARED =~ ^gs://([a-z0-9._-]+)$ ]]; then
    VOLUME="csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes:"
    VOLUME+=" {bucketName: \"${BASH_REMATCH[1]}\", mountOptions: implicit-dirs}}"
  elif [[ $SHARED =~ ^([A-Za-z0-9.-]+):(/[A-Za-z0-9._/-]*)$ ]]; then
    VOLUME="nfs: {server: \"${BASH_REMATCH[1]}\", path: \"${BASH_REMATCH[2]}\"}"
  else
    fail "SHARED is '$SHARED': where the work directory is, as pvc:CLAIM, host:/export or gs://NAME"
  fi
}

# The arguments as a list of YAML, each as a JSON string; Kubernetes would fill in $(...).
yaml_list() {
  local word list=''
  for word in "$@"; do
    [[ $word != *[[:cntrl:]]* ]] || fail "the argument $(quoted "$word") has a control character"
    word=${word//\\/\\\\} word=${word//\$\(/\$\$\(}
    list+="${list:+, }\"${word//\"/\\\"}\""
  done
  printf '[%s]' "$list"
}

# Whether a line that ends in `# if $1` stays.
holds() {
  case $1 in
    spot) ((SPOT)) ;;
    bucket) [[ $SHARED == gs://* ]] ;;
    account) [[ $SERVICE_ACCOUNT ]] ;;
    'host network') ((HOST_NETWORK)) ;;
    *) fail "launch/gke_jobset.yaml has '# if $1', which launch/gke.sh does not know" ;;
  esac
}

# The manifest, filled.
# shellcheck disable=SC2034 # it has ARGUMENTS
manifest() {
  local line name ARGUMENTS=''
  ARGUMENTS=$(yaml_list "${PROGRAM[@]}")
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
    note "if this says Completed or Failed:"
    quoted "${LOOKING[@]}"
    note "then this first:"
    quoted "${DELETE[@]}"
    printf "%s << 'MANIFEST'\n%s\nMANIFEST\n" "$(quoted "${APPLY[@]}")" "$text"
    return
  fi
  ended=$("${LOOKING[@]}") ||
    fail "kubectl cannot see the JobSets of namespace $NAMESPACE: JobSet has to be in the cluster"
  if [[ $ended ]]; then
    echo "$NAME is $ended: it is started again"
    "${DELETE[@]}"
  fi
  "${APPLY[@]}" <<< "$text"
  echo "$((SLICES * HOSTS)) processes on $SLICES x $TPU $TOPOLOGY; $WORKDIR on $SHARED; log:"
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
