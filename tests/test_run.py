"""Run reads what it is asked for; whole run folders are read in tests/test_report.py."""

import json

import pytest

from lib.evaluation import mean_foreground
from lib.experiments.run import Run, read_run
from lib.settings import Settings
from lib.system.error import InputError


@pytest.fixture
def begun(tmp_path):
    """A run that has not finished an epoch."""
    given = {"data": "phantom", "fms_init": 2, "levels": 3, "patch_size": (16, 16), "data_path": str(tmp_path / "gone")}
    settings = Settings.of(given)
    (tmp_path / "config.json").write_text(json.dumps(settings.as_dict() | {"machine": "a PC"}))
    return tmp_path


def test_a_run_without_an_epoch_tells_what_it_knows(begun):
    run = Run(begun)
    assert (run.settings.levels, run.facts, run.lambda_) == (3, {"machine": "a PC"}, 0.5)
    assert run.classes[1:] == ("RV cavity", "myocardium", "LV cavity")
    assert (run.widths["enc_ConvBlock_1"], run.widths["enc_ConvBlock_6"], len(run.widths)) == (2, 8, 12)
    assert run.unpruned["filters"] == sum(run.widths.values())
    assert run.saved_maps == {}
    with pytest.raises(InputError, match="has no finished epoch"):
        read_run(begun)
    with pytest.raises(InputError, match="has no model"):
        run.newest_model  # noqa: B018
    with pytest.raises(InputError, match="the data are not in .*gone any more; name their folder with --data_path"):
        run.data(write=False)
    assert not (begun / "gone").exists()


def test_saved_maps_are_found_by_their_epochs(begun):
    for epoch in (10, 2):
        (begun / "fms" / f"epoch-{epoch:04}").mkdir(parents=True)
    assert {epoch: path.name for epoch, path in Run(begun).saved_maps.items()} == {2: "epoch-0002", 10: "epoch-0010"}
    assert list(Run(begun).saved_maps) == [2, 10]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="is no run folder"):
        Run(tmp_path)


def test_the_mean_of_the_known_classes():
    assert mean_foreground([0.9, 0.5, None, 0.25]) == 0.375
    assert mean_foreground([0.9, None]) is mean_foreground(None) is None
