"""What comes from outside is data and nothing else, and what is the user's stays the user's: docs/safety.md."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
import structlog
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import asyncrl
from asyncrl.agents.endpoint import Endpoint
from asyncrl.agents.template import TurnTemplate
from asyncrl.cli.main import main
from asyncrl.config import Config
from asyncrl.errors import ConfigError, ModelError, RolloutFailed
from asyncrl.metrics.live import LiveView
from asyncrl.model_facts import read_facts
from asyncrl.private import hide_secret_options, hide_secrets
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.evaluation import Evaluator
from asyncrl.sampling.embedded.versions import load_base
from asyncrl.storage.environment import environment
from asyncrl.storage.log import open_log
from asyncrl.testing.models import tiny_model, tiny_tokenizer
from asyncrl.training.model import load_policy
from tests.conftest import MakeConfig

PACKAGE = Path(asyncrl.__file__).parent
ENDS_A_PROGRAM = "\x1b]0;owned\x07\x1b[2J\x9b1;1H\r"
"""Sets a terminal's title, clears it, and goes to its first line."""


# No code from outside

MAY_UNPICKLE = {
    "workers.py": "a worker process of our own, over a pipe of our own",
    "planning/runner.py": "the question of a plan, which our own process left for those that it starts",
    "training/tensor_files.py": "the index of a checkpoint, with a list of what it may name",
}
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "yaml.load",
    "numpy.load",
    "np.load",
    "marshal.loads",
}


def calls_of(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_nothing_that_is_loaded_can_be_a_program(file: Path) -> None:
    for name, call in calls_of(file):
        assert name not in FORBIDDEN, f"line {call.lineno}"
        if "pickle.load" in name.lower() or name.endswith("Unpickler"):
            assert file.relative_to(PACKAGE).as_posix() in MAY_UNPICKLE, f"line {call.lineno}: {name}"
        if name.startswith("Auto") and name.endswith(".from_pretrained"):
            unpacked = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
            wanted = {"DATA_ALONE"} if "Model" in name else {"NO_CODE", "DATA_ALONE"}
            assert unpacked & wanted, f"line {call.lineno}: {name} says neither"


class Bomb:
    """Its pickle touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


def test_a_model_that_is_a_pickle_is_refused_unopened(tmp_path: Path, make_config: MakeConfig) -> None:
    folder, touched = tiny_model(tmp_path / "model"), tmp_path / "touched"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(touched)))
    advice = r"(?s)pytorch_model.bin is a pickle.*convert it once.*save_pretrained"
    with pytest.raises(ModelError, match=advice):
        load_policy(make_config(model=str(folder)))
    with pytest.raises(ModelError, match=advice):
        load_base(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    assert not touched.exists()


def test_the_conversion_that_is_advised_is_one(tmp_path: Path, make_config: MakeConfig) -> None:
    folder = tiny_model(tmp_path / "model")
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(str(folder)).save_pretrained(tmp_path / "new-folder")
    assert load_policy(make_config(model=str(tmp_path / "new-folder"))).causal_lm is not None


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, make_config: MakeConfig) -> None:
    folder, touched = tiny_model(tmp_path / "model"), tmp_path / "touched"
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text(f"open({str(touched)!r}, 'w')\nclass Mine: ...\n")
    with pytest.raises(ModelError, match="comes with code of its own, and asyncrl does not run code"):
        read_facts(str(folder), None)
    with pytest.raises(ModelError):
        load_policy(make_config(model=str(folder)))
    with pytest.raises(ModelError):
        load_base(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    assert not touched.exists()


# Rows, tools and models speak; nobody obeys

INJECTIONS = ["{{ 7 * 7 }}", "{% raw %}", "{0.__class__}", "%(secret)s", "${HOME}", "`id`", "[bold]x[/bold]", "\\x41"]


@pytest.mark.parametrize("text", INJECTIONS)
def test_what_a_row_says_is_text_to_the_chat_template(text: str) -> None:
    tokenizer = tiny_tokenizer()
    rendered = tokenizer.decode(TurnTemplate(tokenizer).opening([{"role": "user", "content": text}], []))
    assert text in rendered


def test_a_chat_template_is_kept_in_the_sandbox() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ModelError, match=r"chat template of .* cannot"):
        TurnTemplate(tokenizer).opening([{"role": "user", "content": "Go."}], [])


@pytest.mark.parametrize("text", [*INJECTIONS, ENDS_A_PROGRAM, "\ud800", "a\nb"])
def test_what_is_shown_in_a_terminal_is_shown_as_it_is(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    with open_log(tmp_path / "log.jsonl") as log, LiveView("m", console=Console(file=screen), mode="plain") as live:
        live.note(f"<{text}>")
        log.warning(f"<{text}>", said=text)
        structlog.get_logger().info("said", text=text)

    def fails(arguments: object) -> int:
        raise ConfigError(f"<{text}>")

    monkeypatch.setitem(main.__globals__["_RUN"], "version", fails)
    assert main(["version"]) == 2
    shown = screen.getvalue() + capsys.readouterr().err
    assert shown.count("<") == 3
    assert not set(shown) & set("\x1b\x07\x9b\r")
    if text in INJECTIONS:
        assert shown.count(text) == 4
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written[0]["said"] == written[1]["text"] == text


async def test_an_error_of_a_rollout_cannot_write_to_the_terminal_either() -> None:
    async def rollout(prompt: object) -> None:
        raise ValueError(ENDS_A_PROGRAM)

    evaluator = Evaluator(rollout, lambda *session: Silent(), Contract(), Config(model="m").rollout, seed=0)
    with pytest.raises(RolloutFailed) as failed:
        await evaluator.run([{}], room=anyio.Semaphore(1))
    assert "\\x1b[2J" in str(failed.value)
    assert not set(str(failed.value)) & set("\x1b\x07\x9b\r")


class Silent:
    def close(self) -> None: ...


# Doors


async def test_the_endpoint_listens_on_loopback_alone_and_asks_for_the_key_of_a_rollout() -> None:
    async with Endpoint() as endpoint, aiohttp.ClientSession() as http:
        host, port = endpoint.url.removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # sends nothing; tells which address others see
            outside = probe.getsockname()[0]
        if not outside.startswith("127."):
            with pytest.raises(OSError), socket.create_connection((outside, int(port)), timeout=1):  # noqa: PT011
                pass
        for headers in ({}, {"Authorization": "Bearer sk-asyncrl-guessed"}, {"x-api-key": ""}):
            for path in ("chat/completions", "completions", "responses", "messages"):
                async with http.post(f"{endpoint.url}/v1/{path}", json={}, headers=headers) as answer:
                    assert answer.status == 401
            async with http.get(f"{endpoint.url}/v1/models", headers=headers) as answer:
                assert answer.status == 401


# Secrets


def test_what_looks_like_a_secret_is_hidden_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "planted-value")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert hide_secrets("a planted-value b, abc") == "a *** b, abc"
    assert hide_secrets("GET http://me:pw%40@host:80/a") == "GET http://***@host:80/a"
    assert hide_secrets("Authorization: Bearer abcdefgh.ijk") == "Authorization: Bearer ***"
    assert hide_secrets("sk-asyncrl-0123456789abcdefghij and hf_0123456789abcdefghij") == "*** and ***"
    same = "task-with-a-rather-long-name, http://host:80/a@b, the bearer of, 2 tokens; max_tokens=5"
    assert hide_secrets(same) == same


def test_a_command_line_is_kept_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["train.py", "--api-key", "hidden1", "--hf.token=hidden2", "--max_tokens", "5", "--url=http://a:hidden3@b"]
    assert hide_secret_options(given) == [
        *("train.py", "--api-key", "***", "--hf.token=***", "--max_tokens", "5", "--url=http://***@b")
    ]
    monkeypatch.setattr(sys, "orig_argv", given)
    assert "hidden" not in json.dumps(environment())


def test_a_password_in_a_setting_is_refused_without_being_told() -> None:
    with pytest.raises(ConfigError, match="VLLM_API_KEY") as refused:
        Config(model="m", sampler={"urls": ["http://me:planted@host:8000"]})
    assert "planted" not in str(refused.value)
    assert Config(model="m", sampler={"urls": ["http://host:8000/a@b"]}).sampler.urls


PLANTED = {
    "OPENAI_API_KEY": "planted-openai-key",
    "WANDB_API_KEY": "planted-wandb-key",
    "DB_PASSWORD": "planted-db-pass",
}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with secrets all around it, in a folder that everybody may read."""
    folder = tmp_path_factory.mktemp("safety") / "run"
    script = folder.parent / "agent.py"
    script.write_text(AGENT, encoding="utf-8")
    with umask(0):
        folder.mkdir(mode=0o777)
        settings = {"model": str(model), "run_dir": str(folder)}
        command = [sys.executable, str(script), json.dumps(settings), "--api-key", "planted-on-the-command-line"]
        done = subprocess.run(
            command,
            env=os.environ | PLANTED | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    (folder.parent / "output").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder


AGENT = """
import json, os, sys
import structlog
import asyncrl
from asyncrl.testing.models import tiny_tokenizer

log = structlog.get_logger()

async def rollout(prompt):
    key = prompt.policy.openai_api_key
    completion = await prompt.policy.generate([65, 66], max_tokens=4)
    log.warning("calling " + prompt.policy.openai_base_url, headers={"Authorization": "Bearer " + key})
    if prompt.rollout_index == 3:
        raise ValueError("http://me:" + os.environ["DB_PASSWORD"] + "@host refused " + key)
    said = {"openai": os.environ["OPENAI_API_KEY"], "endpoint": key, "row": prompt["n"]}
    return asyncrl.RolloutSample.from_completion([65, 66], completion, float(prompt.rollout_index), **said)

if __name__ == "__main__":
    config = asyncrl.Config(
        **json.loads(sys.argv[1]), max_seq_len=64, completions_per_prompt=4, prompt_groups_per_step=2, log_rollouts=9,
        checkpoint={"interval": 1}, rollout={"on_error": "drop", "retries": 0}, sampler={"kind": "transformers"},
        trainer={"device": "cpu"}, loss={"kl_beta": 0.0},
    )
    asyncrl.train(rollout, dataset=[{"n": n} for n in range(6)], config=config)
"""


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_no_file_of_a_run_holds_a_secret(finished: Path) -> None:
    files = files_of(finished)
    assert {"config.toml", "environment.json", "metrics.jsonl", "rollouts.jsonl", "asyncrl.jsonl", "ledger.db"} <= {
        path.name for path in files
    }
    for path in [*files, finished.parent / "output"]:
        if not {"checkpoints", "samples"} & set(path.parts):  # those are what the rollouts gave, exactly
            assert not {b"planted", b"sk-asyncrl-"} & set(re.findall(rb"planted|sk-asyncrl-", path.read_bytes())), path


def test_no_file_of_a_run_can_be_read_by_others(finished: Path) -> None:
    """Whatever the umask. The model is there to be given away: its rights are the user's business."""
    for path in finished.rglob("*"):
        if "model" in path.relative_to(finished).parts or path.is_symlink():
            continue
        inside = [parent for parent in path.parents if finished in parent.parents]
        walled = any(not stat.S_IMODE(parent.stat().st_mode) & 0o077 for parent in inside)
        assert walled or not stat.S_IMODE(path.stat().st_mode) & 0o077, path
