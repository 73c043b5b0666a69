"""What cannot be meant in a call that mixes the course's, TRL's and our names: one line each."""

import datasets
import pytest
from course_data import base_model, hh_rlhf
from peft import LoraConfig
from tiny_models import TOKENIZER, plain_rows, quiet_config, tiny_model, with_lora
from trl.experimental.orpo import ORPOConfig as TRLConfig

from lite_orpo import ORPOConfig, ORPOTrainer
from lite_orpo.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:ORPOConfig. names of earlier versions:UserWarning")

ROWS = plain_rows(2)
LORA = LoraConfig(target_modules=["q_proj"])
SPLITS = datasets.Dataset.from_list(ROWS)


def call(tmp_path, config=None, **arguments):
    """A call of the trainer; `config` has settings beside those that keep it quiet."""
    given = {
        "model": tiny_model(),
        "args": quiet_config(tmp_path, **(config or {})),
        "train_dataset": ROWS,
        "processing_class": TOKENIZER,
    }
    return ORPOTrainer(**{**given, **arguments})


def named_model():
    model = tiny_model()
    model.name_or_path = "its/name"
    return model


SEVERAL = datasets.DatasetDict({"train_sft": SPLITS, "train_prefs": SPLITS})
HELD_OUT_TWICE = datasets.DatasetDict({"train": SPLITS, "test": SPLITS, "validation": SPLITS})

# What is said -> what is given.
MIXTURES = {
    "beta and orpo_alpha are both set": {"config": {"beta": 0.1, "orpo_alpha": 1.0}},
    "beta and orpo_beta are both set": {"config": {"beta": 0.1, "orpo_beta": 1.0}},
    "needs a model": {"model": None},
    "model_name_or_path is 'another/name' in the arguments, but model is 'its/name'": {
        "model": named_model(),
        "config": {"model_name_or_path": "another/name"},
    },
    "model_name_or_path is 'no-such/b' in the arguments, but model is 'no-such/a'": {
        "model": "no-such/a",
        "config": {"model_name_or_path": "no-such/b"},
    },
    "model and model_init are both given": {"model_init": tiny_model},
    "model_init_kwargs (dtype) say how to load a model by its name": {
        "config": {"model_init_kwargs": {"dtype": "float32"}}
    },
    "model_init_kwargs: device_map is not known": {
        "model": "x/y",
        "config": {"model_init_kwargs": {"device_map": "auto"}},
    },
    "model_init_kwargs must be a dictionary, found 'dtype'": {
        "model": "x/y",
        "config": {"model_init_kwargs": "dtype"},
    },
    "model already has an adapter": {"model": with_lora(tiny_model()), "peft_config": LORA},
    "data_collator (found function) cannot be used": {"data_collator": lambda rows: rows},
    "data_collator (found list) cannot be used": {"data_collator": ROWS},
    "compute_metrics (found type) cannot be used": {"compute_metrics": dict},
    "preprocess_logits_for_metrics (found type)": {"preprocess_logits_for_metrics": dict},
    "splits train_sft, train_prefs; pass one of them, such as dataset['train_sft']": {
        "train_dataset": SEVERAL
    },
    "splits a, test; pass one of": {
        "train_dataset": datasets.DatasetDict({"a": SPLITS, "test": SPLITS})
    },
    "pass one of them, such as dataset['train']": {"train_dataset": datasets.DatasetDict()},
    "several held-out splits (test, validation); pass one, eval_dataset=dataset['test']": {
        "train_dataset": HELD_OUT_TWICE,
        "config": {"eval_strategy": "epoch"},
    },
    "is a dictionary of splits": {"train_dataset": {"train": ROWS, "test": ROWS}},
}


@pytest.mark.parametrize("message", MIXTURES)
def test_a_wrong_mixture_is_one_line(tmp_path, message):
    with pytest.raises(UserError) as caught:
        call(tmp_path, **MIXTURES[message])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_arguments_of_trls_trainer(tmp_path):
    with pytest.raises(UserError, match="must be a lite_orpo.ORPOConfig"):
        call(tmp_path, args=TRLConfig(str(tmp_path), bf16=False, use_cpu=True))


def test_a_model_and_its_own_name_are_no_contradiction(tmp_path):
    name = base_model(tmp_path / "base")
    args = ORPOConfig(str(tmp_path), use_cpu=True, model_name_or_path=name)
    first = ORPOTrainer(name, args, train_dataset=hh_rlhf()["train"])
    ORPOTrainer(first.model, args, train_dataset=hh_rlhf()["train"])
    ORPOTrainer(tiny_model(), args, train_dataset=ROWS, processing_class=TOKENIZER)


def test_bf16_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(UserError, match="bf16: there is no GPU here; leave it unset"):
        ORPOConfig(str(tmp_path), bf16=True)


@pytest.mark.parametrize(
    ("splits", "evaluates", "trained", "held_out"),
    [
        (["train", "test"], True, "train", "test"),
        (["train", "validation"], True, "train", "validation"),
        (["train", "test"], False, "train", None),
        (["train_prefs", "test_prefs"], False, "train_prefs", None),
        (["default"], False, "default", None),
        (["test"], True, "test", None),
    ],
    ids=str,
)
def test_the_split_that_is_meant(tmp_path, caplog, splits, evaluates, trained, held_out):
    caplog.set_level("INFO", logger="lite_orpo")
    sets = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(plain_rows(i + 1)) for i, split in enumerate(splits)}
    )
    config = {"eval_strategy": "epoch" if evaluates else "no"}
    if held_out is None and evaluates:  # transformers' own line
        with pytest.raises(ValueError, match="didn't pass an `eval_dataset`"):
            call(tmp_path, config, train_dataset=sets)
        return
    trainer = call(tmp_path, config, train_dataset=sets)
    assert len(trainer.train_dataset) == splits.index(trained) + 1
    assert trainer.data_reports[0].source == f"train_dataset['{trained}']"
    if held_out is None:
        assert trainer.eval_dataset is None
    else:
        assert len(trainer.eval_dataset) == splits.index(held_out) + 1
    said = [r.getMessage() for r in caplog.records if "splits" in r.getMessage()]
    assert len(said) == 1
    assert f"trains on '{trained}'" in said[0]


def test_held_out_pairs_that_are_given_come_before_those_of_the_dictionary(tmp_path):
    sets = datasets.DatasetDict({"train": SPLITS, "test": SPLITS, "validation": SPLITS})
    config = {"eval_strategy": "epoch"}
    trainer = call(tmp_path, config, train_dataset=sets, eval_dataset=plain_rows(3))
    assert len(trainer.eval_dataset) == 3
