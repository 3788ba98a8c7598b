"""Text from outside, made safe for a log line, a terminal or a label."""

from __future__ import annotations


def printable(raw: bytes | str, length: int = 96) -> str:
    """`raw` with everything but printable ASCII replaced by ``?``, cut at `length` characters.

    A client chooses the path of its request: without this it could forge log lines
    (CR, LF), move a terminal's cursor (ESC) or fill a disk.
    """
    text = raw.decode("ascii", "replace") if isinstance(raw, bytes) else raw
    clean = "".join(c if " " <= c <= "~" else "?" for c in text[: length + 1])
    return clean if len(clean) <= length else f"{clean[: length - 3]}..."


def without_controls(text: str) -> str:
    """`text` with every invisible character replaced by ``?``: control characters, line separators, bidirectional marks."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def shortened(text: str, length: int) -> str:
    """The beginning of `text`, of at most `length` bytes in UTF-8."""
    return text.encode("utf-8", "replace")[:length].decode("utf-8", "ignore")


def near_matches(name: str, known: list[str]) -> str:
    """`` (did you mean soft_limit?)`` for a misspelt name; empty if no known name is similar."""
    from difflib import get_close_matches  # imported here, so that only a mistake pays for it

    near = get_close_matches(name, known, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
