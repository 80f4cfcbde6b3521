import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.models import architecture, load_model, nnUNet
from lib.models.filters import format_filters
from lib.models.size import count_filters
from lib.system.error import InputError


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_widths_are_read_off_a_file_and_checked_against_filter_files(tmp_path, dim):
    model = nnUNet(2, 3, 4, 4, dim=dim)
    names = [b.name for b in model.blocks() if not b.head]
    uneven = {name: 2 + i % 3 for i, name in enumerate(names)}
    model = nnUNet(2, 3, 4, 4, dim=dim, filters={"out": uneven})
    model.initialize()
    torch.save(model.state_dict(), tmp_path / "model-7")
    counted = count_filters(model)
    for key in ("in", "out"):
        (tmp_path / f"{key}_filters").write_text(format_filters([counted[key]]))
    files = {"in_filters": tmp_path / "in_filters", "out_filters": tmp_path / "out_filters"}
    loaded = load_model(tmp_path / "model-7", **files)
    assert not loaded.training
    assert count_filters(loaded) == counted
    assert (loaded.dim, loaded.levels, loaded.modalities, loaded.n_classes) == (dim, 4, 2, 3)
    (tmp_path / "out_filters").write_text(format_filters([counted["out"] | {"enc_ConvBlock_2": 9}]))
    with pytest.raises(InputError, match="enc_ConvBlock_2 has 9 filters.*3 in"):
        load_model(tmp_path / "model-7", **files)


def test_files_that_are_no_model_are_refused(tmp_path):
    (tmp_path / "garbage").write_bytes(b"not a model")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other")
    for name, reason in [("garbage", "cannot be read"), ("other", "no model of nnUNet"), ("none", "no such file")]:
        with pytest.raises(InputError, match=reason):
            load_model(tmp_path / name)
    other = nnUNet(1, 2, 4, 3)
    with pytest.raises(InputError, match="encoder.0.seq.0.weight has shape"):
        nnUNet(1, 2, 5, 3).load(other.state_dict(), "x")
    with pytest.raises(InputError, match="missing"):
        nnUNet(1, 2, 4, 4).load(other.state_dict(), "x")


def test_architecture_of_a_published_file():
    state = nnUNet(1, 4, 6, 5).state_dict()
    found = architecture(state, "x")
    assert (found["levels"], found["fms_init"], found["dim"], found["n_classes"]) == (5, 6, "2D", 4)


@st.composite
def networks(draw):
    """The arguments of a small network, and an image size that it takes."""
    dim, levels = draw(st.sampled_from(["2D", "3D"])), draw(st.integers(3, 4))
    axes = int(dim[0])
    strides, kernels = (
        draw(st.lists(st.tuples(*[st.sampled_from(numbers)] * axes), min_size=levels, max_size=levels))
        for numbers in ((1, 2, 3), (1, 3, 5))
    )
    strides[0] = (1,) * axes
    names = [block.name for block in nnUNet(1, 2, 1, levels, dim=dim).blocks() if not block.head]
    widths = {name: draw(st.integers(1, 3)) for name in names}
    arguments = {"modalities": draw(st.integers(1, 2)), "n_classes": draw(st.integers(2, 4)), "levels": levels}
    arguments |= {"dim": dim, "strides": strides, "kernels": kernels, "filters": {"out": widths}}
    return arguments, tuple(2 * math.prod(axis) for axis in zip(*strides, strict=True))


@given(networks())
@settings(max_examples=15, deadline=None)
def test_any_network_is_read_off_its_file(drawn):
    arguments, size = drawn
    model = nnUNet(**arguments).eval()
    model.initialize()
    found = architecture(model.state_dict(), "x")
    assert found == arguments | {"fms_init": arguments["filters"]["out"]["enc_ConvBlock_1"]}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder, "model-1"))
        files = {f"{key}_filters": Path(folder, key) for key in ("in", "out")}
        for key, counted in count_filters(model).items():
            files[f"{key}_filters"].write_text(format_filters([counted]))
        loaded = load_model(Path(folder, "model-1"), **files)
    x = torch.randn(1, arguments["modalities"], *size)
    assert (loaded.strides, loaded.kernels) == (model.strides, model.kernels)
    assert all(map(torch.equal, loaded(x), model(x)))


def test_files_of_networks_that_cannot_be_built_are_refused():
    state = nnUNet(1, 2, 2, 3).state_dict()
    for key, shape, words in [
        ("encoder.2.seq.0.weight", (4, 2, 2, 3), "kernels must be odd"),
        ("decoder.0.weight", (8, 4, 0, 2), "strides must hold 2"),
        ("decoder.3.weight", (4, 2, 2, 2, 2), "strides must hold 2"),
    ]:
        with pytest.raises(InputError, match=f"x: is no model of nnUNet or Sauron .{words}"):
            architecture(state | {key: torch.zeros(shape)}, "x")
    with pytest.raises(InputError, match="'decoder.3.weight' is missing"):
        architecture({key: value for key, value in state.items() if key != "decoder.3.weight"}, "x")


def test_a_file_with_other_strides_is_refused_by_name():
    state = nnUNet(1, 2, 2, 3, strides=[(1, 1), (2, 1), (2, 2)]).state_dict()
    with pytest.raises(InputError, match=r"x: decoder.3.weight has shape \(4, 2, 2, 1\), the network needs"):
        nnUNet(1, 2, 2, 3).load(state, "x")
