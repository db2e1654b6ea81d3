#!/usr/bin/env bash
# What the tests compare with, and nothing that the lab needs. Usage: install_oracles.sh FOLDER
set -euo pipefail
folder=$1
pip="$folder/bin/python -m pip --disable-pip-version-check install --quiet"
echo "installing what the tests compare with ..."
# torch as it is, whatever they ask for
"$folder/bin/python" -m pip --disable-pip-version-check freeze --exclude-editable | grep -iE '^(torch|transformers|triton|numpy)==' >"$folder/kept.txt"
$pip --constraint "$folder/kept.txt" --editable '.[worker,dev,oracles]'
# these want another torch, a GPU's compiler or a torchvision, and their names must not change what the lab finds: no
# dependencies, and in a folder that only the tests look into
apart="$pip --no-deps --upgrade --target $folder/oracles"
$apart timm==1.0.31 flash-attn-4==4.0.0b36 xformers==0.0.35 jax==0.10.2 jaxlib==0.10.2 opt_einsum==3.4.0 scipy==1.17.1
$apart --no-build-isolation natten==0.21.7
