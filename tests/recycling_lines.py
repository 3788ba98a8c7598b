"""What a worker's line says when it is recycled for its soft limit."""

from __future__ import annotations

import re


def recycling_line(limit: str, unit: str, who: str, name: str) -> re.Pattern[str]:
    """`who` is how the line may name who leaks, `name` one piece of its work: both as regular expressions; it need not name any."""
    size = r"[\d.]+ [KM]iB"
    return re.compile(
        rf"worker (?P<pid>\d+) \(slot \d+\) recycling: anon {size}( >|, growing towards) soft limit {size}( \(of {limit}, jitter\))?"
        rf"( for \d+\.\d s| until \d+\.\d s ago)?, after (?P<work>\d+) {unit.removesuffix('s')}s?"
        rf"(; {who} keeps about {size} a call: \d+ % of its growth"
        rf"|; (largest growth in one of them|first of its kind here): {name} \(\+{size}\))?$"
    )
