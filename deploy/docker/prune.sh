#!/usr/bin/env bash
# Removes from an environment what no service needs: packaging tools, headers, static libraries, type stubs, tests.
#   prune.sh PREFIX
set -euo pipefail

prefix=$1
packages=$("$prefix/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
case $packages in
  "$(realpath "$prefix")"/*) ;;
  *) echo "$packages is not in $prefix" >&2; exit 1 ;;
esac

"$prefix/bin/python" -m pip uninstall --yes --quiet setuptools wheel 2>/dev/null || true
rm -rf "$packages"/torch/{include,share,test} "$packages"/torch/lib/*.a "$packages"/pip "$packages"/pip-*.dist-info
# torch looks for this one program when it is imported; the rest are its tests.
[ ! -d "$packages/torch/bin" ] || find "$packages/torch/bin" -mindepth 1 -not -name torch_shm_manager -delete
rm -f "$prefix"/bin/pip* "$prefix"/bin/{Activate.ps1,activate.csh,activate.fish}
find "$packages" -type d \( -name tests -o -name testing \) -not -path '*/torch/*' -not -path '*/numpy/*' \
  -not -path '*/transformers/*' -prune -exec rm -rf {} +
find "$packages" -name '*.pyi' -delete
