#!/usr/bin/env bash
# Builds the project's wheel: generated protobuf code, data files and the compiled kernels included.
#   build-wheel.sh SOURCE OUT [PYTHON]
# PYTHON needs setuptools, wheel and grpcio-tools. SOURCE stays as it is.
set -euo pipefail

source=$(realpath "$1")
out=$(realpath --canonicalize-missing "$2")
python=${3:-python3}

wheel_files() { "$python" -m zipfile --list "$1"/search_foundation-*.whl; }

work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT

for part in pyproject.toml README.md LICENSE search_foundation services gateway protos; do
  cp --recursive "$source/$part" "$work/"
done
find "$work" \( -name '*_pb2*' -o -name __pycache__ -o -name '*.so' -o -name '*.egg-info' \) -prune -exec rm -rf {} +

cd "$work"
# google/api/*.proto come with googleapis-common-protos, which the dependencies hold.
packages=$("$python" -c 'import google.api, pathlib; print(pathlib.Path(list(google.api.__path__)[0]).parents[1])')
"$python" -m grpc_tools.protoc --proto_path=protos --proto_path="$packages" \
  --python_out=protos --grpc_python_out=protos protos/searchfoundation/v1/*.proto

mkdir -p "$out"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir "$out" .

# The kernels are optional for whoever installs from source; an image for x86-64 must not lose them unnoticed.
if [ "$(uname --machine)" = x86_64 ] && [[ $(wheel_files "$out") != */_kernels_* ]]; then
  echo "the wheel has no compiled kernels: is gcc installed?" >&2
  exit 1
fi
