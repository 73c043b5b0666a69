"""Hostile folders: whatever they hold, nothing of it runs, and the user is told in one line.

Each payload would make a file, the canary, if any of its code ran.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TOKENIZER, plain_rows, quiet_config, tiny_model, trainer_for, with_lora
from tiny_tokenizer import char_tokenizer

from lite_orpo import ORPOTrainer
from lite_orpo.config.options import ModelOptions
from lite_orpo.data.files.sources import open_source
from lite_orpo.data.formats.rows import parse_row
from lite_orpo.errors import CheckpointError, DataError, ModelError, UserError
from lite_orpo.model.load import load_config, load_model, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a payload has run"


class Payload:
    """A pickle that makes a file as it is read."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def edit(path, **settings):
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def refusal(call, kind: type[UserError] = ModelError):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def load(folder, **options):
    given = ModelOptions(model_name_or_path=str(folder), **options)
    load_tokenizer(given)
    return load_model(given, CPU, trains_all_weights=False)


def test_the_payload_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


# ---- base models and adapters ----


@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x, 2))])
def test_weights_that_are_a_pickle_of_code(write, base, canary):
    (base / "model.safetensors").unlink()
    write({"x": Payload(canary)}, base / "pytorch_model.bin")
    assert "a pickle that holds more than tensors" in refusal(lambda: load(base))


def test_weights_that_are_a_pickle_of_tensors_are_loaded(base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert load(base).get_input_embeddings().weight.any()


@pytest.mark.parametrize("is_alone", [True, False])
def test_an_adapter_in_the_base_models_place(is_alone, base, canary):
    if is_alone:
        (base / "config.json").unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "someone/else",
               "auto_mapping": {"parent_library": "antigravity"}}  # fmt: skip
    (base / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"x": Payload(canary)}, base / "adapter_model.bin")
    assert "holds an adapter; name the base model" in refusal(lambda: load(base))


def ship_code(base, canary):
    (base / "shipped.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Any: pass\n")


@pytest.mark.parametrize("where", ["shipped.Any", "someone/else--shipped.Any"])
def test_code_that_a_model_ships_does_not_run(where, base, canary):
    ship_code(base, canary)
    auto = {"AutoConfig": where, "AutoModelForCausalLM": where}
    edit(base / "config.json", auto_map=auto, model_type="unheard_of")
    assert "set trust_remote_code: true to run it" in refusal(lambda: load(base))

    def trainer():
        args = quiet_config(base.parent / "o")
        return ORPOTrainer(str(base), args, train_dataset=plain_rows(2))

    assert "set trust_remote_code: true to run it" in refusal(trainer)


def test_code_beside_a_known_architecture_does_not_run(base, canary):
    ship_code(base, canary)
    edit(base / "config.json", auto_map={"AutoModelForCausalLM": "shipped.Any"})
    assert type(load(base)).__name__ == "LlamaForCausalLM"


def test_code_that_a_tokenizer_ships_does_not_run(base, canary):
    ship_code(base, canary)
    auto = {"AutoTokenizer": ["shipped.Any", None]}
    edit(base / "tokenizer_config.json", auto_map=auto, tokenizer_class="Any")
    message = refusal(lambda: load_tokenizer(ModelOptions(model_name_or_path=str(base))))
    assert "set trust_remote_code: true to run it" in message


def test_code_runs_when_it_is_asked_for(base, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(str(tmp_path / "c"))
    ship_code(base, tmp_path / "asked")
    edit(base / "config.json", auto_map={"AutoConfig": "shipped.Any"}, model_type="unheard_of")
    with pytest.raises(ModelError):
        load_config(ModelOptions(model_name_or_path=str(base), trust_remote_code=True))
    assert (tmp_path / "asked").is_dir()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_code_from_the_hub_is_not_fetched_because_a_file_says_so(key, base):
    edit(base / "config.json", **{key: "someone/kernel"})
    assert "asks for attention code from the hub" in refusal(lambda: load(base))
    assert load_config(ModelOptions(str(base), attn_implementation="sdpa")) is not None


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", 3])
def test_an_index_of_weights_that_leaves_the_folder(name, base):
    shutil.move(base / "model.safetensors", base.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside of it" in refusal(lambda: load(base))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"null"), ("config.json", b"{"), ("config.json", b"\xff"),
        ("model.safetensors", b"\xff" * 99), ("model.safetensors.index.json", b"[]"),
        ("tokenizer.json", b'{"x": 1}'), ("tokenizer_config.json", b"[]"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(name, content, base):
    (base / name).write_bytes(content)
    assert str(base) in refusal(lambda: load(base))


# ---- checkpoints ----

SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def checkpoint(tmp_path):
    trainer_for(with_lora(tiny_model()), tmp_path / "run", **SAVING).train()
    return tmp_path / "run" / "checkpoint-1"


def resume(checkpoint):
    trainer = trainer_for(with_lora(tiny_model()), checkpoint.parent, **SAVING)
    trainer.train(resume_from_checkpoint=str(checkpoint))


def seal(checkpoint):
    """A manifest that is right, as who tampers with a checkpoint would write it."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            files[path.relative_to(checkpoint).as_posix()] = {
                "size": len(content),
                "sha256": digest,
            }
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def test_a_checkpoint_that_is_sealed_anew_is_gone_on_from(checkpoint):
    seal(checkpoint)
    resume(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("is_sealed", [False, True], ids=["added", "in the manifest"])
def test_pickles_in_a_checkpoint(name, is_sealed, checkpoint, canary):
    torch.save(Payload(canary), checkpoint / name)
    if is_sealed:
        seal(checkpoint)
    message = refusal(lambda: resume(checkpoint), CheckpointError)
    assert name in message and ("a pickle" if is_sealed else "is not in its manifest") in message


def test_a_pickle_in_the_place_of_the_adapter(checkpoint, canary):
    (checkpoint / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(canary)}, checkpoint / "adapter_model.bin")
    seal(checkpoint)
    message = refusal(lambda: resume(checkpoint), CheckpointError)
    assert "holds adapter_model.bin, a pickle" in message


def test_another_trainers_checkpoint(checkpoint, canary):
    (checkpoint / "manifest.json").unlink()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save(Payload(canary), checkpoint / name)
    assert "not written by lite-orpo" in refusal(lambda: resume(checkpoint), CheckpointError)


@pytest.mark.parametrize("name", ["../../canary.txt", "/etc/passwd"])
def test_a_manifest_that_leaves_its_folder(name, checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0"}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert "outside of it" in refusal(lambda: resume(checkpoint), CheckpointError)


# ---- data ----


@pytest.fixture
def saved(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "extra": {"bytes": None, "path": "x"}}]
    datasets.Dataset.from_list(
        rows,
        features=datasets.Features(
            {
                **dict.fromkeys(("prompt", "chosen", "rejected"), datasets.Value("string")),
                "extra": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            }
        ),
    ).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def read(folder):
    return [parse_row(row) for _, row in open_source(str(folder), split="train").read()]


def test_a_script_beside_the_data_does_not_run(tmp_path, canary):
    folder = tmp_path / "pairs"
    folder.mkdir()
    ship_code(folder, canary)
    (folder / "pairs.py").write_text((folder / "shipped.py").read_text())
    assert "no train.jsonl" in refusal(lambda: read(folder), DataError)
    (folder / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert len(read(folder)) == 1


@pytest.mark.parametrize("kind", ["Image", "Audio", "Video"])
def test_a_medium_in_a_saved_data_set_is_not_opened(kind, saved):
    # datasets would open any file or address that the row names.
    info = json.loads((saved / "dataset_info.json").read_text())
    info["features"]["extra"] = {"_type": kind}
    (saved / "dataset_info.json").write_text(json.dumps(info))
    assert [row.prompt for row in read(saved)] == ["a"]


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"_data_files": 3}', "{"])
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_saved_data_set_with_a_hostile_description(name, text, saved):
    (saved / name).write_text(text)
    if name == "state.json" or not text.endswith("}"):  # any mapping is a description
        assert "cannot be read as a saved data set" in refusal(lambda: read(saved), DataError)


def test_a_format_that_a_saved_data_set_asks_for_is_not_made(saved):
    edit(saved / "state.json", _format_type="custom", _format_kwargs={"transform": "os.getcwd"})
    assert [row.prompt for row in read(saved)] == ["a"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
        "{{ messages.append.__self__.__class__.__base__.__subclasses__() }}",
        "{% set x = messages.__init__.__globals__ %}{{ x }}",
        "{{ ('{0.__class__.__init__.__globals__}').format(cycler) }}",
        "{{ 'x' | attr('__class__') }}{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_that_reaches_out_of_its_sandbox(template, canary, tmp_path):
    tokenizer = char_tokenizer(template=template.replace("CANARY", str(canary)))
    rows = [{"prompt": [{"role": "user", "content": "a"}],
             "chosen": [{"role": "assistant", "content": "b"}],
             "rejected": [{"role": "assistant", "content": "c"}]}]  # fmt: skip
    message = refusal(
        lambda: ORPOTrainer(
            tiny_model(),
            quiet_config(tmp_path / "run"),
            train_dataset=rows,
            processing_class=tokenizer,
        ),
        DataError,
    )
    assert "template" in message
    assert "/usr/" not in message and "root:" not in message


def test_safetensors_metadata_runs_nothing(base, canary):
    weights = load_file(base / "model.safetensors")
    metadata = {"format": "pt", "x": f"__import__('os').mkdir({str(canary)!r})"}
    save_file(weights, base / "model.safetensors", metadata)
    assert load(base) is not None
    assert not Path(canary).exists()
