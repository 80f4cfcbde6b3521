"""What --amp comes to. No test reads the clock: the times are given."""

import json
import signal

import nibabel as nib
import numpy as np
import pytest
import torch

import lib.training
import predict
import train
from lib.loss import DS_CrossEntropyDiceLoss_Distance
from lib.models import Sauron, load_model
from lib.system import device
from lib.system.device import faster_precision, find_device, seconds_of
from lib.system.error import InputError
from lib.system.process import Stopped
from lib.torch_network import TorchNetwork
from lib.trainer import Step, compute_loss, trial_step

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU (CUDA) is here")
SMALL = ["--fms_init", "4", "--levels", "3", "--patch_size", "32", "32", "--num_workers", "0", "--device", "cpu"]


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:77", "nonsense"):
        with pytest.raises(InputError, match=name):
            find_device(name)


def times(monkeypatch, float32, bfloat16):
    """From now on a step takes so many seconds; it is taken all the same."""

    def made_up(step):
        seconds_of(step)
        return float32, bfloat16

    monkeypatch.setattr(device, "seconds_of", made_up)


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = Sauron(1, 4, 4, 3)
    network.initialize()
    return network


def test_the_faster_one_is_chosen(monkeypatch):
    times(monkeypatch, 0.010, 0.066)
    line = "--amp: a step takes 66.0 ms in bfloat16, 10.0 ms in float32; float32 is used"
    assert faster_precision("a step", lambda amp: None) == ("float32", line)
    times(monkeypatch, 0.010, 0.007)
    line = "--amp: a step takes 7.0 ms in bfloat16, 10.0 ms in float32; bfloat16 is used"
    assert faster_precision("a step", lambda amp: None) == ("bfloat16", line)


def test_steps_take_turns_and_the_first_round_is_left_out(monkeypatch):
    taken, clock = [], [0.0]
    seconds = iter([0.5, 0.5, 0.01, 0.03, 0.02, 0.04, 0.03, 0.05, 0.01, 0.02, 0.02, 0.04])

    def step(amp):
        taken.append(amp)
        clock[0] += next(seconds)

    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])
    assert seconds_of(step) == pytest.approx((0.02, 0.04))
    assert taken == [False, True] * 6


def test_slow_steps_are_taken_once(monkeypatch):
    taken, clock = [], [0.0]

    def step(amp):
        taken.append(amp)
        clock[0] += 66 if amp else 10

    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])
    assert seconds_of(step) == (10, 66)
    assert taken == [False, True]


def test_a_trial_leaves_no_trace(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.eval()
    random = torch.get_rng_state()
    faster_precision("a step", trial_step(model, DS_CrossEntropyDiceLoss_Distance(), 2, (32, 32)))
    faster_precision("a step", lambda amp: torch.rand(3))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training


def test_trials_compute_in_the_precision_that_they_are_asked_for(model):
    types = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: types.append(output.dtype) if isinstance(module, torch.nn.Conv2d) else None
    )
    try:
        for trial in (
            trial_step(model, DS_CrossEntropyDiceLoss_Distance(), 2, (32, 32)),
            TorchNetwork(model.eval()).trial((32, 32), 2),
        ):
            for amp, dtype in ((False, torch.float32), (True, torch.bfloat16)):
                types.clear()
                trial(amp)
                assert set(types) == {dtype}
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return tmp_path_factory.mktemp("phantom")


def arguments(phantom, output):
    folders = ["--data_path", phantom / "data", "--cache_path", phantom / "cache", "--output", output]
    return [*map(str, ["--data", "phantom", *folders, *SMALL])]


@pytest.fixture
def begun(phantom, tmp_path, monkeypatch):
    """A function that starts a training, stops it before its first step, and returns the run folder and what it would
    have begun with: {"amp", "random": state, "weights"}."""
    seen = []

    def stopped(state, *_, amp, **settings):
        seen.append({"amp": amp, "random": torch.get_rng_state(), "weights": state.model.state_dict()})
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(lib.training, "fit", stopped)

    def begin(*argv):
        argv = argv if "--resume" in argv else [*arguments(phantom, tmp_path), *argv]
        assert train.main([*map(str, argv)]) == 128 + signal.SIGTERM
        run = max((tmp_path / "unnamed" / "phantom").iterdir())
        return run, seen.pop()

    return begin


def used(run):
    return json.loads((run / "config.json").read_text())["precision"]


def test_a_training_that_is_slow_in_bfloat16_is_one_of_float32_to_the_bit(begun, monkeypatch):
    run, plain = begun()
    assert used(run) == "float32" and not plain["amp"]
    times(monkeypatch, 0.010, 0.066)
    run, slow = begun("--amp")
    assert "66.0 ms in bfloat16, 10.0 ms in float32; float32 is used" in (run / "log.txt").read_text()
    assert used(run) == "float32" and not slow["amp"]
    assert torch.equal(slow["random"], plain["random"])
    assert all(value.equal(slow["weights"][key]) for key, value in plain["weights"].items())

    times(monkeypatch, 0.010, 0.007)  # as on another machine, but the run keeps to its own
    _, again = begun("--resume", run)
    assert used(run) == "float32" and not again["amp"]
    assert (run / "log.txt").read_text().count("bfloat16") == 1


def test_a_training_that_is_fast_in_bfloat16_goes_on_in_it(begun, monkeypatch):
    """Also one of the time before the choice was recorded."""
    times(monkeypatch, 0.010, 0.007)
    run, fast = begun("--amp")
    assert used(run) == "bfloat16" and fast["amp"]
    times(monkeypatch, 0.010, 0.066)
    _, again = begun("--resume", run)
    assert used(run) == "bfloat16" and again["amp"]
    config = json.loads((run / "config.json").read_text())
    del config["precision"]
    (run / "config.json").write_text(json.dumps(config))
    _, again = begun("--resume", run)
    assert used(run) == "bfloat16" and again["amp"]


def test_a_precision_that_there_is_not_does_not_resume(begun, capsys):
    run, _ = begun()
    config = json.loads((run / "config.json").read_text()) | {"precision": "float16"}
    (run / "config.json").write_text(json.dumps(config))
    assert train.main(["--resume", str(run), "--epochs", "2"]) == 2
    assert "precision is 'float16'" in capsys.readouterr().err


def test_predictions_are_in_the_faster_precision(model, tmp_path, monkeypatch, capsys):
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(32, 32, 2)), np.diag([1.5625, 1.5625, 10, 1]))
    nib.save(image, tmp_path / "image.nii")
    torch.save(model.state_dict(), tmp_path / "model")
    argv = ["--data", "phantom", "--input", tmp_path / "image.nii", "--model_state", tmp_path / "model", "--no_tta"]
    argv += ["--probabilities", "--device", "cpu", "--patch_size", "32", "32"]

    def probabilities(name, *flags):
        assert predict.main([*map(str, [*argv, "--output", tmp_path / name]), *flags]) == 0
        return (tmp_path / name / "image_probabilities.nii.gz").read_bytes()

    plain = probabilities("plain")
    times(monkeypatch, 0.010, 0.066)
    assert probabilities("slow", "--amp") == plain
    assert "takes 66.0 ms in bfloat16, 10.0 ms in float32; float32 is used" in capsys.readouterr().out
    times(monkeypatch, 0.010, 0.007)
    assert probabilities("fast", "--amp") != plain
    assert "bfloat16 is used" in capsys.readouterr().out


# On a GPU


@needs_a_gpu
@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_a_gpu_computes_what_the_cpu_does(dim):
    """Loss, softmax maps, both distances and the gradient. In float64: of float32, rounding alone changes the gradient
    of a new 3D network by a thousandth."""
    patch = (32, 48, 16)[: int(dim[0])]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 1, *patch, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (3, *patch), generator=generator)
    found, references = {}, {}
    for name in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = Sauron(1, 4, 8, 3, dim=dim)
        network.initialize()
        network.to(name).double().train()
        criterion = DS_CrossEntropyDiceLoss_Distance()
        loss, measured = compute_loss(network, criterion, images.to(name), labels.to(name), delta_prune=True)
        loss.backward()
        deltas, references[name] = zip(*measured.delta_prune.values(), strict=True)
        gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        found[name] = [loss, *measured.outputs, *measured.delta_opt.values(), *deltas, gradient]
    assert references["cuda"] == references["cpu"]
    for ours, theirs in zip(found["cpu"], found["cuda"], strict=True):
        assert theirs.device.type == "cuda"
        assert (theirs.cpu() - ours).norm() <= 1e-6 * ours.norm()


@needs_a_gpu
def test_a_training_on_a_gpu_prunes_goes_on_and_leaves_a_model_for_the_cpu(phantom, tmp_path):
    flags = ["--device", "cuda", "--val_interval", "1", "--max_flops", "60%", "--prune_between", "0%", "50%"]
    assert train.main([*arguments(phantom, tmp_path), *flags, "--epochs", "2"]) == 0
    run = tmp_path / "unnamed" / "phantom" / "1"
    assert train.main(["--resume", str(run), "--epochs", "3", "--device", "cuda"]) == 0
    history = json.loads((run / "history.json").read_text())
    assert history["epoch"] == [1, 2, 3]
    assert history["pruning_over"] == [True] * 3 and history["filters"][0] == history["filters"][2]
    on = {}
    image = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in ("cpu", "cuda"):
        model = load_model(run / "models" / "model-3", name)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            on[name] = model(image.to(name))[0].cpu()
    torch.testing.assert_close(on["cuda"], on["cpu"], rtol=0, atol=1e-4)


@needs_a_gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_a_step_from_a_graph_is_one_that_is_computed(dim, amp):
    """Loss and gradients, of several batches one after another, and after a step that was computed without it."""
    patch = (32, 48, 16)[: int(dim[0])]
    network = Sauron(1, 4, 8, 3, dim=dim)
    network.initialize("cuda")
    steps = [Step(network, DS_CrossEntropyDiceLoss_Distance(), amp) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    for i in range(6):
        images = torch.randn(3, 1, *patch, generator=generator).cuda()
        labels = torch.randint(4, (3, *patch), generator=generator).cuda()
        found = []
        for step, plain in zip(steps, (True, i == 3), strict=True):
            loss, _ = step(images, labels, plain=plain)
            found.append(torch.cat([loss.flatten(), *(p.grad.flatten() for p in network.parameters())]).clone())
        assert (steps[1].graph is None) == (i == 3)
        assert (found[0] - found[1]).norm() <= (0.05 if amp else 0.01) * found[0].norm()
        assert found[0].norm() > 0
