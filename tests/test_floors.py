"""The floors of lib: a module imports only from floors below its own, so data flows one way."""

import ast
from pathlib import Path

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
