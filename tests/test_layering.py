"""Who may import whom: the table in ARCHITECTURE.md, and what may be loaded where."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "ops": set(),
    "artifacts": {"ops"},
    "models": {"ops"},
    "compiler": {"ops", "artifacts", "models"},
    "runtime": {"ops", "artifacts"},
    "serve": {"ops", "artifacts", "models", "compiler", "runtime"},
}
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in MAY_IMPORT}


def imports(path: Path, *, when_loaded: bool = False) -> Iterator[tuple[str, int]]:
    """(absolute module name, line) of every import of a file but those for type checkers; `when_loaded`: outside functions only."""
    package = ["ingot", *path.relative_to(ROOT).parts[:-1]]
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            # `from ingot import ops` and `from .. import ops` name modules, not attributes
            yield from (((f"{module}.{alias.name}" if module == "ingot" else module), node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not (when_loaded and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            pending += ast.iter_child_nodes(node)


def of_ours(path: Path, **how: bool) -> set[tuple[str, int]]:
    """(package, line) of the imports of other packages of ours."""
    own = path.relative_to(ROOT).parts[0]
    found = {(name.split(".")[1], line) for name, line in imports(path, **how) if name.startswith("ingot.")}
    return {(package, line) for package, line in found if package != own}


def test_the_table_is_the_one_in_the_architecture():
    lines = [line.split("|") for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines() if line.startswith("| `")]
    table = {cells[1].strip(" `/"): cells[3].strip() for cells in lines}
    assert set(table) == set(MAY_IMPORT)
    for package, words in table.items():
        if package == "serve":
            assert words.startswith("all")
        else:
            assert {w.strip() for w in words.split(",")} - {"nothing of ours"} == MAY_IMPORT[package]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_it_may(package):
    assert FILES[package]
    wrong = [f"{path.relative_to(ROOT)}:{line} imports {other}" for path in FILES[package] for other, line in of_ours(path)
             if other not in MAY_IMPORT[package]]  # fmt: skip
    assert not wrong


def test_serve_imports_compiler_and_models_only_inside_functions():
    wrong = [f"{path.relative_to(ROOT)}:{line} imports {other}" for path in FILES["serve"] for other, line in of_ours(path, when_loaded=True)
             if other in ("compiler", "models")]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("package", ["artifacts", "runtime"])
def test_what_serves_knows_no_modeling_code_and_no_generator(package):
    forbidden = {"transformers", "triton", "tvm", "onnx", "gguf"}
    wrong = [f"{path.relative_to(ROOT)}:{line} imports {name}" for path in FILES[package] for name, line in imports(path)
             if name.split(".")[0] in forbidden]  # fmt: skip
    assert not wrong


def test_importing_what_serves_loads_no_generator():
    code = "import sys, ingot.ops, ingot.artifacts, ingot.runtime; print(*({'transformers', 'triton', 'tvm', 'ingot.compiler'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_the_process_that_talks_http_needs_no_torch():
    code = "import sys, ingot.serve.server, ingot.serve.resolve; print(*({'torch', 'numba', 'sympy', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.parametrize("name", ["request", "kv_cache", "scheduler"])
def test_scheduling_needs_no_torch(name):
    assert not [line for module, line in imports(ROOT / "runtime" / f"{name}.py") if module.split(".")[0] == "torch"]


def test_imports_are_seen_in_every_form(tmp_path, monkeypatch):
    folder = tmp_path / "runtime" / "deep"
    folder.mkdir(parents=True)
    path = folder / "module.py"
    path.write_text(
        "from ..request import A\nfrom ingot.ops.graph import B\nimport ingot.compiler.plan as p\nfrom ... import models\n"
        "if TYPE_CHECKING:\n    import ingot.serve\ndef f():\n    from ingot import artifacts\n    import torch.nn\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert sorted(of_ours(path)) == [("artifacts", 8), ("compiler", 3), ("models", 4), ("ops", 2)]
    assert sorted(of_ours(path, when_loaded=True)) == [("compiler", 3), ("models", 4), ("ops", 2)]
    assert ("torch.nn", 9) in list(imports(path))
