"""Sauron's modules. Whichever of them is imported, by a script, by `python -m` or in a worker process, this file comes
first: before torch is loaded, and before a file is opened that stays open."""

import os

from lib.system.screen import open_missing

# Threads of OpenMP that have nothing to do sleep. By default they look again and again whether the others are done, and
# take the cores from whoever else wants to work: on a busy machine from these others. Where GNU's OpenMP is used they
# look for a moment first (by default it is 30 times as long), which a quiet machine gains by. It is read as torch is
# loaded; the user's own values win.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "10000"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
open_missing()
