import pytest
from matplotlib.image import imread

from lib.experiments.figures import COLOURS, class_colours, make_output, new_figure, save_figure
from lib.system.error import InputError


def test_a_figure_of_so_many_inches_is_a_png(tmp_path):
    figure = new_figure(2, 1)
    figure.subplots().plot([0, 1])
    save_figure(figure, tmp_path / "figure.png", dpi=50)
    assert imread(tmp_path / "figure.png").shape == (50, 100, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_an_output_that_cannot_be_a_folder_is_named(tmp_path):
    assert make_output(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output .*file: cannot be made a folder"):
        make_output(tmp_path / "file")


def test_there_is_a_colour_for_every_class():
    assert class_colours(4) == list(COLOURS[:3])
    assert class_colours(10)[6:] == list(COLOURS[:3])  # from the start again
