import re

import pytest

from lib.system.error import InputError
from lib.system.log import Log, no_log


def test_every_line_goes_to_the_screen_and_with_its_time_to_the_file(tmp_path, capsys):
    log = Log(tmp_path / "log.txt")
    log("one")
    log("two\nthree")
    assert capsys.readouterr().out.splitlines() == ["one", "two", "three"]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["one", "two", "three"]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ", line) for line in lines)
    no_log("four")
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match=r"log\.txt: cannot be written"):
        Log(tmp_path / "gone" / "log.txt")("text")
