from PIL import Image

from lib.experiments.idea import main


def test_the_picture_is_always_the_same(tmp_path):
    for name in ("a", "b"):
        assert main(["--output", str(tmp_path / "new" / f"{name}.png")]) == 0
    a, b = (Image.open(tmp_path / "new" / f"{name}.png") for name in "ab")
    assert a.size == (1350, 465)
    assert len(a.getcolors(10**6)) > 1000
    assert a.tobytes() == b.tobytes()


def test_a_picture_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file" / "a.png")]) == 2
    assert "file: cannot be made a folder" in capsys.readouterr().err
