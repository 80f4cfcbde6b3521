"""The floors of lib: a module imports only from floors below its own, so data flows one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["train", "predict", "evaluate"]
FLOORS = [  # from the ground up; what stands in one line may be in any order
    ["lib", "lib.system"],
    ["lib.distance", "lib.loss", "lib.metric", "lib.data"],
    ["lib.models"],
    ["lib.pruning"],
    ["lib.published"],
    ["lib.settings"],
    ["lib.build", "lib.utils", "lib.checkpoint", "lib.record", "lib.postprocessing"],
    ["lib.network", "lib.torch_network", "lib.runs", "lib.onnx_file", "lib.runtimes", "lib.exported"],
    ["lib.callback", "lib.evaluation", "lib.inference"],
    ["lib.trainer", "lib.forecast", "lib.prediction", "lib.validation", "lib.export"],
    ["lib.training"],
    ["lib.experiments"],
    SCRIPTS,
    ["lib.experiments.benchmark"],  # which runs the scripts
]

WITHOUT_TORCH = [  # what the prediction of an exported model needs, where no more is installed than the packages for it
    *["lib.data", "lib.data.images", "lib.data.nifti", "lib.data.itk", "lib.data.geometry", "lib.data.normalization"],
    *["lib.data.resampling", "lib.data.components", "lib.data.definition", "lib.data.raw", "lib.postprocessing"],
    *["lib.record", "lib.system.cli", "lib.system.files", "lib.system.log", "lib.system.process", "lib.system.screen"],
]
NOT_INSTALLED = ["torch", "torchio", "scipy", "filelock", "PIL", "onnx"]
NOT_ON_WINDOWS = ["fcntl", "resource", "pwd", "grp", "termios"]


def imports():
    """(module, what it imports) of all modules of the project."""
    paths = [*(ROOT / "lib").rglob("*.py"), *(ROOT / f"{name}.py" for name in SCRIPTS)]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from ((module, name if name in modules else node.module) for name in whole)
            elif isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)


def floor(module):
    """The number of the floor, by the longest name that the module's begins with; None for a library."""
    places = {name: i for i, names in enumerate(FLOORS) for name in names}
    while module not in places and "." in module:
        module = module.rpartition(".")[0]
    return places.get(module) if module != "lib" else 0


def test_no_import_points_upwards():
    upwards = [(a, b) for a, b in imports() if floor(b) is not None and floor(b) > floor(a)]
    assert upwards == []


def test_every_module_has_a_floor():
    assert {a for a, _ in imports() if floor(a) is None} == set()
    assert floor("lib.system.files") == 0 and floor("lib.data.nifti") == 1 and floor("torch") is None


def test_no_modules_import_one_another():
    above = {}
    for a, b in imports():
        above.setdefault(a, set()).add(b)
    done, way = set(), []

    def visit(module):
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module in done:
            return
        way.append(module)
        for other in above.get(module, set()) - {module}:
            visit(other)
        done.add(way.pop())

    for module in list(above):
        visit(module)


@pytest.mark.parametrize("missing", [NOT_INSTALLED, NOT_INSTALLED + NOT_ON_WINDOWS])
def test_an_image_is_read_resampled_and_written_without_torch(missing, tmp_path):
    """In a process of its own, where these modules cannot be imported. Those that Windows
    lacks are taken away when Python's own library has what it needs of them, and an empty msvcrt comes."""
    code = f"""
import concurrent.futures.process, importlib, sys
from types import ModuleType
sys.modules.update(dict.fromkeys({missing}))
if "fcntl" in {missing}:
    sys.modules["msvcrt"] = ModuleType("msvcrt")
for name in {WITHOUT_TORCH}:
    importlib.import_module(name)
from pathlib import Path
import numpy as np
from lib.data import images, nifti
from lib.data.normalization import nonzero
from lib.data.resampling import resample_image, resample_label
from lib.postprocessing import keep_largest
from lib.system.cli import run_script
from lib.system.files import write_atomically

def main():
    path = Path(sys.argv[1]) / "größer als ein Bild.nii.gz"
    array = np.zeros((5, 6, 7), np.float32)
    array[1:4, 1:4, 1:4], array[2, 2, 2], array[4, 5, 6] = 7, 0, 9
    nifti.create(path, array, np.eye(4))
    volume = images.read_image(path)
    inside, box = nonzero(volume.array[None])
    print(inside.sum(), [(side.start, side.stop) for side in box])
    print(resample_image(volume.array, (10, 12, 14), None).max(), resample_label(array, (3, 3, 3), 0).max())
    labels = keep_largest(inside.astype(np.uint8), 1)
    write_atomically(path, lambda temporary: images.write(temporary, labels, volume.header))
    print(images.read_label(path, 2).array.sum())
    raise RuntimeError("out of memory")

print(run_script(main), sorted({{"torch", "scipy"}} & {{name for name, module in sys.modules.items() if module}}))
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["28 [(1, 5), (1, 6), (1, 7)]", "9.0 7.0", "27", "2 []"], result.stderr
    assert result.stderr == "-c: error: not enough memory; try a smaller --batch_size or --patch_size\n"
    assert [path.name for path in tmp_path.iterdir()] == ["größer als ein Bild.nii.gz"]
