"""What is drawn of finished trainings."""

import matplotlib.image
import pytest

from lib.experiments.dice_figures import Mark, draw_curves, draw_dice_flops, validation_curve


def test_the_curve_of_a_history():
    """Epochs without validation are left out, and the background does not count."""
    history = {"epoch": [1, 2, 3], "val_dice": [[1.0, 0.5, 0.25], None, [1.0, None, 0.75]]}
    assert validation_curve(history) == ([1, 3], [0.375, 0.75])
    assert validation_curve({}) == ([], [])


def marks(*shares):
    found = {"mean": 0.8, "low": 0.7, "high": 0.9, "by_training": [0.75, None, 0.85]}
    return [Mark(f"row {i}", ("#D55E00", "o"), share, "20%", found, None) for i, share in enumerate(shares)]


def drawn(path, draw, *arguments):
    """The axes of the figure that `draw` makes at `path`."""
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.experiments.dice_figures.save_figure", lambda figure, *_, **__: figures.append(figure))
        draw(*arguments, path)
    return [axes for figure in figures for axes in figure.axes]


def test_a_bar_is_the_interval_and_rows_of_one_budget_stand_side_by_side(tmp_path):
    (axes,) = drawn(tmp_path / "a.png", draw_dice_flops, marks(0.2, 0.2, 0.2), "title", "unpruned")
    bars = [line for line in axes.lines if list(line.get_ydata()) == [0.7, 0.9]]
    places = [bar.get_xdata()[0] for bar in bars]
    assert places == pytest.approx([20 / 1.05, 20, 20 * 1.05]) and axes.get_xscale() == "log"
    assert [line.get_label() for line in axes.lines if line.get_marker() == "o"] == ["row 0", "row 1", "row 2"]
    dots = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "."]
    assert dots == [[0.75, 0.85]] * 3  # of the trainings that have a value


def test_a_difference_has_a_panel_of_its_own(tmp_path):
    (one,) = marks(0.5)
    difference = {"mean": -0.01, "low": None, "high": None}
    with_difference = Mark(one.label, one.look, one.share, None, one.dice, difference)
    _, below = drawn(tmp_path / "a.png", draw_dice_flops, [with_difference], "title", "nnUNet")
    assert below.get_ylabel() == "Dice minus nnUNet (paired)"
    assert [list(line.get_ydata()) for line in below.lines if line.get_marker() == "o"] == [[-0.01]]
    draw_dice_flops([with_difference], "title", "nnUNet", tmp_path / "a.png")
    assert matplotlib.image.imread(tmp_path / "a.png").shape[1] >= 800


def test_the_curves_of_a_row_are_before_those_of_the_reference(tmp_path):
    rows = [
        ("nnUNet", "#000000", [([1, 2, 3], [0.1, 0.7, 0.8])]),
        ("Sauron", "#D55E00", [([1, 2, 3], [0.1, 0.6, 0.7]), ([], [])]),
        ("nothing", "#0072B2", [([], [])]),
    ]
    whole, small = drawn(tmp_path / "a.png", draw_curves, rows, "nnUNet")
    assert [line.get_color() for line in whole.lines] == ["#000000"]
    assert [(line.get_color(), list(line.get_ydata())) for line in small.lines] == [
        ("#BBBBBB", [0.1, 0.7, 0.8]),
        ("#D55E00", [0.1, 0.6, 0.7]),
    ]
    assert whole.get_title() == "nnUNet"
    (tmp_path / "none.png").write_text("drawn before")
    draw_curves(rows[2:], "nnUNet", tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
