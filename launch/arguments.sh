# shellcheck shell=bash disable=SC2034 # the scripts that source this file read its variables
# The command line that all launchers share. Each launcher sources this file after its settings.
#
#     launch/NAME.sh [--print] --config=configs/FILE.py[:PRESET] --workdir=DIR [--config.a.b=V ...]
#     launch/NAME.sh [--print] delete
#
# `parse` sets PRINT (1 or empty), ACTION (run or delete), CONFIG, WORKDIR and PROGRAM. PROGRAM is
# an array with the command of each process, without the path of Python. `check_program` sets TRIES,
# the command that counts a start. After too many starts without progress, this command refuses the
# start with exit code 2. A start by the user has the number 0.

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints the arguments as one line of shell code, with quotes where they are needed.
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

# Runs a command, or prints it if --print is given.
step() {
  if [[ $PRINT ]]; then quoted "$@"; else "$@"; fi
}

# Prints a comment about the next commands if --print is given.
note() {
  if [[ $PRINT ]]; then printf '# %s\n' "$*"; fi
}

# Fails if a tool is missing. With --print, no tool is needed.
need() {
  [[ $PRINT ]] || command -v "$1" > /dev/null || fail "$1 is not on PATH: $2"
}

given() {
  [[ ${!1} ]] || fail "$1 is missing: $2"
}

whole() {
  [[ ${!1} =~ ^[1-9][0-9]{0,8}$ ]] || fail "$1 is '${!1}': it must be an integer, 1 or more"
}

one_of() {
  local name=$1 choice
  shift
  for choice in "$@"; do
    [[ ${!name} != "$choice" ]] || return 0
  done
  fail "$name is '${!name}': it must be one of: $*"
}

# Checks a name against the rules of the clouds and of SLURM.
label() {
  [[ ${!1} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    fail "$1 is '${!1}': use at most 40 of a-z, 0-9 and hyphens, beginning with a letter"
}

# Prints the comment at the top of the launcher.
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
        fail "$word: with this launcher, JAX detects the processes from the cluster" ;;
      --config=*) CONFIG=${word#*=} PROGRAM+=("$word") ;;
      --workdir=*) WORKDIR=${word#*=} PROGRAM+=("$word") ;;
      --config.*=*) PROGRAM+=("$word") ;;
      *) fail "unexpected argument '$word': give settings as --config.name=value" ;;
    esac
  done
  PROGRAM+=(--config.mesh.coordinator=auto)
}

# Adds --config.train.grace to the program, unless the user has set it. The variable $1 has the
# seconds from SIGTERM until the process is killed. If there are more than 10 seconds, the last 5
# seconds are reserved for the end of the process.
tell_grace() {
  local word grace=''
  for word in "${PROGRAM[@]}"; do
    [[ $word != --config.train.grace=* ]] || grace=${word#*=}
  done
  [[ $grace ]] || PROGRAM+=("--config.train.grace=$((${!1} > 10 ? ${!1} - 5 : ${!1}))")
  [[ ! $grace =~ ^[0-9]{1,9}$ ]] || ((10#$grace <= ${!1})) ||
    fail "--config.train.grace=$grace: the program is killed after $1=${!1} seconds"
}

# Checks that the card exists, and that the work directory is below $1, the disk that all processes
# share.
check_program() {
  [[ $CONFIG ]] || fail "--config is missing: for example --config=configs/opsd.py"
  [[ -f ${CONFIG%%:*} ]] || fail "--config='${CONFIG%%:*}': this file does not exist"
  [[ $WORKDIR ]] || fail "--workdir is missing: a folder below $1, which all processes share"
  [[ $WORKDIR != *://* ]] ||
    fail "--workdir='$WORKDIR': a URL is no folder; give a folder below $1, which all processes share"
  [[ $WORKDIR == "$1"/?* && $WORKDIR/ != */../* ]] ||
    fail "--workdir='$WORKDIR': it must be a folder below $1, which all processes share"
  whole MAX_TRIES_WITHOUT_PROGRESS
  TRIES=(-m copsd_jax.runtime.tries "--limit=$MAX_TRIES_WITHOUT_PROGRESS" "--workdir=$WORKDIR")
}

# Checks that the card is one of the files that are sent to the hosts.
check_sent() {
  [[ $CONFIG == configs/* ]] ||
    fail "--config='$CONFIG': it must be in configs/, because hosts get only cards from there"
}
