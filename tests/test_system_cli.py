"""lib/system/cli.py; the scripts themselves are tested in test_cli.py."""

import argparse
import sys
from itertools import product

import pytest
import torch

from lib.system.cli import number, run_script
from lib.system.error import InputError


def test_numbers():
    assert number(int, 1)("3") == 3
    assert number(float, 0, 1)("1") == 1
    for text in ("x", "nan", "-1", "1.01", "inf"):
        with pytest.raises(argparse.ArgumentTypeError):
            number(float, 0, 1)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        number(float, 0, open_low=True)("0")


def test_run_script_turns_bad_input_into_one_line(capsys):
    def bad():
        raise InputError("f.nii.gz: is broken")

    assert run_script(bad) == 2
    assert capsys.readouterr().err.endswith("error: f.nii.gz: is broken\n")
    assert run_script(lambda: None) == 0


FULL = [MemoryError(), RuntimeError("not enough memory")]


@pytest.mark.parametrize(("error", "loaded"), [*product(FULL, (torch, None)), (torch.OutOfMemoryError(), torch)])
def test_run_script_says_that_memory_is_short(error, loaded, capsys, monkeypatch):
    """Without torch, too."""

    def fail():
        raise error

    monkeypatch.setitem(sys.modules, "torch", loaded)
    assert run_script(fail) == 2
    assert capsys.readouterr().err.endswith("error: not enough memory; try a smaller --batch_size or --patch_size\n")


def test_run_script_lets_other_errors_through():
    def fail():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run_script(fail)
