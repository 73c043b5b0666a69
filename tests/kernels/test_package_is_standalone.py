"""`lite_orpo_kernels` needs torch and nothing else, so that any trainer can import it."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lite_orpo_kernels

PACKAGE = Path(lite_orpo_kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ALLOWED = set(sys.stdlib_module_names) | {"torch", "triton"}
BLOCKED = ("transformers", "peft", "datasets", "trl", "accelerate", "triton", "lite_orpo")


def imported_names(path):
    """(relative level, module) of every import in the file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_are_torch_triton_or_its_own(path):
    depth = len(path.relative_to(PACKAGE).parts)
    for level, module in imported_names(path):
        if level == 0:
            assert module.split(".")[0] in ALLOWED, f"{path.name} imports {module}"
        else:
            assert level <= depth, f"{path.name} imports from above the package"


def test_imports_and_runs_without_the_rest():
    # A meta path finder that comes first and refuses, as if nothing else were installed.
    program = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
from lite_orpo_kernels import fused_orpo_loss
hidden = torch.randn(4, 8, requires_grad=True)
ids = torch.tensor([0, 0, 1, 1])
targets = torch.tensor([1, 2, 3, 4])
fused_orpo_loss(hidden, torch.randn(9, 8), targets, ids, ids == 0, pair_count=1).loss.backward()
assert hidden.grad.isfinite().all()
try:
    fused_orpo_loss(
        hidden, torch.randn(9, 8), targets, ids, ids == 0, pair_count=1, backend="triton"
    )
except ModuleNotFoundError as error:
    assert "needs the package triton" in str(error) and error.name == "triton", error
else:
    raise AssertionError("ran Triton kernels without triton")
# torch's compiler is 100 MiB and seconds that nobody has asked for.
assert "torch._dynamo" not in sys.modules
assert not set({BLOCKED!r}) & set(sys.modules), set({BLOCKED!r}) & set(sys.modules)
print("ran")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "ran", done.stderr


def test_the_folder_around_the_package_is_not_a_package():
    # An __init__.py there would make it importable under two names.
    assert not (PACKAGE.parent / "__init__.py").exists()


def test_it_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", lite_orpo_kernels.__all__)
def test_public_name_has_a_docstring(name):
    value = getattr(lite_orpo_kernels, name)
    text = inspect.getdoc(value)
    # NamedTuple writes one of its own when there is none.
    assert text and not text.startswith(f"{name}(")
    if inspect.isfunction(value):
        missing = [p for p in inspect.signature(value).parameters if f"    {p}: " not in text]
        assert not missing, f"undocumented parameters: {missing}"


def test_everything_public_is_listed():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = [
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(imported) == sorted(lite_orpo_kernels.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
