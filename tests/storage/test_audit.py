"""The audit: a run that adds up is clean, and every way in which one can be off is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from asyncrl.storage.audit_run import Audit, audit_run
from asyncrl.storage.checkpoints import Checkpoints
from tests.storage.ledgers import BOUNDS, Run, admit, finish, make_run, tamper


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "run"
    root.mkdir()
    make_run(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it to tamper with."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def faults(root: Path) -> list[tuple[str, str]]:
    return [(fault.kind, fault.what) for fault in audit_run(root).faults]


def test_a_run_that_adds_up(root: Path) -> None:
    audit = audit_run(root)
    assert (audit.faults, audit.data_ended) == ([], True)
    assert audit.account.summary() == {
        "admitted": 10, "trained": 8, "filtered": 1, "rejected": 1, "pending": 0, "requeued": 0,
    }  # fmt: skip
    assert audit.account.counts["restarted"] == 1
    assert [(tally.events, tally.undone, tally.steps) for tally in audit.account.by_life.values()] == [
        (22, 5, (1, 2)),
        (12, 0, (3, 4)),
    ]


ROW_0_TRAINED = "(SELECT id FROM history WHERE NOT undone AND epoch = 0 AND row = 0 AND state = 'trained')"
COLUMNS = "time, 1, epoch, row, sequence, state, version, step, rewards, reason"
AGAIN = f"INSERT INTO events SELECT (SELECT max(id) + 1 FROM events), {COLUMNS} FROM history WHERE NOT undone AND "


class TestTheLedger:
    """Changes behind its back: (statement, kinds that must be named, words that one of them must have)."""

    @pytest.mark.parametrize(
        ("statement", "kind", "words"),
        [
            (f"DELETE FROM events WHERE id = {ROW_0_TRAINED}", "lost event", "event 8 of the ledger is missing"),
            ("DELETE FROM events WHERE id BETWEEN 6 AND 7", "lost event", "event 6 to 7 of the ledger is missing"),
            ("DELETE FROM events WHERE id = 1", "lost event", "event 1 of the ledger is missing"),
            ("DELETE FROM events WHERE id = 1", "unknown draw", "row 0 of epoch 0 was finished, but never admitted"),
            (AGAIN + "row = 0 AND epoch = 0 AND state = 'trained'", "trained twice", "in step 1 and again in step 1"),
            (AGAIN + "row = 0 AND epoch = 0 AND state = 'finished'", "begun twice", "was trained, and then finished"),
            (AGAIN + "row = 0 AND epoch = 0 AND state = 'admitted'", "begun twice", "was trained, and then admitted"),
            (AGAIN + "state = 'filtered'", "ended twice", "row 4 of epoch 0 was filtered, and then filtered"),
            (AGAIN + "state = 'filtered'", "conservation", "10 draws were admitted, but 11 ended and 0 are pending"),
            (
                "UPDATE events SET state = 'trained', step = 4 WHERE state = 'rejected'",
                "out of order",
                "row 3 of epoch 1 was trained, but had not finished",
            ),
            ("UPDATE events SET row = 4 WHERE state = 'rejected'", "ended twice", "was rejected, and then trained"),
            ("UPDATE events SET row = 9 WHERE state = 'rejected'", "unknown draw", "row 9 of epoch 1 was rejected"),
            ("UPDATE events SET row = 9 WHERE state = 'rejected'", "coverage", "row 9 of epoch 1 is none of 2 x 5"),
            (
                "UPDATE events SET row = 9 WHERE row = 4 AND epoch = 0",
                "coverage",
                "epoch 0 is over, but never had row 4",
            ),
            ("UPDATE events SET step = 5 WHERE step = 4", "steps", "in step 5, right after step 3"),
            ("UPDATE events SET step = 1 WHERE step = 4", "steps", "in step 1, right after step 3"),
            ("UPDATE events SET step = NULL WHERE step = 4", "steps", "was trained in no step"),
            ("UPDATE events SET step = 1 WHERE step = 2", "batch size", "step 1 trained more than 2 groups"),
            (
                "UPDATE events SET version = 0 WHERE row = 4 AND epoch = 1 AND state = 'finished'",
                "staleness",
                "row 4 of epoch 1 began at version 0 and was trained in step 4: 3 steps old, more than 1",
            ),
            (
                "UPDATE events SET state = 'requeued' WHERE state = 'restarted'",
                "out of order",
                "row 1 of epoch 1 was rolled out again while its rollouts ran",
            ),
            (
                "UPDATE events SET epoch = 0, row = 0, state = 'restarted' WHERE state = 'restarted'",
                "out of order",
                "row 1 of epoch 1 was finished in life 1, which had not begun it",
            ),
            (
                "UPDATE events SET state = 'restarted' WHERE row = 2 AND epoch = 1 AND state = 'finished'",
                "out of order",
                "row 2 of epoch 1 was restarted, but nothing had cut it off",
            ),
            ("UPDATE events SET row = 2 WHERE row = 1 AND epoch = 1 AND life = 1", "out of order", "finished twice"),
            (
                "UPDATE events SET state = 'finished' WHERE state = 'filtered'",
                "coverage",
                "row 4 of epoch 0 is finished at the end of the data",
            ),
            (
                "UPDATE lives SET resumed_from = 10 WHERE life = 1",
                "unknown draw",
                "row 1 of epoch 1 was restarted, but",
            ),
        ],
    )
    def test_tampered_with(self, root: Path, statement: str, kind: str, words: str) -> None:
        tamper(root, statement)
        found = faults(root)
        assert [what for found_kind, what in found if found_kind == kind and words in what], found

    def test_an_undone_event_is_no_fault(self, root: Path) -> None:
        tamper(root, "UPDATE events SET step = 77 WHERE id IN (SELECT id FROM history WHERE undone) AND step = 3")
        assert faults(root) == []


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text()
    assert change(before) != before
    path.write_text(change(before))


class TestTheOtherFiles:
    def test_a_checkpoint_that_counts_otherwise(self, root: Path) -> None:
        rewrite(
            root / "checkpoints" / "step-000003" / "state.json",
            lambda text: text.replace('"trained": 6', '"trained": 9'),
        )
        assert any(kind == "checkpoint" and "step-000003" in what and "it says" in what for kind, what in faults(root))

    def test_a_checkpoint_of_another_step(self, root: Path) -> None:
        rewrite(root / "checkpoints.jsonl", lambda text: text.replace('"step": 3', '"step": 4'))
        assert ("checkpoint", "step-000003 was made at event 32, where the ledger is at step 3") in faults(root)

    def test_a_checkpoint_behind_the_end(self, root: Path) -> None:
        rewrite(root / "checkpoints.jsonl", lambda text: text.replace('"ledger_position": 32', '"ledger_position": 99'))
        assert ("checkpoint", "step-000003 was made at event 99, but the ledger ends at event 34") in faults(root)

    def test_the_newest_checkpoint_is_gone(self, root: Path) -> None:
        shutil.rmtree(root / "checkpoints" / "step-000003")
        assert faults(root) == [("checkpoint", "step-000003 is the newest that is listed, but its folder is gone")]

    def test_an_older_checkpoint_was_removed(self, root: Path) -> None:
        Checkpoints(root).prune(keep_last=1, keep_every=None)
        assert faults(root) == []

    def test_a_checkpoint_that_was_renamed_and_not_listed(self, root: Path) -> None:
        """Killed between the two."""
        rewrite(root / "checkpoints.jsonl", lambda text: "".join(text.splitlines(keepends=True)[:-1]))
        assert faults(root) == []

    def test_half_a_checkpoint(self, root: Path) -> None:
        (root / "checkpoints" / "step-000003" / "state.json").unlink()
        assert any(kind == "checkpoint" and "step-000003 is not whole" in what for kind, what in faults(root))

    def test_a_step_without_a_record(self, root: Path) -> None:
        rewrite(root / "metrics.jsonl", lambda text: "".join(text.splitlines(keepends=True)[:-1]))
        assert faults(root) == [("records", "the ledger has 4 steps, metrics.jsonl 3, summary.json 4")]

    def test_a_step_that_is_recorded_twice(self, root: Path) -> None:
        rewrite(root / "metrics.jsonl", lambda text: text.replace('"step": 3', '"step": 2'))
        assert faults(root) == [("records", "line 3 of metrics.jsonl is of step 2")]

    def test_a_summary_that_counts_otherwise(self, root: Path) -> None:
        rewrite(root / "summary.json", lambda text: text.replace('"trained": 8', '"trained": 7'))
        assert [kind for kind, _ in faults(root)] == ["records"]

    def test_a_summary_of_an_earlier_life(self, root: Path) -> None:
        rewrite(root / "summary.json", lambda text: text.replace('"trained": 8', '"trained": 7'))
        tamper(root, "UPDATE lives SET started_at = started_at + 3600 WHERE life = 1")
        assert faults(root) == []


class TestBeforeTheEnd:
    """A run that is going on, was killed, or did not come to the end of its data."""

    def unended(self, root: Path) -> Run:
        root.mkdir()
        run = Run(root)
        ledger = run.begin()
        admit(ledger, (0, 2), (0, 0), (0, 4))
        finish(ledger, (0, 2), (0, 0))
        run.train((0, 2))
        return run

    async def test_it_is_going_on(self, tmp_path: Path) -> None:
        run = self.unended(tmp_path / "run")
        await run.ledger.flush()
        audit = audit_run(run.folder.root)
        assert (audit.faults, audit.data_ended, audit.account.pending()) == ([], False, 2)
        run.ledger.close()

    def test_it_was_stopped(self, tmp_path: Path) -> None:
        run = self.unended(tmp_path / "run")
        run.end(interrupted=True)
        assert self.kinds(audit_run(run.folder.root)) == []

    def test_it_failed_behind_a_step(self, tmp_path: Path) -> None:
        run = self.unended(tmp_path / "run")
        run.ledger.trained((0, 0), 2)
        run.end(error="SamplerError: it died")
        assert self.kinds(audit_run(run.folder.root)) == []

    def test_it_says_that_its_data_ended(self, tmp_path: Path) -> None:
        run = self.unended(tmp_path / "run")
        run.end()
        audit = audit_run(run.folder.root)
        assert self.kinds(audit) == ["coverage"] * 4
        assert "epoch 0 is over, but never had row 1, 3" in [fault.what for fault in audit.faults]

    def test_it_ended_by_its_number_of_steps(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        run = Run(tmp_path / "run", replace(BOUNDS, max_steps=1))
        ledger = run.begin()
        admit(ledger, (0, 0), (0, 1))
        finish(ledger, (0, 0))
        run.train((0, 0))
        run.end()
        assert self.kinds(audit_run(run.folder.root)) == []

    def kinds(self, audit: Audit) -> list[str]:
        return [fault.kind for fault in audit.faults]
