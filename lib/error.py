"""What may end a script early."""

import signal


class InputError(Exception):
    """Bad input, or a file that cannot be written: one line that names the file or flag and how to mend it.

    The scripts print the line and end with exit code 2; nothing else in the project catches it.
    """


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C came; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
