"""Packed rows on a GPU: both attention paths against the oracle, and a whole model's gradients."""

import pytest
import torch
from test_tree_attention import (
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    LAYOUTS,
    layer,
    oracle,
    visible,
    with_gradients,
)
from tiny_models import (
    plain_rows,
    step_gradients,
    tiny_model,
    trainer_for,
    whole_relative_error,
    with_lora,
)

from lite_orpo.model.tree_attention import (
    refuse_varlen,
    tree_sdpa_attention,
    tree_varlen_attention,
)
from lite_orpo.model.tree_segments import tokens_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PATHS = {"sdpa": tree_sdpa_attention, "varlen": tree_varlen_attention}
# Flash attention wants head sizes that are multiples of 8; more tokens than one of its tiles.
LONG = {**LAYOUTS, "long": ((0, 300, (170, 95)), (565, 40, (3, 200)))}


@pytest.mark.parametrize("window", [None, 1, 4, 129])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("spans", LONG.values(), ids=LONG)
def test_each_path_equals_the_dense_oracle_within_bf16(spans, path, window):
    if path == "varlen" and (why := refuse_varlen(torch.device("cuda"), torch.bfloat16)):
        pytest.skip(why)
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randn(1, heads, tokens_of(spans), HEAD_SIZE, generator=generator).bfloat16()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    module = layer().cuda()

    def attend(query, key, value):
        return PATHS[path](
            module, query, key, value, None, tree_spans=spans, sliding_window=window
        )[0]

    out, gradients = with_gradients(attend, [x.cuda() for x in rows])
    seen = visible(spans, window)
    expected, expected_gradients = with_gradients(
        lambda *qkv: oracle(*qkv, seen), [x.double() for x in rows]
    )
    # Roundings of bf16 (2^-8) in the probabilities, the output and its gradient.
    pairs = [(out, expected), *zip(gradients, expected_gradients, strict=True)]
    for ours, theirs in pairs:
        error = (ours.cpu().double() - theirs).norm() / theirs.norm().clamp_min(1e-3)
        assert error <= 2e-2


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_rows_make_the_gradients_of_separate_ones(attention, family, tmp_path):
    if attention == "varlen" and (why := refuse_varlen(torch.device("cuda"), torch.bfloat16)):
        pytest.skip(why)
    found = {}
    for sharing in ("on", "off"):
        model = with_lora(tiny_model(family, dtype=torch.bfloat16))
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.float()
        trainer = trainer_for(
            model,
            tmp_path,
            plain_rows(6),
            prefix_sharing=sharing,
            tree_attention=attention,
            use_cpu=False,
            bf16=True,
        )
        found[sharing] = step_gradients(trainer, [list(trainer.train_dataset)])
    assert found["on"][0] == pytest.approx(found["off"][0], rel=5e-3)
    # Two different kernels in bf16; each is about this far from fp32.
    assert whole_relative_error(found["on"][1], found["off"][1]) <= 5e-2
