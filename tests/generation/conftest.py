"""Makes the made-up tokenizer of tests/data importable here, and loads the demo's model once."""

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
DEMO = Path(__file__).resolve().parents[2] / "examples/demo_model"


@pytest.fixture(scope="session")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO).eval()


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)
