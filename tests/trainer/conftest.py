"""Makes `tiny_tokenizer` of tests/data importable here, and settles what libraries ask of us."""

import gc
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
# TRL warns on import that its ORPO is experimental; warnings are errors here.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(autouse=True, scope="session")
def _modules_are_no_garbage():
    # accelerate collects garbage when a training ends; walking all of torch, transformers and
    # TRL for it would take most of these tests' time.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
