"""The configurations in examples/ are ones that `lite-orpo train` takes."""

from pathlib import Path

import pytest

from lite_orpo.config.run_config import load_run_config
from lite_orpo.config.yaml_file import Setting

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_key_is_known_and_every_value_fits(path, tmp_path):
    config = load_run_config(path, {"output_dir": Setting(str(tmp_path), "test")})
    assert config.model.model_name_or_path
    assert config.data.dataset_name


def test_the_qlora_configuration_is_one(tmp_path):
    overrides = {"output_dir": Setting(str(tmp_path), "test")}
    config = load_run_config(EXAMPLES / "qlora.yaml", overrides)
    assert config.model.load_in_4bit
    assert config.lora.use_peft
    assert config.training.max_tokens_per_row == "auto"
