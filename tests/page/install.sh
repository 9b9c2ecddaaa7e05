#!/usr/bin/env bash
# Sees to it that Chromium and its driver are there, and puts axe-core into DIRECTORY: install.sh DIRECTORY
set -euo pipefail
here=$(dirname "$(realpath "$0")")

if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "$0: install the packages chromium and chromium-driver (Debian), which root can do" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq install --yes --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null
fi
mkdir -p "$1"
cp "$here/package.json" "$here/package-lock.json" "$1"
npm ci --prefix "$1" --silent --no-audit --no-fund
