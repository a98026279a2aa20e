"""Ten thousand bad rollouts, made by hypothesis, through the real scheduler and the real evaluation.

Each is one fault: a value that no rollout function should return, or an exception. In a group of three one member has
it and the others do not. The fault is counted and has a message of its own, which names the place; the others are
trained, nothing malformed reaches the trainer, and the ledger accounts for every prompt.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, Verbosity, assume, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from asyncrl.assemble import assemble
from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.errors import RecoverableRolloutError, RolloutFailed
from asyncrl.rollout.contract import LARGEST, Contract
from asyncrl.rollout.estimate import EvalResult
from asyncrl.rollout.evaluation import Evaluator
from asyncrl.rollout.failures import is_recoverable
from asyncrl.rollout.scheduler import RolloutFn
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import Rollout, RolloutRun, RolloutSample, TrainSequence

FAULTS_PER_RUN = 50
RUNS = 200
"""Times the faults of one run: ten thousand."""
VOCABULARY = 100
MAX_TOKENS = 16
LONGEST_LINE, LONGEST_ERROR = 3_000, 25_000
"""Characters of what is said about one fault, whatever it carries; the error that ends a run has a traceback."""
CONTRACT = Contract(VOCABULARY, MAX_TOKENS)
GUILTY = 1
"""The member of each group that has the fault."""


# What can be wrong


class Odd(BaseException):
    """What no `except Exception` sees."""


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")

    __repr__ = __str__


class Unhashable(Exception):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise TypeError("not to be compared")


class Guarded(Exception):
    """As of a client library whose properties raise."""

    @property
    def response(self) -> object:
        raise RuntimeError("closed")

    @property
    def status(self) -> object:
        raise RuntimeError("closed")


def hostile(method: str, error: type[BaseException] = RuntimeError, base: type = object) -> object:
    """An object whose `method` raises; it counts three entries, so that others come to be asked."""

    def raises(self: object, *args: object) -> object:
        raise error("mine")

    methods: dict[str, Any] = {"__len__": lambda self: 3, "__iter__": lambda self: iter([5, 6, 7])}
    return type("Hostile", (base,), methods | {method: raises})()


def endless() -> Iterator[int]:
    return itertools.cycle([1])


def lying(length: int) -> object:
    """Says `length`, gives without end."""
    return type("Lying", (), {"__len__": lambda self: length, "__iter__": lambda self: endless()})()


def recursive() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


# Hypothesis draws makers, not values: it looks at what it draws, and these values do not bear that.

Make = Callable[[], Any]
Makers = st.SearchStrategy[Make]


def plain(values: st.SearchStrategy[Any]) -> Makers:
    return values.map(lambda value: lambda: value)


def one_of(*values: Any) -> Makers:
    return plain(st.integers(0, len(values) - 1).map(values.__getitem__))


def raising(*methods: str) -> Makers:
    return st.sampled_from(methods).map(lambda method: lambda: hostile(method))


def as_objects(values: list[Any]) -> Any:
    made = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        made[place] = value
    return made


def good(**changes: Any) -> RolloutSample:
    fields = {"tokens": [5, 6, 7], "logprobs": [0.0, -0.5, -1.0], "loss_mask": [0, 1, 1], "reward": 1.0}
    return RolloutSample(**(fields | changes))


def entry(field: str, entries: Makers) -> Makers:
    """One entry of a sequence is wrong, one that is trained; the sequence is a list, a tuple or an object array."""

    def maker(make: Make, where: int, kind: Callable[[list[Any]], Any]) -> Make:
        def made() -> Any:
            values: list[Any] = list(getattr(good(), field) or [0, 0, 0])
            values[where] = make()
            return kind(values)

        return made

    return st.builds(maker, entries, st.integers(1, 2), st.sampled_from([list, tuple, as_objects]))


HUGE = plain(st.integers(min_value=400, max_value=5_000).map(lambda digits: 10**digits))
NOT_FINITE = one_of(math.nan, math.inf, -math.inf)
NO_NUMBER = st.one_of(
    one_of(None, "1", b"1", [], [1], {}, 1j, object(), int, ..., np.array([[1, 2]]), np.array("x")),
    raising("__float__", "__index__", "__repr__"),
    plain(st.text(max_size=3)),
)
NO_SEQUENCE = st.one_of(
    one_of(7, "abc", b"abc", {}, {5: 1, 6: 1, 7: 1}, {5, 6, 7}, object(), list, np.array(5)),
    one_of(np.full((3, 3), 5), np.array([None, 1, 2]), np.array(["a", "b", "c"]), [[5], [6], [7]]),
    st.sampled_from([endless, recursive, lambda: iter([5, 6, 7]), lambda: lying(2), lambda: lying(-1)]),
    raising("__iter__", "__len__"),
    plain(st.floats()),
)
TOO_LONG = one_of(range(10**12), lying(1 << 62), [0] * (MAX_TOKENS + 1), "x" * 10_000_000, np.zeros(99))
WRONG_LENGTH = one_of([], (), [0], [0, 1], [0, 1, 1, 1], range(4), np.zeros(2, dtype=int), [0] * MAX_TOKENS)
TOO_FAR = st.one_of(NOT_FINITE, HUGE, plain(st.floats(1e31, 1e308)), plain(st.floats(-1e308, -1e31)))
NOT_A_LOGPROB = st.one_of(NO_NUMBER, TOO_FAR, plain(st.floats(0.01, 1e300)), plain(st.integers(min_value=1)))
NOT_A_TOKEN = st.one_of(
    NO_NUMBER, NOT_FINITE, HUGE, plain(st.integers(max_value=-1)), plain(st.integers(VOCABULARY)), plain(st.floats())
)
NOT_A_MASK = st.one_of(NO_NUMBER, NOT_FINITE, HUGE, plain(st.integers(2)), plain(st.integers(max_value=-1)))
NOT_A_VERSION = st.one_of(NO_NUMBER, HUGE, plain(st.integers(1 << 62)), plain(st.integers(max_value=-1)))
SEQUENCE = st.one_of(NO_SEQUENCE, TOO_LONG, WRONG_LENGTH)

WRONG: dict[str, Makers] = {
    "tokens": st.one_of(SEQUENCE, one_of(None), entry("tokens", NOT_A_TOKEN)),
    "logprobs": st.one_of(SEQUENCE, one_of(None), entry("logprobs", NOT_A_LOGPROB)),
    "loss_mask": st.one_of(
        SEQUENCE,
        entry("loss_mask", NOT_A_MASK),
        one_of(None, [0, 0, 0], [1, 1, 1], [1, 0, 0], [0.0, 1.0, 1.0], np.array([0, 0.5, 1])),
    ),
    "reward": st.one_of(NO_NUMBER, TOO_FAR),
    "versions": st.one_of(SEQUENCE, entry("versions", NOT_A_VERSION)),
    "advantages": st.one_of(SEQUENCE, entry("advantages", st.one_of(NO_NUMBER, TOO_FAR))),
    "turn_rewards": st.one_of(
        NO_SEQUENCE, TOO_LONG, one_of([], [1.0, 2.0], ["a"], [[1.0]]), TOO_FAR.map(lambda make: lambda: [make()])
    ),
    "info": st.one_of(one_of(None, 1, "abc", [], [1, 2], object()), raising("__repr__", "__iter__")),
}
SEGMENTS = st.one_of(
    NO_SEQUENCE,
    one_of(None, [], [None], [good(), {}], ["sample"], [RolloutRun([good()])], [RolloutSample]),
    one_of([good(), good(reward=0.0)], range(10**12), lying(1 << 62)),
)
NO_ROLLOUT = st.one_of(
    plain(st.integers() | st.floats() | st.text() | st.binary(max_size=3) | st.booleans()),
    one_of(RolloutSample, RolloutRun, ..., object(), np.zeros(3), np.float32(1), Mute(), ValueError("as a value")),
    one_of([], [good()], (good(), 1.0), {"tokens": [1]}, types.SimpleNamespace(tokens=[1])),
    st.sampled_from([endless, recursive]),
    raising("__repr__", "__len__", "__iter__", "__bool__", "__eq__"),
)
EXCEPTIONS: tuple[type[BaseException], ...] = (
    ValueError, KeyError, RuntimeError, RecursionError, MemoryError, StopIteration, StopAsyncIteration, OSError,
    AssertionError, UnicodeError, NotImplementedError, SystemExit, asyncio.CancelledError, asyncio.InvalidStateError,
    Odd, Mute, Unhashable, Guarded, RecoverableRolloutError, TimeoutError, ConnectionResetError,
)  # fmt: skip
MESSAGES = st.one_of(
    st.sampled_from(["", "\x1b[2Jgone", "\ud800", "{0.__class__}", "%s%n", "[/bold]"]),
    st.just(1_000_000).map("a".__mul__),
    st.text(),
)


def grouped(depth: int, members: list[Make]) -> Make:
    def made() -> BaseException:
        errors = [make() for make in members]
        for _ in range(depth):
            errors = [BaseExceptionGroup("several", errors)]
        error: BaseException = errors[0]
        return error

    return made


def remarked(make: Make, make_cause: Make | None) -> Make:
    """With a long note, and a cause that it caused itself."""

    def made() -> BaseException:
        error: BaseException = make()
        error.add_note("n" * 100_000)
        if make_cause is not None:
            error.__cause__ = make_cause()
            error.__cause__.__context__ = error
        return error

    return made


plain_errors = st.builds(lambda kind, message: lambda: kind(message), st.sampled_from(EXCEPTIONS), MESSAGES)
ERRORS = st.one_of(
    plain_errors,
    st.builds(remarked, plain_errors, st.none() | plain_errors),
    st.builds(grouped, st.integers(1, 5), st.lists(plain_errors, min_size=1, max_size=3)),
    st.builds(grouped, st.just(2_000), st.lists(plain_errors, min_size=1, max_size=1)),
)


@dataclass(frozen=True)
class Fault:
    """What one rollout does, and what its message must name."""

    named: str
    make: Make
    raised: bool = False

    @property
    def recoverable(self) -> bool:
        """A second try may mend it, so it never ends a run by itself."""
        return self.raised and is_recoverable(self.make())

    def happen(self) -> Any:
        made = self.make()
        if self.raised:
            raise made
        return made


def sample_with(field: str) -> st.SearchStrategy[Fault]:
    """A sample with one bad field, alone or as a segment of a run."""

    def build(make: Make, segment: bool) -> Fault:
        def made() -> Rollout:
            sample = good(**{field: make()})
            return RolloutRun([good(), sample]) if segment else sample

        return Fault(field, made)

    return st.builds(build, WRONG[field], st.booleans())


faults = st.one_of(
    *(sample_with(field) for field in WRONG),
    st.builds(lambda make: Fault("segments", lambda: RolloutRun(make())), SEGMENTS),
    st.builds(lambda make: Fault("rollout function returned", make), NO_ROLLOUT),
    st.builds(lambda make: Fault("", make, raised=True), ERRORS),
)
hypothesis_settings = settings(
    max_examples=RUNS,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    verbosity=Verbosity.quiet,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


# The runs


def check_sequences(sequences: Sequence[TrainSequence], step: int) -> None:
    """What the trainer may rely on, type by type."""
    for sequence in sequences:
        count = len(sequence.tokens)
        assert 1 < count <= MAX_TOKENS
        for values, kind in (
            (sequence.tokens, int),
            (sequence.loss_mask, int),
            (sequence.behavior_logprobs, float),
        ):
            assert type(values) is list
            assert len(values) == count
            assert all(type(value) is kind for value in values)
        assert all(0 <= token < VOCABULARY for token in sequence.tokens)
        assert set(sequence.loss_mask) == {0, 1}
        assert not sequence.loss_mask[0]
        assert all(math.isfinite(logprob) for logprob in sequence.behavior_logprobs)
        given = sequence.advantage
        advantages = [given] if isinstance(given, float) else list(given)
        assert all(type(advantage) is float and abs(advantage) <= LARGEST for advantage in advantages)


def config_of(**rollout: Any) -> Config:
    return Config(
        model="none",
        completions_per_prompt=3,
        prompt_groups_per_step=5,
        data={"shuffle": False},
        rollout={"retries": 0, **rollout},
    )


class Handle:
    """The policy of rollouts that draw nothing."""

    oldest_version: int | None = None
    calls: tuple[float, ...] = ()

    def close(self) -> None: ...


async def train(rollout: RolloutFn, rows: int, config: Config) -> tuple[dict[str, int], int]:
    """Returns the ledger, and how many rollouts were lost."""
    lost = 0

    def count(record: dict[str, float], batch: object) -> None:
        nonlocal lost
        lost += int(record["members_failed"])

    engine = assemble(
        config,
        rollout,
        [{"row": row} for row in range(rows)],
        sampler=ScriptedSampler(),
        trainer=CountingTrainer(on_sequences=check_sequences),
        make_policy=lambda session, version: Handle(),
        on_step=count,
        contract=CONTRACT,
    )
    try:
        await engine.run()
    finally:
        engine.ledger.close()
    return engine.ledger.summary(), lost


async def evaluate(rollout: RolloutFn, rows: int, config: Config) -> EvalResult:
    evaluator = Evaluator(rollout, lambda session, version: Handle(), CONTRACT, config.rollout, seed=0)
    return await evaluator.run([{"row": row} for row in range(rows)], 3, room=anyio.Semaphore(1))


def rollout_with(faults: Sequence[Fault]) -> RolloutFn:
    async def rollout(prompt: Prompt) -> Any:
        if prompt.rollout_index == GUILTY:
            return faults[prompt.index].happen()
        return good(reward=float(prompt.rollout_index))

    return rollout


some_faults = st.lists(faults, min_size=FAULTS_PER_RUN, max_size=FAULTS_PER_RUN)


@hypothesis_settings
@given(some_faults)
def test_every_fault_is_counted_and_named_and_the_others_are_trained(faults: list[Fault]) -> None:
    config = config_of(on_error="drop", error_budget=FAULTS_PER_RUN)
    with capture_logs() as lines:
        ledger, lost = run_virtual(train(rollout_with(faults), len(faults), config))
    assert lost == len(faults)
    assert (ledger["admitted"], ledger["trained"]) == (len(faults), len(faults))
    said = {line["rollout"]: line["error"] for line in lines if line["event"] == "a rollout failed"}
    for row, fault in enumerate(faults):
        assert_named(fault, said[f"row {row} (epoch 0), rollout {GUILTY}, attempt 1"])


@settings(hypothesis_settings, max_examples=RUNS // 5)
@given(some_faults)
def test_an_evaluation_counts_and_names_them_too(faults: list[Fault]) -> None:
    config = config_of(on_error="drop", error_budget=FAULTS_PER_RUN)
    with capture_logs() as lines:
        result = run_virtual(evaluate(rollout_with(faults), len(faults), config))
    assert result.failed == len(faults)
    assert result.n == 2 * len(faults)
    said = {line["row"]: line["error"] for line in lines if line["event"] == "an evaluation rollout failed"}
    for row, fault in enumerate(faults):
        assert_named(fault, said[row])


@settings(hypothesis_settings, max_examples=RUNS * 2)
@given(faults, st.booleans())
def test_by_default_a_fault_ends_the_run_with_one_error_that_names_it(fault: Fault, evaluated: bool) -> None:
    assume(not fault.recoverable)
    rollout = rollout_with([fault])
    with pytest.raises(RolloutFailed, match=r"^row 0 (\(epoch 0\), rollout 1, attempt 1|of the evaluation) ") as failed:
        run_virtual(evaluate(rollout, 1, config_of()) if evaluated else train(rollout, 1, config_of()))
    assert_named(fault, str(failed.value), LONGEST_ERROR)
    assert any(hint in str(failed.value) for hint in ("Mend the rollout function", "Raise asyncrl.Recoverable"))


def assert_named(fault: Fault, said: str, longest: int = LONGEST_LINE) -> None:
    assert len(said) <= longest
    assert fault.named in said
    assert fault.raised or any(advice in said for advice in ("Expected", "Return None", "Take them"))


def test_odd_values_that_mean_the_right_thing_are_trained_as_plain_ones() -> None:
    odd = [
        {"tokens": np.array([5, 6, 7], dtype=np.uint8), "loss_mask": np.array([0, 1, 1])},
        {"tokens": (5, np.int64(6), True), "loss_mask": (False, True, True)},
        {"logprobs": np.array([np.nan, -0.5, -1.0], dtype=np.float16)},
        {"logprobs": [math.inf, np.float32(-0.5), Fraction(-1, 2)]},
        {"reward": np.float32(0.5)},
        {"reward": True},
        {"reward": Decimal("0.25")},
        {"versions": [10**400, 0, 0]},
        {"versions": [-1, 0, 0], "advantages": [math.nan, 1, np.float64(2)]},
        {"turn_rewards": (np.float32(1),), "info": types.MappingProxyType({"why": object()})},
        {"tokens": range(5, 8), "logprobs": array("f", [0, -1, -1]), "loss_mask": deque([0, 1, 1])},
    ]

    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(0)
        return good(**({"reward": float(prompt.rollout_index)} | (odd[prompt.index] if prompt.rollout_index else {})))

    ledger, lost = run_virtual(train(rollout, len(odd), config_of()))
    assert (ledger["trained"], lost) == (len(odd), 0)


def test_what_is_changed_after_it_was_returned_is_trained_as_it_was() -> None:
    async def rollout(prompt: Prompt) -> RolloutSample:
        sample = good(tokens=[5, 6, 7], reward=float(prompt.rollout_index), info={"kept": 1})
        asyncio.get_running_loop().call_soon(spoil, sample)
        return sample

    def spoil(sample: RolloutSample) -> None:
        for field in (sample.tokens, sample.logprobs, sample.loss_mask):
            assert isinstance(field, list)
            field[:] = [math.nan] * 99
        assert isinstance(sample.info, dict)
        sample.info.clear()

    ledger, lost = run_virtual(train(rollout, 20, config_of()))
    assert (ledger["trained"], lost) == (20, 0)
