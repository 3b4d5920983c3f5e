"""Imports run one way, and optional packages are imported where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from helpers import OPTIONAL

import keras_dsr

ROOT = Path(keras_dsr.__file__).parent

# A part may import those of its own level and below.
LEVELS = {
    "backend": 0,
    "files": 0,
    "coding": 1,
    "constraints": 1,
    "stream": 2,
    "graph": 2,
    "layers": 3,
    "callbacks": 6,
    "stepping": 4,
    "models": 4,
    "analysis": 4,
    "checkpoints": 4,
    "data": 4,
    "optimizers": 4,
    "distribution": 5,
    "recipes": 5,
    "runs": 6,
    "training": 7,
    "export": 7,
    "serving": 7,
    "experiments": 8,
    "report": 8,
    "deployment": 8,
    "tpu": 8,
    "tuning": 8,
    "cli": 9,
}
# What does not stand in that line, and all that it may import.
ALLOWED = {
    "coding": {"backend"},
    "backend": set(),
    "constraints": {"backend"},
    "stream": {"backend", "coding"},
    "data": {"files"},
    "optimizers": {"backend"},
    "files": set(),
    "graph": set(),
    "stepping": {"backend", "graph", "layers"},
    "serving": {"files"},
    "analysis": {"backend", "coding", "stream", "layers", "graph", "stepping", "files"},
    "export": {"backend", "coding", "stream", "layers", "constraints", "callbacks", "graph", "stepping", "files"},
}
# What a server and a client are made of, and nothing imports before it is one.
PROTOCOLS = {f"serving/{name}.py" for name in ("grpc_api", "grpc_transport", "metrics", "rest_api", "rest_transport")}
# What derives from KerasTuner's classes, and is imported once those are asked for.
DERIVED = {"tuning/kerastuner.py"}
# tf.data and SavedModel are TensorFlow's own; nothing that a layer or a model needs may ask for it.
BACKENDS = {
    "jax": ("backend/jax.py", "distribution/jax.py", "tpu.py"),
    "tensorflow": ("backend/tensorflow.py", "distribution/tensorflow.py", "data/", "export/", "serving/"),
}

MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def part_of(module: str) -> str:
    """The part of the package that a file is in: its folder, or its own name."""
    return module.split("/")[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of all that is imported; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports within the package are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_level(tree: ast.Module) -> ast.Module:
    """The statements that run as the module is imported: without functions, and what only type checkers read."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


def parse(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def test_each_part_has_its_place():
    assert {part_of(module) for module in MODULES} <= {*LEVELS, *ALLOWED, "__init__", "__main__"}


def test_there_is_something_to_look_at():
    assert {"coding.py", "stream.py", "backend/tensorflow.py", "layers/neurons.py", "models/vgg.py"} <= set(MODULES)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("__init__.py", "__main__.py")])
def test_imports_run_one_way(module):
    part = part_of(module)
    others = set()
    for name in imports(parse(module)):
        pieces = name.split(".")
        if pieces[0] == "keras_dsr" and len(pieces) > 1:
            others.add(pieces[1])
    others -= {part, "__version__"}
    if part in ALLOWED:
        assert others <= ALLOWED[part], f"{module} imports {sorted(others - ALLOWED[part])}"
    else:
        above = {other for other in others if LEVELS[other] >= LEVELS[part]}
        assert not above, f"{module} imports {sorted(above)}, which stand above it or beside it"


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_used(module):
    packages = {name.split(".")[0] for name in imports(top_level(parse(module)))}
    assert not packages & OPTIONAL or module in PROTOCOLS | DERIVED
    for package, homes in BACKENDS.items():
        assert package not in packages or module.startswith(homes), f"{module} imports {package}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_are(module):
    assert ast.get_docstring(parse(module)), "a module starts with a docstring"


def test_the_package_itself_needs_no_data_and_no_export():
    names = {name.split(".")[1] for name in imports(parse("__init__.py")) if name.startswith("keras_dsr.")}
    assert not names & {"data", "export", "tuning", "training", "cli"}


def test_importing_the_package_brings_in_no_other():
    """What it costs to import keras_dsr beside Keras is the reading of its own files."""
    code = (
        "import sys, keras; before = set(sys.modules); import keras_dsr; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names, "
        "'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *brought, tensorflow = done.stdout.splitlines()[-1].split()
    # What every layer needs; Keras has read most of it by then, not every version all of it.
    assert "keras_dsr" in brought
    assert set(brought) <= {"keras_dsr", "keras", "numpy", "optree", keras.backend.backend()}
    assert tensorflow == str(keras.backend.backend() == "tensorflow")


def test_public_names_exist():
    for module in (keras_dsr, keras_dsr.layers, keras_dsr.models):
        for name in module.__all__:
            assert hasattr(module, name), name
        assert len(set(module.__all__)) == len(module.__all__)
