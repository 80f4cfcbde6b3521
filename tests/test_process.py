"""Freed memory stays in the process."""

import platform
import subprocess
import sys

import pytest

from lib.system import process
from lib.system.process import keep_freed_memory

CODE = """
import resource
from lib.system.process import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(bytearray(2**26))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
print(new_pages(), new_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc here")
def test_what_was_freed_is_used_again():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    first, again = map(int, run.stdout.split())
    assert again < first / 10


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_nothing_is_done(monkeypatch, system):
    monkeypatch.setattr(process.sys, "platform", system)
    assert not keep_freed_memory()
