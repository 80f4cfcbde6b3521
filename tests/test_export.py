"""From a trained run to a file that is checked before it is there."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace

import exported
import numpy as np
import onnx
import pytest
import tiny
import torch

import lib.export
from lib.data.preprocessing import preprocess, read_channels
from lib.export import LABELS, SOFTMAX, agreement, main, to_graph, to_onnx
from lib.inference import Predictor
from lib.models import load_model
from lib.network import Network
from lib.onnx_file import read_onnx_file
from lib.postprocessing import Decision, write_decision
from lib.runtimes import RUNTIMES, open_network
from lib.settings import Settings
from lib.torch_network import TorchNetwork
from lib.training import train
from lib.validation import validate_run

SMALL = ["--data", "phantom", "--fms_init", "2", "--levels", "3", "--patch_size", "16", "16", "--device", "cpu"]
SMALL += ["--num_workers", "0", "--epochs", "1", "--split", "0.96:0.04"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A validated run of one epoch, in a folder whose name nobody is to learn."""
    place = tmp_path_factory.mktemp("hospital_of_alice")
    places = ["--data_path", place / "data", "--cache_path", place / "cache", "--output", place / "runs"]
    with ExitStack() as held:
        folder = train([*SMALL, *map(str, places)], held).folder
    validate_run(folder, torch.device("cpu"), lambda _: None)
    return folder


@pytest.fixture(scope="module")
def done(run, tmp_path_factory):
    """The exported model, and what was on the screen."""
    path, lines = tmp_path_factory.mktemp("out") / "out.onnx", []
    lib.export.export(run / "models" / "model-1", path, None, lines.append)
    return path, lines


def errors_of(capsys, argv):
    assert main([*map(str, argv)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 1 and printed.err.count("\n") == 1 and "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_the_graph_is_the_network(dim):
    """As onnx's own reference implementation computes it, on numpy alone."""
    from onnx.reference import ReferenceEvaluator

    made, model = exported.exported(dim)
    onnx.checker.check_model(made, full_check=True)
    size = {"2D": (8, 12), "3D": (2, 8, 8)}[dim]
    x = np.random.default_rng(0).normal(size=(2, model.modalities, *size)).astype(np.float32)
    (found,) = ReferenceEvaluator(made).run(None, {"image": x})
    with torch.inference_mode():
        np.testing.assert_allclose(found, model(torch.from_numpy(x))[0].numpy(), atol=1e-4)


def test_the_same_model_gives_the_same_bytes():
    first, second = (exported.exported("3D")[0].SerializeToString() for _ in range(2))
    assert first == second != exported.exported("3D", 1)[0].SerializeToString()


def test_what_has_no_rule_is_not_exported():
    model = exported.network("2D")
    model.encoder[0].seq[2] = torch.nn.LeakyReLU(0.2)
    with pytest.raises(TypeError, match="enc_ConvBlock_1: no rule to export LeakyReLU"):
        to_graph(model)


def test_the_metadata_are_those_of_the_run(run, done):
    path, _ = done
    file, settings, model = read_onnx_file(path), Settings.read(run)[0], load_model(run / "models" / "model-1")
    fields, dataset = file.metadata, settings.dataset
    assert file.patch_size == (16, 16) and file.divisor == (4, 4) and file.dim == "2D"
    assert file.dataset.preprocessing == dataset.preprocessing
    assert file.dataset.class_names == dataset.class_names and file.dataset.values == dataset.values == ()
    assert fields["labels"][3] == {"name": "LV cavity", "value": 3} and fields["channels"] == ["image"]
    assert fields["data"] == {"name": "phantom", "licence": ""}
    assert fields["model"]["name"] == "model-1" and len(fields["made_by"]["versions"]["torch"]) > 3
    assert fields["made_by"]["command"] == "python -m lib.export model-1 out.onnx"
    found = json.loads((run / "validation.json").read_text())
    assert fields["model"]["sha256"] == found["sha256"]
    assert fields["validation"]["n"] == 2
    for when in ("before", "after"):
        assert fields["validation"][when]["dice"] == found[when]["average"]["dice"]
        assert fields["validation"][when]["HD95_mm"] == found[when]["average"]["HD95"]
    assert fields["postprocessing"] == {key: found[key] for key in ("steps", "reasons")}
    n = sum(parameter.numel() for parameter in model.parameters())
    assert fields["parameters"] == {"before": n, "after": n}
    assert fields["filters"]["out"]["enc_ConvBlock_1"] == 2


def test_they_tell_nothing_of_the_machine_and_the_patients(run, done):
    path, _ = done
    data = path.read_bytes()
    ids = {subject for part in json.loads((run / "subjects.json").read_text()).values() for subject in part}
    assert len(ids) > 10
    for secret in (*ids, "hospital_of_alice", str(run.parent), "patient0"):
        assert secret.encode() not in data


def test_both_runtimes_are_compared_with_torch_on_a_validation_image(run, done):
    path, lines = done
    first = next(iter(json.loads((run / "validation.json").read_text())["before"]["subjects"]))
    assert lines[0] == f"export: model-1 is checked on the validation image {first}"
    assert [line.split(":")[0] for line in lines[1:-1]] == [*RUNTIMES, "torch", *RUNTIMES]
    for line in lines[1:3]:
        assert " labels equal in 100.0000% of the voxels, softmax within " in line
    assert lines[3].endswith(" ms per patch")
    for line in lines[4:6]:
        assert " ms per patch, " in line and line.endswith(" times as fast as torch")
    assert lines[-1].startswith(f"export: {path} (0.0 MiB); For research use only")


def test_the_exported_model_predicts_what_the_run_predicts(run, done):
    """On whole files, with mirroring: the same labels."""
    path, _ = done
    file, settings = read_onnx_file(path), Settings.read(run)[0]
    images = settings.dataset.files_in(settings.data_path)[0].images
    theirs = Predictor.load(run / "models" / "model-1", "cpu", postprocess=None).file(images, probabilities=True)
    how = {"preprocessing": file.dataset.preprocessing}
    for runtime in RUNTIMES:
        ours = Predictor(open_network(file, runtime, 1), file.patch_size, **how).file(images, probabilities=True)
        assert (ours.labels == theirs.labels).mean() >= 0.9999
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-4)


def test_agreement_in_numbers():
    """Against a network whose maps are moved in a known part of the voxels."""
    model = exported.network("2D")

    class Called(TorchNetwork):
        mean = Network.mean  # which calls the network

    class Moved(Called):
        def __call__(self, patches):
            maps = super().__call__(patches).copy()
            maps[:, :, 0] = np.roll(maps[:, :, 0], 1, axis=1)  # the first of 16 rows: other classes
            return maps

    class Close(Called):
        def __call__(self, patches):
            return super().__call__(patches) + np.float32(5e-5)

    class Broken(Called):
        def __call__(self, patches):
            return np.full_like(super().__call__(patches), np.nan)

    volume = np.random.default_rng(0).normal(size=(1, 16, 24, 3)).astype(np.float32)
    networks = {"torch": TorchNetwork(model), "moved": Moved(model), "close": Close(model), "broken": Broken(model)}
    found = agreement(networks, volume, (16, 24))
    assert (found["torch"].labels, found["torch"].softmax) == (1, 0) and found["torch"].is_good
    assert found["moved"].labels == 15 / 16 and not found["moved"].is_good
    assert found["close"].labels == 1 and found["close"].softmax == pytest.approx(5e-5, rel=0.01)
    assert found["close"].is_good and not found["broken"].is_good


def test_networks_take_turns_and_the_first_round_does_not_count(monkeypatch):
    now, calls = [0.0], []

    class Slow(TorchNetwork):
        def __call__(self, patches):
            calls.append((self.model, patches.shape))
            n = sum(model is self.model for model, _ in calls)
            now[0] += len(patches) * (9 if n == 1 else 0.002 if self.model is first else 0.004)

    first, second = exported.network("2D"), exported.network("2D")
    monkeypatch.setattr(lib.export.time, "perf_counter", lambda: now[0])
    found = lib.export.milliseconds({"a": Slow(first), "b": Slow(second)}, (16, 24))
    assert found == {"a": pytest.approx(2), "b": pytest.approx(4)}
    assert [model for model, _ in calls] == [first, second] * 6 and calls[0][1] == (2, 1, 16, 24)


def test_the_limits_are_those_that_are_promised():
    assert (LABELS, SOFTMAX) == (0.9999, 1e-4)


def test_a_model_that_does_not_agree_is_not_left_behind(run, tmp_path, capsys, monkeypatch):
    """One weight is another in the file than in torch's network; the file itself is without fault."""
    graph = lib.export.to_graph

    def changed(model):
        made = graph(model)
        weights = np.frombuffer(made.initializer[0].raw_data, "<f4").copy()
        weights[0] += 0.5
        made.initializer[0].raw_data = weights.tobytes()
        return made

    monkeypatch.setattr(lib.export, "to_graph", changed)
    output = tmp_path / "out.onnx"
    error = errors_of(capsys, [run / "models" / "model-1", output])
    assert f"{output}: openvino does not agree with torch (labels equal in " in error and "not written" in error
    assert list(tmp_path.iterdir()) == []
    output.write_text("an older one")
    errors_of(capsys, [run / "models" / "model-1", output, "--overwrite"])
    assert output.read_text() == "an older one"


def test_a_check_needs_a_runtime(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lib.export, "installed_runtimes", lambda: ())
    error = errors_of(capsys, [run / "models" / "model-1", tmp_path / "out.onnx"])
    assert "no runtime is installed that could check it; run `pip install openvino`" in error
    assert list(tmp_path.iterdir()) == []


def test_without_the_data_it_is_checked_on_noise(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"split": "1:0"}))
    lines = []
    lib.export.export(copy / "models" / "model-1", tmp_path / "a.onnx", None, lines.append)
    assert lines[0] == "export: model-1 is checked on a volume of noise (the run has no validation set)"

    dataset = replace(tiny.Tiny3D, how_to_get="Ask.")
    settings = replace(Settings.read(run)[0], data_path=str(tmp_path / "nowhere"))
    settings.__dict__["dataset"] = dataset  # one that does not write itself
    monkeypatch.setattr(lib.export, "build_dataset", lambda it: dataset.partitions(it.data_path, "0.9:0.1", 1))
    volume, what = lib.export.volume_of(settings, None)
    assert (
        what.startswith("a volume of noise (--data tiny: found no case_NN/image.nii.gz in ") and "--data_path" in what
    )
    assert volume.shape == (1, 24, 24, 3) and volume.dtype == np.float32
    with pytest.raises(lib.export.InputError, match="found no case_NN/image.nii.gz"):
        lib.export.volume_of(settings, str(tmp_path / "elsewhere"))


def test_data_that_have_moved_are_found(run, tmp_path):
    settings = Settings.read(run)[0]
    moved = shutil.copytree(settings.data_path, tmp_path / "moved")
    volume, what = lib.export.volume_of(replace(settings, data_path=str(tmp_path / "gone")), str(moved))
    assert what.startswith("the validation image ")
    (path,) = moved.rglob(f"{what.split()[-1]}.nii.gz")
    image, _ = read_channels(path, settings.dataset.preprocessing)
    np.testing.assert_array_equal(volume, preprocess(image, settings.dataset.preprocessing).array)


def test_a_decision_and_a_validation_of_another_model_are_not_its_own(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    model = copy / "models" / "model-1"
    write_decision(model, Decision(("foreground", 2), []))
    lines = []
    lib.export.export(model, tmp_path / "a.onnx", None, lines.append)
    assert read_onnx_file(tmp_path / "a.onnx").steps == ("foreground", 2)
    for name in ("validation.json", "postprocessing.json"):
        content = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(content | {"sha256": "0" * 64}))
    lib.export.export(model, tmp_path / "b.onnx", None, lines.append)
    file = read_onnx_file(tmp_path / "b.onnx")
    assert file.metadata["validation"] is None and file.metadata["postprocessing"] is None and file.steps == ()


def test_what_cannot_be_exported_is_one_line(run, tmp_path, capsys):
    model, output = run / "models" / "model-1", tmp_path / "out.onnx"
    alone = shutil.copy(model, tmp_path / "model-1")
    assert "its run is not known; name RUN/models/model-E" in errors_of(capsys, [alone, output])
    assert "no such file" in errors_of(capsys, [tmp_path / "none", output])
    assert "is not called .onnx" in errors_of(capsys, [model, tmp_path / "out.pt"])
    assert "cannot be written" in errors_of(capsys, [model, tmp_path / "model-1" / "x" / "out.onnx"])
    output.write_text("mine")
    assert "exists already; give --overwrite or another name" in errors_of(capsys, [model, output])
    assert output.read_text() == "mine"
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "validation.json").write_text('{"sha256": 3}')
    output.unlink()
    (copy / "validation.json").write_text(json.dumps({"sha256": lib.export.file_digest(model), "before": 3}))
    assert "validation.json: is damaged" in errors_of(capsys, [copy / "models" / "model-1", output])
    assert not output.exists()


def test_the_command_writes_and_replaces(run, tmp_path, capsys):
    output = tmp_path / "My model ä.onnx"
    argv = [str(run / "models" / "model-1"), str(output)]
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert "openvino: " in printed.out and printed.err == ""
    assert read_onnx_file(output).n_classes == 4
    output.write_text("old")
    assert main([*argv, "--overwrite"]) == 0
    assert read_onnx_file(output).n_classes == 4


def test_help_says_every_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(default: ") == 2 and text.count("(required)") == 2


def test_metadata_and_network_are_checked_before_the_file_is_there():
    """What the reader refuses is never written: here a patch that the network cannot compute."""
    model = exported.network("2D")
    made = to_onnx(model, exported.metadata_of(model, (18, 24)))
    with pytest.raises(ValueError, match="patch_size"):
        lib.onnx_file._parsed(None, made.SerializeToString())
