#!/bin/sh
# A virtual environment with oomsafe and all that its checks and tests drive. Usage: setup.sh PYTHON VENV
# Where the machine lacks a piece of it and we are root with apt, the piece is installed; else said.
set -eu
python=$1 venv=$2

apt_install() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing $* with apt-get"
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; } >/tmp/oomsafe-apt.$$ 2>&1 ||
            { cat /tmp/oomsafe-apt.$$ >&2; rm -f /tmp/oomsafe-apt.$$; exit 1; }
        rm -f /tmp/oomsafe-apt.$$
    else
        echo "$* is missing, and only root can install it: apt-get install $*" >&2
        exit 1
    fi
}

# without root or apt, the tests that drive them say that they are missing; tmux is the terminal of oomsafe top's
missing=
for tool in redis-server rabbitmq-server prometheus tmux; do command -v $tool >/dev/null || missing="$missing $tool"; done
# it reads the units that oomsafe advise writes
command -v systemd-analyze >/dev/null || missing="$missing systemd"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ -n "$missing" ]; then
    # their packages would start services of their own
    [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d && ours=1; }
    # shellcheck disable=SC2086  one word each
    apt_install $missing
    [ -z "${ours:-}" ] || rm /usr/sbin/policy-rc.d
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install python3-venv
[ -x "$venv/bin/python" ] || { echo "making a virtual environment in $venv"; "$python" -m venv "$venv"; }
rm -f "$venv"/.ready-*
# pip 25.1 is the first that reads dependency groups
"$venv/bin/python" -m pip install --quiet --upgrade 'pip>=25.1'
"$venv/bin/python" -m pip install --quiet --editable '.[gunicorn,uvicorn,starlette,celery,django,prometheus,cli]' --group dev
echo "ready: $venv"
