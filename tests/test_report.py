import base64
import html
import json
import re
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from lib import postprocessing
from lib.build import build_model
from lib.data import DATASETS
from lib.data.geometry import Volume, of_header
from lib.data.loading import Loader
from lib.experiments import report as module
from lib.experiments.report import (
    command,
    main,
    report,
)
from lib.experiments.report import report_training as report_at_the_end
from lib.experiments.report_figures import (
    draw_dice,
    draw_examples,
    draw_filters,
    draw_loss,
    draw_size,
    draw_time,
    draw_validation,
    largest_slice,
)
from lib.experiments.run import read_run
from lib.models import load_model, nnUNet
from lib.models.filters import format_filters
from lib.models.size import count_filters, summary
from lib.settings import Settings
from lib.system.error import InputError
from lib.system.facts import facts
from lib.utils import parseArguments

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CPU = torch.device("cpu")
SMALL = ["--data", "phantom", "--fms_init", "4", "--levels", "3", "--patch_size", "32", "32", "--num_workers", "0"]
SMALL += ["--min_filters", "2"]
PRUNABLE = [block.name for block in nnUNet(1, 4, 4, 3).blocks() if not block.head]
COUNT_IMAGES = """<script>onload = () => {
const images = [...document.images]
document.title = images.filter(i => i.naturalWidth > 0).length + " of " + images.length
}</script></body>"""


def dump_dom(page, folder):
    """What headless Chromium makes of a page: its DOM, and its messages."""
    quiet = ["no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-gpu"]
    ended = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", *(f"--{flag}" for flag in quiet), f"--user-data-dir={folder}/profile"]
        + ["--virtual-time-budget=3000", "--enable-logging=stderr", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,  # of a machine that is busy with other things
        check=True,
    )
    return ended.stdout, ended.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    places = ["--data_path", str(folder / "data"), "--cache_path", str(folder / "cache"), "--output", str(folder)]
    assert train.main([*SMALL, *places, "--epochs", "1", "--device", "cpu"]) == 0
    return folder / "unnamed" / "phantom" / "1"


@pytest.fixture
def made_up(tmp_path):
    """Write the files of a run of 3 epochs, the last one of which halved the first block."""

    def write(pruning=True, validation=True, epochs=3, flags=("--max_flops", "none"), more=None, **settings):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        given = ["--epochs", "4", "--data_path", str(tmp_path / "gone"), *(flags if pruning else ["--no_prune"])]
        usual = Settings.of(vars(parseArguments([*SMALL, *given])))
        config, model = usual.as_dict() | facts() | settings, build_model(usual)
        rows, size = [count_filters(model)["out"]] * 3, summary(model, (32, 32))
        if pruning:
            rows[2] = rows[0] | {"enc_ConvBlock_1": 2}
        dice = [[0.9, 0.2, None, 0.4], None, [0.9, 0.6, 0.7, 0.8]] if validation else [None] * 3
        history = {
            "epoch": [1, 2, 3],
            "train_loss": [3.0, 2.0, 1.5],
            "val_loss": [d and loss for d, loss in zip(dice, (2.5, None, 2.25), strict=True)],
            "val_dice": dice,
            "seconds": [100.0, 3600.0, 25.0],
            "parameters": [size["parameters"], size["parameters"], size["parameters"] // 2],
            "flops": [size["flops"], size["flops"] // 2, size["flops"] // 4],
            "filters": [92, 92, 90],
        }
        if pruning:
            history["tau"] = [dict.fromkeys(count_filters(model)["out"], 0.1 * epoch) for epoch in range(3)]
        scores = {"2": {"loss": 2.5, "dice": {"patient001_frame01": [0.9, 0.5, None, 0.75]}}} if validation else {}
        history = {key: values[:epochs] for key, values in (history | (more or {})).items()}
        for name, content in (("config", config), ("history", history), ("validation_scores", scores)):
            (run / f"{name}.json").write_text(json.dumps(content))
        (run / "out_filters").write_text(format_filters(rows[:epochs]))
        return run

    return write


def test_the_page_of_a_training_holds_all_its_figures(trained):
    page = (trained / "report.html").read_text()
    names = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="(\w+)">', page)
    assert names == ["loss", "dice", "size", "time", "filters", "examples", "validation"]
    for name, content in zip(names, re.findall(r"base64,([^\"]+)", page), strict=True):
        assert base64.b64decode(content) == (trained / "figures" / f"{name}.png").read_bytes()
    assert len(list((trained / "figures").iterdir())) == 7
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert "<td>finished: epoch 1 of 1</td>" in page
    assert f"report: {trained / 'report.html'}" in (trained / "log.txt").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here to open the page (apt-get install chromium)")
def test_chromium_shows_every_image_and_has_no_complaint(trained, tmp_path):
    page = tmp_path / "page.html"
    page.write_text((trained / "report.html").read_text().replace("</body>", COUNT_IMAGES))
    dom, messages = dump_dom(page, tmp_path)
    assert "<title>7 of 7</title>" in dom
    assert dom.rstrip().endswith("</html>")
    assert dom.count("<h2>") == 4
    assert "CONSOLE" not in messages


def test_examples_are_the_best_the_median_and_the_worst_subject(trained):
    run = read_run(trained)
    figure = draw_examples(run, None, None, CPU)
    scores = json.loads((trained / "validation_scores.json").read_text())["1"]["dice"]
    means = {subject: np.mean(dice[1:]) for subject, dice in scores.items()}
    ranked = sorted(means, key=means.get, reverse=True)
    labels = [axis.get_ylabel() for axis in figure.axes[::3]]
    expected = [("best", ranked[0]), ("median", ranked[2]), ("worst", ranked[5])]
    for label, (rank, subject) in zip(labels, expected, strict=True):
        assert label.startswith(f"{rank}: Dice {means[subject]:.3f}\n{subject}\nslice ")

    data = Loader(DATASETS["phantom"], run.settings.data_path, run.settings.cache_path, patch_size=(32, 32))
    volumes = {volume["id"]: volume for volume in data.validation_volumes()}
    model = load_model(trained / "models" / "model-1")
    for i, (_, subject) in enumerate(expected):
        image, label = volumes[subject]["image"], volumes[subject]["label"]
        k = int(labels[i].split()[-1])
        assert k == (label > 0).sum((1, 2)).argmax()
        _, truth, prediction = figure.axes[3 * i : 3 * i + 3]
        assert np.array_equal(truth.images[1].get_array().filled(0), label[k].T)
        assert np.array_equal(prediction.images[1].get_array().filled(0), model(image[k : k + 1])[0][0].argmax(0).T)


@pytest.mark.parametrize(("n", "ranks"), [(1, ["best"]), (2, ["best", "worst"])])
def test_few_subjects_are_shown_once(trained, n, ranks):
    run = read_run(trained)
    for subject in list(run.scores)[n:]:
        del run.scores[subject]
    figure = draw_examples(run, None, None, CPU)
    assert [axis.get_ylabel().split(":")[0] for axis in figure.axes[::3]] == ranks


def test_the_page_says_what_the_run_has_come_to(made_up):
    page = report(made_up()).read_text()
    assert "not finished: epoch 3 of 4" in page
    assert "0.700 on average in epoch 3 (RV cavity 0.600, myocardium 0.700, LV cavity 0.800)" in page
    assert "92 &#8594; 90 (97.8%)" in page
    assert "1:02:05 h for training and validation, 100.0 s for the median epoch" in page
    assert "DS_CrossEntropyDiceLoss_Distance (lambda = 0.5): summed over the heads" in page
    assert "Not drawn: examples, because the data are not in" in page
    scores = "<th>patient001_frame01</th><td>0.500</td><td>-</td><td>0.750</td><td>0.625</td>"
    assert "<details><summary>Dice of every validation subject in epoch 2, best first</summary>" in page
    assert scores in page


def test_a_run_that_is_not_finished_says_how_to_go_on(made_up, trained):
    folder = made_up()
    text = html.unescape(re.sub("<.*?>", "", report(folder).read_text()))
    assert f"To continue it:python train.py --resume {folder}" in text
    assert "To continue it" not in (trained / "report.html").read_text()


def test_the_mean_dice_and_the_epoch_of_model_best(made_up):
    axis = draw_dice(read_run(made_up())).axes[0]
    mean, star = axis.lines[-2:]
    assert (mean.get_label(), star.get_label()) == ("mean", "model-best (epoch 3)")
    assert mean.get_xydata() == pytest.approx(np.array([[1, 0.3], [3, 0.7]]))
    assert star.get_xydata() == pytest.approx(np.array([[3, 0.7]]))


def test_byte_order_marks_do_not_matter(made_up):
    run = made_up()
    expected = read_run(run)
    for name in ("config.json", "history.json", "validation_scores.json", "out_filters"):
        (run / name).write_text((run / name).read_text(), encoding="utf-8-sig")
    found = read_run(run)
    assert (found.history, found.scores, found.settings) == (expected.history, expected.scores, expected.settings)
    assert np.array_equal(found.filters, expected.filters)


def test_what_is_not_known_of_epochs_that_the_published_code_trained(made_up):
    more = {
        "seconds": [None, 3600.0, 25.0],
        "val_dice": [None, None, [0.9, 0.6, 0.7, 0.8]],
        "val_loss": [1.0, None, 2.0],
    }
    run = read_run(made_up(more=more | {"tau": [dict.fromkeys(PRUNABLE), *[dict.fromkeys(PRUNABLE, 0.1)] * 2]}))
    assert np.isnan(run.tau[:, 0]).all() and (run.tau[:, 1:] == 0.1).all()
    assert run.best == 3  # the lowest of those that were validated here
    page = report(run.folder).read_text()
    assert "1:00:25 h for training and validation, 1812.5 s for the median epoch (known of 2 of 3 epochs)" in page
    assert page.count("<img ") == 5  # all but the examples, whose data are gone
    validated, others = draw_time(run).axes[0].collections
    assert [points.get_offsets()[:, 1].tolist() for points in (validated, others)] == [[25], [3600]]


@pytest.mark.parametrize(
    "more", [{"tau": [dict.fromkeys(PRUNABLE, float("nan"))] * 3}, {"seconds": [None] * 3}, {"train_loss": [None] * 3}]
)
def test_what_must_be_known(made_up, more):
    with pytest.raises(InputError, match="history.json: is broken"):
        read_run(made_up(more=more))


BUDGET = {"budget_met": [False, True, True], "ms": [None, 4.0, None]}


def test_the_budget_and_when_it_was_met(made_up):
    run = read_run(made_up(flags=["--max_flops", "30%", "--max_ms", "5"], more=BUDGET))
    size, time = draw_size(run).axes
    lines = {line.get_label(): line for line in [*size.lines, *time.lines]}
    assert list(lines["FLOPs allowed: 30.0%"].get_ydata()) == pytest.approx([30, 30])
    assert lines["FLOPs allowed: 30.0%"].get_linestyle() == "--"
    assert list(lines["budget met (epoch 2)"].get_xdata()) == [2, 2]
    assert lines["4.00 ms (right)"].get_xydata().tolist() == [[2, 4]]
    assert list(lines["5 ms allowed"].get_ydata()) == [5, 5]
    assert draw_filters(run).axes[1].images[0].get_clim() == (0, 1)
    page = report(run.folder).read_text()
    assert "<td>30% of the FLOPs, 5 ms per patch: met after epoch 2</td>" in page
    assert "(lambda = 0.5, 0 after epoch 2)" in page
    for flag, value in (("max_flops", "30%"), ("max_ms", "5.0"), ("min_filters", "2"), ("max_prune_fraction", "None")):
        assert f"<tr><th>{flag}</th><td>{value}</td></tr>" in page


def test_a_budget_that_is_not_met(made_up):
    run = read_run(made_up(flags=["--max_flops", "1K"], more={"budget_met": [False] * 3, "ms": [None] * 3}))
    assert len(draw_size(run).axes) == 1
    assert "<td>1K: not met</td>" in report(run.folder).read_text()


def test_the_best_model_is_one_that_fits_the_budget(made_up):
    flags, losses = ["--max_flops", "30%"], {"val_loss": [1.0, 2.0, 1.5]}
    assert read_run(made_up(flags=flags, more=losses | {"budget_met": [False] * 3})).best == 1
    assert read_run(made_up(flags=flags, more=losses | {"budget_met": [True] * 3})).best == 3
    assert read_run(made_up(flags=flags, more=losses | {"budget_met": [False, False, True]})).best == 1  # none yet
    not_met = {"budget_met": [False] * 3, "pruning_over": [False, True, True]}
    run = read_run(made_up(flags=flags, more=losses | not_met))
    assert (run.met, run.over, run.best) == (None, 2, 3)
    assert read_run(made_up()).best == 3
    assert read_run(made_up(validation=False)).best is None


def test_the_epochs_that_deleted_filters_are_marked(made_up):
    (area,) = draw_loss(read_run(made_up())).axes[0].patches
    assert (area.get_x(), area.get_width()) == (2.5, 1)


@pytest.mark.parametrize(("pruning", "validation", "epochs"), [(1, 0, 3), (0, 1, 3), (0, 0, 1)])
def test_any_run_with_an_epoch_is_shown(made_up, pruning, validation, epochs):
    folder = made_up(pruning, validation, epochs)
    page = report(folder).read_text()
    drawn = {path.stem for path in (folder / "figures").iterdir()}
    assert drawn == {"loss", "size", "time", "filters"} | ({"dice"} if validation else set())
    assert ("Not drawn: dice, because no epoch was validated." in page) == (not validation)
    assert len(draw_filters(read_run(folder)).axes) == (4 if pruning else 2)  # the colour bars are axes, too


def test_filters_are_in_percent_of_the_unpruned_blocks_in_the_order_of_the_forward_pass(made_up):
    axis, thresholds = draw_filters(read_run(made_up())).axes[:2]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[:2] == ["enc_ConvBlock_1", "enc_ConvBlock_2"]
    assert names[6:9] == ["dec_ConvTranspose2d_1", "dec_ConvBlock_1", "dec_ConvBlock_2"]
    assert len(names) == 12
    assert axis.images[0].get_array()[:2].tolist() == [[100, 100, 50], [100, 100, 100]]
    assert thresholds.images[0].get_array()[0].tolist() == pytest.approx([0, 0.1, 0.2])
    assert [text.get_text() for text in axis.texts[:2]] == ["2 of 4", "4 of 4"]


def test_the_time_of_an_epoch_belongs_to_the_network_that_it_trained(made_up):
    run = read_run(made_up())
    validated, others = draw_time(run).axes[0].collections
    first, second, _ = np.array(run.history["flops"]) / 1e6
    assert validated.get_offsets().tolist() == [[first, 100], [second, 25]]
    assert others.get_offsets().tolist() == [[first, 3600]]


@pytest.mark.parametrize(
    "argv",
    [
        ["--data", "acdc"],
        ["--data", "kits", "--model", "nnunet", "--patch_size", "32", "64", "64", "--nesterov", "False"],
        ["--data", "phantom", "--lambda", "0", "--no_prune", "--save_fms", "--data_path", "my data/$HOME; 'x'"],
        ["--data", "phantom", "--lr", "1e-05", "--seed_train", "7", "--prune_between", "10%", "62.5%"],
        [
            "--data",
            "acdc",
            "--max_flops",
            "2.5G",
            "--max_ms",
            "7",
            "--min_filters",
            "3",
            "--max_prune_fraction",
            "0.15",
        ],
        ["--data", "phantom", "--max_flops", "none"],
    ],
)
def test_the_command_repeats_the_settings(argv):
    settings = Settings.of(vars(parseArguments(argv)))
    words = shlex.split(command(settings))
    assert words[:2] == ["python", "train.py"]
    assert Settings.of(vars(parseArguments(words[2:]))) == settings


def test_texts_from_files_are_escaped(made_up):
    bad = "<script>alert('$x^2')</script>&"
    again = [{"after_epoch": 2, "command": bad}]
    name = bad.replace("/", "")  # a run of another name is refused
    page = report(made_up(exp_name=name, command=bad, machine=bad, continued=again, versions={bad: bad})).read_text()
    assert "<script" not in page
    assert "<title>&lt;script&gt;alert(&#x27;$x^2&#x27;)&lt;script&gt;&amp; / phantom / run</title>" in page
    assert "&lt;/script&gt;" in page
    assert "after epoch 2" in re.sub("<.*?>", "", page)


def test_a_second_report_replaces_the_first(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    before = sorted(run.rglob("*"))
    shutil.rmtree(run / "models")
    assert main([str(run), "--device", "cpu"]) == 0
    page = (run / "report.html").read_text()
    assert "Not drawn: examples, because " in page and "Not drawn: validation" not in page
    gone = [path for path in before if not path.exists()]
    assert [path.name for path in gone if "models" not in path.parts] == ["examples.png"]
    assert set(run.rglob("*")) < set(before)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "is no run folder"),
        ("history.json", None, "has no finished epoch"),
        ("history.json", '{"epoch": []}', "history.json: is broken"),
        ("history.json", "{", "history.json: is broken"),
        ("out_filters", "a\tb\n1\t2\n", "out_filters: is broken"),
        ("validation_scores.json", '{"2": {}}', "validation_scores.json: is broken"),
        ("validation.json", '{"model": "model-3"}', "validation.json: is broken"),
        ("validation.json", json.dumps({}), "validation.json: is broken"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(made_up, capsys, file, content, message):
    run = made_up()
    (run / file).unlink() if content is None else (run / file).write_text(content)
    before = sorted(run.rglob("*"))
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(run.rglob("*")) == before


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([]) | st.just({}) | st.just([[None]])
)


@settings(max_examples=40)
@given(
    file=st.sampled_from(["config.json", "history.json", "validation_scores.json", "validation.json"]),
    value=VALUES,
    depth=st.integers(0, 3),
    data=st.data(),
)
def test_a_run_with_some_other_value_is_refused_or_reported(made_up, tmp_path, file, value, depth, data):
    good, run = tmp_path / "good", tmp_path / "other"
    if not good.exists():
        shutil.copytree(made_up(), good)
        (good / "validation.json").write_text(json.dumps(validated()))
    shutil.copytree(good, run, dirs_exist_ok=True)
    content = json.loads((run / file).read_text())
    parent, key = {"": content}, ""
    for _ in range(depth):
        child = parent[key]
        if not isinstance(child, dict | list) or not child:
            break
        parent, key = child, data.draw(st.sampled_from(list(child) if isinstance(child, dict) else range(len(child))))
    parent[key] = value
    (run / file).write_text(json.dumps(content if key != "" else value))
    try:
        found = read_run(run)
    except InputError as error:
        assert file in str(error)
        return
    for draw in (draw_loss, draw_dice, draw_size, draw_time, draw_filters):
        with suppress(InputError):  # nothing was validated
            draw(found)
    module.page(found, {}, [])


# --- the whole validation volumes -------------------------------------------------------------------------------------


def validated(steps=("foreground",)):
    """validation.json of two cases of the phantom, of which a step mends one."""

    def part(first):
        cases = {"good": ([0.99, 0.9, 0.9, None], 1.5), "<bad>": ([0.99, first, 0.5, 0.8], 3.25)}
        alike = {
            key: {"dice": dice, "HD95": [None, mm, mm, None], "surface_dice": dice} for key, (dice, mm) in cases.items()
        }
        dice = [0.99, (0.9 + first) / 2, 0.7, 0.8]
        return {"average": {"dice": dice, "HD95": [None, 2.375, 2.375, None], "surface_dice": dice}, "subjects": alike}

    reasons = [{"step": "foreground", "kept": bool(steps), "dice": [0.7, 0.8], "why": "it <helps>"}]
    said = {"model": "model-3", "sha256": "0", "steps": list(steps), "reasons": reasons}
    return said | {"before": part(0.2), "after": part(0.4 if steps else 0.2)}


def test_the_validation_has_its_section_the_worst_case_first(made_up):
    run = made_up()
    (run / "validation.json").write_text(json.dumps(validated()))
    page = html.unescape(report(run).read_text())
    assert "<p>model-3 on 2 whole volumes of the validation set" in page
    assert "<tr><th>RV cavity</th><td>0.550 → 0.650</td><td>2.38</td><td>0.550 → 0.650</td></tr>" in page
    assert "<tr><th>mean</th><td>0.683 → 0.717</td>" in page
    assert "<p>Post-processing: it <helps>.</p>" in page
    worst, best = (page.index(f"<tr><th>{name}</th>") for name in ("<bad>", "good"))
    assert worst < best
    assert "<th><bad></th><td>0.400</td><td>0.500</td><td>0.800</td><td>0.567</td><td>3.25</td>" in page
    assert "<details open><summary>Every case, after the post-processing, worst first</summary>" in page
    assert "Not drawn: validation, because the data are not in" in page
    (run / "validation.json").write_text(json.dumps(validated(steps=())))
    page = html.unescape(report(run).read_text())
    assert "<tr><th>RV cavity</th><td>0.550</td>" in page and "post-processing" not in page.lower()


def test_without_a_validation_there_is_no_section(made_up):
    page = report(made_up()).read_text()
    assert "<h2>Validation</h2>" not in page and "validation, because" not in page


def test_the_worst_cases_are_drawn_with_truth_and_prediction(trained):
    run = read_run(trained)
    figure = draw_validation(run, None)
    subjects = run.validation["after"]["subjects"]
    ranked = sorted(subjects, key=lambda subject: np.mean(subjects[subject]["dice"][1:]))
    assert len(ranked) == 6
    for i, subject in enumerate(ranked):
        left, right = figure.axes[2 * i : 2 * i + 2]
        mean = np.mean(subjects[subject]["dice"][1:])
        place = f"{i + 1} of 6{', median' * (i == 3)}"
        assert left.get_title("left") == f"{subject}\nDice {mean:.3f} ({place})"
        k = int(right.get_title("left").split()[-1])
        (file,) = (file for file in run.data().files("validation") if file.id == subject)
        truth = np.asarray(nib.load(file.label).dataobj)
        assert k == (truth > 0).sum((0, 1)).argmax()
        shown = left.images[1].get_array().filled(0)
        assert [(shown == c).sum() for c in (1, 2, 3)] == [(truth[..., k] == c).sum() for c in (1, 2, 3)]
        predicted = np.asarray(nib.load(trained / "validation" / f"{subject}.nii.gz").dataobj)
        predicted = postprocessing.apply(predicted, run.validation["steps"])[..., k]
        assert (right.images[1].get_array().filled(0) > 0).sum() == (predicted > 0).sum()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(run.classes[1:])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_cases_are_drawn_once(trained, n):
    run = read_run(trained)
    for when in ("before", "after"):
        run.validation[when]["subjects"] = dict(list(run.validation[when]["subjects"].items())[:n])
    figure = draw_validation(run, None)
    assert [axis.axison for axis in figure.axes] == [True] * 2 * n + [False] * 2 * (n == 3)


def test_a_prediction_that_is_gone_is_told(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "validation")
    assert "Not drawn: validation, because" in report(run).read_text()


def as_volumes(affine, *arrays):
    header = nib.Nifti1Image(arrays[0], affine).header
    geometry = of_header(Path("a.nii"), header, arrays[0].shape)
    return [Volume(Path("a.nii"), array, geometry, header, 0, "") for array in arrays]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_slice_of_the_largest_area_in_its_proportions(axis):
    spacing = np.array([1.0, 2.0, 4.0])[[(2 - axis + a) % 3 for a in range(3)]]  # the largest along `axis`
    truth = np.zeros((40, 41, 42), np.uint8)
    where = [slice(10, 20)] * 3
    where[axis] = slice(5, 8)
    truth[tuple(where)] = 1
    where[axis] = 6
    where[axis - 1] = slice(10, 24)  # the largest one
    truth[tuple(where)] = 1
    volumes = as_volumes(np.diag([*spacing, 1]), np.arange(truth.size, dtype=np.float32).reshape(truth.shape), truth)
    k, aspect, (image, shown, predicted) = largest_slice(*volumes, volumes[1], 2)
    assert k == 6 and sorted([aspect, 1 / aspect]) == [0.5, 2]
    assert shown.sum() == 140 and image.shape == shown.shape == predicted.shape
    assert set(image[shown == 1]) == set(volumes[0].array.take(6, axis)[truth.take(6, axis) == 1])


def test_the_slice_lies_as_the_patient_does_and_needs_no_truth():
    predicted = np.zeros((60, 60, 3), np.uint8)
    predicted[40, 50, 1] = 1
    empty = np.zeros_like(predicted)
    for axis, first, last in ((0, (0, 0), (0, -1)), (1, (0, 0), (-1, 0))):  # more to the right; more anterior
        where = np.broadcast_to(np.arange(60.0).reshape([60 if a == axis else 1 for a in range(3)]), empty.shape)
        volumes = as_volumes(np.diag([1, 1, 5, 1]), where, empty, predicted)
        k, aspect, (image, _, shown) = largest_slice(*volumes, 2)
        assert (k, aspect) == (1, 1) and image[first] > image[last] and len(shown) < 60
        assert image[shown == 1].tolist() == [(40, 50)[axis]]
    k, _, planes = largest_slice(*volumes[:2], volumes[1], 2)
    assert k == 0 and [plane.shape for plane in planes] == [(60, 60)] * 3  # nothing to be near to


def test_no_report_fails_a_training(monkeypatch, tmp_path):
    lines = []
    report_at_the_end(tmp_path, CPU, lines.append)  # no run at all

    def fail(*_, **__):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(module, "report", fail)
    report_at_the_end(tmp_path, CPU, lines.append)
    assert lines[0].startswith(f"no report: InputError: {tmp_path}: is no run folder")
    assert lines[1:] == ["no report: ZeroDivisionError: two lines"]


def test_a_folder_that_cannot_be_written_to(made_up):
    run = made_up()
    (run / "figures").write_text("a file is in the way")
    with pytest.raises(InputError, match="figures: cannot be"):
        report(run)
