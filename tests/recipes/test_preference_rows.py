from __future__ import annotations

from typing import Any

import pytest

from asyncrl.errors import DataError
from asyncrl.recipes.examples import Encoder, Example
from asyncrl.recipes.preference_rows import Pairing, preference_encoder
from asyncrl.testing.models import tiny_tokenizer
from tests.recipes.test_examples import REWRITING

TOKENIZER = tiny_tokenizer()
USER = {"role": "user", "content": "Hi"}
OTHER = {"role": "user", "content": "So?"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pairs(row: dict[str, Any], pairing: Pairing = "best_worst") -> list[tuple[Example, ...]]:
    return preference_encoder(pairing)(Encoder(TOKENIZER))(row)


def compared(row: dict[str, Any], pairing: Pairing = "best_worst") -> list[tuple[str, ...]]:
    """For each pair, the texts of the trained tokens of both sides; their signs are checked on the way."""
    found = []
    for pair in pairs(row, pairing):
        assert [{weight for weight in side.weights if weight} for side in pair] in ([{1.0}, {-1.0}], [])
        found.append(tuple(said(side) for side in pair))
    return found


def said(example: Example) -> str:
    ids = [token for token, weight in zip(example.tokens, example.weights, strict=True) if weight]
    return str(TOKENIZER.decode(ids))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [says("Good")], "rejected": [says("Bad")]},
        {"chosen": [USER, says("Good")], "rejected": [USER, says("Bad")]},
        {"prompt": None, "chosen": [USER, says("Good")], "rejected": [USER, says("Bad")]},
        {"prompt": "Hi", "chosen": [says("Good")], "rejected": [says("Bad")]},
        {"prompt": [USER], "chosen": "Good", "rejected": "Bad"},
        {"prompt": "Hi", "chosen": "Good", "rejected": "Bad"},
        {"chosen": "Hi: Good", "rejected": "Hi: Bad"},
        {"prompt": [USER], "samples": [{"text": "Bad", "score": 0}, {"text": "Good", "score": 1.5}]},
        {
            "prompt": "Hi",
            "samples": [{"messages": [says(s)], "score": n} for s, n in (("So", 2), ("Good", 3), ("Bad", 1))],
        },
        {"input": {"messages": [USER]}, "preferred_output": [says("Good")], "non_preferred_output": [says("Bad")]},
    ],
)
def test_the_shapes(row: dict[str, Any]) -> None:
    assert compared(row) == [("Good<|im_end|>", "Bad<|im_end|>")]


def test_what_comes_before_is_the_same_on_both_sides() -> None:
    row = {"chosen": [USER, says("A"), OTHER, says("Good")], "rejected": [USER, says("A"), OTHER, says("Bad")]}
    ((chosen, rejected),) = pairs(row)
    prompt = TOKENIZER.apply_chat_template(row["chosen"][:3], add_generation_prompt=True, return_dict=False)
    for side in (chosen, rejected):
        assert list(side.tokens[: len(prompt)]) == prompt
        assert not any(side.weights[: len(prompt)])


def test_texts_without_a_prompt_are_compared_from_where_they_differ() -> None:
    assert compared({"chosen": "Q: x A: yes", "rejected": "Q: x A: no"}) == [("yes<|im_end|>", "no<|im_end|>")]
    assert compared({"chosen": "ab", "rejected": "abc"}) == [("<|im_end|>", "c<|im_end|>")]


def test_openai_rows_bring_their_tools() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    row = {
        "input": {"messages": [USER], "tools": [tool], "parallel_tool_calls": True},
        "preferred_output": [says("Good")],
        "non_preferred_output": [says("Bad")],
    }
    ((chosen, _),) = pairs(row)
    assert "Tools:" in TOKENIZER.decode(list(chosen.tokens))


SAMPLES = [{"text": text, "score": score} for text, score in (("a", 1), ("b", 3), ("c", 2), ("d", 2))]


def test_all_pairs_of_unequal_scores() -> None:
    found = compared({"prompt": "Hi", "samples": SAMPLES}, "all")
    ends = [tuple(side.removesuffix("<|im_end|>") for side in pair) for pair in found]
    assert ends == [("b", "c"), ("b", "d"), ("b", "a"), (), ("c", "a"), ("d", "a")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "samples": [{"text": "a", "score": 1}, {"text": "b", "score": 1.0}]},
        {"prompt": "Hi", "chosen": "same", "rejected": "same"},
        {"chosen": "same", "rejected": "same"},
        {"prompt": [USER], "chosen": [says("same")], "rejected": [says("same")]},
        {"chosen": [USER, says("same")], "rejected": [USER, says("same")]},
    ],
)
def test_ties_are_empty(row: dict[str, Any]) -> None:
    assert pairs(row) == [()]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "?"},
            "found the fields 'question'. Expected `chosen` and `rejected`; `prompt` and `samples`; or",
        ),
        ({"chosen": "a"}, "found the fields 'chosen'"),
        ({"samples": SAMPLES}, "Expected `prompt` beside `samples`"),
        ({"prompt": "Hi", "samples": SAMPLES[:1]}, "at least two answers"),
        ({"prompt": "Hi", "samples": [{"text": "a"}, SAMPLES[0]]}, r"samples\[0\].score is None. Expected a finite"),
        ({"prompt": "Hi", "samples": [SAMPLES[0], {"text": "a", "score": float("nan")}]}, r"samples\[1\].score is nan"),
        ({"prompt": "Hi", "samples": [SAMPLES[0], {"score": 1}]}, r"samples\[1\] is .* Expected {\"text\" or"),
        ({"preferred_output": [], "non_preferred_output": []}, "input is missing or has no messages"),
        (
            {"input": {"messages": [USER]}, "preferred_output": "Good", "non_preferred_output": [says("Bad")]},
            "preferred_output is str 'Good'. Expected a list of messages",
        ),
        ({"prompt": [USER], "chosen": [OTHER], "rejected": [says("Bad")]}, "the chosen answer: no message is the"),
        ({"chosen": [USER, says("a"), OTHER], "rejected": [USER, says("a"), USER]}, "the chosen answer: no message"),
        ({"prompt": [USER], "chosen": 3, "rejected": [says("Bad")]}, "chosen is int 3. Expected text, or a list of"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        pairs(row)


def test_answers_of_several_turns_need_a_template_that_keeps_history() -> None:
    row = {"prompt": [USER], "chosen": [says("a"), OTHER, says("b")], "rejected": [says("c")]}
    assert compared(row) == [("a<|im_end|>b<|im_end|>", "c<|im_end|>")]
    with pytest.raises(DataError, match="the chosen answer is 2 token sequences, because the chat template renders"):
        preference_encoder("best_worst")(Encoder(tiny_tokenizer(chat_template=REWRITING)))(row)
