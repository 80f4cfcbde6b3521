import pytest

from lib.error import InputError
from lib.filters import format_filters, read_filters


def test_rows_are_sorted_by_name_as_strings_and_the_last_one_counts(tmp_path):
    rows = [{"enc_10": 8, "enc_2": 4}, {"enc_10": 7, "enc_2": 3}]
    text = format_filters(rows)
    assert text == "enc_10\tenc_2\n8\t4\n7\t3\n"
    (tmp_path / "out_filters").write_text(text)
    assert read_filters(tmp_path / "out_filters") == {"enc_10": 7, "enc_2": 3}


@pytest.mark.parametrize("text", ["", "a\tb\n", "a\tb\n1\n", "a\tb\n1\tx\n", "a\n0\n", "a\n-3\n"])
def test_bad_files_are_named(tmp_path, text):
    (tmp_path / "f").write_text(text)
    with pytest.raises(InputError, match=str(tmp_path / "f")):
        read_filters(tmp_path / "f")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing"):
        read_filters(tmp_path / "nothing")
