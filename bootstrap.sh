#!/usr/bin/env bash
# Set up .venv with all that a clone needs, then run a command:
#
#     bash bootstrap.sh [--dev] [-- COMMAND …]
#
# It works for root and for ordinary users, on a machine with Python 3.11+ and nothing else prepared. What is there
# already is left alone, so that a second call takes a moment. Exit status 2 means: something is missing that only the
# user can install; one line says what, and the command for it.
set -euo pipefail
cd "$(dirname "$0")"
readonly venv=.venv torch=torch==2.13.0
PATH=$PATH:/usr/sbin:/sbin  # ordinary users lack these on Debian; ip, tc and iptables live there

extras=''
if [[ ${1:-} == --dev ]]; then
  extras='[dev]'
  shift
fi
[[ ${1:-} == -- ]] && shift

fail() {
  echo "wantrain: $*" >&2
  exit 2
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local name
  if [[ -n ${PYTHON:-} ]]; then
    is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer; name another one"
    echo "$PYTHON"
    return
  fi
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if is_new_enough "$name"; then
      command -v "$name"
      return
    fi
  done
  fail "no Python 3.11 or newer (found $(python3 --version 2>/dev/null || echo none)); install one," \
    "or name it: make demo PYTHON=/path/to/python3"
}

# Install Debian packages as root; else say how.
need_packages() {
  local packages=$* sudo=''
  local line="apt-get install -y --no-install-recommends $packages"
  if ! command -v apt-get >/dev/null; then
    fail "system packages are missing (Debian's names: $packages); install them and run this again"
  fi
  if ((EUID != 0)); then
    command -v sudo >/dev/null && sudo='sudo '
    fail "system packages are missing ($packages); run '$sudo$line'${sudo:- as root}, then this again"
  fi
  echo "installing $packages"
  export DEBIAN_FRONTEND=noninteractive
  $line -qq </dev/null >/dev/null 2>&1 || { apt-get update -qq && $line -qq </dev/null >/dev/null; } ||
    fail "apt-get could not install $packages; install them and run this again"
}

# iptables is needed only where the kernel can't delay packets itself; where it allows no sandbox, nothing could use it.
lacks_iptables() {
  local said status=0
  command -v iptables >/dev/null || command -v iptables-legacy >/dev/null && return 1
  said=$("$python" -m wantrain.netem.sandbox -- tc qdisc add dev lo root netem delay 1ms 2>&1) || status=$?
  ((status != 0)) && [[ $said != wantrain:* ]]
}

install_system_packages() {
  local lacking=()
  command -v ip >/dev/null && command -v tc >/dev/null || lacking+=(iproute2)
  if ! is_usable_venv && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    lacking+=("$("$python" -c 'import sys; print(f"python3.{sys.version_info[1]}-venv")')")
  fi
  ((${#lacking[@]} == 0)) || need_packages "${lacking[@]}"
  ! lacks_iptables || need_packages iptables
}

is_usable_venv() {
  "$venv/bin/python" -c 'import pip' 2>/dev/null
}

has_torch() {
  "$venv/bin/python" - 2>/dev/null <<'PYTHON'
import importlib.metadata, sys
major, minor = importlib.metadata.version("torch").split(".")[:2]
sys.exit((int(major), int(minor)) < (2, 11))
PYTHON
}

# What the installation depends on; the place counts, because an editable install points at it.
fingerprint() {
  (pwd && cat pyproject.toml setup.py bootstrap.sh) | sha256sum
}

is_installed() {
  local wanted stamp
  wanted=$(fingerprint)
  for stamp in "$venv/.installed$extras" "$venv/.installed[dev]"; do
    if [[ -e $stamp && $(<"$stamp") == "$wanted" ]] && is_usable_venv; then
      return 0
    fi
  done
  return 1
}

install_python_packages() {
  local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
  echo "installing into $venv (once; torch is large)"
  is_usable_venv || "$python" -m venv --clear "$venv" || fail "can't make $PWD/$venv; is the folder writable?"
  # torch first and alone: left to pip's resolver together with the rest, its version would be anybody's guess.
  has_torch || "${pip[@]}" "$torch" || fail "pip could not install $torch (see above); is there a network?"
  "${pip[@]}" -e ".$extras" || fail "pip could not install wantrain$extras (see above)"
  # pip would compile file after file (20,000 of them for [dev]); here all processors do, without packages' own tests
  # and some large parts of which hardly a file is ever imported: those are compiled when they are.
  "$venv/bin/python" -m compileall -qq -j 0 -x '/(tests?|transformers/models|ray/(rllib|serve|llm|dashboard)|mypy|pip)/' \
    "$venv/lib" >/dev/null 2>&1 || true
  fingerprint >"$venv/.installed$extras"
}

# Accounts without a writable home exist (nobody, services); tokens and fonts are then kept beside the packages.
find_cache() {
  local cache=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}
  if ! mkdir -p "$cache" 2>/dev/null || [[ ! -w $cache ]]; then
    export XDG_CACHE_HOME=$PWD/$venv/cache MPLCONFIGDIR=$PWD/$venv/cache/matplotlib
    mkdir -p "$MPLCONFIGDIR"
  fi
}

python=$(find_python)
install_system_packages
is_installed || install_python_packages
find_cache
(($# == 0)) || exec "$@"
