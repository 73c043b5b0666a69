"""check.html: complete in itself, and nothing that stands in the data can become a part of it."""

import html.parser
import re

import pytest
from pairs_with_findings import clean_rows, source_of

from lite_orpo.data.inspection.lengths import Histogram
from lite_orpo.data.inspection.survey import SurveyOptions, survey_pairs
from lite_orpo.data.preparation import LengthRule
from lite_orpo.report.charts_svg import histogram_svg
from lite_orpo.report.check_page import page_of
from lite_orpo.report.visible_text import make_visible

EVIL = "<script>alert(1)</script>\"'&\u202e\x00"
VOID = {"meta"}


class Page(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that each tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def survey_with(text, **arguments):
    rows = [{**row, "source": f"{text}{i % 3}", text: "x"} for i, row in enumerate(clean_rows())]
    for row in rows[::2]:
        row["chosen"] = f"{text} {row['chosen']}"
    rows += [*rows[:2], {"prompt": text, "chosen": [{"role": text, "content": ""}], "rejected": []}]
    return survey_pairs(source_of(rows, text), held_out=source_of(rows, text), **arguments)


@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_no_text_of_the_data_becomes_markup(has_tokenizer):
    from tiny_tokenizer import char_tokenizer

    tokenizer = char_tokenizer() if has_tokenizer else None
    options = SurveyOptions(LengthRule(120, "drop"))
    text = page_of(survey_with(EVIL, tokenizer=tokenizer, options=options), EVIL)
    page = Page(text)
    assert "script" not in page.tags and page.open == []
    assert "&lt;script&gt;" in text
    assert "\u202e" not in text and "\x00" not in text and "⟨U+202E⟩" in text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_nothing_is_loaded_from_outside():
    text = page_of(survey_with("plain"), None)
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "script"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset")]
    assert "url(" not in text and "@import" not in text and not re.search(r"https?://", text)
    assert "default-src 'none'" in text


def test_the_page_shows_what_was_found():
    survey = survey_with("plain")
    text = page_of(survey, None)
    for finding in survey.findings:
        assert finding.title.split(":")[0].split("'")[0] in text
    assert text.count("<svg") == 6  # four lengths and two rules
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    clean = survey_pairs(source_of(clean_rows()))
    assert "Nothing was found" in page_of(clean, None)
    assert "Too few prompts to judge" not in page_of(clean, None)
    few = survey_pairs(source_of(clean_rows(20)))
    assert "Too few prompts to judge (fewer than 20 in a half)" in page_of(few, None)


def test_every_row_is_in_a_bar():
    svg = histogram_svg(Histogram(5, (1, 0, 10_000)), "x", "tokens", limit=7)
    assert svg.count("<rect") == 2
    assert "0 to 4 tokens: 1 rows" in svg and "10 or more tokens: 10000 rows" in svg
    heights = [float(h) for h in re.findall(r'<rect[^>]* height="([\d.]+)"', svg)]
    assert min(heights) >= 1, "a single row is to be seen beside ten thousand"
    assert "max_length 7" in svg
    assert "max_length" not in histogram_svg(Histogram(5, (1, 2)), "x", "tokens", limit=90)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("a\nb\tc", "a⏎b⇥c"),
        ("\u202e\x00", "⟨U+202E⟩⟨U+0000⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("日本語 é", "日本語 é"),
    ],
)
def test_characters_that_cannot_be_seen_are_made_visible(text, shown):
    assert make_visible(text) == shown
