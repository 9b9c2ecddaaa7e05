#!/bin/sh
# Installs Debian's Slurm where root asks for it; without it the tests that need it are skipped, and say so.
set -eu
PATH=$PATH:/usr/sbin
command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo 'cluster: no Slurm here: apt-get install slurmctld slurmd slurm-client munge' >&2
    exit 0
fi
echo 'cluster: installing Slurm'
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge >/dev/null
