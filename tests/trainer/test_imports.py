"""Imports run one way through the rooms, and the trainer imports without what it can do without."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A room may import itself and every room of a lower number.
RANK = {
    "lite_orpo.allocator_failure": 0,
    "lite_orpo.checkpoint.optimizer_settings": 0,
    "lite_orpo.errors": 0,
    "lite_orpo.interruption": 0,
    "lite_orpo.memory.device": 0,
    "lite_orpo.notebook_table": 0,
    "lite_orpo.offline_bitsandbytes": 0,
    "lite_orpo.public_names": 0,
    "lite_orpo.step.length_order": 0,
    "lite_orpo.step.random_state": 0,
    "lite_orpo_kernels": 0,
    "lite_orpo.chat_format": 1,
    "lite_orpo.checkpoint": 1,
    "lite_orpo.checkpoint.writing": 1,
    "lite_orpo.config": 1,
    "lite_orpo.evaluation": 1,
    "lite_orpo.data": 2,
    "lite_orpo.losses": 2,
    "lite_orpo.model": 3,
    "lite_orpo.checkpoint.fingerprint": 4,
    "lite_orpo.generation": 4,
    "lite_orpo.memory.items": 4,
    "lite_orpo.metrics": 4,
    "lite_orpo.row_choice": 4,
    "lite_orpo.setup": 4,
    "lite_orpo.step.context": 4,
    "lite_orpo.step.guard": 4,
    "lite_orpo.step.ranks": 4,
    "lite_orpo.step.row_room": 4,
    "lite_orpo.step.throughput": 4,
    "lite_orpo.checkpoint.saved_folder": 5,
    "lite_orpo.memory.plan": 5,
    "lite_orpo.pair_scores": 5,
    "lite_orpo.checkpoint.saving_trainer": 6,
    "lite_orpo.reference": 6,
    "lite_orpo.step.row_budget": 6,
    "lite_orpo.checkpointing": 7,
    "lite_orpo.evaluating": 8,
    "lite_orpo.comparison": 9,
    "lite_orpo.trainer": 9,
    "lite_orpo.report": 10,
    "lite_orpo.cli": 11,
    "lite_orpo": 12,
}
REACH_THE_KERNELS = {"lite_orpo", "lite_orpo.losses", "lite_orpo.model.head"}


def modules(root: Path = ROOT) -> dict[str, Path]:
    files = {}
    for package, folder in (("lite_orpo", root), ("lite_orpo_kernels", root / "kernels")):
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def room(module: str) -> str:
    candidates = [name for name in RANK if module == name or module.startswith(f"{name}.")]
    return max(candidates, key=len)


def imported(module: str, path: Path) -> list[tuple[str, str]]:
    """(module, name) of everything of ours that a file imports, at its top or inside functions."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            found += [(target, alias.name) for alias in node.names]
    # `from . import head` names a module, not an attribute.
    known = modules()
    found = [(f"{m}.{n}", "") if f"{m}.{n}" in known else (m, n) for m, n in found]
    return [(m, n) for m, n in found if m.split(".")[0] in ("lite_orpo", "lite_orpo_kernels")]


def upward(module: str, path: Path) -> list[str]:
    if module == "lite_orpo":
        return []  # the lazy front door names what it opens to; that it is lazy is tested below
    own = room(module)
    bad = []
    for target, name in imported(module, path):
        there = room(target)
        if there != own and RANK[there] >= RANK[own]:
            bad.append(f"{module} imports {target}")
        asks_only = own == "lite_orpo.cli" and name == "select_backend"
        is_kernels_own = own == "lite_orpo_kernels"
        if there == "lite_orpo_kernels" and not is_kernels_own and not asks_only:
            if module not in REACH_THE_KERNELS:
                bad.append(f"{module} reaches the kernels")
    return bad


@pytest.mark.parametrize("module", modules())
def test_no_import_goes_upward(module):
    assert upward(module, modules()[module]) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("lite_orpo.errors", "from .config import options"),
        ("lite_orpo.data.step_plan", "from ..model.head import attach_scored_head"),
        ("lite_orpo.data.step_plan", "def f():\n    from ..trainer import ORPOTrainer"),
        ("lite_orpo.model.load", "import lite_orpo.trainer"),
        ("lite_orpo.setup", "from .trainer import ORPOTrainer"),
        ("lite_orpo.trainer", "from lite_orpo_kernels import orpo_loss"),
        ("lite_orpo.trainer", "from .report.card import write_card"),
        ("lite_orpo.config.options", "from lite_orpo import ORPOTrainer"),
        ("lite_orpo_kernels.orpo", "from lite_orpo.errors import UserError"),
    ],
)
def test_the_check_sees_an_upward_import(module, line, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(line)
    assert upward(module, path)


def run_python(code: str) -> str:
    paths = [ROOT, ROOT / "kernels", ROOT / "tests" / "data", ROOT / "tests" / "trainer"]
    prelude = f"import sys\nsys.path[:0] = {[str(path) for path in paths]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "kernels-community" not in done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    code = "import lite_orpo, sys; dir(lite_orpo)\nprint(*sys.modules)"
    loaded = {name.split(".")[0] for name in run_python(code).split()}
    assert "lite_orpo" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "peft", "datasets", "lite_orpo_kernels"})


WITHOUT = """
import importlib.abc, importlib.util
BLOCKED = {"datasets", "trl", "bitsandbytes"}
true_find_spec = importlib.util.find_spec

def find_spec(name, package=None):
    return None if name.split(".")[0] in BLOCKED else true_find_spec(name, package)

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

importlib.util.find_spec = find_spec
sys.meta_path.insert(0, Block())
for name in BLOCKED:
    try:
        __import__(name)
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit(f"{name} is not blocked")

import tempfile
from tiny_models import plain_rows, tiny_model, trainer_for, with_lora

with tempfile.TemporaryDirectory() as folder:
    trainer = trainer_for(
        with_lora(tiny_model()), folder, plain_rows(4), eval_dataset=plain_rows(2),
        max_steps=2, learning_rate=0.01,
    )
    trainer.train()
    trainer.evaluate()
losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
assert losses[1] < losses[0], losses
assert BLOCKED.isdisjoint(sys.modules)
print("trained")
"""


def test_training_on_a_list_works_without_datasets_trl_and_bitsandbytes():
    assert "trained" in run_python(WITHOUT)


OFFLINE = """
import logging, types
asked = []
hub = types.ModuleType("kernels")
hub.get_kernel = lambda *a, **k: asked.append(a)
sys.modules["kernels"] = hub
import lite_orpo.offline_bitsandbytes
assert "bitsandbytes" in sys.modules
assert not asked, asked
assert sys.modules["kernels"] is hub
assert not logging.getLogger("bitsandbytes.backends.cpu.ops").disabled
"""


def test_bitsandbytes_is_imported_without_asking_the_hub():
    run_python(OFFLINE)


@pytest.mark.parametrize("module", ["trainer", "config.orpo_config", "cli.train"])
def test_bitsandbytes_is_imported_offline_before_a_library_imports_it(module):
    seen = "print('lite_orpo.offline_bitsandbytes' in sys.modules, 'bitsandbytes' in sys.modules)"
    assert run_python(f"import lite_orpo.{module}\n{seen}") == "True True\n"
