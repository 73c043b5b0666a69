"""Fixtures of the data room's tests."""

import pytest
from tiny_tokenizer import CHATML, char_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """BOS <s>, EOS </s>, no chat template."""
    return char_tokenizer()


@pytest.fixture(scope="session")
def chatml_tokenizer():
    """No BOS, EOS <|im_end|>, as in the ChatML family."""
    return char_tokenizer(bos=None, eos="<|im_end|>", template=CHATML)
