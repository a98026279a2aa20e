"""Every code block of README and docs is run, page by page, as a reader would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from blocks import blocks, pages  # noqa: E402

FEW = 4
"""Blocks in all of the docs that nothing here can run."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Reads pages, each in a fresh copy of one folder."""

    home: Path
    process: subprocess.Popen[str]

    def read(self, page: Path, folder: Path) -> list[str]:
        shutil.copytree(self.home / "begin", folder, dirs_exist_ok=True)
        return self.ask(page, folder)

    def ask(self, page: Path | None, folder: Path) -> list[str]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"page": page and str(page), "folder": str(folder)}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the reader's machine is gone, with {self.process.wait()}: what it said is on stderr"
        answer: list[str] = json.loads(line)
        return answer


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    home = tmp_path_factory.mktemp("reader")
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    typed = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # their environment is active
    process = subprocess.Popen(
        [sys.executable, str(HERE / "machine.py"), str(home)],
        env=os.environ | offline | quiet | typed,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        made = Machine(home, process)
        assert made.ask(None, home / "begin") == []
        yield made
    finally:
        process.communicate(timeout=60)


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in pages()])
def test_every_block_runs(page: str, machine: Machine, tmp_path: Path) -> None:
    failures = machine.read(ROOT / page, tmp_path)
    assert not failures, "\n\n".join(failures)


def test_few_blocks_are_not_run() -> None:
    marked = [f"{page}:{block.line}" for page in pages() for block in blocks(page.read_text()) if block.not_run]
    assert len(marked) <= FEW, marked


BROKEN = {
    "```python\nprint(nothing)\n```": "name 'nothing' is not defined",
    "```python\nfrom asyncrl import learn\n```": "cannot import name 'learn'",
    '```python\nasync def rollout(prompt):\n    return grade(prompt["answer"])\n```': "name 'grade' is not defined",
    '```python\nasync def rollout(prompt):\n    return prompt["solution"]\n```': "solution",
    "```python\nasync def make_rollout(setup):\n    raise OSError('no luck')\n```": "no luck",
    "```python\nconfig = asyncrl.Config(model='Qwen/Qwen3-0.6B', steps=3)\n```": "steps: there is no such setting",
    "```python\nconfig = asyncrl.Config(model='a/b')\n```": "no model 'a/b'",
    (
        "```python\ndef loss(inputs): return 1 / 0\n"
        "config = asyncrl.Config(model='Qwen/Qwen3-0.6B', policy_loss=loss)\n```"
    ): "division by zero",
    "```toml\n[staleness]\nmaximum = 3\n```": "staleness.maximum",
    '```toml\nbase_model = "Qwen/Qwen3-0.6B"\nrank = 3\n```': "no recipe has all of",
    '```json\n{"prompt": ...}\n```': "JSONDecodeError",
    "```sh\nasyncrl learn train.toml\n```": "SystemExit: 2",
    "```console\n$ asyncrl inspect runs/first --wurst 3\n```": "does not know --wurst",
    "```console\nasyncrl inspect runs/first\n```": "begins with `$ `",
    "```sh\nasyncrl inspect runs/second\n```": "ended with 2",
    "```sh\npip install '.[gpu]'\n```": "no extra ['gpu']",
    "```sh\nmake everything\n```": "CalledProcessError",
    "```sh\npython examples/chess.py\n```": "no examples/chess.py",
    "```sh\npython benchmarks/overlap.py --sheep 3\n```": "has no --sheep",
    "```sh\nrm -rf runs\n```": "nothing here runs 'rm'",
    "```yaml\na: 1\n```": "nothing here runs 'yaml'",
    "```\nasyncrl train train.toml\n```": "typed by readers",
    "Try this:\n\n    asyncrl train train.toml\n": "typed by readers",
    "<!-- not run: sorry -->\n```python\n1 / 0\n```": "no reason",
    "```python\n1 + 1\n": "never ends",
    "```python\nimport os; os._exit(0)\n```": "the process died",
}
"""What is wrong with a page -> what is said of it."""


@pytest.mark.parametrize(("broken", "said"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_broken_block_is_found(broken: str, said: str, machine: Machine, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{broken}\n")
    assert said in "\n".join(machine.read(page, tmp_path / "folder"))


def test_what_is_right_passes(machine: Machine, tmp_path: Path) -> None:
    """Blocks go on from each other and from README, and files that they name are there."""
    page = tmp_path / "page.md"
    page.write_text(
        """# A page

<!-- file: judge.py -->
```python
def judge(text): return float(text == "4")
```

```python
from judge import judge

async def rollout(prompt):
    chat = prompt.policy.chat(prompt["messages"], tools=[calculator])
    return chat.sample(reward=judge(await chat.run()))
```

```python
result = asyncrl.train(rollout, dataset="train.jsonl", config=asyncrl.Config(model="Qwen/Qwen3-0.6B"))
assert result.steps == 2
```

<!-- not run: there is no such machine -->
```sh
ssh far-away
```
"""
    )
    assert machine.read(page, tmp_path / "folder") == []
