#!/usr/bin/env bash
# Make the virtual environment and install the lab into it. Usage: make_environment.sh FOLDER
set -euo pipefail
folder=$1
python=${PYTHON:-python3}

if ! command -v "$python" >/dev/null; then
    echo "attnlab needs Python 3.11 or newer; $python was not found. Choose one with PYTHON=/path/to/python make venv" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "attnlab needs Python 3.11 or newer; $python is $("$python" -V). Choose another with PYTHON=python3.12 make venv" >&2
    exit 1
fi
# Debian and Ubuntu ship venv apart from python3
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    else
        echo "Python's venv module is missing. Install it with: sudo apt-get install python3-venv" >&2
        exit 1
    fi
fi

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip="$folder/bin/python -m pip --disable-pip-version-check install --quiet"
echo "installing torch ..."
$pip 'torch>=2.11,<2.14'
echo "installing attnlab and what it needs ..."
$pip --editable '.[worker,dev]'
