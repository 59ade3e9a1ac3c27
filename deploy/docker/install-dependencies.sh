#!/usr/bin/env bash
# Makes a virtual environment with everything the project needs but the project itself, so that a change of the
# source leaves this layer of the image alone.
#   install-dependencies.sh SOURCE PREFIX cpu|cuda [EXTRA_INDEX]
# For cpu, EXTRA_INDEX is a package index that holds torch built for the CPU alone, unless pip's own configuration
# names one: with CUDA's libraries the environment would be gigabytes larger, so that ends in an error.
set -euo pipefail

source=$1
prefix=$2
device=$3
index=${4:-}

python3 -m venv "$prefix"
options=(--no-cache-dir --disable-pip-version-check --constraint "$source/constraints.txt")
[ -n "$index" ] && options+=(--extra-index-url "$index")

mapfile -t requirements < <("$prefix/bin/python" -c '
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print("\n".join([*project["dependencies"], *project["optional-dependencies"]["media"]]))' "$source/pyproject.toml")
"$prefix/bin/pip" install "${options[@]}" "${requirements[@]}"

cuda=$("$prefix/bin/python" -c 'import torch; print(torch.version.cuda or "")')
case $device in
  cpu)
    if [ -n "$cuda" ]; then
      echo "torch came with CUDA $cuda: pass --build-arg TORCH_INDEX=<index of torch's CPU wheels>" >&2
      exit 1
    fi ;;
  cuda)
    if [ -z "$cuda" ]; then
      echo "torch came without CUDA: this package index holds its CPU build" >&2
      exit 1
    fi ;;
  *) echo "$device is neither cpu nor cuda" >&2; exit 1 ;;
esac
