#!/usr/bin/env bash
# Test the netem path on a kernel that has sch_netem, whatever this machine's own: Debian's user-mode-linux, an ordinary
# program, boots over this machine's own files and runs the tests marked `netem_kernel` inside. Needs no root.
#
#     PYTHON=.venv/bin/python tests/netem_kernel.sh        packages: user-mode-linux, kmod, iproute2
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || python=${PYTHON:-python3}
for program in "$python" linux.uml modprobe ip tc; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || {
    echo "netem_kernel.sh: '$program' is missing; set PYTHON, or install user-mode-linux, kmod and iproute2" >&2
    exit 2
  }
done

work=$(mktemp -d)
trap 'kill "$copying" 2>/dev/null; rm -rf "$work"' EXIT
cp /proc/stat "$work/stat"
while sleep 1; do cp /proc/stat "$work/stat.new" && mv "$work/stat.new" "$work/stat"; done & # the guest doesn't know it
copying=$!
mkdir "$work/lib" && ln -s /usr/lib/uml/modules "$work/lib/modules"
cat >"$work/init" <<INIT
#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PROC_STAT="$work/stat" PYTHONPATH="$checkout:$checkout/kernels"
echo "booted Linux \$(uname -r)"
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
mkdir -p /dev/shm && mount -t tmpfs tmpfs /dev/shm
modprobe -d "$work" -a veth bridge sch_htb sch_netem cls_u32 tcp_bbr
ip link set dev lo up
cd "$checkout"
"$python" -m pytest tests/netem -m netem_kernel -p no:cacheprovider --color=no $*
echo \$? >"$work/status"
poweroff -f
INIT
chmod +x "$work/init"
if grep -q amx_tile /proc/cpuinfo; then
  cc -shared -fPIC -O1 -o "$work/uml_ptrace.so" "$checkout/tests/uml_ptrace.c"
  export LD_PRELOAD=$work/uml_ptrace.so
fi
timeout "${LIMIT_S:-900}" linux.uml mem=1G rootfstype=hostfs rw rootflags=/ init="$work/init" \
  loglevel=3 con=null con0=null,fd:1 ssl=null </dev/null 2>&1 | sed -n '/^booted /,$p' | grep -v '^\(reboot:\|Powering off\|$\)' || true
exit "$(cat "$work/status" 2>/dev/null || echo 1)"
