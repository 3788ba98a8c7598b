"""Runs scenarios in machines of their own and prints what they found. Usage: run.py [SCENARIO...] [--times N].

Exit status: 0 where each check of each run holds, 1 where one does not or a run did not come to its end, 2 where this host can't run it.
"""

from __future__ import annotations

import argparse
import ast
import shutil
import sys
import time
from pathlib import Path

import machine

SCENARIOS = machine.HERE / "guest" / "scenarios"

#: Seconds for one boot, from the kernel's start to the power's end.
PATIENCE = 1200


def main() -> int:
    """Build, run, tell."""
    parser = argparse.ArgumentParser(description="oomsafe in real machines that run out of memory")
    parser.add_argument("scenario", nargs="*", help="default: all of them")
    parser.add_argument("--times", type=int, default=1, help="how often each")
    asked = parser.parse_args()
    known = sorted(path.stem for path in SCENARIOS.glob("*.py"))
    if unknown := set(asked.scenario) - set(known):
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        built = machine.build()
    except machine.CantRun as error:
        print(f"the virtual machines can't run here: {error}", file=sys.stderr)
        return 2
    try:
        results = [run(built, name) for name in asked.scenario or known for _ in range(asked.times)]
    finally:
        shutil.rmtree(built.project.parent)
    print(f"\n{sum(results)} of {len(results)} runs hold")
    return 0 if all(results) else 1


def run(built: machine.Machine, name: str) -> bool:
    """One scenario in one boot: its rows of the table, and whether all of it holds."""
    promise, memory = described(SCENARIOS / f"{name}.py")
    out = machine.CACHE / "runs" / name
    shutil.rmtree(out, ignore_errors=True)
    print(f"\n{name}: {promise}", flush=True)
    began, said = time.monotonic(), []
    try:
        said = list(built.boot([f"oomsafe.scenario={name}"], memory, out, PATIENCE))
    except TimeoutError as error:
        print(f"  {error}")
    for row in filter(lambda row: "check" in row, said):
        verdict = "    " if row["wanted"] is None else "ok  " if row["good"] else "FAIL"
        wanted = "" if row["wanted"] in (None, "that") else f"   (wanted: {row['wanted']})"
        print(f"  {verdict} {row['check']}: {row['got']}{wanted}")
    for row in filter(lambda row: "log" in row, said):
        (out / f"{row['log']}.log").write_text(f"{row['text']}\n")
    ended = any("end" in row for row in said)
    good = ended and all(row.get("good", True) for row in said)
    if not ended:
        print("  FAIL the run did not come to its end")
    print(f"  {'holds' if good else 'DOES NOT HOLD'}, {time.monotonic() - began:.0f} s" + ("" if good else f"; see {out}"), flush=True)
    return good


def described(path: Path) -> tuple[str, int]:
    """A scenario's promise, and its machine's memory in MiB; it is not imported, for it is the machine's."""
    tree = ast.parse(path.read_text())
    named = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    return (ast.get_docstring(tree) or "").split("\n")[0], ast.literal_eval(named["MEMORY"]) if "MEMORY" in named else 768


if __name__ == "__main__":
    sys.exit(main())
