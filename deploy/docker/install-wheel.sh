#!/usr/bin/env bash
# Installs the project's wheel into an environment that has the dependencies, and compiles to byte code, which a
# read-only root file system could not keep later.
#   install-wheel.sh WHEELS PREFIX
set -euo pipefail

wheels=$1
prefix=$2

"$prefix/bin/python" -m pip install --no-index --no-deps --disable-pip-version-check "$wheels"/search_foundation-*.whl
# Tests of torch hold syntax of later Python versions.
"$prefix/bin/python" -m compileall -q -j 0 -x 'torch/testing/' "$prefix/lib"
