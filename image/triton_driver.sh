#!/bin/sh
# Triton compiles one C file on first use, its driver module. Here that is done beforehand, since images have no compiler:
# CC then names a script that hands the module out. Without Triton's NVIDIA backend there is nothing to do.
set -eu
python=/opt/trimtab/bin/python
backend=$($python -c 'import importlib.util as u; s = u.find_spec("triton"); print(s.submodule_search_locations[0] + "/backends/nvidia" if s else "")')
[ -n "$backend" ] && [ -f "$backend/driver.c" ] || exit 0
libraries=$(mktemp -d)
gcc -shared -x c /dev/null -Wl,-soname,libcuda.so.1 -o "$libraries/libcuda.so.1" # the real one comes with the node's GPU
mkdir -p /opt/trimtab/lib/triton
gcc "$backend/driver.c" -O3 -shared -fPIC -Wno-psabi -o /opt/trimtab/lib/triton/cuda_utils.so \
  -L"$libraries" -Wl,--no-as-needed -l:libcuda.so.1 -I"$backend/include" -I"$($python -c 'import sysconfig; print(sysconfig.get_path("include"))')"
cp image/triton-cc /opt/trimtab/bin/triton-cc
