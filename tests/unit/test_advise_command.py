"""`oomsafe advise` for a person and for a machine, from given figures: at any width, and whatever is given."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from oomsafe.cli import advise as command
from oomsafe.cli.advice_text import advice_text
from oomsafe.cli.app import cli
from oomsafe.policy.sizing.advice import advise
from oomsafe.policy.sizing.facts import Facts, preloaded
from oomsafe.policy.units import GIB, KIB, MIB

# click before 8.2 mixes stderr into stdout where it is not told otherwise
RUNNER = CliRunner(**({"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}))

SHOP = Facts(
    limit=2 * GIB, source="given", others=0, cpus=2, fresh=180 * MIB, supervisor=60 * MIB, growth=40 * KIB, balloon=200 * MIB, rate=50
)
GIVEN = [
    "--memory",
    "2GiB",
    "--worker",
    "180MiB",
    "--supervisor",
    "60MiB",
    "--growth",
    "40KiB",
    "--balloon",
    "200MiB",
    "--rate",
    "50",
    "--cpus",
    "2",
]

AT_80 = """\
from the given figures
  workers                 5  by CPU 5 (2 x 2 + 1); by memory 5 (each needs a
                             soft limit of 270 MiB at least); CPU binds
  soft limit        320 MiB  (1843 MiB budget - 60 MiB supervisor - 181 MiB
                             headroom) / 5 workers; a fresh worker has 180 MiB,
                             which leaves it 140 MiB
  hard limit        527 MiB  2048 MiB limit - 60 MiB supervisor - 181 MiB
                             headroom - 4 x 320 MiB: with the others at their
                             soft limits, all still fit, and a worker at its own
                             has room for the largest growth, 200 MiB
  budget           1843 MiB  90% of 2048 MiB (given)
  headroom          181 MiB  kept free for a replacement, which boots before its
                             predecessor leaves: a fresh worker, and 600 KiB
                             that the pool grows by until it helps
  recycles       57 an hour  50 requests a second x 40.0 KiB = 2.0 MiB/s; a
                             worker gains 124 MiB until it is recycled, and
                             lives 5.29 min, if it goes on like that
  preload           unknown  what workers share is not known: with gunicorn, run
                             the pool with preload_app = True and advise again;
                             or say what would be shared: --preload 100MiB
  would do          2.0 GiB  the smallest memory for these workers (5), each of
                             which lives 5 min at least, with room for a
                             replacement
not known: how long a boot takes (--boot 5s)"""


def run(*argv: str, env: dict[str, str] | None = None) -> Result:
    return RUNNER.invoke(cli, ["advise", *argv], env={"COLUMNS": "80", "OOMSAFE_SCOREBOARD": None, **(env or {})})


@pytest.fixture(autouse=True)
def _no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs on this machine."""
    monkeypatch.setattr(command, "living_boards", list)


def test_at_80_columns() -> None:
    """Each figure with the arithmetic that it comes from."""
    assert advice_text("from the given figures", SHOP, advise(SHOP), 80).plain == AT_80
    assert run(*GIVEN).stdout.startswith(AT_80)


@pytest.mark.parametrize("width", [20, 40, 63, 64, 80, 200])
def test_at_any_width(width: int) -> None:
    """No line is longer than that, down to 40; every figure is there."""
    lines = advice_text("shop, gunicorn sync, supervisor 4711", SHOP, advise(SHOP), width).plain.splitlines()

    assert max(map(cell_len, lines)) <= max(width, 40)
    text = " ".join(" ".join(lines).split())
    assert all(figure in text for figure in ("320 MiB", "527 MiB", "57 an hour", "2.0 GiB", "4 x 320 MiB"))


def test_no_colour_and_no_terminal() -> None:
    """No escape sequence; the same text."""
    for env in ({}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b[3" not in run(*GIVEN, env=env).stdout
        assert "\x1b]" not in run(*GIVEN, env=env).stdout


def test_as_json() -> None:
    """Bytes and seconds, null for what is not known, with a version."""
    record = json.loads(run(*GIVEN, "--json").stdout)

    assert record["version"] == 1
    (one,) = record["advice"]
    assert one["pool"] is None
    assert (one["advice"]["workers"], one["advice"]["soft"], one["advice"]["hard"]) == (5, 320 * MIB, 527 * MIB)
    assert (one["advice"]["bound"], one["facts"]["growth"], one["facts"]["boot"]) == ("cpu", 40 * KIB, None)
    still = json.loads(run(*GIVEN[:4], "--growth", "0KiB", "--json").stdout)["advice"][0]
    assert (still["advice"]["recycles"], still["advice"]["life"]) == (0, None)


def test_what_is_not_known_is_said() -> None:
    """And not made up."""
    text = " ".join(run("--memory", "2GiB", "--worker", "180MiB").stdout.split())

    assert "hard limit none what one of the requests may need at most is not known (--balloon 200MiB)" in text
    assert "recycles unknown requests a second x what each leaks" in text
    assert "what the supervisor holds, counted as nothing (--supervisor 60MiB)" in text
    for option in ("--growth", "--rate", "--balloon", "--boot"):
        assert option in text


def test_what_speaks_against_it() -> None:
    """A life that is too short, the largest work that does not fit, workers that the processors can't feed."""
    short = " ".join(run(*GIVEN, "--rate", "500").stdout.split())
    large = " ".join(run(*GIVEN, "--balloon", "4GiB").stdout.split())
    fast = " ".join(run(*GIVEN, "--rate", "5000", "--file", "gunicorn").stdout.split())
    many = " ".join(run(*GIVEN, "--memory", "64GiB", "--workers", "40").stdout.split())

    assert re.search(r"! a worker lives \d\d\.\d s only, less than 5 min: mend the leak", short)
    assert "! one of the requests may grow by 4.0 GiB: a worker near its soft limit has no room for that, and it gets 503" in large
    assert 'min_lifetime="1s"' in fast
    assert "hard_limit" not in fast
    leaks = " ".join(run(*GIVEN, "--rate", "5000").stdout.split())
    assert "hard limit none a worker leaks 39.1 MiB/s: requests would be refused for that" in leaks
    assert "! 40 workers are many for 2 CPUs, which 5 keep busy" in many


def test_preloading_as_a_what_if() -> None:
    """What is shared counts once; uvicorn's workers share nothing."""
    text = " ".join(run(*GIVEN, "--preload", "100MiB").stdout.split())

    assert "preload saves 400 MiB: 5 workers share 100 MiB" in text
    assert "metric=private" in text
    assert advise(preloaded(SHOP, 100 * MIB)).by_memory > advise(SHOP).by_memory
    assert "--preload is for servers that fork" in run(*GIVEN, "--preload", "100MiB", "--server", "uvicorn").stderr


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--memory", "300", "--worker", "80MiB"], "--memory='300' has no unit (KiB, MiB, GiB or %); a correct example: --memory=\"2GiB\""),
        (["--memory", "90%", "--worker", "80MiB"], "--memory='90%' is a share, and of what is not known here"),
        (["--memory", "-1GiB", "--worker", "80MiB"], "--memory='-1GiB' is negative"),
        (["--memory", "2GB", "--worker", "80MiB"], "--memory='2GB' has the unit 'GB'"),
        (["--worker", "80"], "--worker='80' has no unit"),
        (["--worker", "80MiB", "--growth", "40"], "--growth='40' has no unit"),
        (["--worker", "80MiB", "--growth", "1%"], "--growth='1%' is a share"),
        (["--worker", "80MiB", "--growth", "x" * 500], "--growth='xxx"),
        (["--worker", "80MiB", "--cpus", "0"], "--cpus='0' is not above zero; a correct example: --cpus=2"),
        (["--worker", "80MiB", "--cpus", "100000"], "--cpus='100000' is more than 65536; a correct example: --cpus=2"),
        (["--worker", "80MiB", "--over", "60s"], "--over measures a live pool, and with --worker none is asked; a correct example: --pool"),
        (["--worker", "80MiB", "--over", "3d"], "--over='3d' is longer than 24 h; a correct example: --over=\"60s\""),
        (["--worker", "80MiB", "--over", "0s"], "--over='0s' is not a duration above zero"),
        (["--worker", "80MiB", "--cpus", "nan"], "--cpus='nan' is not a number"),
        (["--worker", "80MiB", "--rate", "-5"], "--rate='-5' is not a number"),
        (["--worker", "80MiB", "--workers", "1.5"], "--workers='1.5' is not a number of workers"),
        (["--worker", "80MiB", "--workers", "0"], "--workers='0' is not above zero"),
        (["--worker", "80MiB", "--boot", "5"], "--boot='5' is not a duration above zero with a unit"),
        (["--worker", "80MiB", "--app", "-c evil"], "--app='-c evil' is not a module and a name in it"),
        (["--worker", "80MiB", "--app", "a:b\n\x1b[2J"], "--app='a:b\\n\\x1b[2J' is not"),
        (["--worker", "80MiB", "--json", "--file", "gunicorn"], "--file and --json"),
        (["--memory", "256MiB", "--worker", "180MiB"], "--memory='256 MiB' is less than one worker and its replacement need"),
        (["--memory", "2GiB", "--worker", "180MiB", "--workers", "9"], "--workers=9 do not fit in 2.0 GiB, which holds 6; 3072MiB would"),
        (["--memory", "2GiB"], "no pool of this user is guarded by oomsafe now, and no figures are given"),
        (["--pool", "shop"], "no pool of this user is guarded"),
    ],
    ids=lambda part: " ".join(part)[:40] if isinstance(part, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line(argv: list[str], line: str) -> None:
    """It names the option, the value, and what would be right."""
    ended = run(*argv)

    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"oomsafe advise: {line}")
    assert ended.stderr.count("\n") == 1
    assert "a correct example: " in ended.stderr
    assert "\x1b" not in ended.stderr


def test_memory_that_is_named_would_do() -> None:
    """What the line says is what it accepts."""
    line = run("--memory", "256MiB", "--worker", "180MiB").stderr
    (memory,) = re.findall(r'--memory="(\w+)"', line)

    assert run("--memory", memory, "--worker", "180MiB").exit_code == 0


def test_a_scoreboard_that_can_not_be_read(tmp_path: Path) -> None:
    """Or that is none."""
    fake = tmp_path / "board"
    fake.write_bytes(bytes(65536))

    for path in (fake, tmp_path / "missing", tmp_path):
        ended = run("--scoreboard", str(path))
        assert (ended.exit_code, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
        assert str(path) in ended.stderr


@given(st.lists(st.sampled_from(["memory", "worker", "supervisor", "growth", "balloon", "rate", "boot", "cpus", "workers"]), unique=True),
       st.text(max_size=30))  # fmt: skip
def test_no_text_makes_it_crash(options: list[str], text: str) -> None:
    """It is a figure, or one line says that it is none."""
    argv = [f"--{option}={text}" for option in options]
    ended = RUNNER.invoke(cli, ["advise", "--worker=80MiB", *argv])

    assert ended.exit_code in (0, 2)
    assert ended.exit_code == 0 or ended.stderr.count("\n") == 1


def test_an_app_that_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On stderr: the file alone is on stdout, also where the folder is gone."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    ended = run(*GIVEN, "--file", "systemd")

    assert ended.exit_code == 0
    assert ended.stdout.startswith("# by oomsafe advise, for 2048 MiB and 2 CPUs: 5 workers of at most 320 MiB each\n[Unit]\n")
    assert ended.stderr == "oomsafe advise: app:app stands for your own app there: give it, as in --app app:app\n"


def test_figures_beyond_any_machine() -> None:
    """They don't overflow."""
    most = "999999999999"
    ended = run("--memory=65536TiB", "--worker=65536TiB", "--growth=9999999999GiB", f"--rate={most}", f"--boot={most}d")

    assert ended.exit_code == 2
    assert "is less than one worker and its replacement need" in ended.stderr


def test_the_example_in_the_docs_is_what_it_prints() -> None:
    """To the letter."""
    page = (Path(__file__).parents[2] / "docs" / "sizing.md").read_text()
    (line, shown), *_ = re.findall(r"^\$ oomsafe advise (.+)\n((?:.+\n)+)```", page, re.MULTILINE)

    assert run(*line.split()).stdout == shown
