import pytest

from lib.text import read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_left_out(tmp_path, encoding):
    (tmp_path / "f").write_text("Größe\n1\t2\n", encoding=encoding)
    assert read_text(tmp_path / "f") == "Größe\n1\t2\n"


@pytest.mark.parametrize("data", [b"\xff\xfea", b"a\xff", b"\xef\xbb\xbf\xe4"])
def test_what_is_no_text(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(ValueError):
        read_text(tmp_path / "f")
    assert "\ufffd" in read_text(tmp_path / "f", errors="replace")
