"""`oomsafe doctor` reads a real systemd and cgroup v2: what is set wrongly is found, its own line mends it, and then nothing is left."""

import json
import subprocess
import sys
import time

from guest import systemctl


def doctor(name):
    """What it finds of one unit, and how many seconds it took."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "oomsafe", "doctor", "--json"], check=False, capture_output=True, text=True)
    took = time.monotonic() - began
    record = json.loads(done.stdout)
    (pool,) = (pool for pool in record["facts"]["pools"] if pool["unit"] and pool["unit"]["name"].startswith(name))
    about = f"supervisor {pool['supervisor']['pid']})"
    return [finding for finding in record["findings"] if about in finding["about"]], pool, took


def run(vm):
    """Debian's defaults first; then what the doctor says."""
    wrong = vm.gunicorn("wrong")
    wrong.pool()
    findings, pool, took = doctor("wrong")
    vm.check("found", sorted(finding["code"] for finding in findings), ["no-limit", "unit-stops"])
    vm.check("guarded", pool["guarded"], True)
    vm.note("seconds, without KVM", took)
    for finding in findings:
        command, _, line = finding["change"][0].partition("   # [Service] ")
        vm.check("the line to change names the unit", command, f"systemctl edit {wrong.name}")
        name, _, value = line.partition("=")
        if name == "MemoryMax":
            systemctl("set-property", "--runtime", wrong.name, f"{name}={value}")
    findings, pool, _ = doctor("wrong")
    vm.check("with MemoryMax, left", [finding["code"] for finding in findings], ["unit-stops"])
    vm.check("the limit is seen", [ranking["level"]["source"].startswith("cgroup v2 ") for ranking in pool["rankings"]], [True, False])
    systemctl("stop", wrong.name)

    right = vm.gunicorn("right", MemoryMax="300M", OOMPolicy="continue")
    right.pool()
    findings, pool, _ = doctor("right")
    vm.check("found", findings, [])
    vm.check("workers first", sorted(one["pid"] for one in pool["rankings"][0]["order"][:-1]), sorted(right.workers()))
