"""The notebooks run as a student runs them, with fewer steps and pairs, and show what they say.

Their branch for the hub runs in this process, on data of the hub sets' shapes.
"""

import ast
import importlib
import re
import sys
from pathlib import Path

import datasets
import matplotlib.pyplot
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "examples/notebooks"
NAMES = [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
STEPS = {"1_orpo": 8, "2_dpo": 8, "3_orpo_against_dpo": 6, "4_your_own_data": 6}

sys.path.insert(0, str(NOTEBOOKS))
execute = importlib.import_module("execute")
sys.path.insert(0, str(ROOT / "tests/trainer"))
sys.path.insert(0, str(ROOT / "tests/data"))
course_data = importlib.import_module("course_data")


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def set_parameters(notebook, **values):
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    for name, value in values.items():
        cell.source, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", cell.source)
        assert found == 1, name


def small_repository(folder, train=96, held_out=81):
    """The shipped model and fewer of the shipped pairs, and the folder a kernel starts in."""
    data = folder / "examples/demo_data"
    data.mkdir(parents=True)
    (folder / "examples/notebooks").mkdir()
    for name, count in (("train", train), ("heldout", held_out)):
        lines = (ROOT / f"examples/demo_data/{name}.jsonl").read_text("utf-8").splitlines()
        (data / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n", "utf-8")
    (folder / "examples/demo_model").symlink_to(ROOT / "examples/demo_model")
    return folder / "examples/notebooks"


def streams(notebook, name):
    found = [o for cell in code_cells(notebook) for o in cell.outputs if o.get("name") == name]
    return "\n".join(output.text for output in found)


def shown(notebook, kind):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [o.data[kind] for o in outputs if "data" in o and kind in o.data]


def tables(notebook):
    """Of each table: the numbers of each line by its first cell."""
    found = []
    for html in shown(notebook, "text/html"):
        lines = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in html.split("<tr")]
        found.append({line[0]: line[1:] for line in lines if line})
    return found


def check_orpo(notebook):
    figures = tables(notebook)[-1]
    before, after = map(float, figures["eval_rewards/accuracies"])
    assert after > before + 0.15
    before, after = map(float, figures["eval_log_odds_chosen"])
    assert after > before + 0.1
    assert streams(notebook, "stdout").count("\nbefore") == 3


def check_dpo(notebook):
    figures = tables(notebook)[-1]
    before, after = map(float, figures["eval_loss"])
    assert before == pytest.approx(0.693, abs=1e-3)
    assert after < before - 0.01
    assert float(figures["eval_rewards/margins"][1]) > 0.02


def check_against(notebook):
    figures = next(t for t in tables(notebook) if "DPO, lower rate" in t)
    accuracy = {name: float(line[0]) for name, line in figures.items() if name}
    assert list(accuracy) == ["before training", "ORPO", "DPO, same rate", "DPO, lower rate"]
    assert accuracy["ORPO"] > accuracy["before training"]
    assert accuracy["DPO, same rate"] > accuracy["before training"]
    answers = tables(notebook)[-1]
    assert all(len(answers[name]) == 3 and all(answers[name]) for name in accuracy)


def check_own_data(notebook):
    printed = streams(notebook, "stdout")
    first, second = re.split(r"written: \S*check.html", printed)[:2]
    for finding in (
        "exchanged",
        "same pair again",
        "is identical to",
        "is empty",
        "Held-out rows whose",
    ):
        assert finding in first, finding
        assert finding not in second, finding
    assert "length alone would score 0.9" in first or "length alone would score 1.0" in first
    assert "With the adapter the chosen answer is likelier" in printed
    assert "Warning" not in printed and "WARNING" not in printed
    assert "\x1b[?25l" not in printed, "a bar that moves"


def check_weights(notebook):
    betas, alphas, losses = [t for t in tables(notebook) if len(t) > 2][-3:]
    assert [name for name in betas if name] == [f"beta = {b}" for b in (0.0, 0.1, 0.3, 1.0)]
    margin = {name: float(line[1]) for name, line in (betas | alphas | losses).items() if name}
    assert margin["beta = 1.0"] > margin["beta = 0.0"]
    assert margin["alpha = 1, beta = 1"] == margin["beta = 1.0"]
    assert set(margin) >= {"orpo", "sft", "cpo", "dpo", "ipo", "simpo"}


CHECKS = {
    "1_orpo": check_orpo,
    "2_dpo": check_dpo,
    "3_orpo_against_dpo": check_against,
    "4_your_own_data": check_own_data,
    "5_loss_weights": check_weights,
}


def test_there_are_five():
    assert list(CHECKS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_shows_what_it_says(name, tmp_path):
    notebook = read(name)
    set_parameters(notebook, STEPS=STEPS.get(name, 2))
    size = {"4_your_own_data": {"train": 160}, "5_loss_weights": {"held_out": 24}}.get(name, {})
    folder = small_repository(tmp_path / "repository", **size)
    environment = execute.kernel_environment(tmp_path) | {"OMP_NUM_THREADS": "1"}
    execute.execute(notebook, folder, environment, timeout=240)
    CHECKS[name](notebook)
    assert all(len(image) < 100_000 for image in shown(notebook, "image/png"))
    assert shown(notebook, "image/png")
    assert not streams(notebook, "stderr")
    everything = nbformat.writes(notebook)
    assert str(tmp_path) not in everything and str(ROOT) not in everything


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What the notebooks fetch, in small: SmolLM2's kind of tokenizer, the hub sets' columns."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = course_data.base_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n{% endfor %}"
    )
    tokenizer.chat_template = chatml
    tokenizer.save_pretrained(tmp_path / "instruct")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "instruct")
    sets = {
        "trl-lib/ultrafeedback_binarized": course_data.ultrafeedback,
        "Anthropic/hh-rlhf": course_data.hh_rlhf,
    }
    models = {
        "HuggingFaceTB/SmolLM2-135M": base,
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(tmp_path / "instruct"),
    }
    asked = set()

    def enough_rows(name):
        asked.add(name)
        small = sets[name]()
        return datasets.DatasetDict(
            {k: datasets.concatenate_datasets([rows] * 50) for k, rows in small.items()}
        )

    real = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda n, **kw: enough_rows(n) if n in sets else real(n, **kw)
    )
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        load = auto.from_pretrained

        def from_pretrained(name, load=load, **kwargs):
            if name in models:
                asked.add(name)
            return load(models.get(name, name), **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: matplotlib.pyplot.close("all"))
    return asked


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_online_too(name, hub, tmp_path, monkeypatch, capsys):
    notebook = read(name)
    set_parameters(notebook, ONLINE=True, STEPS=1)
    monkeypatch.chdir(small_repository(tmp_path / "repository", train=60, held_out=8))
    if name != "4_your_own_data":  # that one is about the shipped pairs: it looks for them
        monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names = {}
    for cell in code_cells(notebook):
        # Commands have the other test: they are processes that know nothing of these stand-ins.
        source = re.sub(r"(?m)^( *)[!%].*$", r"\1pass", cell.source)
        exec(compile(source, name, "exec"), names)
    assert any(asked.startswith("HuggingFaceTB/SmolLM2-135M") for asked in hub)
    trainers = names.get("trainers", {"": names.get("trainer")}).values()
    assert all(t.state.global_step == 1 for t in trainers if t is not None)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_a_real_run_that_names_no_machine(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert not streams(notebook, "stderr")
    assert shown(notebook, "image/png")
    text = "\n".join(cell.source for cell in notebook.cells)
    text += streams(notebook, "stdout") + "".join(shown(notebook, "text/html"))
    text += "".join(shown(notebook, "text/plain"))
    assert not re.search(r"(?<![\w.:/])(/(home|root|tmp|work|Users|usr|opt|var)/|[A-Z]:\\)", text)
    assert "Traceback" not in text
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 200_000
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_python_and_colab_installs_are_guarded(name):
    for cell in code_cells(read(name)):
        ast.parse(TransformerManager().transform_cell(cell.source))
        for line in cell.source.splitlines():
            if "pip install" in line:
                assert line.startswith("    ") and '"google.colab" in sys.modules' in cell.source


@pytest.mark.parametrize("name", ["3_orpo_against_dpo", "5_loss_weights"])
def test_the_comparisons_it_names_are_commands(name, monkeypatch):
    from lite_orpo.cli.overrides import split_arguments
    from lite_orpo.comparison.variants import variants_of
    from lite_orpo.config.yaml_file import read_settings

    text = "\n".join(cell.source for cell in read(name).cells)
    commands = re.findall(r"(?m)^lite-orpo compare (.*)$", text)
    assert commands
    monkeypatch.chdir(ROOT)
    for words in commands:
        path, overrides = split_arguments(words.split(), None)
        variants, _ = variants_of(read_settings(path), overrides)
        assert len(variants) >= 2
