"""Which models may train on packed rows, and that those compute exactly the same that way."""

import logging

import pytest
import torch
from tiny_models import (
    plain_rows,
    quiet_config,
    step_gradients,
    tiny_model,
    trainer_for,
    whole_relative_error,
    with_lora,
)
from transformers import TrainerCallback
from tree_families import EXACT, REFUSED, exact_model, refused_model

from lite_orpo.data.row_batch import PlannedPair
from lite_orpo.data.tree_rows import tree_row_batch
from lite_orpo.errors import ModelError
from lite_orpo.model import prefix_sharing
from lite_orpo.model.head import attach_scored_head
from lite_orpo.model.prefix_sharing import decide_prefix_sharing
from lite_orpo.model.tree_attention import TREE_SDPA

# PEFT, of experts that "all-linear" does not reach.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")


def decide(model, **settings):
    head = attach_scored_head(model, backend="auto", workspace_bytes=2**20, device="cpu")
    head.verify()
    options = {"attention": "sdpa", "max_length": 64, **settings}
    return decide_prefix_sharing(model, **options)


def longer_rows(count):
    """Prompts and completions beyond the families' windows of 8."""
    rows = plain_rows(count)
    return [{**row, "prompt": row["prompt"] + "and then some more " * (i % 3)} for i, row in
            enumerate(rows)]  # fmt: skip


# ---- which models ----


@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_probe_accepts(family, dtype):
    sharing = decide(with_lora(exact_model(family, dtype=dtype)))
    assert sharing.is_on, sharing.reason
    assert sharing.attention == TREE_SDPA


@pytest.mark.parametrize("family", EXACT)
def test_packed_rows_make_the_loss_and_gradients_of_separate_ones(family, tmp_path):
    found = {}
    for sharing in ("on", "off"):
        trainer = trainer_for(
            with_lora(exact_model(family)), tmp_path, longer_rows(6), prefix_sharing=sharing
        )
        found[sharing] = step_gradients(trainer, [list(trainer.train_dataset)])
    assert found["on"][0] == pytest.approx(found["off"][0], rel=1e-6)
    # fp32, SDPA against the model's eager attention: mixtures of experts and gemma3n (which
    # divides by norms) round most.
    assert whole_relative_error(found["on"][1], found["off"][1]) <= 5e-6


@pytest.mark.parametrize("family", REFUSED)
def test_the_static_rule_refuses(family):
    reason = REFUSED[family][2]
    sharing = decide(refused_model(family))
    assert not sharing.is_on
    assert reason in sharing.reason


@pytest.mark.parametrize("family", REFUSED)
def test_the_probe_alone_refuses_too(family, monkeypatch):
    monkeypatch.setattr(prefix_sharing, "_static_reasons", lambda *_: iter(()))
    sharing = decide(refused_model(family))
    assert not sharing.is_on
    assert REFUSED[family][3] in sharing.reason


def attend_without_the_window(module, query, key, value, mask, **kwargs):
    from lite_orpo.model.tree_attention import tree_sdpa_attention

    return tree_sdpa_attention(
        module, query, key, value, mask, **{**kwargs, "sliding_window": None}
    )


def attend_across_branches(module, query, key, value, mask, **kwargs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kwargs.pop("tree_spans")
    return sdpa_attention_forward(module, query, key, value, None, **kwargs)


@pytest.mark.parametrize(
    ("family", "dtype", "broken", "reason"),
    [
        ("mistral window", torch.float32, attend_without_the_window, "differ by"),
        ("llama", torch.float32, attend_across_branches, "see the chosen ones"),
        ("llama", torch.bfloat16, attend_across_branches, "see the chosen ones"),
    ],
)
def test_the_probe_sees_broken_attention(family, dtype, broken, reason, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def register():
        ALL_ATTENTION_FUNCTIONS.register(TREE_SDPA, broken)

    monkeypatch.setattr(prefix_sharing, "register_tree_attention", register)
    sharing = decide(exact_model(family, dtype=dtype))
    assert not sharing.is_on
    assert reason in sharing.reason


def test_a_window_that_is_not_told_is_seen_though_the_probes_rows_are_shorter():
    model = tiny_model("mistral", sliding_window=200)
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = _forgets_its_window(forward, layer.self_attn)
    sharing = decide(model)
    assert not sharing.is_on
    assert "sliding window" in sharing.reason


def _forgets_its_window(forward, attention):
    def forgetful(*args, **kwargs):
        window, attention.config.sliding_window = attention.config.sliding_window, None
        try:
            return forward(*args, **kwargs)
        finally:
            attention.config.sliding_window = window

    return forgetful


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_that_counts_positions_along_the_row_is_refused(dtype):
    model = tiny_model(dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)  # small enough for the difference to drown in bf16's rounding
    rotary = model.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, torch.arange(x.shape[1]).unsqueeze(0))
    sharing = decide(model)
    assert not sharing.is_on
    assert sharing.reason == "it does not read position_ids"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_that_is_not_causal_is_refused(dtype):
    model = tiny_model(dtype=dtype)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    sharing = decide(model)
    assert not sharing.is_on
    assert "not causal" in sharing.reason


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_that_round_by_how_many_tokens_they_get_are_no_leak(family):
    settings = {"hidden_size": 256, "num_hidden_layers": 3, "num_experts": 32}
    settings |= {"num_local_experts": 8, "num_experts_per_tok": 4}
    model = exact_model(family, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)  # for the width; logits of some nats
    sharing = decide(model)
    assert sharing.is_on, sharing.reason


def test_an_adapter_that_begins_at_a_token_of_the_row_is_refused():
    sharing = decide(with_lora(tiny_model(), alora_invocation_tokens=[7]))
    assert not sharing.is_on
    assert "aLoRA" in sharing.reason


def test_an_adapter_of_a_kind_that_is_not_known_is_refused():
    model = with_lora(tiny_model())
    model.peft_config["default"].peft_type = "XLORA"
    assert "adapter of type XLORA" in decide(model).reason


def test_a_window_in_the_configuration_of_a_model_that_has_none_does_not_matter():
    sharing = decide(tiny_model("llama", sliding_window=8))
    assert sharing.is_on, sharing.reason


def test_more_embeddings_than_outputs_do_not_stop_the_probe():
    model = tiny_model(tie_word_embeddings=False)
    old = model.get_input_embeddings()
    new = torch.nn.Embedding(old.num_embeddings + 5, old.embedding_dim)
    new.weight.data[: old.num_embeddings] = old.weight.data
    model.set_input_embeddings(new)
    assert decide(model).is_on


@pytest.mark.parametrize(("max_length", "is_on"), [(64, True), (65, False), (None, False)])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_changes_with_the_longest_sequence_is_refused_beyond_its_limit(
    kind, max_length, is_on
):
    parameters = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny_model("llama", rope_parameters=parameters)
    sharing = decide(model, max_length=max_length)
    assert sharing.is_on == is_on, sharing.reason
    assert is_on or kind in sharing.reason


def test_the_probe_leaves_the_model_as_it_was():
    model = with_lora(tiny_model()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = model.config._attn_implementation
    state = torch.random.get_rng_state()
    decide(model)
    assert model.training
    assert model.config._attn_implementation == own
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- what the user sees ----


def test_auto_falls_back_and_says_why_and_what_it_costs(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trainer_for(with_lora(refused_model("lfm2")), tmp_path, plain_rows(4))
    assert not trainer.sharing.is_on
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("rows:")]
    assert "separate, padded: it has layers of type conv" in line
    assert "packed rows would take 1." in line
    assert "fewer tokens" in line
    trainer.train()


def test_on_refuses_a_model_that_cannot_in_one_line(tmp_path):
    with pytest.raises(ModelError) as caught:
        trainer_for(with_lora(refused_model("lfm2")), tmp_path, prefix_sharing="on")
    text = str(caught.value)
    assert text.startswith("prefix_sharing: on, but Lfm2ForCausalLM cannot: it has layers of type")
    assert text.endswith("set it to auto or off")
    assert "\n" not in text


def test_varlen_on_a_cpu_is_refused_with_its_reason(tmp_path):
    with pytest.raises(ModelError, match="tree_attention: varlen: it needs a CUDA device"):
        trainer_for(with_lora(tiny_model()), tmp_path, prefix_sharing="on", tree_attention="varlen")


def test_the_rows_are_described_with_the_tokens_saved(tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()), tmp_path, plain_rows(6), per_device_train_batch_size=3
    )
    pairs = list(trainer.train_dataset)
    packed = sum(
        len(pair[f"{part}_input_ids"]) for pair in pairs for part in
        ("prompt", "chosen", "rejected")
    )  # fmt: skip
    assert f"{packed:,} tokens an epoch" in trainer.rows_description
    assert "fewer than padded batches of 3" in trainer.rows_description
    separate = packed + sum(len(pair["prompt_input_ids"]) for pair in pairs)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert 0 < log["lite_orpo/tokens_saved"] < 1
    assert log["lite_orpo/rows_per_step"] == 1
    assert f"{separate / packed:.2f}x fewer than separate" in trainer.rows_description


def test_off_does_not_touch_the_attention(tmp_path):
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, prefix_sharing="off")
    assert trainer.rows_description == "separate, padded (as configured)"
    with trainer.sharing.attending(trainer.model):
        assert trainer.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"neftune_noise_alpha": 5.0}, "NEFTune's noise goes by the length of the row"),
        ({"torch_compile": True}, "torch.compile would compile anew"),
    ],
    ids=["neftune", "compile"],
)
def test_settings_that_go_by_the_row_turn_packing_off(settings, reason, tmp_path):
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, **settings)
    assert not trainer.sharing.is_on
    assert reason in trainer.rows_description


def test_a_compiled_model_turns_packing_off(tmp_path):
    model = with_lora(tiny_model())
    model.compile(backend="eager")
    assert not trainer_for(model, tmp_path).sharing.is_on


@pytest.mark.parametrize("value", [False, "off"])
def test_off_may_be_a_boolean(value, tmp_path):
    assert quiet_config(tmp_path, prefix_sharing=value).prefix_sharing == "off"
    assert quiet_config(tmp_path, prefix_sharing=True).prefix_sharing == "on"


# ---- around the step ----


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_training_follows_an_evaluation_in_inference_mode(family, tmp_path):
    trainer = trainer_for(
        with_lora(exact_model(family)), tmp_path, plain_rows(2), eval_dataset=plain_rows(2),
        prefix_sharing="on", max_steps=1,
    )  # fmt: skip
    with torch.inference_mode():
        trainer.evaluate()
    trainer.train()


def test_a_second_training_reports_nothing_of_the_first(tmp_path):
    logs = []
    for first_steps in (0, 1):
        trainer = trainer_for(
            with_lora(tiny_model()), tmp_path, learning_rate=0.0, max_steps=2, logging_steps=2
        )
        if first_steps:
            trainer.args.max_steps = first_steps
            trainer.train()
            trainer.args.max_steps = 2
        trainer.train()
        lines = [log for log in trainer.state.log_history if "nll_loss" in log]
        logs.append(lines[-1]["nll_loss"])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


class Answers(TrainerCallback):
    """Generates in the middle of a training, as callbacks that show samples do."""

    def __init__(self):
        self.answers = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        prompt = torch.tensor([[1, 7, 8, 9]])
        with torch.no_grad():
            self.answers.append(model.generate(input_ids=prompt, max_new_tokens=3))


def test_callbacks_can_generate_while_packed_rows_are_trained(tmp_path):
    callback = Answers()
    trainer = trainer_for(
        with_lora(tiny_model()),
        tmp_path,
        prefix_sharing="on",
        callbacks=[callback],
        max_steps=2,
    )
    trainer.train()
    assert [answer.shape for answer in callback.answers] == [(1, 7)] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_keeps_the_layout(reentrant, tmp_path):
    found = []
    for extra in (
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        },
    ):
        trainer = trainer_for(
            with_lora(exact_model("gemma2")),
            tmp_path,
            longer_rows(4),
            prefix_sharing="on",
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=0.1,
            optim="sgd",
            **extra,
        )
        trainer.train()
        found.append(
            {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora" in n}
        )
    # The same operations on the same numbers.
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    "lengths", [(1, 4, 3), (4, 1, 3), (4, 3, 1), (1, 1, 1)], ids=lambda lengths: f"{lengths}"
)
def test_the_shortest_pairs_are_scored_as_separate_sequences_are(lengths, tmp_path):
    prompt, chosen, rejected = lengths
    ids = list(range(6, 6 + sum(lengths)))
    pair = {
        "prompt_input_ids": ids[:prompt],
        "chosen_input_ids": ids[prompt : prompt + chosen],
        "rejected_input_ids": ids[prompt + chosen :],
        "length": prompt + max(chosen, rejected),
        "row": 0,
    }
    found = []
    for sharing in ("on", "off"):
        trainer = trainer_for(with_lora(tiny_model()), tmp_path, prefix_sharing=sharing)
        found.append(step_gradients(trainer, [[pair]]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert whole_relative_error(found[0][1], found[1][1]) <= 2e-6


def test_bf16_rows_are_as_near_to_fp32_as_separate_ones_are(tmp_path):
    rows = longer_rows(6)

    def loss_and_gradients(dtype, sharing):
        torch.manual_seed(0)
        model = with_lora(tiny_model(dtype=dtype))
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.float()
        trainer = trainer_for(model, tmp_path, rows, prefix_sharing=sharing)
        return step_gradients(trainer, [list(trainer.train_dataset)])

    true_loss, true = loss_and_gradients(torch.float32, "off")
    errors, losses = {}, {}
    for sharing in ("on", "off"):
        loss, gradients = loss_and_gradients(torch.bfloat16, sharing)
        errors[sharing] = whole_relative_error(gradients, true)
        losses[sharing] = abs(loss - true_loss)
    assert errors["on"] <= 2 * errors["off"]
    # Of a loss of 6, a rounding of bf16 in the logits moves single tokens by some hundredths.
    assert losses["on"] <= 2 * losses["off"] + 1e-2


def rejected_logps(model, pairs, sharing):
    row = tree_row_batch(pairs, nll_on_prompt=True)
    with torch.no_grad(), sharing.attending(model):
        logps = model(**row.inputs, score_rows=(row.score_index, row.targets))
    return {number: logps[row.completion_ids == number] for number in range(2 * len(pairs))}


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral window", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_changing_one_completion_leaves_every_other_bitwise_as_it_was(family, changed):
    model = with_lora(exact_model(family)).eval()
    sharing = decide(model)
    pairs = [
        PlannedPair([7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18], is_scored=True),
        PlannedPair([19], [20, 21], [22, 23, 24], is_scored=True),
    ]
    before = rejected_logps(model, pairs, sharing)
    field = "rejected" if changed % 2 else "chosen"
    pair = pairs[changed // 2]
    other = [token + 30 for token in getattr(pair, field)]
    pairs[changed // 2] = pair._replace(**{field: other})
    after = rejected_logps(model, pairs, sharing)
    for number in before:
        assert torch.equal(before[number], after[number]) == (number != changed)


def test_shuffled_pairs_make_the_same_loss_and_gradients(tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()), tmp_path, plain_rows(6), prefix_sharing="on", max_tokens_per_row=90
    )
    pairs = list(trainer.train_dataset)
    loss, gradients = step_gradients(trainer, [pairs])
    again, shuffled = step_gradients(trainer, [[pairs[i] for i in (3, 0, 5, 1, 4, 2)]])
    assert again == pytest.approx(loss, rel=1e-6)
    assert whole_relative_error(shuffled, gradients) <= 1e-6
