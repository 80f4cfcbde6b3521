"""What the run folders of models of torch say."""

import json

import pytest

from lib.checkpoint import save_model
from lib.models import Sauron
from lib.models.size import summary
from lib.runs import agreed_settings, open_models, settings_of_model, sizes_of
from lib.settings import Settings
from lib.system.error import InputError


@pytest.fixture
def run(tmp_path):
    """A function that makes a run folder and returns its model's path."""

    def make(name, **given):
        settings = Settings.of({"data": "phantom", "patch_size": (16, 16), "fms_init": 4, "levels": 3} | given)
        model = Sauron(1, 4, 4, 3, filters={"out": {"enc_ConvBlock_1": 2}})
        model.initialize()
        (tmp_path / name / "models").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(settings.as_dict()))
        save_model(tmp_path / name / "models" / "model-1", model)
        return tmp_path / name / "models" / "model-1"

    return make


def test_a_models_settings_are_those_of_its_run(run, tmp_path):
    path = run("a")
    assert settings_of_model(path).patch_size == (16, 16)
    (tmp_path / "model-1").write_bytes(path.read_bytes())
    assert settings_of_model(tmp_path / "model-1") is None


def test_models_must_agree(run):
    first, other = run("a"), run("b", patch_size=(32, 16))
    assert [one.data for one in agreed_settings([first, run("c")]).values()] == ["phantom"] * 2
    with pytest.raises(InputError, match=f"^{other}: its run has another patch_size than that of {first}"):
        agreed_settings([first, other])
    assert len(agreed_settings([first, other], but=("patch_size",))) == 2


def test_what_a_predictor_gets(run, tmp_path):
    path = run("a")
    found = open_models([path], "cpu", "auto")
    assert found["patch_size"] == (16, 16) and found["postprocess"] is None and len(found["models"]) == 1
    with pytest.raises(InputError, match="runs exported models"):
        open_models([path], "cpu", "openvino")


def test_sizes_before_and_after_pruning(run):
    path = run("a")
    (network,) = open_models([path], "cpu", "auto")["models"]
    settings = settings_of_model(path)
    sizes = sizes_of(network.model, settings.dataset, (16, 16), settings)
    assert sizes["flops"]["now"] == summary(network.model, (16, 16))["flops"] < sizes["flops"]["unpruned"]
    # two of four filters less: 2 x (9 + 1) weights of their own, and 2 x 9 of each of the next block's 4
    assert sizes["parameters"]["unpruned"] - sizes["parameters"]["now"] == 2 * 10 + 2 * 9 * 4
