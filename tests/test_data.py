from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import DataConfig
from asyncrl.data import Cursor, Prompt, PromptStream, load_rows
from asyncrl.errors import DataError


def rows(count: int) -> list[dict[str, int]]:
    return [{"n": n} for n in range(count)]


def drain(stream: PromptStream) -> list[tuple[int, int]]:
    found = []
    while not stream.exhausted:
        found.append(stream.draw().key)
    return found


class TestLoadRows:
    def test_jsonl(self, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text('{"q": "1+1"}\n\n{"q": "é"}\n', encoding="utf-8")
        assert list(load_rows(file)) == [{"q": "1+1"}, {"q": "é"}]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"q": 1}\n{"q": }\n', r"rows.jsonl, line 2: not JSON: Expecting value at column 7"),
            ('{"q": 1}\n\n[1, 2]\n', r"rows.jsonl, line 3: found a JSON list: \[1, 2\]. Expected a JSON object."),
            ("", "the dataset has no rows"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            load_rows(file)

    def test_a_file_that_is_not_there_or_not_text(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no dataset file"):
            load_rows(tmp_path / "none.jsonl")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match="cannot be read as UTF-8"):
            load_rows(tmp_path / "binary")

    @pytest.mark.parametrize("dataset", [{"q": [1]}, 7, iter([{"q": 1}])])
    def test_what_has_no_index_is_refused(self, dataset: object) -> None:
        with pytest.raises(DataError, match="Expected the path of a JSONL file"):
            load_rows(dataset)  # type: ignore[arg-type]

    def test_a_datasets_dataset(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        found = load_rows(datasets.Dataset.from_list([{"q": "a"}, {"q": "b"}]))
        stream = PromptStream(found, DataConfig(shuffle=False), seed=0)
        assert [stream.draw().row["q"], stream.draw().row["q"]] == ["a", "b"]


class TestPromptStream:
    @given(count=st.integers(1, 30), epochs=st.integers(1, 3), seed=st.integers(0, 9), shuffle=st.booleans())
    def test_every_row_once_an_epoch(self, count: int, epochs: int, seed: int, shuffle: bool) -> None:
        stream = PromptStream(rows(count), DataConfig(epochs=epochs, shuffle=shuffle), seed)
        found = drain(stream)
        assert len(found) == count * epochs
        for epoch in range(epochs):
            assert sorted(index for e, index in found if e == epoch) == list(range(count))

    @given(at=st.integers(0, 40), seed=st.integers(0, 5))
    def test_a_stream_goes_on_exactly_from_its_cursor(self, at: int, seed: int) -> None:
        config = DataConfig(epochs=2, max_rows=20)
        whole = PromptStream(rows(25), config, seed)
        for _ in range(at):
            whole.draw()
        again = PromptStream(rows(25), config, seed)
        again.go_on(whole.cursor)
        assert drain(again) == drain(whole)

    def test_the_order_is_that_of_the_seed_and_the_epoch(self) -> None:
        config = DataConfig(epochs=2)
        found = drain(PromptStream(rows(50), config, 1))
        assert found == drain(PromptStream(rows(50), config, 1))
        assert found != drain(PromptStream(rows(50), config, 2))
        assert [index for _, index in found[:50]] != [index for _, index in found[50:]]

    def test_max_rows_takes_the_first(self) -> None:
        stream = PromptStream(rows(50), DataConfig(max_rows=3), 0)
        assert sorted(drain(stream)) == [(0, 0), (0, 1), (0, 2)]

    def test_a_draw_that_is_given_back_comes_next(self) -> None:
        stream = PromptStream(rows(2), DataConfig(shuffle=False), 0)
        first = stream.draw()
        stream.draw()
        assert stream.exhausted
        stream.give_back(*first.key)
        assert not stream.exhausted
        again = stream.draw()
        assert (again.key, again.again, stream.cursor) == (first.key, True, Cursor(1, 0))


class TestPrompt:
    def prompt(self, row: dict[str, object], **more: int) -> Prompt:
        return Prompt(row, policy=None, index=3, **more)  # type: ignore[arg-type]

    def test_it_is_a_mapping_over_the_row(self) -> None:
        prompt = self.prompt({"q": "x", "a": 1})
        assert dict(prompt) == {"q": "x", "a": 1}
        assert prompt.get("none") is None
        with pytest.raises(KeyError, match="the row has 'q', 'a'"):
            prompt["question"]
        with pytest.raises(TypeError):
            prompt["q"] = "y"  # type: ignore[index]

    def test_a_rollout_cannot_change_the_row_of_another(self) -> None:
        row: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}]}
        prompt = self.prompt(row)
        prompt["messages"].append("mine")
        prompt["messages"][0]["content"] = "mine"
        assert row == json.loads('{"messages": [{"role": "user", "content": "hi"}]}')

    def test_its_randomness_is_that_of_its_place(self) -> None:
        first = self.prompt({}, seed=1, rollout_index=2).rng.random()
        assert first == self.prompt({}, seed=1, rollout_index=2).rng.random()
        assert first != self.prompt({}, seed=1, rollout_index=3).rng.random()
        assert first != self.prompt({}, seed=1, rollout_index=2, epoch=1).rng.random()
        assert first != self.prompt({}, seed=1, rollout_index=2, evaluation=True).rng.random()
