"""Flat images: integrity, grey and colour, against SimpleITK where it reads them rightly."""

import sys

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from lib.data import images
from lib.data.geometry import codes
from lib.system.error import InputError
from lib.system.files import write_atomically

sitk.ProcessObject.SetGlobalWarningDisplay(False)
GREY = np.random.default_rng(0).integers(0, 256, (40, 50)).astype(np.uint8)  # (y, x)
SUFFIXES = (".png", ".bmp", ".tif", ".tiff")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flat_image_is_one_thick_slice(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(GREY).save(path, dpi=(72, 72))  # the size of print is none of a voxel
    volume = images.read(path)
    np.testing.assert_array_equal(volume.array[..., 0].T, GREY)
    assert volume.array.flags.f_contiguous and volume.array.dtype == np.uint8
    assert volume.geometry.shape == (50, 40, 1) == images.read_geometry(path).shape
    assert volume.geometry.spacing_mm == (1, 1, 999) and codes(volume.geometry) == "LPS"
    assert images.n_channels(path) == 1 and images.read_image(path).array.dtype == np.float32


@settings(deadline=None, max_examples=40)
@given(arrays(st.sampled_from([np.uint8, np.uint16]), array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_grey_images_are_those_of_simpleitk_both_ways(tmp_path_factory, array):
    folder = tmp_path_factory.getbasetemp()
    for suffix in (".png", ".tif"):
        sitk.WriteImage(sitk.GetImageFromArray(array), folder / f"a{suffix}")
        volume = images.read(folder / f"a{suffix}")
        assert volume.array.dtype == array.dtype
        np.testing.assert_array_equal(volume.array[..., 0].T, array)
        images.write(folder / f"b{suffix}", volume.array, volume.header)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(folder / f"b{suffix}")), array)


@pytest.mark.parametrize(("suffix", "n"), [(suffix, 3) for suffix in SUFFIXES] + [(".png", 4), (".tif", 4)])
def test_colours_are_channels(tmp_path, suffix, n):
    path = tmp_path / f"a{suffix}"
    colours = np.stack([GREY, 255 - GREY, GREY // 2, GREY // 3][:n], -1)
    Image.fromarray(colours).save(path)
    channels = images.read_channels_of(path)
    assert len(channels) == n == images.n_channels(path)
    for i, volume in enumerate(channels):
        np.testing.assert_array_equal(volume.array[..., 0].T, colours[..., i])
        assert volume.array.dtype == np.float32 and volume.sha256 == channels[0].sha256
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(path)), colours)
    with pytest.raises(InputError, match=f"must be one volume of one channel, but it has {n} channels"):
        images.read(path)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_a_palette_stands_for_its_colours_and_one_bit_for_0_and_1(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    image = Image.fromarray(GREY % 3)
    image.putpalette([0, 0, 0, 255, 0, 7, 0, 128, 0])
    image.save(path)
    found = np.concatenate([volume.array for volume in images.read_channels_of(path)], -1)
    expected = np.array([[0, 0, 0], [255, 0, 7], [0, 128, 0]])[GREY % 3]
    assert images.n_channels(path) == 3
    np.testing.assert_array_equal(found.transpose(1, 0, 2), expected)
    Image.fromarray(GREY > 99).save(path)
    np.testing.assert_array_equal(images.read_label(path, 2).array[..., 0].T, GREY > 99)


@pytest.mark.parametrize("kind", ["grey", "colour", "deflated"])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_a_file_that_is_cut_or_damaged_is_refused(tmp_path, suffix, kind, capfd):
    path = tmp_path / f"a{suffix}"
    more = {"compression": "tiff_adobe_deflate"} if (suffix, kind) == (".tif", "deflated") else {}
    Image.fromarray(np.stack([GREY] * 3, -1) if kind == "colour" else GREY).save(path, **more)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (*range(0, len(whole) - 20, 97), len(whole) // 2)] + [b"some text"]
    if suffix == ".png":
        damaged += [whole[:-5], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            images.read_channels_of(path)
        assert str(error.value).startswith(f"{path}: cannot be read as an image (") and "\n" not in str(error.value)
        assert "0x" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    path.unlink()
    with pytest.raises(InputError, match="cannot be read .No such file"):
        images.n_channels(path)


def test_what_would_lose_something_is_refused(tmp_path):
    page = Image.fromarray(GREY)
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page])
    Image.fromarray(np.stack([GREY] * 4, -1), "CMYK").save(tmp_path / "print.tif")
    deep = sitk.GetImageFromArray(np.stack([GREY.astype(np.uint16) * 257] * 3, -1), isVector=True)
    sitk.WriteImage(deep, tmp_path / "deep.png")
    for name, message in (
        ("pages.tif", "holds 2 images; convert it to .nii.gz or .mha"),
        ("print.tif", "is of the kind CMYK; convert it to grey values, or to RGB of 8 bits"),
        ("deep.png", "is 16 bits a colour; convert"),
    ):
        for reader in (images.read, images.n_channels):
            with pytest.raises(InputError, match=f"{name}: {message}"):
                reader(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labels_are_written_without_loss(tmp_path, suffix):
    Image.fromarray(GREY).save(tmp_path / "image.png")
    header = images.read(tmp_path / "image.png").header
    for n in (4, 200) if suffix == ".bmp" else (4, 200, 300):
        labels = np.resize(np.arange(n), (50, 40, 1)).astype(images.label_type(n))
        path = tmp_path / f"labels{suffix}"
        images.write(path, labels, header)
        first = path.read_bytes()
        np.testing.assert_array_equal(images.read_label(path, n).array, labels)
        images.write(path, labels, header)
        assert path.read_bytes() == first


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_pillow_one_line_says_what_to_do(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(GREY).save(path)
    header = images.read(path).header
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = f"^{tmp_path}/a{suffix}: {suffix} files need Pillow; pip install pillow$"
    for reader in (images.read, images.read_geometry, images.n_channels):
        with pytest.raises(InputError, match=message):
            reader(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        write_atomically(path, lambda temporary: images.write(temporary, GREY.T[..., None], header))
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before
