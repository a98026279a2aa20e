from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import structlog

from asyncrl.cli.main import main
from asyncrl.errors import DataError, SamplerError, StallError
from asyncrl.rollout.estimate import EvalResult
from asyncrl.storage.folder import RunFolder

ROLLOUT = "async def rollout(prompt):\n    return None\n"
CONFIG = 'model = "m"\nrollout_fn = "cli_case_rollout.py:rollout"\ndataset = "rows.jsonl"\n'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: config, rollout function, rows."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_case_rollout", raising=False)
    (tmp_path / "run.toml").write_text(CONFIG)
    (tmp_path / "cli_case_rollout.py").write_text(ROLLOUT)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


class Calls:
    """Stands where `asyncrl.run` is, and keeps what it was asked to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[dict[str, Any]] = []
        self.then: Callable[[], Any] = lambda: EvalResult({0: [1.0, 0.0, 0.0, 0.0], 1: [1.0, 1.0, 0.0, 1.0]})
        module = ModuleType("asyncrl.run")
        module.train = self.take  # type: ignore[attr-defined]
        module.evaluate = self.take  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "asyncrl.run", module)

    def take(self, rollout: Any, **arguments: Any) -> Any:
        self.seen.append({"rollout": rollout.__name__, **arguments})
        return self.then()

    def fail(self, error: BaseException) -> None:
        def throw() -> None:
            raise error

        self.then = throw


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def test_train_starts_what_the_config_says(project: Path, calls: Calls) -> None:
    assert main(["train", str(project / "run.toml"), "--staleness.max_staleness", "8", "--debug", "--seed=-3"]) == 0
    (call,) = calls.seen
    assert (call["rollout"], call["dataset"]) == ("rollout", str(project / "rows.jsonl"))
    assert (call["config"].staleness.max_staleness, call["config"].seed) == (8, -3)


@pytest.mark.parametrize(("given", "view"), [((), "auto"), (("--quiet",), "quiet")])
def test_quiet_shows_no_progress(project: Path, calls: Calls, given: tuple[str, ...], view: str) -> None:
    assert main(["train", str(project / "run.toml"), *given]) == 0
    assert calls.seen[0]["view"] == view


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("rows.jsonl:3: not JSON"), 2),
        (SamplerError("vLLM [died]"), 1),
        (StallError("nothing has moved"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_one_message_and_an_exit_code(
    project: Path, calls: Calls, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    calls.fail(error)
    assert main(["train", str(project / "run.toml")]) == code
    assert capsys.readouterr().err == (f"error: {error}\n" if code != 130 else "stopped\n")


def test_debug_shows_the_traceback(project: Path, calls: Calls) -> None:
    calls.fail(SamplerError("died"))
    with pytest.raises(SamplerError):
        main(["train", str(project / "run.toml"), "--debug"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nothing.toml"], "there is no config file nothing.toml"),
        (["train", "run.toml", "--sed", "1"], "Did you mean 'seed'"),
        (["train", "run.toml", "--dataset", "none.jsonl"], "dataset: there is no file"),
        (["train", "run.toml", "--dataset", "none"], "dataset: this setting is needed"),
        (["train", "run.toml", "--rollout_fn", "none"], "rollout_fn: this setting is needed"),
        (["eval", "run.toml", "--samples", "0"], "--samples is 0, expected at least 1"),
        (["eval", "."], "is not a run folder: it has no config.toml"),
    ],
)
def test_what_the_user_can_mend_is_said_before_anything_starts(
    project: Path,
    calls: Calls,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(project)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert calls.seen == []


def test_eval_of_a_config(project: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "test.jsonl").write_text("{}\n")
    assert main(["eval", str(project / "run.toml"), "--dataset", str(project / "test.jsonl"), "--samples", "4"]) == 0
    (call,) = calls.seen
    config = call["config"]
    assert (call["dataset"], config.evaluation.samples, config.model) == (str(project / "test.jsonl"), 4, "m")
    assert capsys.readouterr().out.splitlines() == [
        "model: m",
        f"rows: {project / 'test.jsonl'}",
        "mean reward 0.500 [0.150, 0.850] (95%, 8 rollouts)",
        "pass@1 0.500 [0.150, 0.850] (a pass is a reward of at least 1)",
        "pass@2 0.750 [0.256, 0.963]",
        "pass@4 1.000 [0.342, 1.000]",
    ]


def test_warnings_of_an_evaluation_are_not_in_its_output(
    project: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = calls.then

    def warns() -> Any:
        structlog.get_logger().warning("a tool raised", tool="calculator")
        return honest()

    calls.then = warns
    assert main(["eval", str(project / "run.toml")]) == 0
    said = capsys.readouterr()
    assert said.err == "warning: a tool raised (tool=calculator)\n"
    assert said.out.splitlines()[2].startswith("mean reward 0.500")


def test_eval_takes_the_held_out_rows_of_the_config(project: Path, calls: Calls) -> None:
    """They are what nothing was trained on."""
    (project / "held_out.jsonl").write_text("{}\n")
    with (project / "run.toml").open("a") as config:
        config.write('[evaluation]\ndataset = "held_out.jsonl"\nsamples = 2\n')
    assert main(["eval", str(project / "run.toml")]) == 0
    assert main(["train", str(project / "run.toml")]) == 0
    assert calls.seen[0]["dataset"] == str(project / "held_out.jsonl")
    assert (calls.seen[1]["dataset"], calls.seen[1]["config"].evaluation.samples) == (str(project / "rows.jsonl"), 2)
    assert main(["train", str(project / "run.toml"), "--evaluation.dataset", "nowhere.jsonl"]) == 2


def test_eval_of_a_run_folder_uses_its_model_and_config(project: Path, calls: Calls) -> None:
    main(["train", str(project / "run.toml"), "--run_dir", str(project / "out"), "--seed", "5"])
    folder = RunFolder.create(calls.seen[0]["config"])
    assert main(["eval", str(folder.root)]) == 2  # it has not ended: there is no model
    folder.model.mkdir()
    assert main(["eval", str(folder.root)]) == 0
    call = calls.seen[1]
    assert (call["config"].model, call["config"].seed, call["rollout"]) == (str(folder.model), 5, "rollout")
    assert call["dataset"] == str(project / "rows.jsonl")


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["train"], ["doctor", "--seed", "1"], ["demo", "--sampler", "x"], ["demo", "--steps", "0"]],
)
def test_usage_errors_have_their_own_exit_code(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import asyncrl

    assert main(["version"]) == 0
    said = capsys.readouterr().out
    first, *others = said.splitlines()
    assert first == f"asyncrl {asyncrl.__version__}"
    assert {"torch", "transformers"} <= {line.split()[0] for line in others}
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == said


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys\nfrom asyncrl.cli.main import main\nmain(['version'])\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'pydantic', 'rich') if name in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "asyncrl", "train", "none.toml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no config file none.toml")
    assert "Traceback" not in done.stderr
