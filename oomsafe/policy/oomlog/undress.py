"""The first stage: takes off what loggers put around a kernel message, and keeps what it says of time and host.

Wrappers (JSON, CRI, /dev/kmsg, journal fields) come off one after the other, then the text prefix of dmesg or syslog. A line that another
program than the kernel has logged is dropped. No pattern here has a quantifier inside of another, and each is applied to a bounded text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from typing import Any, NamedTuple

#: How far into a line a prefix may reach, in characters.
PREFIX = 512

#: Wrappers inside of wrappers, at most: a syslog line in JSON in a container's log.
DEPTH = 5

#: Values of one JSON text that are looked at, at most.
VALUES = 50_000


class Line(NamedTuple):
    """A kernel message without its prefix."""

    message: str
    when: str | None = None
    """The time as it stands there."""
    iso: str | None = None
    uptime: float | None = None
    host: str | None = None
    source: str = ""
    """What the prefix is made of, and who printed it. Two copies of a report by two loggers differ in it, so they don't mix."""

    @property
    def printer(self) -> tuple[str, str | None]:
        """Lines of two printers belong to two reports."""
        return self.source, self.host


_STAMP = re.compile(r"\[ {0,11}(\d{1,11}\.\d{3,9})\](?:\[ {0,8}([TC]\d{1,10})\])?:? ?")
_HUMAN = re.compile(r"\[([^\[\]]{3,40}\d\d:\d\d:\d\d[^\[\]]{0,24})\] ?")
_ISO = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))? ?(Z\b|UTC\b|[+-]\d\d:?\d\d)?")
_BSD = re.compile(r"(?:[A-Z][a-z]{2} )?[A-Z][a-z]{2} [ \d]?\d (?:\d{4} )?\d\d:\d\d:\d\d(?:\.\d{1,9})?")
_UNIX = re.compile(r"(\d{9,11}\.\d{3,9}) ")
_PRIORITY = re.compile(r"<(\d{1,3})>")
_DECODED = re.compile(r"([a-z]{3,8}\d?) *:([a-z]{3,7}) *: ")
_RFC5424 = re.compile(r"<(\d{1,3})>\d{1,2} (\S{1,64}) (\S{1,255}) (\S{1,48}) (\S{1,128}) (\S{1,32}) ")
_CRI = re.compile(r"(\d{4}-\d\d-\d\dT\S{1,40}) (?:stdout|stderr) ([FP]) ")
_TAG = re.compile(r"(\S{1,255}) (?:kern\.[a-z]{3,7} )?kernel(?:\[\d{1,10}\])?: ")
_BARE_TAG = re.compile(r"(?:kern\.[a-z]{3,7} )?kernel(?:\[\d{1,10}\])?: ")
_OTHER_TAG = re.compile(r"(\S{1,255}) ([\w./@-]{1,64})(?:\[\d{1,10}\])?: ")
# messages of the kernel that look like ``host program: message``
_KERNELS_OWN = re.compile(
    r"Memory cgroup|Out of |oom[-_]|[A-Z]{3}: |.{1,64} invoked oom-killer|memory|swap|kmem|Kernel panic|active_anon|Node "
)
_KILL = re.compile(r"(?:Memory cgroup out of memory|Out of memory(?: \([a-z_]{1,40}\))?): Kill|oom-kill:constraint=")
_RELEASE = re.compile(r"\d{1,3}\.\d{1,4}[\w.+~-]{0,80}")
_ESCAPE = re.compile(r"\\x([0-9a-fA-F]{2})")
_FIELD = re.compile(r'[ \t]{0,64}"([\w@.-]{1,64})" {0,4}: {0,8}(.*)')
_KEY = re.compile(r" {0,4}([A-Z_][A-Z0-9_]{1,63})=(.*)")
_VERBOSE = re.compile(r"[A-Z][a-z]{2} (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{1,9})? \S{1,6}) \[s=")
_STRING = re.compile(r'"(?:MESSAGE|message|msg|log|textPayload|line|content|body)" ?: ?("[^"\\]*(?:\\.[^"\\]*)*")')

_MESSAGES = ("MESSAGE", "message", "msg", "log", "textPayload", "Message", "line", "body", "content", "text")
_TIMES = (
    "_SOURCE_REALTIME_TIMESTAMP", "__REALTIME_TIMESTAMP", "timestamp", "@timestamp", "time", "ts", "date", "Timestamp", "eventTime",
    "TimeGenerated", "observedTimestamp", "receiveTimestamp",
)  # fmt: skip
_UPTIMES = ("_SOURCE_MONOTONIC_TIMESTAMP", "__MONOTONIC_TIMESTAMP")
_HOSTS = ("_HOSTNAME", "hostname", "host", "Computer", "instance")
_OWN = {*_MESSAGES, *_TIMES, *_UPTIMES, *_HOSTS, "_TRANSPORT"}


class Undresser:
    """Line after line of one log. It has a state, because some formats spread one record over several lines."""

    def __init__(self) -> None:
        self._record: dict[str, Any] = {}
        self._indent: int | None = None
        self._fragment: tuple[str, str] | None = None
        self.in_records = False
        """A record has several lines here: each line counts, not only those with a message."""

    def feed(self, text: str) -> Iterable[Line]:
        """The kernel messages that end with this line; mostly one or none."""
        if text[:1] == "[" and not self._record and (match := _STAMP.match(text)):
            return (_stamped(text, match, ""),)  # dmesg, the commonest: no other form needs to be tried
        return self._feed(text)

    def _feed(self, text: str) -> Iterator[Line]:
        if text[:1] in (" ", "\t", '"') and self._is_in_object(text):
            return
        if (match := _KEY.match(text)) and (match[1] in _OWN or (self._record and self._indent is None)):
            if match[1] in self._record:  # no empty line between two records
                yield from self.flush()
            self.in_records = True
            self._record |= {match[1]: match[2]} if match[1] in _OWN else {}
            return
        if self._record:
            yield from self.flush()
        if match := _VERBOSE.match(text):
            self.in_records = True
            self._record["timestamp"] = match[1]
        elif not _is_bracket(text.strip()):
            yield from undress(self._joined(text) if text[:1].isdigit() and ",ncfrag=" in text[:PREFIX] else text)

    def flush(self) -> Iterator[Line]:
        """The message of a record that is complete."""
        record, self._record, self._indent = self._record, {}, None
        if any(key in record for key in _MESSAGES):
            yield from _from_json(record, DEPTH)

    def skip(self) -> None:
        """Lines were left out: what is known of the record is void."""
        self._record, self._indent, self._fragment = {}, None, None

    def _is_in_object(self, text: str) -> bool:
        """A line inside of an object in indented JSON: ``"msg": "…",``. What is less indented than its fields ends it."""
        indent = len(text) - len(text.lstrip())
        if match := _FIELD.match(text):
            self.in_records = True
            if match[2].strip() == "[":
                self._indent = None  # of objects, perhaps: then they are the records
                return True
            self._indent = indent if self._indent is None else min(self._indent, indent)
            if match[1] in _OWN and (value := _scalar(match[2])) is not None:
                self._record.setdefault(match[1], value)
            return True
        return bool(self._record) and _is_bracket(text.strip()) and indent >= (self._indent or 0)

    def _joined(self, text: str) -> str:
        """netconsole cuts a long message in fragments: ``6,416,1758426,-,ncfrag=0/31;``."""
        head, _, body = text.partition(";")
        head, _, place = head.rpartition(",ncfrag=")
        offset, _, total = place.partition("/")
        if self._fragment is not None and self._fragment[0] == head and offset != "0":
            body = self._fragment[1] + body
        if total.isdigit() and len(body.encode()) < int(total[:9]) < 1 << 16:
            self._fragment = head, body
            return ""
        self._fragment = None
        return f"{head};{body}"


def _is_bracket(stripped: str) -> bool:
    """The beginning or the end of an object or an array, or nothing."""
    return len(stripped) <= 4 and not stripped.strip("{}[], ")


def undress(text: str, depth: int = DEPTH) -> Iterator[Line]:
    """The kernel messages in one line: none if another program has logged it, several if it is a JSON array of records."""
    if depth <= 0:
        return
    first = text[:1]
    if first in "{[" and text.rstrip()[-1:] in ("}", "]", ",") and (records := _parsed(text)) is not None:
        yield from _from_json(records, depth)
    elif first == "{":
        for match in _STRING.finditer(text):  # cut off, or not quite JSON
            if isinstance(message := _scalar(match[1]), str):
                yield from undress(message.rstrip("\n"), depth - 1)
    elif first.isdigit() and ";" in text[:PREFIX] and (line := _kmsg(text)) is not None:
        if line.message:
            yield line
    elif cri := _CRI.match(text):
        for line in undress(text[cri.end() :], depth - 1):
            yield _within(line, cri[1], "cri")
    else:
        yield from _plain(text, depth)


def _plain(text: str, depth: int) -> Iterator[Line]:
    """Of dmesg or syslog, perhaps quoted in a mail, or with something before it that is not known here."""
    text = text.lstrip("> \t") if text[:1] in ("> \t") else text
    if stamp := _STAMP.search(text, 0, PREFIX):
        yield _stamped(text, stamp, text[: stamp.start()])
        return
    if head := _RFC5424.match(text):
        if head[4] in ("kernel", "-"):
            yield _within(Line(_after_data(text[head.end() :]), host=head[3], source="rfc5424"), head[2], "")
        return
    rest = _behind(_DECODED, _behind(_PRIORITY, text))
    if human := _HUMAN.match(rest):
        yield Line(rest[human.end() :], human[1], iso_of(human[1]), source="dmesg -T")
    elif time := _BSD.match(rest) or _ISO.match(rest) or _UNIX.match(rest):
        yield from _timed(rest[time.end() :].lstrip(" \t"), time[0].strip(), depth)
    elif tag := _BARE_TAG.search(rest, 0, PREFIX):
        when = rest[: tag.start()].strip()
        yield Line(rest[tag.end() :], when or None, iso_of(when), source="kernel:")
    elif (start := text.find("{", 0, PREFIX)) > 0 and text.rstrip()[-1:] == "}":
        yield from undress(text[start:], depth - 1)
    else:
        kill = _KILL.search(rest, 0, PREFIX)  # behind a prefix that is not known here
        yield Line(rest[kill.start() :] if kill else rest)


def _timed(rest: str, when: str, depth: int) -> Iterator[Line]:
    """What comes behind a time: ``host kernel: message``, JSON, or the message itself. A message of another program is dropped."""
    rest = rest[3:].lstrip() if rest[:3] == "UTC" else rest
    if tag := _TAG.match(rest):
        yield Line(rest[tag.end() :], when, iso_of(when), host=tag[1], source="syslog")
    elif bare := _BARE_TAG.search(rest, 0, PREFIX):
        yield Line(rest[bare.end() :], when, iso_of(when), source="syslog")
    elif (start := rest.find("{", 0, PREFIX)) >= 0 and rest.rstrip()[-1:] == "}":
        for line in undress(rest[start:], depth - 1):
            yield _within(line, when, "text")
    elif not _OTHER_TAG.match(rest) or _KERNELS_OWN.match(rest):
        yield Line(rest, when, iso_of(when), source="iso")


def _behind(pattern: re.Pattern[str], text: str) -> str:
    """`text` without the beginning that matches."""
    match = pattern.match(text)
    return text[match.end() :] if match else text


def _stamped(text: str, match: re.Match[str], head: str) -> Line:
    """A message behind the kernel's own stamp: ``[ 1740.788324]``, with the printing thread if it was built so (CONFIG_PRINTK_CALLER)."""
    message = text[match.end() :]
    uptime, caller = float(match[1]), match[2] or ""
    if not head and not caller and " kernel: " not in message[:280]:  # the commonest
        return Line(message, match[0].rstrip(" :"), None, uptime, None, "dmesg ")
    if " kernel: " in message[:280] and (tag := _TAG.match(message)):  # journalctl -o short-monotonic
        return Line(message[tag.end() :], match[0].strip(), None, uptime, tag[1], f"monotonic {caller}")
    head = head.strip()
    if not head:
        return Line(message, match[0].rstrip(" :") if not caller else f"[{match[1]}]", None, uptime, None, f"dmesg {caller}")
    time = _BSD.search(head) or _ISO.search(head)
    when = time[0].strip() if time else match[0].strip()
    host = _TAG.search(f"{head} ", time.end() if time else 0)
    return Line(message, when, iso_of(when) if time else None, uptime, host[1] if host else None, f"stamp{bool(time)} {caller}")


def _kmsg(text: str) -> Line | None:
    """A record of /dev/kmsg, or of netconsole's extended format, which may begin with the kernel's release.

    ``3,1378,1067484848,-[,caller=T1];message``: priority and facility, sequence, microseconds since boot. A message with another facility
    than 0 was written by a program: an empty Line.
    """
    head, _, message = text.partition(";")
    words = head.split(",")
    if len(words) > 4 and _RELEASE.fullmatch(words[0]) and not words[0].isdigit():
        del words[0]
    if len(words) < 4 or not all(word.isdigit() and len(word) < 20 for word in words[:3]):
        return None
    if int(words[0]) >> 3:
        return Line("")
    if "\\x" in message:
        raw = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), message)
        message = raw.encode("latin-1", "replace").decode("utf-8", "replace") if raw.isascii() is False else raw
    caller = next((word[7:] for word in words[4:] if word.startswith("caller=")), "")
    return Line(message, None, None, int(words[2]) / 1e6, None, f"kmsg {caller}")


def _within(line: Line, when: str, source: str) -> Line:
    """`line`, which stood in a wrapper that has a time too: its own time comes first."""
    text, iso = (line.when, line.iso) if line.iso else (when, iso_of(when))
    return line._replace(when=text, iso=iso, source=f"{source} {line.source}".strip())


def _after_data(text: str) -> str:
    """RFC 5424: what comes after the structured data, which is ``-`` or ``[id key="value"]``."""
    if text[:2] == "- ":
        text = text[2:]
    elif text[:1] == "[" and "=" in text[:PREFIX]:
        text = text[text.find("] ") + 2 :] if "] " in text else ""
    return text.removeprefix("\ufeff").removeprefix("BOM")


def _scalar(text: str) -> Any:
    """A string or a number in JSON, with perhaps a comma behind it; None for anything else."""
    text = text.strip().rstrip(",")
    if text[:1] == '"' or text[:1].isdigit():
        try:
            value = json.loads(text, strict=False)
        except ValueError:
            return None
        return value if isinstance(value, (str, int, float)) else None
    return None


def _parsed(text: str) -> Any:
    """JSON data; None if it is none. A number of 10 000 digits or 10 000 brackets in each other are none."""
    try:
        value = json.loads(text.rstrip().rstrip(","), strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def _from_json(value: Any, depth: int) -> Iterator[Line]:
    """The messages in JSON data: of a record that has one, or of all records inside of it."""
    stack: list[tuple[Any, dict[str, Any]]] = [(value, {})]
    for _ in range(VALUES):
        if not stack:
            return
        value, around = stack.pop()
        if isinstance(value, list):
            if len(value) == 2 and isinstance(value[0], str) and value[0].isdigit() and isinstance(value[1], str):  # Loki's API
                value = {"time": value[0], "message": value[1]}
            else:
                stack += ((one, around) for one in reversed(value) if isinstance(one, (dict, list)))
                continue
        if not isinstance(value, dict):
            continue
        fields = {**around, **{key: value[key] for key in _OWN if isinstance(value.get(key), (str, int, float))}}
        message = next((text for key in _MESSAGES if (text := _text(value.get(key)))), None)
        if message is None:
            stack += ((one, fields) for one in reversed(value.values()) if isinstance(one, (dict, list)))
        elif fields.get("_TRANSPORT", "kernel") == "kernel":
            for line in message.splitlines()[:1000]:
                for inner in undress(line, depth - 1):
                    yield _with_fields(inner, fields)


def _text(value: Any) -> str | None:
    """A message: text, or its bytes as numbers, as the journal writes what is not UTF-8."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(one) is int and 0 <= one < 256 for one in value[:4096]):
        return bytes(value[:4096]).decode("utf-8", "replace")
    return None


def _with_fields(line: Line, fields: dict[str, Any]) -> Line:
    """`line` with the time and the host of the record that it stood in. What it says itself comes first."""
    when, iso, uptime = line.when, line.iso, line.uptime
    for key in _TIMES:
        if key in fields and iso is None:
            stamp = fields[key]
            number = _number(stamp)
            if number is not None and number < 1e8:
                uptime = number if uptime is None else uptime  # dmesg -J
            elif (found := iso_of(stamp) if number is None else _iso_of_number(number)) is not None:
                when, iso = str(stamp), found
    for key in _UPTIMES:
        if uptime is None and key in fields and (number := _number(fields[key])) is not None:
            uptime = number / 1e6
    host = next((str(fields[key]) for key in _HOSTS if key in fields), None)
    return line._replace(when=when, iso=iso, uptime=uptime, host=line.host or host, source=f"json {line.source}")


def _number(value: Any) -> float | None:
    try:
        return float(value) if not isinstance(value, str) or len(value) < 40 else None
    except (ValueError, OverflowError):
        return None


def _iso_of_number(number: float) -> str | None:
    """Seconds since 1970, or milli-, micro- or nanoseconds, as ISO 8601 in UTC."""
    for size in (1e17, 1e14, 1e11):
        if number >= size:
            number /= size / 1e8
            break
    try:
        return datetime.fromtimestamp(number, timezone.utc).isoformat()
    except (ValueError, OverflowError, OSError):
        return None


_MONTHS = ("", "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_CTIME = re.compile(r"[A-Z][a-z]{2} ([A-Z][a-z]{2}) {1,2}(\d{1,2}) (\d\d:\d\d:\d\d) (\d{4})")


def iso_of(text: object) -> str | None:
    """A time in a log as ISO 8601; None if its year is not there, or it can't be read. Without an offset if the log has none."""
    if not isinstance(text, str):
        return None
    text = text[:PREFIX]
    if match := _ISO.search(text):
        offset = {"": "", "Z": "+00:00", "UTC": "+00:00"}.get(match[4] or "", match[4] or "")
        offset = offset if not offset or ":" in offset else f"{offset[:3]}:{offset[3:]}"
        return _checked(f"{match[1]}T{match[2]}{f'.{match[3][:6]:0<6}' if match[3] else ''}{offset}")
    if match := _CTIME.search(text):
        month = _MONTHS.index(match[1]) if match[1] in _MONTHS else 0
        return _checked(f"{match[4]}-{month:02}-{int(match[2]):02}T{match[3]}")
    if match := _UNIX.match(f"{text} "):
        return _iso_of_number(float(match[1]))
    return None


def _checked(iso: str) -> str | None:
    """`iso` if there is such a time."""
    try:
        datetime.fromisoformat(iso)
    except ValueError:
        return None
    return iso
