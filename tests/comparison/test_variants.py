"""What a command line of `compare` stands for: which runs, with which settings taken back."""

import pytest

from lite_orpo.comparison.variants import split_values, variants_of
from lite_orpo.config.yaml_file import Setting, parse_value
from lite_orpo.errors import ConfigError


def settings(**values):
    return {key: Setting(value, f"config.yaml {key}") for key, value in values.items()}


def given(text):
    """Overrides as they come from the command line."""
    pairs = [word.split("=", 1) for word in text.split()]
    return {key: Setting(parse_value(value), "command line") for key, value in pairs}


def made(file, text):
    variants, same = variants_of(settings(**file), given(text))
    return [(variant.label, variant.overrides) for variant in variants], same


def test_each_loss_is_a_run_with_its_own_defaults():
    runs, same = made({}, "loss_type=orpo,dpo,sft max_steps=5")
    assert runs == [
        ("orpo", {"loss_type": "orpo"}),
        ("dpo", {"loss_type": "dpo"}),
        ("sft", {"loss_type": "sft"}),
    ]
    assert {key: setting.value for key, setting in same.items()} == {"max_steps": 5}


def test_settings_of_the_files_own_loss_are_no_settings_of_another():
    runs, _ = made({"beta": 0.2, "nll_tokens": "completion"}, "loss_type=orpo,simpo")
    assert runs[0] == ("orpo", {"loss_type": "orpo"})
    assert runs[1] == ("simpo", {"loss_type": "simpo", "beta": None, "nll_tokens": None})


def test_values_are_crossed_with_losses_that_have_the_setting():
    runs, _ = made({}, "loss_type=orpo,dpo,sft beta=0.05,0.1")
    assert [label for label, _ in runs] == [
        "orpo (beta 0.05)",
        "orpo (beta 0.1)",
        "dpo (beta 0.05)",
        "dpo (beta 0.1)",
        "sft",
    ]
    assert runs[1][1] == {"loss_type": "orpo", "beta": 0.1}


def test_one_loss_may_be_compared_with_itself_at_other_settings():
    runs, _ = made({"loss_type": "dpo"}, "learning_rate=1e-5,1e-4")
    assert [overrides["learning_rate"] for _, overrides in runs] == [1e-5, 1e-4]
    assert all(overrides["loss_type"] == "dpo" for _, overrides in runs)


def test_beta_replaces_the_courses_names_in_the_file():
    runs, _ = made({"orpo_alpha": 1.0, "orpo_beta": 0.1}, "beta=0.1,0.2")
    assert runs[0][1] == {"loss_type": "orpo", "orpo_alpha": None, "orpo_beta": None, "beta": 0.1}


def test_a_value_for_all_runs_is_given_to_each_loss_that_has_it():
    runs, _ = made({}, "loss_type=orpo,dpo,sft beta=0.3")
    assert [overrides.get("beta") for _, overrides in runs] == [0.3, 0.3, None]


def test_names_of_folders_are_plain_and_each_its_own():
    variants, _ = variants_of({}, given("loss_type=orpo,dpo beta=0.05,0.1 lora_r=4,8"))
    names = [variant.name for variant in variants]
    assert names[0] == "orpo-beta0.05-lora_r4"
    assert len(set(names)) == 8


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ({}, "max_steps=5", "nothing to compare it with"),
        ({}, "loss_type=orpo", "nothing to compare it with"),
        ({}, "loss_type=orpo,dpoo", "loss_type must be of orpo, dpo, .* found 'dpoo'"),
        ({}, "loss_type=orpo,orpo", "has a value twice"),
        ({}, "loss_type=orpo,", "has an empty value"),
        ({}, "loss_type=orpo,dpo simpo_gamma=0.5", "simpo_gamma is a setting of none of these"),
        ({}, "loss_type=orpo,dpo seed=1,2", "seed cannot be varied"),
        ({}, "loss_type=orpo,dpo max_steps=5,10", "max_steps cannot be varied"),
        ({}, "beta=" + ",".join(str(i / 100) for i in range(40)), "40 runs are more than 32"),
    ],
)
def test_what_cannot_be_compared_is_one_line(file, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        variants_of(settings(**file), given(text))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", ["0.05,0.1", [0.05, 0.1]])
def test_values_are_written_with_commas_or_as_a_list(value):
    assert split_values("beta", value) == [0.05, 0.1]
