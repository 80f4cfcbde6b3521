"""Text files as their readers want them, whichever editor saved them."""

import codecs
from pathlib import Path


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A text file without the byte-order mark that some editors put in front (of UTF-8, or of UTF-16).

    Raises OSError, or ValueError if it is no text; with `errors` "replace" bytes that are none become U+FFFD.
    """
    data = Path(path).read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig", errors)
    except UnicodeDecodeError as error:  # whose own words hold the whole file
        raise ValueError(f"no text: byte {error.start} is {data[error.start]:#04x}") from None
