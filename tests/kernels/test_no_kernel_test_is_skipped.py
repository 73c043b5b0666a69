"""A run of the suite fails where a test of the Triton kernels was skipped or none was there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "conftest.py"
FILES = {
    "passes": "def test_one():\n    pass\n",
    "skips": "import pytest\n\ndef test_one():\n    pytest.skip('no GPU')\n",
    "skipped-module": "import pytest\npytest.importorskip('no_such_module')\n",
    "missing": None,
}


@pytest.mark.parametrize(
    ("what", "workers"),
    [("passes", "1"), ("skips", "1"), ("skipped-module", "0"), ("missing", "0")],
)
def test_exit_status_says_whether_the_kernels_were_tested(tmp_path, what, workers):
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    shutil.copy(CONFTEST, tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests" / "test_other.py").write_text("def test_other():\n    pass\n")
    if FILES[what] is not None:
        (folder / "test_triton_something.py").write_text(FILES[what])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", workers],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (what == "passes"), done.stdout
    assert ("may be left out" in done.stdout) == (what != "passes")
    assert "1 tests of the kernels" in done.stdout or what != "passes"


def test_a_selection_of_other_tests_is_left_alone(tmp_path):
    (tmp_path / "tests").mkdir()
    shutil.copy(CONFTEST, tmp_path / "tests")
    (tmp_path / "tests" / "test_other.py").write_text("def test_other():\n    pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_other.py"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0
