# Sourced in the repository root by the scripts that have to run on a fresh machine.
#   setup_env [EXTRA...]   activates .venv, with vit_rsst (editable) and these extras of setup.cfg in it
# PYTHON chooses the interpreter that .venv is made with.

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidates=(python3 python3.12 python3.11) candidate without_venv=""
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        # Debian packs venv without ensurepip, and then it fails half-way.
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv=$candidate
    done
    if [[ -n $without_venv ]]; then
        say "$without_venv lacks the venv module; install it (Debian: python3-venv) or set PYTHON to another one."
    else
        say "vit_rsst needs Python 3.11 or newer; tried ${candidates[*]}. Install one or set PYTHON to its path."
    fi
    return 3
}

venv_works() {
    # The programs in a .venv that was copied or moved belong to its old place.
    [[ $(source .venv/bin/activate 2>/dev/null && printf %s "$VIRTUAL_ENV") -ef .venv ]] &&
        .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_venv() {
    local python old=.venv.old.$$
    python=$(find_python)
    # Renamed before it is deleted: what an interrupted deletion leaves must not pass for an environment.
    if [[ -e $stamp ]]; then
        say ".venv is unfinished or was moved; making it again."
        mv .venv "$old"
        rm -rf "$old"
    elif [[ -e .venv ]]; then
        say ".venv cannot be used and is not from this script; keeping it as $old."
        mv .venv "$old"
    fi
    mkdir .venv
    echo unfinished >"$stamp"
    "$python" -m venv .venv || return 3
}

setup_env() {
    # Says what .venv holds: "unfinished" while pip works, then the checksum of the configuration and the extras.
    # Without it, .venv is the user's own: installed into, never deleted.
    local stamp=.venv/vit_rsst.stamp checksum extra installed="" extras=""

    # One set-up at a time. pip inherits the lock: one that outlives a killed script is waited for.
    if command -v flock >/dev/null; then
        exec 9<.
        flock -n 9 || { say "Waiting for another set-up of .venv to end."; flock 9; }
    fi

    [[ ! -e $stamp ]] || read -r installed extras <"$stamp" || true
    if [[ $installed == unfinished ]] || ! venv_works; then
        make_venv
        installed="" extras=""
    fi

    # Of what decides about the installation; how tests and linters are configured is none of its business.
    checksum=$(awk '/^\[/ {counts = /^\[(metadata|options|build-system)/} counts' setup.cfg pyproject.toml | cksum | tr ' ' -)
    for extra in "$@"; do
        [[ " $extras " == *" $extra "* ]] || { extras+="${extras:+ }$extra"; installed=""; }
    done
    if [[ $installed != "$checksum" ]]; then
        say "Installing vit_rsst, torch and the rest into .venv; the first time takes minutes and gigabytes."
        [[ ! -e $stamp ]] || echo unfinished >"$stamp"
        .venv/bin/python -m pip install -q -e ".${extras:+[${extras// /,}]}" || {
            say "pip could not install vit_rsst (see above); the next call tries again."
            return 3
        }
        echo "$checksum $extras" >"$stamp"
    fi
    exec 9<&-
    source .venv/bin/activate
}
