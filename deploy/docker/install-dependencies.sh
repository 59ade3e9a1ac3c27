#!/usr/bin/env bash
# Makes a virtual environment with everything the project needs but the project itself, so that a change of the
# source leaves this layer of the image alone.
#   install-dependencies.sh SOURCE PREFIX [EXTRA_INDEX]
# EXTRA_INDEX is a package index that holds torch built for the CPU alone; without it comes the build for CUDA.
set -euo pipefail

source=$1
prefix=$2
index=${3:-}

python3 -m venv "$prefix"
options=(--no-cache-dir --disable-pip-version-check --constraint "$source/constraints.txt")
[ -n "$index" ] && options+=(--extra-index-url "$index")

mapfile -t requirements < <("$prefix/bin/python" -c '
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print("\n".join([*project["dependencies"], *project["optional-dependencies"]["media"]]))' "$source/pyproject.toml")
"$prefix/bin/pip" install "${options[@]}" "${requirements[@]}"
