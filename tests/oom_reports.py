"""Reports of the OOM killer for tests: one built for each kernel from its own format strings, in each prefix that loggers give them.

The formats are those of mm/oom_kill.c, mm/memcontrol.c and mm/show_mem.c in these releases.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

PAGE = 4096
KIB = 1024


@dataclass(frozen=True)
class Process:
    """One row. Memory in pages."""

    pid: int
    comm: str
    total_vm: int
    anon: int
    file: int = 0
    shmem: int = 0
    tables: int = 10
    swap: int = 0
    adj: int = 0
    uid: int = 0

    @property
    def rss(self) -> int:
        return self.anon + self.file + self.shmem


HOG = Process(27718, "python3", 30_354, 27_277, 963, tables=69)
#: Of each logger that tells it.
HOST = "node-1"
SMALL = Process(27700, "gunicorn", 5_000, 1_200, 300)
EXEMPT = Process(301, "systemd-udevd", 9_000, 200, 40, adj=-1000)
PROCESSES = (EXEMPT, SMALL, HOG)
LIMIT_KB = 204_800
CGROUP = "/kubepods/burstable/pod1234/app"

#: By release, what is different in its table.
TABLES = {
    "2.6.32": "[ pid ]   uid  tgid total_vm      rss cpu oom_adj name",
    "2.6.36": "[ pid ]   uid  tgid total_vm      rss cpu oom_adj oom_score_adj name",
    "3.10": "[ pid ]   uid  tgid total_vm      rss nr_ptes swapents oom_score_adj name",
    "4.4": "[ pid ]   uid  tgid total_vm      rss nr_ptes nr_pmds swapents oom_score_adj name",
    "4.15": "[ pid ]   uid  tgid total_vm      rss pgtables_bytes swapents oom_score_adj name",
    "5.0": "[  pid  ]   uid  tgid total_vm      rss pgtables_bytes swapents oom_score_adj name",
    "6.8": "[  pid  ]   uid  tgid total_vm      rss rss_anon rss_file rss_shmem pgtables_bytes swapents oom_score_adj name",
}

RELEASES = ("2.6.32", "2.6.36", "3.10", "4.4", "4.9", "4.15", "4.19", "5.0", "5.1", "5.4", "6.8", "6.18")


def at_least(release: str, other: str) -> bool:
    """Whether `release` is `other` or newer."""
    return [int(part) for part in release.split(".")] >= [int(part) for part in other.split(".")]


def header_of(release: str) -> str:
    """The table's header."""
    return [text for since, text in TABLES.items() if at_least(release, since)][-1]


def row_of(release: str, one: Process) -> str:
    """The table's line of a process."""
    ids = f"{one.uid:5d} {one.pid:5d} {one.total_vm:8d} {one.rss:8d}"
    last = f"{one.swap:8d}         {one.adj:5d} {one.comm}"
    if at_least(release, "6.8"):
        return f"[{one.pid:7d}] {ids} {one.anon:8d} {one.file:8d} {one.shmem:9d} {one.tables * PAGE:8d} {last}"
    if at_least(release, "4.15"):
        return f"[{one.pid:7d}] {ids} {one.tables * PAGE:8d} {last}"
    if at_least(release, "4.4"):
        return f"[{one.pid:5d}] {ids} {one.tables - 3:7d} {3:7d} {last}"
    if at_least(release, "3.10"):
        return f"[{one.pid:5d}] {ids} {one.tables:7d} {last}"
    cpu = f"[{one.pid:5d}] {ids} {0:3d}     {one.adj * 17 // 1000:3d}"
    return f"{cpu}         {one.adj:5d} {one.comm}" if at_least(release, "2.6.36") else f"{cpu} {one.comm}"


def killed_line(release: str, one: Process, memcg: bool = True) -> list[str]:
    """The last lines: one since 5.1, two before."""
    what = "Memory cgroup out of memory" if memcg else "Out of memory"
    sizes = f"total-vm:{one.total_vm * 4}kB, anon-rss:{one.anon * 4}kB, file-rss:{one.file * 4}kB"
    if at_least(release, "4.5"):
        sizes += f", shmem-rss:{one.shmem * 4}kB"
    if at_least(release, "5.4"):
        sizes += f", UID:{one.uid} pgtables:{one.tables * 4}kB oom_score_adj:{one.adj}"
    if at_least(release, "5.1"):
        return [f"{what}: Killed process {one.pid} ({one.comm}) {sizes}"]
    if at_least(release, "2.6.36"):
        return [
            f"{what}: Kill process {one.pid} ({one.comm}) score 544 or sacrifice child",
            f"Killed process {one.pid} ({one.comm}) {sizes}",
        ]
    return [f"{what}: kill process {one.pid} ({one.comm}) score 54402 or a child", f"Killed process {one.pid} ({one.comm})"]


def report(
    release: str = "6.8",
    victim: Process = HOG,
    processes: tuple[Process, ...] = PROCESSES,
    memcg: bool = True,
    order: int = 0,
    invoker: str = "",
) -> list[str]:
    """The messages of one report, without prefixes."""
    invoker = invoker or victim.comm
    adj = "oom_score_adj=0" if at_least(release, "2.6.36") else "oom_adj=0"
    gfp = "0xcc0(GFP_KERNEL)" if at_least(release, "4.9") else "0x201da"
    mask = ", nodemask=(null)," if "4.10" in release or release in ("4.15", "4.19") else ","
    lines = [f"{invoker} invoked oom-killer: gfp_mask={gfp}{mask} order={order}, {adj}"]
    if at_least(release, "4.9"):
        lines += [f"CPU: 0 PID: 27719 Comm: {invoker} Not tainted {release}.0-test #1", "Call Trace:", " dump_stack_lvl+0x59/0x90"]
    else:
        lines += [
            f"Pid: 27719, comm: {invoker} Not tainted {release}-test #1",
            "Call Trace:",
            " [<ffffffff81692515>] dump_header+0x83/0x1ca",
        ]
    lines += _memcg(release) if memcg else _machine()
    lines += ["Tasks state (memory values in pages):"] if at_least(release, "4.19") else []
    lines += [header_of(release), *(row_of(release, one) for one in processes)]
    if at_least(release, "5.0"):
        scope = f"oom_memcg={CGROUP},task_memcg={CGROUP}" if memcg else f"global_oom,task_memcg={CGROUP}"
        constraint = "CONSTRAINT_MEMCG" if memcg else "CONSTRAINT_NONE"
        who = f"task={victim.comm},pid={victim.pid},uid={victim.uid}"
        lines += [f"oom-kill:constraint={constraint},nodemask=(null),cpuset=/,mems_allowed=0,{scope},{who}"]
    return [*lines, *killed_line(release, victim, memcg)]


def _memcg(release: str) -> list[str]:
    usage = [f"memory: usage {LIMIT_KB}kB, limit {LIMIT_KB}kB, failcnt 17"]
    before = [] if at_least(release, "5.0") else [f"Task in {CGROUP} killed as a result of limit of {CGROUP}"]
    if at_least(release, "5.0"):
        return [*usage, "swap: usage 0kB, limit 0kB, failcnt 0", f"Memory cgroup stats for {CGROUP}:", "anon 109000000", "shmem 8192"]
    return [
        *before,
        *usage,
        f"memory+swap: usage {LIMIT_KB}kB, limit {LIMIT_KB}kB, failcnt 0",
        f"Memory cgroup stats for {CGROUP}: cache:4KB rss:1KB",
    ]


def _machine() -> list[str]:
    return [
        "Mem-Info:",
        "active_anon:366008 inactive_anon:67023 isolated_anon:96",
        " slab_reclaimable:1528 slab_unreclaimable:5821",
        " mapped:69 shmem:154 pagetables:6367 bounce:0",
        "Node 0 hugepages_total=4 hugepages_free=0 hugepages_surp=0 hugepages_size=2048kB",
        "Free swap  = 128kB",
        "Total swap = 262144kB",
        "511983 pages RAM",
        "0 pages HighMem/MovableOnly",
        "43784 pages reserved",
    ]


Prefixer = Callable[[list[str]], str]

STAMPS = [1740.788324 + at / 1e6 for at in range(5000)]


def each(form: Callable[[str, float], str]) -> Prefixer:
    """A logger that writes one line for each message."""
    return lambda messages: "\n".join(form(text, stamp) for text, stamp in zip(messages, STAMPS, strict=False)) + "\n"


def _records(messages: list[str]) -> list[dict[str, object]]:
    return [{"pri": 6, "time": stamp, "msg": text} for text, stamp in zip(messages, STAMPS, strict=False)]


def _dmesg_json(messages: list[str]) -> str:
    """As util-linux writes it."""
    items = "},{".join(
        f'\n         "pri": 6,\n         "time": {record["time"]:12.6f},\n         "msg": {json.dumps(record["msg"])}\n      '
        for record in _records(messages)
    )
    return f'{{\n   "dmesg": [\n      {{{items}}}\n   ]\n}}\n'


def _export(messages: list[str]) -> str:
    entries = [
        f"__CURSOR=s=1;i={at}\n__REALTIME_TIMESTAMP=1795194006788324\n__MONOTONIC_TIMESTAMP={int(stamp * 1e6)}\n_TRANSPORT=kernel\n"
        f"PRIORITY=6\nMESSAGE={text}\n_HOSTNAME=node-1\n_SOURCE_MONOTONIC_TIMESTAMP={int(stamp * 1e6)}\n\n"
        for at, (text, stamp) in enumerate(zip(messages, STAMPS, strict=False))
    ]
    return "".join(entries)


def _verbose(messages: list[str]) -> str:
    return "".join(
        f"Fri 2026-11-20 17:00:06.788324 UTC [s=1;i={at};b=2]\n    PRIORITY=6\n    _HOSTNAME=node-1\n"
        f"    _TRANSPORT=kernel\n    MESSAGE={text}\n"
        for at, text in enumerate(messages)
    )


def _journal(text: str, stamp: float) -> dict[str, str]:
    return {
        "__REALTIME_TIMESTAMP": "1795194006788324", "_TRANSPORT": "kernel", "_HOSTNAME": "node-1", "PRIORITY": "6", "MESSAGE": text,
        "_SOURCE_MONOTONIC_TIMESTAMP": str(int(stamp * 1e6)),
    }  # fmt: skip


def _gcp(text: str, where: str) -> dict[str, object]:
    in_json = {"jsonPayload": {"message": text, "SYSLOG_IDENTIFIER": "kernel"}}
    resource = {"type": "gce_instance", "labels": {"zone": "a"}}
    payload = {"textPayload": text} if where == "text" else in_json
    return {"insertId": "x1", **payload, "resource": resource, "timestamp": "2026-11-20T17:00:06.788324Z"}


def _pretty(items: list[dict[str, object]]) -> str:
    return json.dumps(items, indent=2) + "\n"


def _fragments(messages: list[str]) -> str:
    """netconsole: what is longer than 60 bytes comes in pieces."""
    lines = []
    for at, (text, stamp) in enumerate(zip(messages, STAMPS, strict=False)):
        head, size = f"6.18.44,6,{at},{int(stamp * 1e6)},-", len(text.encode())
        if size <= 60:
            lines.append(f"{head};{text}")
        else:
            lines += [f"{head},ncfrag={start}/{size};{text[start : start + 60]}" for start in range(0, size, 60)]
    return "\n".join(lines) + "\n"


ISO = "2026-11-20T17:00:06"

#: Each logger: how it writes messages, and the ISO time that can be known from it.
LOGGERS: dict[str, tuple[Prefixer, str | None]] = {
    "dmesg": (each(lambda text, at: f"[{at:12.6f}] {text}"), None),
    "dmesg with the caller": (each(lambda text, at: f"[{at:12.6f}][ T9185] {text}"), None),
    "dmesg -T": (each(lambda text, at: f"[Fri Nov 20 17:00:06 2026] {text}"), ISO),
    "dmesg -T in French": (each(lambda text, at: f"[ven. 20 nov. 17:00:06 2026] {text}"), None),
    "dmesg iso": (each(lambda text, at: f"{ISO},788324+00:00 {text}"), f"{ISO}.788324+00:00"),
    "dmesg -x": (each(lambda text, at: f"kern  :err   : [{at:12.6f}] {text}"), None),
    "dmesg -x -T": (each(lambda text, at: f"kern  :err   : [Fri Nov 20 17:00:06 2026] {text}"), ISO),
    "dmesg -r": (each(lambda text, at: f"<3>[{at:12.6f}] {text}"), None),
    "dmesg -J": (_dmesg_json, None),
    "dmesg -J, compact": (lambda messages: json.dumps({"dmesg": _records(messages)}) + "\n", None),
    "/dev/kmsg": (each(lambda text, at: f"6,1378,{int(at * 1e6)},-;{text}"), None),
    "/dev/kmsg with the caller": (each(lambda text, at: f"6,1378,{int(at * 1e6)},-,caller=T9185;{text}\n SUBSYSTEM=memory"), None),
    "netconsole": (each(lambda text, at: f"[{at:12.6f}] {text}"), None),
    "netconsole, extended": (each(lambda text, at: f"6.18.44-fc,6,444,{int(at * 1e6)},-;{text}"), None),
    "netconsole, in fragments": (_fragments, None),
    "syslog": (each(lambda text, at: f"Nov 20 17:00:06 node-1 kernel: [{at:12.6f}] {text}"), None),
    "syslog, indented": (each(lambda text, at: f"\tNov 20 17:00:06 node-1 kernel: {text}"), None),
    "syslog over the wire": (each(lambda text, at: f"<6>Nov 20 17:00:06 node-1 kernel: [{at:12.6f}] {text}"), None),
    "syslog of rsyslog": (each(lambda text, at: f"{ISO}.788324+00:00 node-1 kernel: [{at:12.6f}] {text}"), f"{ISO}.788324+00:00"),
    "syslog of busybox": (each(lambda text, at: f"Nov 20 17:00:06 node-1 kern.warn kernel: [{at:12.6f}] {text}"), None),
    "RFC 5424": (each(lambda text, at: f"<6>1 {ISO}.788324Z node-1 kernel - - - {text}"), f"{ISO}.788324+00:00"),
    "RFC 5424 with data": (each(lambda text, at: f'<6>1 {ISO}Z node-1 kernel - - [meta id="1"] {text}'), f"{ISO}+00:00"),
    "journalctl": (each(lambda text, at: f"Nov 20 17:00:06 node-1 kernel: {text}"), None),
    "journalctl short-precise": (each(lambda text, at: f"Nov 20 17:00:06.788324 node-1 kernel: {text}"), None),
    "journalctl short-iso": (each(lambda text, at: f"{ISO}+0100 node-1 kernel: {text}"), f"{ISO}+01:00"),
    "journalctl short-full": (each(lambda text, at: f"Fri 2026-11-20 17:00:06 UTC node-1 kernel: {text}"), f"{ISO}+00:00"),
    "journalctl short-monotonic": (each(lambda text, at: f"[{at:12.6f}] node-1 kernel: {text}"), None),
    "journalctl short-unix": (each(lambda text, at: f"1795194006.788324 node-1 kernel: {text}"), f"{ISO}.788324+00:00"),
    "journalctl json": (each(lambda text, at: json.dumps(_journal(text, at))), f"{ISO}.788324+00:00"),
    "journalctl json-pretty": (
        lambda messages: "".join(json.dumps(_journal(text, at), indent="\t") + "\n" for text, at in zip(messages, STAMPS, strict=False)),
        f"{ISO}.788324+00:00",
    ),
    "journalctl json, in bytes": (
        each(lambda text, at: json.dumps({**_journal(text, at), "MESSAGE": list(text.encode())}, separators=(",", ":"))),
        f"{ISO}.788324+00:00",
    ),
    "journalctl export": (_export, f"{ISO}.788324+00:00"),
    "journalctl verbose": (_verbose, f"{ISO}.788324+00:00"),
    "CRI": (each(lambda text, at: f"{ISO}.788324123Z stdout F [{at:12.6f}] {text}"), f"{ISO}.788324+00:00"),
    "docker": (
        each(lambda text, at: json.dumps({"log": f"[{at:12.6f}] {text}\n", "stream": "stdout", "time": f"{ISO}.788324123Z"})),
        f"{ISO}.788324+00:00",
    ),
    "docker with syslog in it": (
        each(lambda text, at: json.dumps({"log": f"Nov 20 17:00:06 node-1 kernel: {text}\n", "time": f"{ISO}Z"})),
        f"{ISO}+00:00",
    ),
    "GCP text": (each(lambda text, at: json.dumps(_gcp(text, "text"))), f"{ISO}.788324+00:00"),
    "GCP json": (each(lambda text, at: json.dumps(_gcp(text, "json"))), f"{ISO}.788324+00:00"),
    "gcloud logging read": (lambda messages: _pretty([_gcp(text, "json") for text in messages]), f"{ISO}.788324+00:00"),
    "CloudWatch": (
        lambda messages: json.dumps({"events": [{"timestamp": 1795194006788, "message": text, "ingestionTime": 1} for text in messages]}),
        f"{ISO}.788000+00:00",
    ),
    "CloudWatch, indented": (
        lambda messages: json.dumps({"events": [{"timestamp": 1795194006788, "message": text} for text in messages]}, indent=4),
        f"{ISO}.788000+00:00",
    ),
    "aws logs tail": (
        each(lambda text, at: f"{ISO}.788000+00:00 i-0abc {text}".replace("i-0abc ", "i-0abc kernel: ")),
        f"{ISO}.788000+00:00",
    ),
    "Datadog": (
        each(lambda text, at: json.dumps({"content": {"timestamp": f"{ISO}.788Z", "host": "node-1", "message": text}})),
        f"{ISO}.788000+00:00",
    ),
    "Loki": (
        lambda messages: json.dumps({"data": {"result": [{"stream": {}, "values": [["1795194006788324000", text] for text in messages]}]}}),
        f"{ISO}.788324+00:00",
    ),
    "Elasticsearch": (
        each(lambda text, at: json.dumps({"_source": {"@timestamp": f"{ISO}Z", "message": text, "host": "node-1"}})),
        f"{ISO}+00:00",
    ),
    "fluentd": (each(lambda text, at: f"{ISO}+00:00\tkernel\t" + json.dumps({"message": text, "hostname": "node-1"})), f"{ISO}+00:00"),
    "quoted in a mail": (each(lambda text, at: f"> > [{at:12.6f}] {text}"), None),
    "no prefix": (each(lambda text, at: text), None),
    "CRLF": (each(lambda text, at: f"[{at:12.6f}] {text}\r"), None),
}


def scored(process: Process, adj: int) -> Process:
    """The process with another oom_score_adj."""
    return replace(process, adj=adj)
