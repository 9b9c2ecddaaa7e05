#!/usr/bin/env bash
# Puts Debian's Prometheus into DIRECTORY, without root and without its service: install.sh DIRECTORY
set -euo pipefail
directory=$(realpath -m "$1")

if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
    echo "$0: this is no Debian: install Prometheus 2.40 or later, so that prometheus and promtool are on the PATH" >&2
    exit 1
fi
rm -rf "$directory"
mkdir -p "$directory/apt/lists/partial" "$directory/apt/cache/archives/partial"
cd "$directory/apt"
own=(-o "Dir::State::Lists=$PWD/lists" -o "Dir::Cache=$PWD/cache" -o APT::Sandbox::User=)

# The lists of this machine may be missing, or so old that what they name is gone.
if ! apt-get -qq download prometheus 2>/dev/null; then
    apt-get -qq "${own[@]}" update
    apt-get -qq "${own[@]}" download prometheus
fi
dpkg-deb --extract prometheus_*.deb "$directory"
cd "$directory"
rm -rf apt usr/share
usr/bin/promtool --version >/dev/null
