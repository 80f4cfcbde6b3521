"""What is printed, in processes of their own, since each test spoils the streams."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRINTING = """
import sys
from lib.system.screen import kept_screen
with kept_screen("script.py"):
    for i in range(3):
        print(i, "x" * 5000)
        print(i, file=sys.stderr)
    open(sys.argv[1], "w").write("done")
"""


def python(code, *argv, redirections="", **environment):
    """Run the code, with the redirections of a shell; a pipe's exit code is that of python."""
    command = f'set -o pipefail; "$0" -c "$1" "${{@:2}}" {redirections}'
    argv = ["bash", "-c", command, sys.executable, code, *map(str, argv)]
    return subprocess.run(argv, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirections", "out", "err"),
    [
        ("", 3, "0\n1\n2\n"),
        ("<&-", 3, "0\n1\n2\n"),
        (">&-", 0, "0\n1\n2\n"),
        ("2>&-", 3, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| true", 0, "0\n1\n2\n"),
        ("2>&1 >&- | true", 0, ""),
        ("2>&1 | true", 0, ""),
        ("2>/dev/full", 3, ""),
        (">/dev/full", 0, "0\n1\n2\nscript.py: what was printed is not whole (No space left on device); all else is\n"),
    ],
)
def test_the_work_is_done_whatever_becomes_of_the_screen(redirections, out, err, unbuffered, tmp_path):
    result = python(PRINTING, tmp_path / "file", redirections=redirections, PYTHONUNBUFFERED=unbuffered)
    assert (result.returncode, len(result.stdout.splitlines()), result.stderr) == (0, out, err)
    assert (tmp_path / "file").read_text() == "done"


def test_a_reader_gets_what_it_wants_and_leaves(tmp_path):
    result = python(PRINTING, tmp_path / "file", redirections="| head -1")
    assert (result.returncode, result.stdout[:3], len(result.stdout)) == (0, "0 x", 5003)
    assert result.stderr == "0\n1\n2\n"


def test_no_file_gets_what_is_printed_to_a_closed_stream(tmp_path):
    code = "import lib, os, sys; file = open(sys.argv[1], 'w'); os.write(2, b'no'); os.write(1, b'no'); input"
    assert python(code, tmp_path / "file", redirections="<&- >&- 2>&-").returncode == 0
    assert (tmp_path / "file").read_text() == ""
    code = "import lib, os, subprocess, sys; file = open(sys.argv[1], 'w'); subprocess.run(['sh', '-c', 'echo no >&2'])"
    assert python(code, tmp_path / "file", redirections="2>&-").returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_a_program_that_uses_the_modules_keeps_its_streams():
    code = "import sys; before = sys.stdout, sys.stderr; import lib.system.screen\n"
    code += "with lib.system.screen.kept_screen('a'): assert sys.stdout is not before[0]\n"
    code += "assert (sys.stdout, sys.stderr) == before; print('whole')"
    assert python(code).stdout == "whole\n"


@pytest.mark.parametrize(
    ("own", "spins"),
    [
        ({}, 10000),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, 0),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 30000000000),
        ({"GOMP_SPINCOUNT": "7"}, 7),
    ],
)
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(own, spins):
    """OpenMP tells how often a thread looks before it sleeps, as it is loaded: 300000 times by default."""
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **own}
    found = subprocess.run(
        [sys.executable, "-c", "import train"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0
    if "GOMP_SPINCOUNT" not in found.stderr:
        pytest.skip("this is not GNU's OpenMP")
    assert f"GOMP_SPINCOUNT = '{spins}'" in found.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_name_that_the_screen_cannot_show_is_printed_with_escapes(unbuffered):
    code = "from lib.system.screen import keep_screen; keep_screen(); print('Gr\\xf6\\xdfe \\u03b1 \\udcff')"
    for encoding, shown in (("ascii", r"Gr\xf6\xdfe \u03b1 \udcff"), ("utf-8", "Größe α \\udcff")):
        result = python(code, PYTHONIOENCODING=f"{encoding}:strict", PYTHONUNBUFFERED=unbuffered)
        assert (result.returncode, result.stdout, result.stderr) == (0, shown + "\n", "")
