"""`asyncrl sweep`: which runs it makes, how it runs them, and what it makes of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from asyncrl.cli.config import load_config
from asyncrl.cli.main import main
from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.sweeps.processes import Job, Runner, cause_of, share_of_devices
from asyncrl.sweeps.results import Result, Spread, group_results, read_result, target_of
from asyncrl.sweeps.trials import Axis, Trial, make_trials, parse_axis

ROOT = Path(__file__).parents[1]
LIMIT_S = 60.0


class TestAxes:
    @pytest.mark.parametrize(
        ("text", "setting", "values"),
        [
            ("staleness=0,1,8", "staleness.max_staleness", ("0", "1", "8")),
            ("lr=1e-4", "optimizer.learning_rate", ("1e-4",)),
            ("seed=1,2", "seed", ("1", "2")),
            ("kl_beta=0,0.01", "loss.kl_beta", ("0", "0.01")),
            ("staleness.on-stale=train,mask", "staleness.on_stale", ("train", "mask")),
            ('lora.targets=["q_proj","v_proj"],all-linear', "lora.targets", ('["q_proj","v_proj"]', "all-linear")),
        ],
    )
    def test_names_and_values(self, text: str, setting: str, values: tuple[str, ...]) -> None:
        axis = parse_axis(text)
        assert (axis.setting, axis.values) == (setting, values)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("staleness", "NAME=VALUE"),
            ("=3", "NAME=VALUE"),
            ("seed=", "empty"),
            ("seed=1,,2", "empty"),
            ("seed=1,2,1", "1 is there twice"),
            ("stalenes=1", "Did you mean 'staleness'"),
            ("learning_rat=1", "Did you mean 'learning_rate'"),
            ("nothing_like_it_at_all=1", r"docs/configuration\.md"),
            ("timeout_s=1,2", r"rollout\.timeout_s or publish\.timeout_s"),
            ("run_dir=a,b", "run_dir cannot be swept"),
        ],
    )
    def test_what_cannot_be_meant(self, text: str, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            parse_axis(text)


class TestTrials:
    @pytest.fixture
    def load(self, tmp_path: Path) -> Callable[[Sequence[str]], Config]:
        (tmp_path / "c.toml").write_text('model = "m"\n[staleness]\nmax_staleness = 3\n')
        return lambda given: load_config(tmp_path / "c.toml", given)

    @staticmethod
    def axes(*texts: str) -> list[Axis]:
        return [parse_axis(text) for text in texts]

    def test_all_combinations_the_last_axis_fastest(self, load: Any, tmp_path: Path) -> None:
        trials = make_trials(self.axes("staleness=0,2", "seed=1,2"), load, tmp_path / "out", ("--max_steps", "5"))
        assert [(trial.config.staleness.max_staleness, trial.config.seed) for trial in trials] == [
            *((0, 1), (0, 2)),
            *((2, 1), (2, 2)),
        ]
        assert {trial.config.max_steps for trial in trials} == {5}
        assert [trial.folder.name for trial in trials] == [f"staleness-{o}_seed-{s}" for o in (0, 2) for s in (1, 2)]
        assert [trial.name for trial in trials][:2] == ["staleness=0 seed=1", "staleness=0 seed=2"]
        assert [trial.group for trial in trials] == ["staleness=0"] * 2 + ["staleness=2"] * 2

    def test_its_command_line_gives_the_same_config(self, load: Any, tmp_path: Path) -> None:
        (trial,) = make_trials(self.axes("lr=1e-4", "optimizer.schedule=cosine"), load, tmp_path)
        assert load(trial.overrides) == trial.config

    def test_nothing_is_run_where_one_cannot_be(self, load: Any, tmp_path: Path) -> None:
        """With the fault once, however many combinations have it."""
        with pytest.raises(ConfigError, match=r"nothing was run") as caught:
            make_trials(self.axes("staleness=-1,0,1", "seed=1,2,3"), load, tmp_path)
        said = str(caught.value)
        assert said.count("max_staleness") == 1
        assert "staleness=-1 seed=1 and 2 more" in said

    @pytest.mark.parametrize(
        ("axes", "said"),
        [
            (["lr=1e-3,0.001"], "lr=1e-3 and lr=0.001 are the same settings"),
            (["staleness=1", "max_staleness=2"], "swept twice"),
            (["dataset=a/b,a-b"], "the same run folder"),
            ([f"seed={','.join(map(str, range(40)))}", f"lr={','.join(f'0.{n}' for n in range(1, 40))}"], "at most"),
        ],
    )
    def test_combinations_that_make_no_sense(self, load: Any, tmp_path: Path, axes: list[str], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            make_trials(self.axes(*axes), load, tmp_path)


def result(rewards: Sequence[float], *, seconds: float = 10.0, staleness: int = 1) -> Result:
    times = tuple(10.0 * place for place in range(len(rewards)))
    ends = (rewards[-1], max(rewards)) if rewards else (None, None)
    return Result(len(rewards), seconds, True, times, tuple(rewards), *ends, 5.0, staleness)


class TestResults:
    @staticmethod
    def write(folder: Path, name: str, records: Sequence[dict[str, Any]]) -> None:
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def steps(self, folder: Path, rewards: Sequence[float | None]) -> None:
        steps = enumerate(rewards, start=1)
        self.write(
            folder,
            "metrics.jsonl",
            [
                {"step": n, "time_s": 2.0 * n, "reward_mean": reward, "samples": 4, "staleness_max": n % 3}
                for n, reward in steps
            ],
        )

    def test_of_evaluations(self, tmp_path: Path) -> None:
        """An evaluation is placed at the training time of its version."""
        self.steps(tmp_path, [0.9] * 10)
        found = [{"eval_version": version, "eval_reward": version / 20} for version in (0, 5, 10)]
        self.write(tmp_path, "evaluations.jsonl", [*found, {"eval_version": 10, "eval_own": 3.0}])
        read = read_result(tmp_path)
        assert read.held_out
        assert (read.times, read.rewards) == ((0, 10, 20), (0, 0.25, 0.5))
        assert (read.final, read.best, read.steps, read.seconds) == (0.5, 0.5, 10, 20)
        assert (read.samples_per_s, read.worst_staleness) == (2, 2)
        assert (read.seconds_to(0.2), read.seconds_to(0.6)) == (10, None)

    def test_of_training_where_there_are_too_few_evaluations(self, tmp_path: Path) -> None:
        self.steps(tmp_path, [0.0, None, *([1.0, 0.0] * 20)])
        self.write(tmp_path, "evaluations.jsonl", [{"eval_version": 0, "eval_reward": 0.5}])
        read = read_result(tmp_path)
        assert not read.held_out
        assert read.rewards[1:] == (0.5,) * 39, "a mean over a twentieth of the steps: 2"
        assert read.times[-1] == 84

    def test_of_nothing(self, tmp_path: Path) -> None:
        read = read_result(tmp_path / "not there")
        assert (read.steps, read.final, read.worst_staleness, read.samples_per_s) == (0, None, None, None)
        assert target_of([read]) is None

    def test_the_target_is_most_of_the_way_to_the_best(self) -> None:
        runs = [result([0.1, 0.3]), result([0.3, 1.2, 0.2])]
        assert target_of(runs) == pytest.approx(0.2 + 0.9 * 1.0)
        assert target_of([result([0.5, 0.4])]) is None, "no run got better"

    def test_repetitions_are_one_group(self) -> None:
        runs = {"a": [result([0.0, 1.0]), result([0.0, 0.4, 0.8], staleness=4)], "b": [result([0.0, 0.2])]}
        a, b = group_results(runs, target=0.9)
        assert a.final.values == (1.0, 0.8)
        assert str(a.final) == "0.900 ±0.141"
        assert (a.reached, a.runs, a.seconds_to_target.values) == (1, 2, (10.0,))
        assert (a.worst_staleness, b.worst_staleness) == (4, 1)
        assert (b.reached, str(b.seconds_to_target)) == (0, "-")
        assert a.as_json()["best"]["mean"] == pytest.approx(0.9)

    @pytest.mark.parametrize(
        ("values", "shown"),
        [((), "-"), ((0.5,), "0.500"), ((0.0,), "0.000"), ((12.34,), "12.3"), ((1234.5, 1235.5), "1235 ±1")],
    )
    def test_a_number_with_its_spread(self, values: tuple[float, ...], shown: str) -> None:
        assert str(Spread(values)) == shown


ENDS = "import sys; print('working'); sys.exit({code})"
STOPS = """
import signal, sys, time
def stop(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(600)
"""
DEAF = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(600)"


def job(folder: Path, name: str, code: str, commands: dict[str, str]) -> Job:
    commands[name] = code
    return Job(Trial({"name": name}, (), Config(model="m", run_dir=folder / name)))


class TestProcesses:
    """The processes are programs of one line, under the guard as in a sweep."""

    @staticmethod
    def runner(jobs: Sequence[Job], commands: dict[str, str], **more: Any) -> Runner:
        return Runner(jobs, lambda trial: [sys.executable, "-c", commands[trial.folder.name]], **more)

    def test_one_that_fails_does_not_end_the_others(self, tmp_path: Path) -> None:
        commands: dict[str, str] = {}
        fails = (
            "print('error: the tool is gone\\nTraceback (most recent):\\n  File x\\nKeyError: 3'); raise SystemExit(2)"
        )
        dies = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
        codes = {"a": ENDS.format(code=0), "b": fails, "c": dies, "d": ENDS.format(code=0)}
        jobs = [job(tmp_path, name, code, commands) for name, code in codes.items()]
        self.runner(jobs, commands).run()
        assert [one.state for one in jobs] == ["finished", "failed", "failed", "finished"]
        assert jobs[1].error == "exit code 2: the tool is gone KeyError: 3"
        assert "SIGSEGV" in jobs[2].error
        assert jobs[0].log.read_text() == "working\n"

    def test_no_more_at_once_than_asked_for_and_finished_ones_not_again(self, tmp_path: Path) -> None:
        commands: dict[str, str] = {}
        jobs = [job(tmp_path, name, ENDS.format(code=0), commands) for name in "abcde"]
        jobs[1].state = "finished"
        most = 0

        def look() -> None:
            nonlocal most
            most = max(most, sum(one.state == "running" for one in jobs))

        self.runner(jobs, commands, at_once=2).run(look)
        assert most == 2
        assert {one.state for one in jobs} == {"finished"}
        assert jobs[1].began_at is None

    def test_a_stop_lets_what_runs_save_itself_and_starts_nothing(self, tmp_path: Path) -> None:
        commands: dict[str, str] = {}
        young = "import time; print('ready', flush=True); time.sleep(600)"  # has not come to take the signal
        jobs = [job(tmp_path, name, code, commands) for name, code in {"a": STOPS, "b": young, "c": STOPS}.items()]
        runner, deadline = self.runner(jobs, commands, at_once=2), time.monotonic() + LIMIT_S / 2

        def look() -> None:
            ready = [one for one in jobs if one.log.exists() and "ready" in one.log.read_text()]
            if len(ready) == 2 and not runner.stopping:
                runner.stop()
            assert time.monotonic() < deadline

        runner.run(look)
        assert [one.state for one in jobs] == ["stopped", "stopped", "waiting"]
        assert jobs[0].log.read_text() == "ready\nsaved\n"

    @pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks processes up in /proc")
    def test_a_second_signal_leaves_nobody_behind(self, tmp_path: Path) -> None:
        """The process that is signalled is one of its own, with two deaf programs."""
        script = tmp_path / "sweeping.py"
        script.write_text(
            "from pathlib import Path\n"
            "from asyncrl.interrupt import Interrupt, stop_on_signals\n"
            f"from tests.test_sweep import DEAF, TestProcesses, job\n"
            f"folder, commands = Path({str(tmp_path)!r}), {{}}\n"
            "jobs = [job(folder, name, f'{DEAF}\\n# {folder}', commands) for name in 'ab']\n"
            "runner = TestProcesses.runner(jobs, commands, at_once=2)\n"
            "interrupt = Interrupt()\n"
            "interrupt.stop = runner.stop\n"
            "with stop_on_signals(interrupt, at_once=runner.kill):\n"
            "    runner.run()\n"
        )
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        logs = [tmp_path / "a.log", tmp_path / "b.log"]
        until(lambda: all(log.exists() and "ready" in log.read_text() for log in logs))
        assert process.stderr is not None
        assert len(naming(tmp_path)) >= 3
        process.send_signal(signal.SIGINT)
        until(lambda: "once more" in process.stderr.readline())  # type: ignore[union-attr]
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 4
        process.stderr.close()
        until(lambda: not naming(tmp_path))

    def test_devices_are_shared_out_among_those_that_run(self, tmp_path: Path) -> None:
        commands: dict[str, str] = {}
        code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
        jobs = [job(tmp_path, name, code, commands) for name in "abc"]
        jobs[0].state = "finished"
        runner = self.runner(jobs, commands, at_once=9, environment={**os.environ, "CUDA_VISIBLE_DEVICES": "4,5,6,7"})
        runner.run()
        assert [one.log.read_text() for one in jobs[1:]] == ["4,5\n", "6,7\n"]

    def test_devices_are_shared_out(self) -> None:
        four = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
        assert [share_of_devices(four, slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["0,1", "2,3"]
        assert share_of_devices(four, 0, 1) == {}
        assert share_of_devices({"CUDA_VISIBLE_DEVICES": "0"}, 1, 2) == {}, "too few: they share"
        assert share_of_devices({}, 0, 2) == {}

    def test_a_process_without_a_word(self, tmp_path: Path) -> None:
        (tmp_path / "log").write_text("")
        assert cause_of(1, tmp_path / "log") == "exit code 1: it said nothing"


def naming(folder: Path) -> list[str]:
    """Command lines of processes that name the folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has just ended
            continue
    return [command for command in found if str(folder) in command]


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


ROLLOUT = """
import asyncrl

async def good(prompt):
    ids = [65 + prompt["n"], 65]
    drawn = await prompt.policy.generate(ids)
    return asyncrl.RolloutSample.from_completion(ids, drawn, prompt.rng.random())

async def bad(prompt):
    raise KeyError("the tool is gone")
"""


@pytest.fixture
def config_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "rollout.py").write_text(ROLLOUT)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"n": n % 10}) + "\n" for n in range(16)))
    path = tmp_path / "small.toml"
    path.write_text(
        f"""
        model = "{model}"
        dataset = "rows.jsonl"
        rollout_fn = "rollout.py:good"
        max_steps = 2
        max_seq_len = 64
        prompt_groups_per_step = 4
        sampling = {{max_tokens = 4}}
        sampler = {{kind = "transformers"}}
        trainer = {{device = "cpu"}}
        loss = {{kl_beta = 0.0}}
        """
    )
    return path


def test_a_real_sweep_with_a_run_that_fails_and_is_mended(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    functions = ",".join(str(tmp_path / f"rollout.py:{name}") for name in ("good", "bad"))
    out = tmp_path / "out"
    command = ["sweep", str(config_file), f"rollout_fn={functions}", "--out", str(out), "--seed", "3", "--jobs", "2"]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "the tool is gone" in said
    assert "1 of 2 runs have finished" in said
    found = json.loads((out / "sweep.json").read_text())
    assert [run["state"] for run in found["runs"]] == ["finished", "failed"]
    assert (found["runs"][0]["steps"], found["groups"][0]["runs"]) == (2, 1)
    good, bad = (Path(run["folder"]) for run in found["runs"])
    assert load_config(good / "config.toml").seed == 3
    written = (good / "metrics.jsonl").stat().st_mtime_ns

    (tmp_path / "rollout.py").write_text(ROLLOUT.replace("async def bad", "bad = good\n\nasync def worse"))
    assert main(command) == 0
    assert "has finished before" in capsys.readouterr().out
    assert (good / "metrics.jsonl").stat().st_mtime_ns == written, "not trained again"
    assert len((bad / "metrics.jsonl").read_text().splitlines()) == 2
    assert {run["state"] for run in json.loads((out / "sweep.json").read_text())["runs"]} == {"finished"}
    page = (out / "report.html").read_text()
    assert str(good) in page
    assert str(bad) in page

    assert main([*command, "--max_steps", "3"]) == 2, "another training than the one that is there"
    assert "max_steps 2, now 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=1,x"], "found 'x'"),
        (["seed=1", "--no_such_setting", "3"], "no_such_setting"),
        (["--seed", "1"], "NAME=VALUE"),
        (["seed=1", "--dataset", "nowhere.jsonl"], r"nowhere.jsonl"),
        (["seed=1", "--rollout_fn", "none"], "rollout_fn"),
        (["seed=1", "--out", "rows.jsonl"], "--out: rows.jsonl cannot be used"),
        (["seed=1,2", "--seed", "3"], "--seed is given, and swept too"),
        (["staleness=1,2", "--staleness.max-staleness=3"], "--staleness.max_staleness is given, and swept too"),
        (["seed=1,2", "--run_dir", "x"], "--out names the one they are in"),
        (["run_dir=a,b"], "run_dir cannot be swept"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        try:
            code = main(["sweep", str(config_file), *words])
        except SystemExit as end:  # of the parser
            code = int(end.code or 0)
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "sweeps").exists()
