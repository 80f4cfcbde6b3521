import pytest

from lib.models.filters import format_filters, read_filters
from lib.system.error import InputError


def test_rows_are_sorted_by_name_as_strings_and_the_last_one_counts(tmp_path):
    rows = [{"enc_10": 8, "enc_2": 4}, {"enc_10": 7, "enc_2": 3}]
    text = format_filters(rows)
    assert text == "enc_10\tenc_2\n8\t4\n7\t3\n"
    (tmp_path / "out_filters").write_text(text)
    assert read_filters(tmp_path / "out_filters") == {"enc_10": 7, "enc_2": 3}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # the latter two with a byte-order mark
@pytest.mark.parametrize("text", ["a\tb\n4\t8\n", "a\tb\r\n4\t8\r\n", "a\tb\t\n4\t8\t \n\n\t\n", "a\tb\n4\t8"])
def test_what_editors_leave_in_a_file_does_not_matter(tmp_path, text, encoding):
    (tmp_path / "f").write_bytes(text.encode(encoding))
    assert read_filters(tmp_path / "f") == {"a": 4, "b": 8}


@pytest.mark.parametrize("text", ["", "a\tb\n", "a\tb\n1\n", "a\tb\n1\tx\n", "a\n0\n", "a\n-3\n"])
def test_bad_files_are_named(tmp_path, text):
    (tmp_path / "f").write_text(text)
    with pytest.raises(InputError, match=str(tmp_path / "f")):
        read_filters(tmp_path / "f")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing"):
        read_filters(tmp_path / "nothing")
