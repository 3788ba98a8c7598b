"""What systemd would do is said at boot; a pool that systemd killed as a whole is explained by the next one; each kill is confirmed."""

from guest import systemctl, until


def run(vm):
    """Debian's defaults: OOMPolicy=stop, no journal or kernel log for the service's own user."""
    stops = vm.gunicorn("stops", MemoryMax="300M", StateDirectory="stops", Restart="always", RestartSec="1")
    stops.pool()
    said = stops.wait_for("OOMPolicy=stop")
    vm.holds("a line at boot says what OOMPolicy=stop means", said, said)
    supervisor = stops.pid
    stops.get("/hog")
    until(lambda: stops.show("NRestarts") != "0", "systemd stops it, and starts it again")
    until(lambda: stops.pid not in (0, supervisor), "it runs again")
    stops.pool()
    vm.check("stopped in order, so nothing is explained", len(stops.lines("the pool before this one")), 0)
    vm.note("lines about the kill", stops.lines("was killed by the kernel's OOM killer"))
    systemctl("stop", stops.name)

    goes_on = vm.gunicorn("goes-on", MemoryMax="300M", OOMPolicy="continue", StateDirectory="goes-on", Restart="always", RestartSec="1")
    goes_on.pool()
    vm.check("lines about OOMPolicy", len(goes_on.lines("OOMPolicy=stop")), 0)
    supervisor = goes_on.pid
    for kill in range(1, 6):
        goes_on.get("/hog")
        until(lambda kill=kill: goes_on.kills == kill, "the kernel kills")
        goes_on.wait_for("was killed by the kernel's OOM killer (confirmed: ", kill)
        goes_on.pool()
    vm.check("kernel kills, each confirmed", (goes_on.kills, len(goes_on.lines("(confirmed: "))), (5, 5))
    vm.check("the supervisor", goes_on.pid, supervisor)

    systemctl("kill", "--signal=KILL", goes_on.name)
    until(lambda: goes_on.pid not in (0, supervisor), "it runs again")
    goes_on.pool()
    told = goes_on.lines("the pool before this one ended without a goodbye")
    vm.check("explained", len(told), 1)
    vm.holds("with the last deaths", told and "was killed by the kernel's OOM killer" in told[0], True)
