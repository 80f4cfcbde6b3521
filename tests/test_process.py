"""Freed memory stays in the process, and signals keep their stack."""

import ctypes
import platform
import subprocess
import sys

import pytest

from lib.system import process
from lib.system.process import SS_DISABLE, keep_freed_memory, kept_signal_stack

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


@pytest.fixture
def signal_stack():
    """A function that sets the stack of this thread's signals, if one is given, and returns what was set before."""

    def swap(stack=None):
        before = process._SignalStack()
        assert not ctypes.CDLL(None).sigaltstack(ctypes.byref(stack) if stack else None, ctypes.byref(before))
        return before

    before = swap() if sys.platform == "linux" else None
    yield swap
    if before:
        swap(before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are left alone")
@pytest.mark.parametrize("own", [True, False])
def test_signals_are_handled_where_they_were_before(signal_stack, own):
    memory = [ctypes.create_string_buffer(2**16) for _ in range(2)]
    mine, other = (process._SignalStack(ctypes.addressof(stack), 0, len(stack)) for stack in memory)
    signal_stack(mine if own else process._SignalStack(flags=SS_DISABLE))
    with pytest.raises(KeyError), kept_signal_stack():
        signal_stack(other)
        assert signal_stack().address == other.address
        raise KeyError
    found = signal_stack()
    assert (found.address, found.size) == (mine.address, mine.size) if own else found.flags == SS_DISABLE


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_signals_are_left_alone(monkeypatch, system):
    monkeypatch.setattr(process.sys, "platform", system)
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: pytest.fail("asked for"))
    with kept_signal_stack():
        pass
