"""The run's log: every line goes to the screen and to a file."""

from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from lib.system.error import InputError


def no_log(_text: str) -> None:
    """The log of a process that has none."""


class Log:
    """Call it with a line of text. Progress bars on the screen stay whole; lines in the file carry the time."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, text: str) -> None:
        tqdm.write(text)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(f"{now} {line}\n" for line in text.splitlines())
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error
