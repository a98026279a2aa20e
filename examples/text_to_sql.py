"""Text to SQL: the model looks around in a real SQLite database, tries out queries, and answers with one.

    python examples/text_to_sql.py

makes a small shop database and its own questions about it. With your own databases, which are opened read-only:

    python examples/text_to_sql.py --dataset train.jsonl

A row is `{"question": "...", "sql": "SELECT ...", "database": "path/to/file.db"}`. An answer is right when it gives the
rows that `sql` gives, in any order unless that has an ORDER BY.
"""

from __future__ import annotations

import argparse
import random
import re
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import asyncrl
from asyncrl.config import DataConfig, LoraConfig, OptimizerConfig, SamplerConfig, SamplingConfig

TASK = (
    "Answer the question with one SELECT statement for SQLite. Look at schema() first, and try your statement with "
    "query(sql). When it is right, write it in a ```sql block, and nothing else."
)


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
    """The right rows earn 1, a statement that runs at least 0.1."""
    database = Database(prompt["database"])
    asked = [{"role": "system", "content": TASK}, {"role": "user", "content": prompt["question"]}]
    chat = prompt.policy.chat(asked, tools=[database], max_turns=6)
    sql = statement(await chat.run())
    reward = (
        await asyncrl.offload(grade, prompt["database"], sql, prompt["sql"]) if chat.finish_reason == "stop" else 0.0
    )
    return chat.sample(reward=reward, sql=sql, queries=database.queries)


class Database:
    """What the model may do with the database, and how often it did: one for each rollout."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.queries = 0

    @asyncrl.tool
    def schema(self) -> str:
        """The tables of the database, as CREATE statements."""
        _, rows = select(self.path, "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")
        return "\n".join(sql for (sql,) in rows)

    @asyncrl.tool
    def query(self, sql: str) -> str:
        """Run one SELECT statement and see the first rows of its result.

        Args:
            sql: The statement.
        """
        self.queries += 1
        columns, rows = select(self.path, sql)
        shown = [" | ".join(map(str, row)) for row in (columns, *rows[:SHOWN_ROWS])]
        return "\n".join(shown) + (f"\n[{SHOWN_ROWS} of {len(rows)} rows]" if len(rows) > SHOWN_ROWS else "")


def statement(answer: str) -> str:
    """The SQL of an answer: its last ``` block, or all of it."""
    blocks = re.findall(r"```(?:sql)?\s*(.*?)```", answer, re.DOTALL | re.IGNORECASE)
    return (blocks[-1] if blocks else answer).strip()


def grade(database: str, sql: str, gold: str) -> float:
    """1 for the rows that `gold` gives, 0.1 for others, 0 for a statement that does not run."""
    _, wanted = select(database, gold)
    try:
        _, found = select(database, sql)
    except QueryError:
        return 0.0
    order_counts = re.search(r"\border\s+by\b", gold, re.IGNORECASE)
    right = found == wanted if order_counts else Counter(found) == Counter(wanted)
    return 1.0 if right else 0.1


# Running a statement that a model wrote: read-only in three ways, and limited in time and size

QUERY_S = 2.0
MOST_ROWS, MOST_CHARS, SHOWN_ROWS = 10_000, 1_000_000, 20
LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_LENGTH: 100_000,  # of one value: functions such as zeroblob() make any size
    sqlite3.SQLITE_LIMIT_COLUMN: 100,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,  # one LIKE cannot be interrupted
}
HARMLESS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)

Row = tuple[Any, ...]


class QueryError(ValueError):
    """A statement that cannot be run, for the model to read."""


def select(database: str, sql: str) -> tuple[Row, list[Row]]:
    """The columns and the rows of one SELECT. Whatever else it is, or too long, or too large, is a QueryError."""
    if not Path(database).is_file():
        raise FileNotFoundError(f"there is no database {database!r}. Expected the path of a SQLite file.")
    with closing(sqlite3.connect(f"{Path(database).resolve().as_uri()}?mode=ro", uri=True)) as connection:
        for limit, value in LIMITS.items():
            connection.setlimit(limit, value)
        connection.execute("PRAGMA query_only = ON")
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in HARMLESS else sqlite3.SQLITE_DENY)
        ends = time.monotonic() + QUERY_S
        connection.set_progress_handler(lambda: time.monotonic() > ends, 10_000)
        try:
            cursor = connection.execute(sql)
            if cursor.description is None:
                raise QueryError("expected a SELECT statement")
            return tuple(column[0] for column in cursor.description), _fetch(cursor)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            late = str(error) == "interrupted"
            raise QueryError(f"it took longer than {QUERY_S:g} s" if late else str(error)) from None


def _fetch(cursor: sqlite3.Cursor) -> list[Row]:
    rows: list[Row] = []
    chars = 0
    for row in cursor:
        rows.append(tuple(round(value, 6) if isinstance(value, float) else value for value in row))
        chars += sum(len(value) for value in row if isinstance(value, str | bytes))
        if len(rows) > MOST_ROWS or chars > MOST_CHARS:
            raise QueryError(f"the result is too large: more than {MOST_ROWS} rows or {MOST_CHARS} characters")
    return rows


# The shop, and questions about it

CITIES = ("Lisbon", "Oslo", "Cairo", "Quito", "Hanoi")
PRODUCTS = ("tea", "rice", "soap", "paper", "honey", "salt")
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ines", "Jon", "Kai", "Lea", "Max", "Nia", "Otto")
AGES = range(20, 70, 5)
BOUGHT = "FROM customers JOIN orders ON customers.id = orders.customer_id"
QUESTIONS = {
    "How many customers live in {city}?": "SELECT COUNT(*) FROM customers WHERE city = '{city}'",
    "What is the {which} age of customers in {city}?": "SELECT {function}(age) FROM customers WHERE city = '{city}'",
    "Who lives in {city}, oldest first?": "SELECT name FROM customers WHERE city = '{city}' ORDER BY age DESC",
    "Who in {city} is older than {age}?": "SELECT name FROM customers WHERE city = '{city}' AND age > {age}",
    "How much {product} has been sold?": "SELECT SUM(quantity) FROM orders WHERE product = '{product}'",
    "Who has bought {product}?": f"SELECT DISTINCT name {BOUGHT} WHERE product = '{{product}}'",
    "What has {name} paid for {product}?": (
        f"SELECT SUM(quantity * price) {BOUGHT} WHERE name = '{{name}}' AND product = '{{product}}'"
    ),
    "How much {product} went to {city}?": (
        f"SELECT SUM(quantity) {BOUGHT} WHERE city = '{{city}}' AND product = '{{product}}'"
    ),
}
SLOTS: dict[str, Sequence[dict[str, Any]]] = {
    "{city}": [{"city": city} for city in CITIES],
    "{product}": [{"product": product} for product in PRODUCTS],
    "{name}": [{"name": name} for name in NAMES],
    "{age}": [{"age": age} for age in AGES],
    "{which}": [
        {"which": which, "function": function}
        for which, function in (("average", "AVG"), ("highest", "MAX"), ("lowest", "MIN"))
    ],
}


def questions(database: Path) -> list[dict[str, str]]:
    """Every question with every word in its slots that has an answer, as dataset rows in random order."""
    rows = []
    for question, sql in QUESTIONS.items():
        slots = [values for slot, values in SLOTS.items() if slot in question]
        for filled in product(*slots):
            words = {name: word for slot in filled for name, word in slot.items()}
            row = {"question": question.format(**words), "sql": sql.format(**words), "database": str(database)}
            if select(row["database"], row["sql"])[1] not in ([], [(None,)]):
                rows.append(row)
    random.Random(0).shuffle(rows)
    return rows


def make_shop(path: Path) -> Path:
    """Write the database: customers of all ages, and what they bought."""
    rng = random.Random(0)
    ages = rng.sample(range(18, 80), len(NAMES))  # no two the same, so that "oldest first" has one answer
    customers = [
        (number, name, rng.choice(CITIES), age) for number, (name, age) in enumerate(zip(NAMES, ages, strict=True), 1)
    ]
    orders = [
        (number, rng.randint(1, len(NAMES)), rng.choice(PRODUCTS), rng.randint(1, 9), rng.randint(2, 20))
        for number in range(1, 301)
    ]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, age INTEGER)")
        connection.execute(
            "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers, product TEXT, "
            "quantity INTEGER, price INTEGER)"
        )
        connection.executemany("INSERT INTO customers VALUES (?, ?, ?, ?)", customers)
        connection.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", orders)
    return path


def main(argv: Sequence[str] | None = None) -> asyncrl.TrainResult:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a chat model of the hub, or a folder")
    parser.add_argument("--dataset", help="JSONL with question, sql and database; left out: a shop")
    parser.add_argument("--eval", help="held-out JSONL, measured before and after")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of one step")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of one prompt")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest turn")
    parser.add_argument("--lora-rank", type=int, default=16, help="0 trains the full model")
    parser.add_argument("--sampler", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--out", help="run folder")
    options = parser.parse_args(argv)
    config = asyncrl.Config(
        model=options.model,
        run_dir=options.out,
        max_steps=options.steps,
        data=DataConfig(epochs=options.steps),  # however few rows there are, the steps decide
        prompt_groups_per_step=options.prompts,
        completions_per_prompt=options.rollouts,
        sampling=SamplingConfig(max_tokens=options.max_tokens),
        lora=LoraConfig(rank=options.lora_rank),
        optimizer=OptimizerConfig(learning_rate=5e-5 if options.lora_rank else 2e-6, warmup_steps=5),
        sampler=SamplerConfig(kind=options.sampler),
    )
    if options.dataset is not None:
        return asyncrl.train(rollout, dataset=options.dataset, evaluation=options.eval, config=config)
    with tempfile.TemporaryDirectory() as folder:
        rows = questions(make_shop(Path(folder) / "shop.db"))
        return asyncrl.train(rollout, dataset=rows[64:], evaluation=rows[:64], config=config)


if __name__ == "__main__":
    main()
