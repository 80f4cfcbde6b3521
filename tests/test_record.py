"""What predictions.json says of a folder; tests/test_prediction.py has it written by whole predictions."""

import hashlib
import json

import pytest

from lib.record import Record, check_others, difference, identity, is_done, mixed_jobs, read_record, source_identity
from lib.system.error import InputError

JOB = {"model": {"path": "/a/model-1", "sha256": "1" * 64}, "data": "acdc", "patch_size": [8, 8], "tta": True}


def write(folder, name, job, image, content=b"labels"):
    """A prediction as predict.py writes it."""
    record = read_record(folder)
    record.begin(job)
    record.announce(name, source_identity(image), hashlib.sha256(content).hexdigest())
    (folder / name).write_bytes(content)
    record.replaced(name)
    record.write()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "image.nii.gz").write_bytes(b"image")
    write(tmp_path / "out", "a.nii.gz", JOB, tmp_path / "image.nii.gz")
    return tmp_path / "out"


def test_a_job_is_what_it_depends_on_and_not_where_its_model_lies():
    moved = JOB | {"model": JOB["model"] | {"path": "/b/model-1"}}
    assert identity(moved) == identity(JOB)
    assert identity(JOB | {"tta": False}) != identity(JOB)
    assert difference(JOB, JOB | {"tta": False}) == "--no_tta was not given"
    assert difference(JOB | {"patch_size": [4, 4]}, JOB) == "--patch_size was 4 4"
    other = JOB | {"model": {"path": "/a/model-1", "sha256": "2" * 64}}
    assert difference(other, JOB) == "the model was another one of this name"


def test_what_a_job_does_not_say_is_as_it_was_before_it_could_be_said():
    assert difference(JOB, JOB | {"step_size": 0.25}) == "--step_size was 0.5"
    assert difference(JOB | {"step_size": 0.25}, JOB) == "--step_size was 0.25"
    steps = {"postprocessing": ["foreground"]}
    assert difference(JOB, JOB | steps) == "--no_postprocessing was given"
    assert difference(JOB | steps, JOB) == "--no_postprocessing was not given"
    assert difference(JOB | steps, JOB | {"postprocessing": [1]}) == "the postprocessing was another one"


def test_several_models_are_one_job_wherever_they_lie():
    models = [{"path": f"/a/model-{i}", "sha256": str(i) * 64} for i in (1, 2)]
    job = JOB | {"model": {"path": "/a/model-1", "sha256": "3" * 64, "models": models}}
    moved = JOB | {"model": {"path": "/b", "sha256": "3" * 64, "models": [one | {"path": "/b"} for one in models]}}
    assert identity(moved) == identity(job) != identity(JOB)
    assert difference(job, JOB) == "the models were /a/model-1 /a/model-2"
    assert difference(JOB, job) == "the model was /a/model-1"


def test_what_is_done_stays_and_what_is_not_is_refused(folder, tmp_path):
    image, outputs = (tmp_path / "image.nii.gz",), [folder / "a.nii.gz"]
    assert is_done(read_record(folder), JOB, image, outputs)
    assert not is_done(read_record(folder), JOB, image, [folder / "b.nii.gz"])
    with pytest.raises(InputError, match="is another prediction .--no_tta was not given"):
        is_done(read_record(folder), JOB | {"tta": False}, image, outputs)
    with pytest.raises(InputError, match="holds other predictions"):
        check_others(read_record(folder), JOB | {"tta": False})
    image[0].write_bytes(b"another")
    with pytest.raises(InputError, match="is not the image that"):
        is_done(read_record(folder), JOB, image, outputs)
    outputs[0].write_bytes(b"edited")
    with pytest.raises(InputError, match="is not as it was predicted"):
        is_done(read_record(folder), JOB, image, outputs)


def test_of_two_entries_the_one_with_the_files_sum_counts(folder, tmp_path):
    """A process was killed after it had announced a file, before it was there."""
    record = read_record(folder)
    record.begin(JOB | {"tta": False}, ["a.nii.gz"])
    record.announce("a.nii.gz", source_identity(tmp_path / "image.nii.gz"), "0" * 64)
    again = read_record(folder)
    assert again.entry("a.nii.gz")["job"] == identity(JOB) and len(again.files["a.nii.gz"]) == 1
    assert again.pending == {"a.nii.gz"} and again.job == identity(JOB | {"tta": False})


def test_predictions_of_two_jobs_are_told_apart(folder, tmp_path):
    assert mixed_jobs(folder, ["a.nii.gz"]) is None
    write(folder, "b.nii.gz", JOB | {"tta": False}, tmp_path / "image.nii.gz", b"other labels")
    assert "were not made alike (of the former: --no_tta was not given)" in mixed_jobs(folder, ["a.nii.gz", "b.nii.gz"])
    (folder / "model.json").write_text(json.dumps({"sha256": "3" * 64}))
    assert "describes another model" in mixed_jobs(folder, ["a.nii.gz"])


def test_an_empty_folder_has_an_empty_record(tmp_path):
    assert read_record(tmp_path) == Record(tmp_path)
