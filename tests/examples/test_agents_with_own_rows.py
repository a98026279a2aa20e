"""The examples that make their own rows, as users run them, with a model that has learned a few things to say."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from asyncrl.config import Config, LossConfig, OptimizerConfig
from asyncrl.demo.model import torch_threads
from asyncrl.losses import cross_entropy
from asyncrl.testing.models import tiny_model, tiny_tokenizer
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence

ROOT = Path(__file__).parents[2]
SHARED_PUZZLES = ROOT.parent / "shared" / "data" / "countdown.jsonl"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sql, countdown, code = load("text_to_sql"), load("countdown"), load("code_agent")


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


TEAS = "SELECT SUM(quantity) FROM orders WHERE product = 'tea'"
COUNT = "import sys; print(len(sys.stdin.read().split()))"
CALLS = {
    "sql": [call("schema"), call("query", sql=TEAS)],
    "countdown": [],
    "code": [call("python", code=COUNT, stdin="1 2")],
}
ANSWERS = {
    "sql": {TEAS: 1.0, f"```sql\n{TEAS}\n```": 1.0, "SELECT 1": 0.1, "DROP TABLE orders": 0.0},
    "countdown": {"<answer>1 + 2</answer>": 1.0, "<answer>1 * 2 = 3</answer>": 0.1, "<answer>2 + 2</answer>": 0.0},
    "code": {f"```python\n{COUNT}\n```": 1.0, "```python\nprint(3)\n```": 0.25, "```python\n1 / 0\n```": 0.0},
}
"""What the model says, whatever it is asked, one token each; and what that is worth where it belongs."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = sql.make_shop(tmp_path_factory.mktemp("shop") / "shop.db")
    return made


@pytest.fixture(scope="module")
def rows(shop: Path) -> dict[str, list[dict[str, Any]]]:
    asked = {"question": "How much tea has been sold?", "sql": TEAS, "database": str(shop)}
    counted = [{"stdin": "4 5 6", "stdout": "3"}, {"stdin": "7", "stdout": "1"}]
    return {
        "sql": [asked] * 12,
        "countdown": [{"numbers": [1, 2], "target": 3}] * 12,
        "code": [{"task": "Print how many integers there are.", "tests": counted}] * 12,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(words=[saying for kind in ANSWERS for saying in (*CALLS[kind], *ANSWERS[kind])])
    blank = tiny_model(folder / "blank", hidden=32, layers=1, tokenizer=tokenizer)
    config = Config(model=str(blank), loss=LossConfig(kl_beta=0), optimizer=OptimizerConfig(learning_rate=1e-2))
    trainer = TorchTrainer(config, total_steps=40, weights_format="tensors")
    rng = random.Random(0)
    openings: dict[str, Callable[[], dict[str, Any]]] = {
        "sql": lambda: {
            "conversation": [{"role": "system", "content": sql.TASK}, {"role": "user", "content": "How much?"}],
            "tools": [sql.Database("").query.schema, sql.Database("").schema.schema],
        },
        "countdown": lambda: {"conversation": [{"role": "user", "content": countdown.TASK}]},
        "code": lambda: {"conversation": [{"role": "user", "content": code.TASK}], "tools": [code.python.schema]},
    }
    with torch_threads(1):
        for _ in range(40):
            batch = []
            for kind, opening in openings.items():
                prompt = tokenizer.apply_chat_template(**opening(), add_generation_prompt=True, return_dict=False)
                answer = tokenizer.encode(rng.choice([*CALLS[kind], *ANSWERS[kind]]) + "<|im_end|>")
                mask = [0] * len(prompt) + [1] * len(answer)
                batch.append(TrainSequence([*prompt, *answer], [0.0] * len(mask), mask, advantage=1.0, group=0))
            trainer.forward_backward_custom(batch, cross_entropy)
            trainer.optim_step()
    trainer.save_model(folder / "lucky")
    return folder / "lucky"


def arguments(model: Path, out: Path, dataset: Path | None = None) -> list[str]:
    small = "--steps 2 --prompts 2 --rollouts 8 --max-tokens 4 --lora-rank 0 --sampler transformers"
    given = ["--dataset", str(dataset)] if dataset else []
    return ["--model", str(model), "--out", str(out), *small.split(), *given]


@pytest.mark.parametrize(("kind", "example"), [("sql", sql), ("countdown", countdown), ("code", code)])
def test_it_trains_and_every_answer_gets_what_it_deserves(
    kind: str,
    example: ModuleType,
    rows: dict[str, list[dict[str, Any]]],
    model: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "code":
        request.getfixturevalue("walls")
    dataset = tmp_path / "rows.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
    held_out = ["--eval-puzzles", "2"] if kind == "countdown" else ["--eval", str(dataset)]
    result = example.main([*arguments(model, tmp_path / "run", dataset), *held_out])
    assert result.steps == 2
    assert result.after is not None
    judged = called = 0
    for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines():
        for rollout in json.loads(line)["rollouts"]:
            info = rollout["samples"][0]["info"]
            last = info["messages"][-1]["content"]
            if info["finish_reason"] == "stop" and last in ANSWERS[kind]:
                assert rollout["reward"] == ANSWERS[kind][last]
                judged += 1
            called += any("tool_calls" in message for message in info["messages"])
    assert judged
    assert called or not CALLS[kind]


@pytest.mark.parametrize("example", [sql, countdown, code])
def test_without_a_dataset_it_makes_one(
    example: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "EXERCISES", {"their sum": sum})
    few = ["--steps", "1", "--rollouts", "4", *(["--eval-puzzles", "2"] if example is countdown else [])]
    result = example.main([*arguments(model, tmp_path / "run"), *few])
    assert result.rollouts >= 8


@pytest.mark.skipif(not SHARED_PUZZLES.is_file(), reason="the puzzles are not beside this clone")
def test_the_shared_puzzles_are_understood_and_asked_in_their_own_words(model: Path, tmp_path: Path) -> None:
    result = countdown.main([*arguments(model, tmp_path / "run", SHARED_PUZZLES), "--eval-puzzles", "0"])
    logged = (tmp_path / "run" / "rollouts.jsonl").read_text()
    assert result.ledger["pending"] == 0
    assert "create an equation that equals" in logged or result.ledger["trained"] == 0
    for line in SHARED_PUZZLES.read_text().splitlines():
        row = json.loads(line)
        numbers, target = countdown.puzzle(row)
        assert str(numbers) in row["messages"][-1]["content"]
        assert str(target) in row["messages"][-1]["content"]


# Text to SQL


def test_every_question_about_the_shop_has_an_answer_that_its_statement_finds(shop: Path) -> None:
    asked = sql.questions(shop)
    assert len(asked) > 150
    assert len({row["question"] for row in asked}) == len(asked)
    assert all(sql.grade(str(shop), row["sql"], row["sql"]) == 1.0 for row in asked)
    wrong = [sql.grade(str(shop), row["sql"].replace("SUM", "MIN").replace("age", "id"), row["sql"]) for row in asked]
    assert wrong.count(0.1) > 50


@pytest.mark.parametrize(
    ("statement", "gold", "reward"),
    [
        ("SELECT name FROM customers ORDER BY id DESC", "SELECT name FROM customers", 1.0),
        ("SELECT name FROM customers ORDER BY id DESC", "SELECT name FROM customers ORDER BY id", 0.1),
        ("SELECT name FROM customers LIMIT 3", "SELECT name FROM customers", 0.1),
        ("SELECT name FROM customers UNION ALL SELECT 'Ada'", "SELECT name FROM customers", 0.1),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", 1.0),
        ("SELECT 3.0", "SELECT 3", 1.0),
        ("SELECT nothing", "SELECT 3", 0.0),
        ("", "SELECT 3", 0.0),
    ],
)
def test_rows_are_compared_as_sets_with_counts_or_in_order(
    statement: str, gold: str, reward: float, shop: Path
) -> None:
    assert sql.grade(str(shop), statement, gold) == reward


@pytest.mark.parametrize(
    "statement",
    [
        "ATTACH 'other.db' AS other",
        "PRAGMA query_only = OFF",
        "PRAGMA user_version = 3",
        "DELETE FROM orders",
        "DROP TABLE orders",
        "CREATE TEMP TABLE mine (x)",
        "SELECT 1; DROP TABLE orders",
        "VACUUM INTO 'copy.db'",
        "SELECT load_extension('evil')",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c",
        "SELECT COUNT(*) FROM orders, orders, orders, orders, orders",
        "SELECT * FROM orders a, orders b, orders c",
        "SELECT zeroblob(1000000000)",
        "SELECT randomblob(90000), randomblob(90000) FROM orders",
        "SELECT '\ud800'",
        "SELECT 1\0",
        "SELECT CAST(x'ff' AS TEXT)",
        f"SELECT 1{' + 1' * 5000}",
        "BEGIN",
        "-- nothing",
    ],
)
async def test_hostile_sql_is_an_error_for_the_model(
    statement: str, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sql, "QUERY_S", 0.1)
    before = digest(shop)
    database = sql.Database(str(shop))
    result = await database.query.invoke({"sql": statement})
    assert result.error
    assert "QueryError" in result.text
    assert len(result.text) < 300
    assert digest(shop) == before
    assert os.listdir(tmp_path) + os.listdir(shop.parent) == [shop.name]
    assert sql.grade(str(shop), statement, "SELECT 1") == 0.0


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


async def test_the_model_sees_tables_and_the_first_rows(shop: Path) -> None:
    database = sql.Database(str(shop))
    assert (await database.schema.call({})).startswith("CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT")
    seen = (await database.query.call({"sql": "SELECT id, name FROM customers"})).splitlines()
    assert seen[:2] == ["id | name", "1 | Ada"]
    assert (await database.query.call({"sql": "SELECT * FROM orders"})).endswith("\n[20 of 300 rows]")
    assert database.queries == 2


def test_a_database_that_is_not_there_is_the_rows_fault(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected the path of a SQLite file"):
        sql.grade(str(tmp_path / "none.db"), "SELECT 1", "SELECT 1")
    with pytest.raises(sql.QueryError):
        sql.grade(str(sql.make_shop(tmp_path / "shop.db")), "SELECT 1", "SELECT wrong")


# Countdown


def test_every_puzzle_can_be_solved() -> None:
    rng = random.Random(0)
    puzzles = [countdown.make_puzzle(rng) for _ in range(30)]
    assert all(puzzle["target"] in reachable(tuple(map(Fraction, puzzle["numbers"]))) for puzzle in puzzles)
    assert {len(puzzle["numbers"]) for puzzle in puzzles} == {3, 4}


def reachable(values: tuple[Fraction, ...]) -> set[Fraction]:
    if len(values) == 1:
        return {values[0]}
    found = set()
    for left, right, *rest in permutations(values):
        for joined in (left + right, left - right, left * right, *([left / right] if right else [])):
            found |= reachable((joined, *rest))
    return found


@pytest.mark.parametrize(
    ("expression", "reward"),
    [
        ("45 + 14 - 39", 1.0),
        ("(45-39)+14", 1.0),
        ("45 + 14 + 39", 0.1),
        ("39 / 45 / 14", 0.1),
        ("45 + 14", 0.0),
        ("45 + 14 - 39 + 39 - 39", 0.0),
        ("45 + 14 - 39 // 1", 0.0),
        ("45 / (14 - 14) * 39", 0.0),
        ("45 ** 14 ** 39", 0.0),
        ("(" * 100, 0.0),
        ("-" * 199 + "1", 0.0),
        ("__import__('os')", 0.0),
        ("45(14)39", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_an_expression_is_worth(expression: str | None, reward: float) -> None:
    assert countdown.score(expression, [14, 39, 45], 20) == reward


def test_the_last_answer_counts() -> None:
    assert countdown.final_expression("<answer>1</answer> no: <answer>\n2 *\n3 = 6 </answer>") == "2 * 3"
    assert countdown.final_expression("<answer>1") is None


# The programmer


@pytest.mark.usefixtures("walls")
async def test_right_programs_pass_and_others_pass_in_part_or_not_at_all() -> None:
    tests = [{"stdin": "4 5 6", "stdout": "3"}, {"stdin": "7", "stdout": "1\n"}]
    assert await code.share_passed(COUNT, tests) == 1.0
    assert await code.share_passed("print(3)", tests) == 0.5
    assert await code.share_passed("print(3); raise SystemExit(1)", tests) == 0.0
    assert await code.share_passed("syntax error", tests) == 0.0


@pytest.mark.usefixtures("walls")
async def test_every_exercise_has_tests_that_tell_answers_apart() -> None:
    rows = code.exercises()
    assert len({row["task"] for row in rows}) == len(rows) == 50
    assert all(len({test["stdout"] for test in row["tests"]}) > 1 for row in rows)
    task = next(row for row in rows if "multiples of 3" in row["task"] and "their sum." in row["task"])
    solution = "print(sum(n for n in map(int, input().split()) if n % 3))"
    assert await code.share_passed(solution, task["tests"]) == 1.0
    assert await code.share_passed(solution.replace("n % 3", "True"), task["tests"]) < 1.0


@pytest.mark.usefixtures("walls")
async def test_the_tool_shows_what_the_program_prints_and_survives_it() -> None:
    assert await code.python.call({"code": COUNT, "stdin": "1 2"}) == "2"
    assert "ZeroDivisionError" in await code.python.call({"code": "1 / 0"})
    assert "MemoryError" in await code.python.call({"code": "bytearray(10 << 30)"})


def test_the_program_is_the_last_block() -> None:
    assert code.program("```python\na\n```\nbetter:\n```\nb\n```") == "b\n"
    assert code.program("print(1)") is None
