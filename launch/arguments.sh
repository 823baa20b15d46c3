# shellcheck shell=bash disable=SC2034 # its variables are read where it is sourced
# What the launchers' command lines have in common; sourced by them below their settings.
#
#     launch/NAME.sh [--print] --config=configs/FILE.py[:PRESET] --workdir=DIR [--config.a.b=V ...]
#     launch/NAME.sh [--print] delete
#
# `parse` leaves PRINT (1 or empty), ACTION (run or delete), CONFIG, WORKDIR and PROGRAM, an array:
# the command of each process, without the Python in front.

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The arguments as one line of shell, which a shell reads as the same arguments.
quoted() {
  local word name line='' apostrophe="'\\''"
  for word in "$@"; do
    name=''
    if [[ $word =~ ^(--[A-Za-z0-9_.-]+=)(.*)$ ]]; then
      name=${BASH_REMATCH[1]} word=${BASH_REMATCH[2]}
    fi
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/$apostrophe}'"
    line+="${line:+ }$name$word"
  done
  printf '%s\n' "$line"
}

# Runs a command, or shows it.
step() {
  if [[ $PRINT ]]; then quoted "$@"; else "$@"; fi
}

# Says why the commands that --print shows next are run.
note() {
  if [[ $PRINT ]]; then printf '# %s\n' "$*"; fi
}

# --print needs no tool.
need() {
  [[ $PRINT ]] || command -v "$1" > /dev/null || fail "$1 is not on PATH: $2"
}

given() {
  [[ ${!1} ]] || fail "$1 is missing: $2"
}

whole() {
  [[ ${!1} =~ ^[1-9][0-9]*$ ]] || fail "$1 is '${!1}': it must be a whole number from 1 on"
}

one_of() {
  local name=$1 choice
  shift
  for choice in "$@"; do
    [[ ${!name} != "$choice" ]] || return 0
  done
  fail "$name is '${!name}': it must be one of: $*"
}

# A name that the cloud and SLURM take as it is.
label() {
  [[ ${!1} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "$1 is '${!1}': it must be of a-z, 0-9 and hyphens, a letter first, 40 signs at most"
}

# The comment at the top of the launcher.
help() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$0"
  exit 0
}

parse() {
  local word
  PRINT='' ACTION=run CONFIG='' WORKDIR='' PROGRAM=(-m copsd_jax.main)
  for word in "$@"; do
    case $word in
      -h | --help) help ;;
      --print) PRINT=1 ;;
      delete) ACTION=delete ;;
      --config.mesh.coordinator=* | --config.mesh.process=* | --config.mesh.processes=*)
        fail "$word: with this launcher the cluster says which processes there are" ;;
      --config=*) CONFIG=${word#*=} PROGRAM+=("$word") ;;
      --workdir=*) WORKDIR=${word#*=} PROGRAM+=("$word") ;;
      --config.*=*) PROGRAM+=("$word") ;;
      *) fail "unexpected argument '$word': settings are --config.name=value" ;;
    esac
  done
  PROGRAM+=(--config.mesh.coordinator=auto)
}

# `run` needs a card, and a work directory below $1, on the disk that all processes share.
check_program() {
  [[ $CONFIG ]] || fail "--config is missing: for example --config=configs/opsd.py"
  [[ -f ${CONFIG%%:*} ]] || fail "--config='${CONFIG%%:*}': there is no such file"
  [[ $WORKDIR ]] || fail "--workdir is missing: a folder below $1, which all processes share"
  [[ $WORKDIR == "$1"/?* && $WORKDIR/ != */../* ]] ||
    fail "--workdir='$WORKDIR': it must be a folder below $1, which all processes share"
}

# Where the program is sent to the hosts, the card goes with it.
check_sent() {
  [[ $CONFIG == configs/* ]] ||
    fail "--config='$CONFIG': the hosts get what is below configs/, and nothing else"
}
