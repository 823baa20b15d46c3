#!/bin/sh
# Makes tunix's own environment, for benchmarks/decode.py:
#
#     sh benchmarks/tunix_env.sh DIR [PYTHON]
#     python benchmarks/decode.py --tunix=DIR
#
# Never into the package's own environment: tunix's dependencies change the version of transformers.
# PYTHON is 3.11 or later (default python3). On a GPU machine set EXTRA='jax[cuda13]'.
set -eu
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    echo "usage: sh benchmarks/tunix_env.sh DIR [PYTHON]" >&2
    exit 2
fi
directory=$1
python=${2:-python3}
if [ -e "$directory" ]; then
    echo "$directory exists: give a new folder" >&2
    exit 2
fi
"$python" -m venv "$directory"
# torch, which it does not ask for, is left out; jax is whatever its dependencies choose.
"$directory/bin/python" -m pip install --quiet --disable-pip-version-check \
    google-tunix==0.1.7 ${EXTRA:-}
"$directory/bin/python" "$(dirname "$0")/decode_tunix.py" --check
