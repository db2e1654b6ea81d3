#!/usr/bin/env bash
# Find a Chromium for the browser tests, or install one. Usage: install_browser.sh PYTHON
set -euo pipefail
python=$1

for name in chromium google-chrome; do
    command -v "$name" >/dev/null && exit 0
done
# Debian's own package; Ubuntu's is a snap that does not start in a container
if [ "$(id -u)" = 0 ] && grep -qs '^ID=debian' /etc/os-release; then
    echo "installing chromium ..."
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1
else
    "$python" -m playwright install chromium
fi
