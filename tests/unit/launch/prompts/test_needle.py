"""Facts are where they are said to be, in characters and in tokens, and what is asked calls for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conf.schema import ConfigError
from launch.analysis.needle_prompt import make_needle_prompt
from launch.prompts.needle import NeedleForm, make_facts, plant
from tests.support import tiny_tokenizers

ROOT = Path(__file__).resolve().parents[4]
FILLER = "".join(f"Line {i}: the quick brown fox, number {i * i}.\n" for i in range(400))
TEMPLATE = (
    "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "assets/demo/target")


@settings(max_examples=40, deadline=None)
@given(depths=st.lists(st.floats(0, 1), min_size=1, max_size=6), form=st.sampled_from(NeedleForm))
def test_facts_are_planted_whole_in_an_unchanged_filler(depths, form):
    facts = make_facts(form, len(depths), seed=1)
    haystack = plant(FILLER, facts, depths)
    rest = haystack.text
    for start, fact in sorted(zip(haystack.starts, facts, strict=True), key=lambda pair: -pair[0]):
        assert haystack.text[start : start + len(fact.text)] == fact.text
        rest = rest[:start] + rest[start + len(fact.text) :]
    assert rest == FILLER
    for start, depth in zip(haystack.starts, depths, strict=True):
        assert haystack.text[:start] == "" or haystack.text[start - 1] in "\n "
        num_before = sum(len(fact.text) for other, fact in zip(haystack.starts, facts, strict=True) if other < start)
        assert -60 < start - num_before - depth * len(FILLER) <= 1


def test_a_filler_without_a_break_is_not_cut_in_a_word():
    (fact,) = make_facts(NeedleForm.sentence, 1, seed=0)
    assert plant("x" * 100, [fact], [0.5]).starts == [0]
    assert plant("x" * 100, [fact], [1.0]).starts == [100]
    assert plant("one two three", [fact], [0.7]).starts == [8]


@pytest.mark.parametrize("form", NeedleForm)
def test_facts_differ_and_are_the_same_for_the_same_seed(form):
    facts = make_facts(form, 8, seed=3)
    assert facts == make_facts(form, 8, seed=3) != make_facts(form, 8, seed=4)
    assert len({fact.question for fact in facts}) == len({fact.answer for fact in facts}) == 8
    for fact in facts:
        assert fact.answer in fact.text
        if form != NeedleForm.question:
            assert (fact.question + fact.answer).strip() in fact.text


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("form", NeedleForm)
def test_tokens_of_a_fact_are_where_the_question_says(tokenizer, form, template):
    tokenizer.chat_template = template
    depths = [0.0, 0.3, 0.9, 1.0]
    facts = make_facts(form, len(depths), seed=0)
    prompt = make_needle_prompt(tokenizer, FILLER, form, facts, depths, 2000)
    text = tokenizer.decode(prompt.tokens)
    assert len(prompt.tokens) < 2000
    for fact, depth, question in zip(facts, depths, prompt.questions, strict=True):
        found = tokenizer.decode(prompt.tokens[question.fact_begin : question.fact_end])
        assert fact.text.strip() in found and len(found) < len(fact.text) + 12
        assert question.depth == question.fact_begin / len(prompt.tokens) == pytest.approx(depth, abs=0.1)
        asked = tokenizer.decode(question.tokens)
        assert fact.question.strip() in asked and fact.answer.strip() not in asked
        assert tokenizer.decode(question.answer) == fact.answer
        assert len(prompt.tokens) + len(question.tokens) + len(question.answer) <= 2000
    is_chat = form == NeedleForm.question and template is not None
    assert text.startswith("<user>" if is_chat else "<s>")
    assert asked.endswith("</user><bot>") == is_chat


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_text_with_facts_has_no_end_of_sequence(template):
    tokens = []
    for adds_end in (False, True):
        tokenizer = tiny_tokenizers.byte_level(adds_end=adds_end)
        tokenizer.chat_template = template
        facts = make_facts(NeedleForm.question, 2, seed=0)
        prompt = make_needle_prompt(tokenizer, FILLER, NeedleForm.question, facts, [0.3, 0.9], 2000)
        tokens.append(prompt.tokens)
        assert tokenizer.eos_token_id not in prompt.tokens
        for fact, question in zip(facts, prompt.questions, strict=True):
            assert fact.text.strip() in tokenizer.decode(prompt.tokens[question.fact_begin : question.fact_end])
    assert tokens[0] == tokens[1]
    assert (tokens[0][0] == tokenizer.bos_token_id) == (template is None)


def test_a_context_without_room_for_the_facts_is_refused(tokenizer):
    facts = make_facts(NeedleForm.passage, 4, seed=0)
    with pytest.raises(ConfigError, match=r"^context is 300; it must be at least \d+"):
        make_needle_prompt(tokenizer, FILLER, NeedleForm.passage, facts, [0, 0.3, 0.6, 1], 300)
