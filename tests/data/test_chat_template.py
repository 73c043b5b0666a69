"""A chat template is a program: whatever it does, one line says so, and it does not go on."""

import signal
import threading
import time

import pytest
from tiny_tokenizer import CHATML, char_tokenizer

from lite_orpo.data.formats.rows import PreferenceRow
from lite_orpo.data.tokens import template_limits
from lite_orpo.data.tokens.chat_template import TemplateRunaway
from lite_orpo.data.tokens.template_limits import within_limits
from lite_orpo.data.tokens.tokenization import tokenize_pair
from lite_orpo.errors import DataError, RowProblem

resource = pytest.importorskip("resource", reason="limits are those of POSIX systems")

CHAT = PreferenceRow(
    [{"role": "user", "content": "hi"}],
    [{"role": "assistant", "content": "yes"}],
    [{"role": "assistant", "content": "no"}],
)

LOOPING = {
    "nested_ranges": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a_great_power": "{% set n = messages|length + 9 %}{% set x = n ** (n ** 9) %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(90) }}",
}
EXPLODING = {
    "a_constant": "{{ 'x' * 10 ** 10 }}",
    "a_product": "{{ messages[0].content * 10 ** 10 }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(100) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a_list": "{% set ns = namespace(x=[1]) %}{% for i in range(100) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a_wide_column": "{{ '{:99999999999}'.format(1) }}",
}
RAISING = {
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ 1 + 'a' }}": "TypeError: unsupported operand",
    "{{ nothing.here }}": "'nothing' is undefined",
    "{{ messages[7].content.text }}": "list object has no element 7",
    "{{ messages.__class__.__mro__ }}": "unsafe",
    "{{ messages.pop() }}": "unsafe",
    "{{ range(10 ** 9)|list }}": "OverflowError: Range too big",
    "{{ 'x' * 10 ** 30 }}": "OverflowError: cannot fit 'int'",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError: maximum recursion",
    "{{ 10 ** 100000 }}": "ValueError: Exceeds the limit",
    "{{ {}|dictsort(by='x') }}": "",
    "{{ raise_exception('first\nsecond') }}": "first second",
}


@pytest.fixture
def short_time(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.3)


def test_a_template_that_loops_is_stopped(short_time):
    for name, template in LOOPING.items():
        begun = time.process_time()
        with pytest.raises(
            TemplateRunaway, match=r"the chat template ran for .* seconds"
        ) as caught:
            tokenize_pair(CHAT, char_tokenizer(template=template))
        assert time.process_time() - begun < 5, name
        assert "chat_template_path" in str(caught.value)


needs_linux = pytest.mark.skipif(
    template_limits._address_space() is None, reason="the system does not tell the address space"
)


@needs_linux
@pytest.mark.parametrize("name", EXPLODING)
def test_a_template_that_explodes_is_stopped(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateRunaway, match="the chat template wants more than 512 MiB"):
        tokenize_pair(CHAT, char_tokenizer(template=EXPLODING[name]))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 1.5 * template_limits.MAX_BYTES


def test_a_template_that_writes_far_more_than_the_row_is_stopped():
    template = CHATML + "{{ 'ab' * 200000 }}"
    with pytest.raises(TemplateRunaway, match=r"writes 400\d+ characters for a row of"):
        tokenize_pair(CHAT, char_tokenizer(template=template))


def test_a_long_row_is_no_exploding_template():
    tokenizer = char_tokenizer(template=CHATML)
    long = CHAT._replace(prompt=[{"role": "user", "content": "long " * 100_000}])
    assert len(tokenize_pair(long, tokenizer).prompt) > 500_000


@pytest.mark.parametrize("template", RAISING)
def test_whatever_a_template_raises_is_one_line_about_the_row(template):
    with pytest.raises(RowProblem) as caught:
        tokenize_pair(CHAT, char_tokenizer(template=template))
    assert caught.value.problem.startswith("is refused by the chat template: ")
    assert RAISING[template] in caught.value.problem
    assert "\n" not in caught.value.problem


def test_a_long_complaint_is_cut():
    with pytest.raises(RowProblem) as caught:
        tokenize_pair(CHAT, char_tokenizer(template="{{ raise_exception('x' * 100000) }}"))
    assert len(caught.value.problem) < 300


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ 1|no_such_filter }}", "{% for i in x %}" * 25 + "{% endfor %}" * 25],
)
def test_no_valid_jinja_is_the_templates_fault_and_not_the_rows(template):
    with pytest.raises(DataError, match="the chat template is no valid Jinja"):
        tokenize_pair(CHAT, char_tokenizer(template=template))


def test_limits_leave_timer_handler_and_memory_as_they_were():
    mine = []
    handler = signal.signal(signal.SIGPROF, lambda *_: mine.append(1))
    signal.setitimer(signal.ITIMER_PROF, 1000.0)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        assert within_limits(lambda: "text") == "text"
        with pytest.raises(KeyError):
            within_limits(lambda: {}["nothing"])
        assert signal.getitimer(signal.ITIMER_PROF)[0] > 900
        signal.raise_signal(signal.SIGPROF)
        assert mine == [1]
        assert resource.getrlimit(resource.RLIMIT_AS) == limits
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def test_outside_the_main_thread_templates_run_without_a_limit_of_time():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(tokenize_pair(CHAT, char_tokenizer(template=CHATML)))
    )
    thread.start()
    thread.join()
    assert found == [tokenize_pair(CHAT, char_tokenizer(template=CHATML))]


def test_tools_go_to_the_template():
    tokenizer = char_tokenizer(template="{% if tools %}{{ tools[0].name }}{% endif %}" + CHATML)
    prompt = tokenizer.decode(
        tokenize_pair(CHAT._replace(tools=[{"name": "clock"}]), tokenizer).prompt
    )
    assert prompt.startswith("<s>clock<|im_start|>user")
    assert "clock" not in tokenizer.decode(tokenize_pair(CHAT, tokenizer).prompt)
