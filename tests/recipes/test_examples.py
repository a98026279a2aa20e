"""Which tokens are trained, exactly: by templates that append, rewrite, or mark, and tokenizers that merge or pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from asyncrl.agents.template import TurnTemplate
from asyncrl.errors import DataError, ModelError
from asyncrl.recipes.examples import Encoder, Example
from asyncrl.testing.models import CHAT_TEMPLATE, tiny_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Bye, naïve 🙂"},
]

PLAIN = """\
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# Writes empty thoughts into the last assistant message and none into earlier ones.
REWRITING = PLAIN.replace(
    "+ m.content", "+ ('<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' and loop.last else '') + m.content"
)
MARKED = """\
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}
{%- else -%}{{ m.content + '<|im_end|>\\n' }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
# A special token after the whole conversation, behind the one that closes the turn.
CLOSED = PLAIN + "{%- if not add_generation_prompt -%}{{ '<|endoftext|>' }}{%- endif -%}"
BARE = """\
{%- for m in messages -%}{{ m.role + ': ' + m.content + '\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"""
SPACED = PLAIN.replace("m.content + '<|im_end|>", "' ' + m.content + ' <|im_end|>").replace(
    "m.role + '\\n' + ' '", "m.role + '\\n '"
)


def encode(tokenizer: Any, weights: Sequence[float], messages: Sequence[Any] = TALK) -> list[Example]:
    return Encoder(tokenizer).conversation(messages, weights)


def trained(tokenizer: Any, example: Example) -> list[str]:
    """The texts of the runs of trained tokens."""
    runs: list[list[int]] = [[]]
    for token, weight in zip(example.tokens, example.weights, strict=True):
        if weight:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


ALL, LAST = (0, 0, 1, 0, 1), (0, 0, 0, 0, 1)


def test_each_turn_is_trained_with_the_token_that_ends_it_and_without_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    (example,) = encode(tokenizer, ALL)
    assert trained(tokenizer, example) == ["Hello.<|im_end|>", "Bye, naïve 🙂<|im_end|>"]
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(example.tokens) == text.removesuffix("\n")


def test_the_last_turn_alone() -> None:
    tokenizer = tiny_tokenizer()
    (example,) = encode(tokenizer, LAST)
    assert trained(tokenizer, example) == ["Bye, naïve 🙂<|im_end|>"]


def test_weights_are_those_of_the_messages() -> None:
    (example,) = encode(tiny_tokenizer(), (0, 0, 0.5, 0, 2))
    assert list(dict.fromkeys(example.weights)) == [0.0, 0.5, 2.0]


def test_nothing_to_train_is_no_example() -> None:
    assert encode(tiny_tokenizer(), (0, 0, 0, 0, 0)) == []


def test_the_tokens_are_those_of_a_rollout() -> None:
    """What `policy.chat` puts before and between the model's turns is what stands there in training."""
    tokenizer = tiny_tokenizer()
    turns = TurnTemplate(tokenizer)
    expected = [
        *turns.opening(TALK[:2], ()),
        *tokenizer.encode("Hello.<|im_end|>"),
        *turns.continuation(TALK[3:4], ()),
        *tokenizer.encode("Bye, naïve 🙂<|im_end|>"),
    ]
    (example,) = encode(tokenizer, ALL)
    assert list(example.tokens) == expected


def test_calls_of_tools_are_trained_and_their_results_are_not() -> None:
    tokenizer = tiny_tokenizer()
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    talk = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    (example,) = Encoder(tokenizer).conversation(talk, (0, 1, 0, 1), [tool])
    assert trained(tokenizer, example) == [
        '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
        "2<|im_end|>",
    ]
    assert '"parameters": {}' in tokenizer.decode(example.tokens)


def test_a_template_that_rewrites_history_gives_an_example_for_each_turn() -> None:
    """Each after the history as the model will see it, ending with what it then has to say."""
    tokenizer = tiny_tokenizer(chat_template=REWRITING)
    first, second = encode(tokenizer, ALL)
    assert trained(tokenizer, first) == ["<think>\n\n</think>\n\nHello.<|im_end|>"]
    assert trained(tokenizer, second) == ["<think>\n\n</think>\n\nBye, naïve 🙂<|im_end|>"]
    for example, turn in ((first, 2), (second, 4)):
        prompt = tokenizer.apply_chat_template(TALK[:turn], add_generation_prompt=True, return_dict=False)
        assert list(example.tokens[: len(prompt)]) == prompt
        assert not any(example.weights[: len(prompt)])
        assert all(example.weights[len(prompt) :])


def test_marks_of_the_template_are_used_where_it_has_them() -> None:
    tokenizer = tiny_tokenizer(chat_template=MARKED)
    plain = tiny_tokenizer(chat_template=PLAIN)
    for weights in (ALL, LAST, (0, 0, 0.5, 0, 2)):
        (marked,), (found,) = encode(tokenizer, weights), encode(plain, weights)
        assert trained(tokenizer, marked) == trained(plain, found)
        assert list(marked.tokens)[:-1] == list(found.tokens)  # the line break after the last turn stays
        assert list(marked.weights)[:-1] == list(found.weights)


def test_marks_around_other_turns_cannot_carry_weights() -> None:
    tokenizer = tiny_tokenizer(chat_template=MARKED.replace("m.role == 'assistant'", "loop.last"))
    (example,) = encode(tokenizer, ALL)
    assert trained(tokenizer, example) == ["Bye, naïve 🙂<|im_end|>"]
    with pytest.raises(DataError, match="2 turns of the assistant have different weights, but the chat template marks"):
        encode(tokenizer, LAST)


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (CLOSED, ["Hello.<|im_end|>", "Bye, naïve 🙂<|im_end|>"]),
        (BARE, ["Hello.\n", "Bye, naïve 🙂\n"]),
        (SPACED, [" Hello. <|im_end|>", " Bye, naïve 🙂 <|im_end|>"]),
        (CHAT_TEMPLATE, ["Hello.<|im_end|>", "Bye, naïve 🙂<|im_end|>"]),
    ],
    ids=["closed twice", "without a closing token", "a space before it", "tiny"],
)
def test_where_a_turn_ends(template: str, turns: list[str]) -> None:
    tokenizer = tiny_tokenizer(chat_template=template)
    assert [said for example in encode(tokenizer, ALL) for said in trained(tokenizer, example)] == turns


def test_a_turn_that_closes_with_another_token_ends_there() -> None:
    """As calls of tools do in some templates."""
    source = PLAIN.replace(
        "m.content + '<|im_end|>\\n'", "m.content + ('<|endoftext|>' if m.call else '<|im_end|>') + '\\n'"
    )
    tokenizer = tiny_tokenizer(chat_template=source)
    talk = [TALK[1], {"role": "assistant", "content": "f()", "call": True}, TALK[3], TALK[4]]
    (example,) = encode(tokenizer, (0, 1, 0, 1), talk)
    assert trained(tokenizer, example) == ["f()<|endoftext|>", "Bye, naïve 🙂<|im_end|>"]


def test_a_token_that_would_cross_the_edge_is_cut_there() -> None:
    """The prompt ends at the edge when the model is used, so it does in training."""
    tokenizer = tiny_tokenizer(words=["assistant\nBye"])
    (example,) = encode(tokenizer, LAST)
    assert trained(tokenizer, example) == ["Bye, naïve 🙂<|im_end|>"]
    prompt = tokenizer.apply_chat_template(TALK[:4], add_generation_prompt=True, return_dict=False)
    assert list(example.tokens[: len(prompt)]) == prompt


def sentencepiece_like(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Puts a space before every text, as many tokenizers made by SentencePiece do, and begins with <s>."""
    letters = sorted(
        {letter for message in TALK for letter in message["role"] + message["content"]}
        | set(":\n▁ 0123456789asyncrlmarker?")
    )
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>", continuing_subword_prefix=""))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = BARE
    return wrapped


def test_a_tokenizer_that_puts_spaces_before_texts() -> None:
    tokenizer = sentencepiece_like([])
    (example,) = encode(tokenizer, LAST)
    whole = tokenizer.encode(tokenizer.apply_chat_template(TALK, tokenize=False), add_special_tokens=False)
    assert list(example.tokens) == whole
    first = list(example.weights).index(1.0)
    assert tokenizer.convert_ids_to_tokens(whole[first - 1 : first + 4]) == ["▁", "B", "y", "e", ","]
    assert all(example.weights[first:])


def test_a_token_across_the_edge_of_such_a_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match="lets a token cross the edge of a turn"):
        encode(sentencepiece_like(["▁Bye"]), LAST)


def test_text_begins_as_the_tokenizer_begins_and_ends_with_its_end() -> None:
    tokenizer = sentencepiece_like([])
    example = Encoder(tokenizer).text("And?", " Bye")
    assert tokenizer.convert_ids_to_tokens(list(example.tokens)) == ["<s>", *"▁And?▁Bye", "</s>"]
    assert list(example.weights) == [0.0] * 6 + [1.0] * 5
    assert list(Encoder(tokenizer).text("", "And?").weights) == [0.0] + [1.0] * 6


def test_a_text_that_has_its_end_gets_no_second_one() -> None:
    tokenizer = tiny_tokenizer()
    example = Encoder(tokenizer).text("2+2=", "4<|im_end|>")
    assert tokenizer.decode(example.tokens) == "2+2=4<|im_end|>"
    assert list(example.weights) == [0.0] * 4 + [1.0] * 2


def test_the_first_token_is_never_trained() -> None:
    example = Encoder(tiny_tokenizer()).text("", "ab")
    assert list(example.weights) == [0.0, 1.0, 1.0]


def test_cutting_and_masking() -> None:
    example = Encoder(tiny_tokenizer()).text("ab", "cd")
    assert list(example.cut(3).weights) == [0, 0, 1]
    assert not example.cut(2).trained
    assert list(example.masked(3).weights) == [0, 0, 0, 1, 1]
    assert list(example.rejected().weights) == [0, 0, -1, -1, -1]


@given(
    contents=st.lists(st.text(alphabet="ab \n<|é", max_size=6), min_size=1, max_size=4),
    chosen=st.lists(st.booleans(), min_size=4, max_size=4),
    template=st.sampled_from([CHAT_TEMPLATE, PLAIN, REWRITING, BARE, CLOSED, SPACED]),
)
@settings(max_examples=60, deadline=None)
def test_every_trained_turn_follows_its_prompt_exactly(contents: list[str], chosen: list[bool], template: str) -> None:
    """Any texts: before each trained turn stand the tokens of the prompt that the model would be given there."""
    tokenizer = tiny_tokenizer(chat_template=template)
    talk: list[dict[str, str]] = []
    for content in contents:
        talk += [{"role": "user", "content": content}, {"role": "assistant", "content": content[::-1]}]
    weights = [float(place % 2 == 1 and chosen[place // 2]) for place in range(len(talk))]
    turns = [
        (list(example.tokens), place)
        for example in encode(tokenizer, weights, talk)
        for place, weight in enumerate(example.weights)
        if weight and not example.weights[place - 1]
    ]
    prompts = [
        tokenizer.apply_chat_template(talk[:place], add_generation_prompt=True, return_dict=False)
        for place, weight in enumerate(weights)
        if weight
    ]
    assert [tokens[:place] for tokens, place in turns] == prompts


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            PLAIN.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"),
            "lets the model begin with",
        ),
        (PLAIN.replace("m.content", "(m.content if m.role == 'user' else '')"), "it drops what the assistant said"),
        (None, "there is none"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused(source: str | None, reason: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    with pytest.raises(ModelError, match=reason):
        encode(tokenizer, (0, 1), TALK[1:3])


def test_messages_that_a_template_cannot_render_are_named() -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('no system here') }}")
    with pytest.raises(DataError, match="messages with the roles system, user, assistant, user: no system"):
        encode(tokenizer, LAST)


def test_an_assistant_that_answers_nothing_cannot_be_trained() -> None:
    with pytest.raises(DataError, match="first message is the assistant's, and nothing comes before it"):
        encode(tiny_tokenizer(), (1, 0), TALK[2:4])
