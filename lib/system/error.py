"""The one exception that a user may cause."""


class InputError(Exception):
    """Bad input, or a file that cannot be written: one line that names the file or flag and how to mend it.

    The scripts print the line and end with exit code 2; nothing else in the project catches it.
    """
