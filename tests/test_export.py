"""From a run's model to a file, and what refuses to be one."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from exporting import exported, make_run, own_settings
from raw_data import write_raw

import lib.export
import train
from lib.checkpoint import save_model
from lib.data import raw
from lib.export import describe, export, main, to_onnx
from lib.models import load_model
from lib.models.filters import read_filters
from lib.models.size import count_filters, summary
from lib.network import Network
from lib.onnx_file import KEY, NOTICE, RESEARCH, read_onnx_file
from lib.runs import settings_of_model
from lib.system.error import InputError


def metadata_of(path):
    return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}[KEY])


def test_the_file_is_what_it_should_be(tmp_path):
    path = exported(tmp_path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 17)]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    for end, channels in ((model.graph.input, 1), (model.graph.output, 4)):
        (end,) = end
        sizes = [dim.dim_param or dim.dim_value for dim in end.type.tensor_type.shape.dim]
        assert sizes[1] == channels and all(isinstance(size, str) for size in (sizes[0], *sizes[2:]))
    assert {entry.key: entry.value for entry in model.metadata_props}[NOTICE] == RESEARCH
    # of the heads only that of full resolution is in it
    assert len([node for node in model.graph.node if node.op_type == "Softmax"]) == 1


def test_what_the_file_says(tmp_path):
    path = make_run(tmp_path / "run")
    network, settings = load_model(path), settings_of_model(path)
    said = describe(path, network, settings)
    assert (said["dim"], said["patch_size"], said["divisor"], said["channels"]) == ("2D", [16, 24], [4, 4], ["image"])
    assert [(one["name"], one["value"]) for one in said["labels"]] == [
        ("background", 0),
        ("RV cavity", 1),
        ("myocardium", 2),
        ("LV cavity", 3),
    ]
    assert said["preprocessing"]["spacing_mm"] == [2.5, 2.5, None] and said["mirroring"] == {"axes": [2, 3]}
    assert said["flops"]["after"] == summary(network, (16, 24))["flops"] < said["flops"]["before"]
    counted = count_filters(network)["out"]
    assert all(counted[name] == n for name, n in said["filters"]["out"].items()) and said["postprocessing"] is None
    assert said["validation"] is None


def test_the_same_model_gives_the_same_bytes(tmp_path):
    path = make_run(tmp_path / "run")
    said = describe(path, load_model(path), settings_of_model(path))
    assert to_onnx(load_model(path), said) == to_onnx(load_model(path), json.loads(json.dumps(said)))


def test_no_subject_and_no_place_is_named(tmp_path):
    folder = write_raw(tmp_path / "Dataset001_Secret", n=5, shape=(12, 20, 24), spacing=(1.0, 1.2, 4.0))
    ids = [file.id for file in raw.read_dataset(folder).find(folder)]
    path = exported(tmp_path, **own_settings(folder))
    data = path.read_bytes()
    assert ids and not any(id_.encode() in data for id_ in ids) and str(tmp_path).encode() not in data


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The settings of a run on own data of two channels."""
    folder = write_raw(
        tmp_path_factory.mktemp("raw") / "Dataset002_Two", n=5, shape=(20, 24, 9), spacing=(1.0, 1.2, 4.0)
    )
    return own_settings(folder)


def test_a_whole_validation_volume_is_compared_and_all_runtimes_are_timed(tmp_path, own):
    lines = []
    export(make_run(tmp_path / "run", **own, fold="0"), tmp_path / "out.onnx", lines.append)
    for runtime in ("openvino", "onnxruntime"):
        agreed, timed = [line for line in lines if line.startswith(runtime)]
        assert "% of the labels as torch's" in agreed and "on validation volume" in agreed
        assert " ms for a patch, " in timed and "times as fast as torch" in timed
    file = read_onnx_file(tmp_path / "out.onnx")
    assert file.modalities == 2 and file.dataset.values == (0, 1, 4) and file.divisor == (2, 4, 4)
    assert metadata_of(tmp_path / "out.onnx") == file.metadata


def test_without_the_data_noise_is_compared_and_that_is_said(tmp_path):
    lines = []
    run = make_run(tmp_path / "run", data="acdc", data_path=str(tmp_path / "gone"))
    export(run, tmp_path / "out.onnx", lines.append)
    assert "on noise, since --data acdc: found no" in lines[0]
    with pytest.raises(InputError, match="found no"):
        export(run, tmp_path / "other.onnx", lines.append, data_path=str(tmp_path / "elsewhere"))
    assert not (tmp_path / "other.onnx").exists()


class Wrong(Network):
    """As torch, but for what `change` makes of the softmax maps."""

    def __init__(self, network, change):
        self.network, self.change = network, change
        self.modalities, self.n_classes = network.modalities, network.n_classes

    def __call__(self, patches):
        return self.change(self.network(patches))


@pytest.mark.parametrize(
    ("change", "what"), [(lambda maps: maps + np.float32(2e-4), "softmax"), (lambda maps: maps[:, ::-1], "labels")]
)
def test_a_file_that_does_not_agree_is_not_left_behind(tmp_path, monkeypatch, change, what, capsys):
    right = lib.export.open_network
    monkeypatch.setattr(lib.export, "open_network", lambda *given: Wrong(right(*given), change))
    path = make_run(tmp_path / "run")
    assert main([str(path), str(tmp_path / "out.onnx")]) == 2
    error = capsys.readouterr().err
    assert what in error and "nothing is exported" in error and len(error.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_nothing_is_replaced_unasked(tmp_path, capsys):
    path, output = make_run(tmp_path / "run"), tmp_path / "out.onnx"
    output.write_text("precious")
    assert main([str(path), str(output)]) == 2 and "--overwrite" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert main([str(path), str(output), "--overwrite"]) == 0 and read_onnx_file(output).dim == "2D"


def test_a_model_without_its_run_is_refused(tmp_path, capsys):
    path = make_run(tmp_path / "run")
    shutil.move(path, tmp_path / "model-1")
    assert main([str(tmp_path / "model-1"), str(tmp_path / "out.onnx")]) == 2
    assert "model-1: its run is not known" in capsys.readouterr().err
    assert main([str(path), str(tmp_path / "out.pt")]) == 2 and "must end in .onnx" in capsys.readouterr().err


def test_what_was_decided_and_measured_for_this_very_model_stands_in_the_file(tmp_path):
    path = make_run(tmp_path / "run")
    from lib.postprocessing import Decision, write_decision
    from lib.system.files import file_digest

    reason = {"step": 1, "kept": True, "dice": [0.5, 0.75], "why": "it is better"}
    write_decision(path, Decision((1,), [reason]))
    average = {"dice": [0.9, 0.5, 0.7, None], "HD95": [None, 1.5, 2.5, None]}
    scores = {"average": average, "subjects": {"patient001": {}, "patient002": {}}}
    (tmp_path / "run" / "validation.json").write_text(
        json.dumps({"sha256": file_digest(path), "before": scores, "after": scores})
    )
    export(path, tmp_path / "out.onnx", lambda line: None)
    said = metadata_of(tmp_path / "out.onnx")
    assert said["postprocessing"] == {"steps": [1], "reasons": [reason]} and read_onnx_file(
        tmp_path / "out.onnx"
    ).steps == (1,)
    after = said["validation"]["after"]
    assert said["validation"]["n"] == 2 and after["HD95_mm"] == [None, 1.5, 2.5, None]
    assert after["mean_foreground_dice"] == pytest.approx(0.6) and after["mean_foreground_HD95_mm"] == pytest.approx(2)

    save_model(path, load_model(path))  # the same again
    with torch.no_grad():
        other = load_model(path)
        other.blocks()[0].conv.bias += 1
    save_model(path, other)
    export(path, tmp_path / "other.onnx", lambda line: None)
    said = metadata_of(tmp_path / "other.onnx")
    assert said["postprocessing"] is None and said["validation"] is None


def test_a_training_exports_its_model_at_its_end(tmp_path):
    places = ["--data_path", tmp_path / "data", "--cache_path", tmp_path / "cache", "--output", tmp_path / "runs"]
    small = ["--fms_init", 4, "--levels", 3, "--patch_size", 32, 32, "--num_workers", 0, "--device", "cpu"]
    argv = ["--data", "phantom", *places, *small, "--epochs", 1, "--export"]
    assert train.main([*map(str, argv)]) == 0
    run = tmp_path / "runs" / "unnamed" / "phantom" / "1"
    file = read_onnx_file(run / "model.onnx")
    assert file.metadata["validation"]["n"] == 6
    assert "exported: " in (run / "log.txt").read_text()
    out = read_filters(run / "out_filters")
    assert all(out[name] == n for name, n in file.metadata["filters"]["out"].items())
