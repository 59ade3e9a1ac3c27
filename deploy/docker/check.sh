#!/usr/bin/env bash
# Says whether an installed environment works: the command, the catalogue, the embedded model, Envoy and a
# configuration it accepts. Needs no network and writes only below TMPDIR.
#   check.sh PREFIX
set -euo pipefail

prefix=$1
work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT
export SF_DATA_DIR=$work/data HOME=$work HF_HUB_OFFLINE=1

cd "$work"
"$prefix/bin/search-foundation" --version
"$prefix/bin/search-foundation" models pull --missing all-MiniLM-L6-v2
"$prefix/bin/envoy" --version
"$prefix/bin/search-foundation" gateway --render "$work/envoy.yaml"
"$prefix/bin/envoy" --mode validate --config-path "$work/envoy.yaml" --log-level error
"$prefix/bin/python" - <<'PYTHON'
import importlib
import importlib.util
import pkgutil

import gateway
import services
import torch

left_out = ()
try:
    import triton
except ModuleNotFoundError:
    if torch.version.cuda:
        raise
    left_out = ("services.core.modeling.cuda.",)  # torch brings triton where it brings CUDA's libraries

for package in (services, gateway):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name.startswith(left_out):
            continue
        spec = importlib.util.find_spec(module.name)
        if spec is not None and str(spec.origin).endswith(".py"):  # compiled kernels are loaded by their user
            importlib.import_module(module.name)
print("every module imports")
PYTHON
