#!/bin/sh
# Fill /opt/trimtab with what some extras of trimtab need, pinned; then take out what only building needs.
# Usage: environment.sh EXTRA …
set -eu
case " $* " in *" vllm "*) pins=image/constraints-vllm.txt ;; *) pins=constraints.txt ;; esac # vLLM's own pins differ
python=/opt/trimtab/bin/python
$python image/requirements.py pyproject.toml clients/python/pyproject.toml -- "$@" > /tmp/requirements.txt
if [ -n "${TORCH_INDEX:-}" ] && grep -q '^torch[<>=]' /tmp/requirements.txt; then
  $python -m pip install -c "$pins" --index-url "$TORCH_INDEX" torch
fi
$python -m pip install -c "$pins" -r /tmp/requirements.txt
# vLLM asks for these three, text models for none. Where one was built for another torch (PyPI's beside a torch for CPUs)
# importing it fails, and transformers would import it.
for package in torchvision torchaudio torchcodec; do
  if $python -m pip show -q $package && ! $python -c "import $package"; then $python -m pip uninstall -y $package; fi
done
image/triton_driver.sh
$python image/sbom.py > /opt/trimtab/sbom.cdx.json
$python -m pip uninstall -y pip setuptools
# Headers, static libraries and the packages' own tests.
packages=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -rf "$packages"/torch/include "$packages"/torch/share/cmake "$packages"/pyarrow/include /opt/trimtab/include
find "$packages" -type d -name tests -prune -exec rm -rf {} +
find "$packages" -name '*.a' -delete
