#!/bin/sh
# Makes .venv ready: checks the system packages, creates the environment, installs the pinned versions.
#
#   scripts/bootstrap.sh demo     what a node on the CPU needs: the daemon and ONNX Runtime (no torch)
#   scripts/bootstrap.sh test     everything: torch, linters, test tools
#
# Fast when nothing changed; safe when two run at once; starts over after an interrupted run. Says everything on
# stderr, so that what comes after it owns stdout.
set -eu

kind=${1:-demo}
case $kind in demo | test) ;; *) echo "usage: $0 demo|test" >&2; exit 2 ;; esac
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"
packages="python3-venv python3-dev gcc make libgmp-dev"
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP 2>/dev/null || true

say() { echo "dgn: $*" >&2; }

# Whether the interpreter $1 is new enough; then, which of venv and the headers it lacks.
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() {
    "$1" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' 2>/dev/null
}

# The interpreter to use: the first that is complete, else the first that is new enough.
find_python() {
    python= incomplete=
    for candidate in ${PYTHON:-} /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        new_enough "$path" || continue
        if has_venv "$path" && has_headers "$path"; then python=$path; return; fi
        [ -n "$incomplete" ] || incomplete=$path
    done
}

find_missing() {
    missing=
    find_python
    if [ -z "$python" ]; then
        [ -n "$incomplete" ] && has_venv "$incomplete" || missing="$missing python3-venv"
        [ -n "$incomplete" ] && has_headers "$incomplete" || missing="$missing python3-dev"
    fi
    if command -v gcc >/dev/null 2>&1; then
        echo '#include <gmp.h>' | gcc -E -x c - >/dev/null 2>&1 || missing="$missing libgmp-dev"
    else
        missing="$missing gcc libgmp-dev"
    fi
    command -v make >/dev/null 2>&1 || missing="$missing make"
    missing=${missing# }
}

find_missing
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing what is missing on this system: $missing"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q </dev/null >&2 || say "apt-get update failed; going on with the package lists that are here"
        # shellcheck disable=SC2086  # a list of words
        apt-get install -q -y --no-install-recommends $missing </dev/null >&2
        find_missing
    fi
    if [ -n "$missing" ]; then
        say "this system lacks: $missing"
        [ -n "$python$incomplete" ] || say "and Python 3.11 or newer"
        say "as root, run:  apt-get install -y $packages"
        exit 1
    fi
fi

# One bootstrap at a time in one checkout; the lock is on a file that is always there.
exec 9<pyproject.toml
if ! flock -n 9; then
    say "waiting for another run that prepares .venv"
    flock 9
fi

# The stamp says what was installed where; "test" holds all of "demo".
wanted=$(cat pyproject.toml constraints.txt scripts/bootstrap.sh | sha256sum | cut -d' ' -f1)
stamp=.venv/.dgn-stamp
marker=.venv/.dgn-installing
installed=$(cat $stamp 2>/dev/null || true)
broken=
[ ! -e $marker ] || broken="the last run was interrupted"
.venv/bin/python -c 'import pip' 2>/dev/null || broken="it does not work"
case $installed in
    "" | *" $root") ;;
    *) broken="the checkout was moved" ;; # the scripts in a venv name its place
esac
if [ -z "$broken" ]; then
    case $installed in "$kind $wanted $root" | "test $wanted $root") exit 0 ;; esac
else
    [ ! -e .venv ] || say "making .venv anew: $broken"
    say "creating .venv with $("$python" --version) ($python)"
    rm -rf .venv
    "$python" -m venv .venv
fi
: >$marker
pip_version=$(sed -n 's/^pip==//p' constraints.txt)
case $kind in
    demo)
        say "installing the daemon, ONNX Runtime and their libraries into .venv; the first time this takes some minutes"
        set -- -e '.[onnx]'
        ;;
    test)
        say "installing the daemon, its backends and the test tools into .venv; the first time this takes some minutes"
        set -- -e '.[all]' --group dev
        ;;
esac
pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@" </dev/null >&2 9<&-; }
pip install -q "pip==$pip_version"
pip install --constraint constraints.txt --build-constraint constraints.txt "$@"
# trio has types of its own; the stubs of trio-typing, which py-libp2p requires, are years older and hide them.
rm -rf .venv/lib/python3*/site-packages/trio-stubs
echo "$kind $wanted $root" >$stamp
rm -f $marker
say "installed"
