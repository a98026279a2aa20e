"""A reader's machine: a folder with what a reader has, a hub that needs no network, and a process for each page.

    python tests/docs/machine.py HOME       one JSON job a line on stdin, one answer a line on stdout

It imports what a run needs once, and forks for each page: a page costs what its code costs, and leaves nothing behind.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reading
from blocks import ROOT, blocks

HUB_NAME = "Qwen/Qwen3-0.6B"
"""What the pages train. Here it is a model of 0.1 million parameters that has learned five things to say."""
REVISION = "0" * 40
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+2"}}\n</tool_call>'
SAID = ("4", "5", "yes", "<answer>4</answer>", CALL)
PAGE_S = 120.0
"""Longest page. Most take two seconds."""
STEPS_OF_FIRST = 12


def main(home: Path) -> None:
    _preload()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        work = (lambda f=folder: furnish(home, f)) if job["page"] is None else _reads(Path(job["page"]), folder)
        print(json.dumps(_in_a_process(folder, work)), flush=True)


def _preload() -> None:
    import peft
    import torch
    import transformers.models.qwen3.modeling_qwen3

    import asyncrl.run
    import asyncrl.sampling.transformers
    import asyncrl.training.thread
    import asyncrl.training.trainer

    del peft, transformers, asyncrl
    torch.set_num_threads(1)


def _reads(page: Path, folder: Path) -> Callable[[], list[str]]:
    return lambda: reading.Reader(page, folder).read()


def _in_a_process(folder: Path, work: Callable[[], list[str]]) -> list[str]:
    """What went wrong there: what `work` returns, or how it ended otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    printed, result = folder / "printed.txt", folder / "result.json"
    for left in (printed, result):  # of the folder that this one is a copy of
        left.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _be(folder, printed, result, work)
    deadline = time.monotonic() + PAGE_S
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return [f"it took longer than {PAGE_S:g} s; it had printed\n{_end_of(printed)}"]
        time.sleep(0.01)
    if not result.exists():
        return [f"the process died; it had printed\n{_end_of(printed)}"]
    found: list[str] = json.loads(result.read_text())
    return found and [*found, f"it had printed\n{_end_of(printed)}"]


def _be(folder: Path, printed: Path, result: Path, work: Callable[[], list[str]]) -> None:
    """The child, to its end."""
    try:
        os.setpgid(0, 0)
        out = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        result.write_text(json.dumps(work()))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def _end_of(printed: Path) -> str:
    return printed.read_text(errors="replace")[-3000:]


def furnish(home: Path, folder: Path) -> list[str]:
    """Fill the folder that every page begins in: the files of README, rows, and a run."""
    for block in blocks((ROOT / "README.md").read_text()):
        if block.file is not None:
            Path(block.file).write_text(block.text)
    for name, rows in _data().items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    _publish(home)
    settings = "--run_dir runs/first --checkpoint.interval 4 --checkpoint.keep_last 3 --evaluation.dataset test.jsonl"
    with reading.shortened(STEPS_OF_FIRST):
        reading.asyncrl_command(["train", "train.toml", *settings.split()])
    shutil.copytree("runs/first", "runs/demo")  # as `asyncrl demo --out runs/demo` would, which takes minutes
    shutil.copytree(_snapshot(home) / "snapshots" / REVISION, "runs/demo/start-model")
    return []


def _data() -> dict[str, list[dict[str, Any]]]:
    sums = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    asked = [(f"What is {a} + {b}?", "4" if (a + b) % 2 else "5") for a, b in sums]
    told = [(question, {"role": "user", "content": question}, answer) for question, answer in asked]
    rows = [{"messages": [message], "question": question, "answer": answer} for question, message, answer in told]
    chats = [{"messages": [message, {"role": "assistant", "content": answer}]} for _, message, answer in told]
    pairs = [{"prompt": question, "chosen": answer, "rejected": "9"} for question, _, answer in told]
    return {"train.jsonl": rows, "test.jsonl": rows[:4], "chats.jsonl": chats[:16], "pairs.jsonl": pairs[:16]}


def _publish(home: Path) -> None:
    """Put the model where `transformers` looks for `HUB_NAME` when it has no network."""
    snapshot = _snapshot(home)
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text(REVISION)
    (snapshot / "snapshots").mkdir()
    _train_a_talker(home / "blank", snapshot / "snapshots" / REVISION)


def _snapshot(home: Path) -> Path:
    return home / "hub" / f"models--{HUB_NAME.replace('/', '--')}"


def _train_a_talker(blank: Path, folder: Path) -> None:
    """A model that says one of `SAID` to whatever it is asked."""
    from asyncrl.config import Config, LossConfig, OptimizerConfig
    from asyncrl.losses import cross_entropy
    from asyncrl.testing.models import tiny_model, tiny_tokenizer
    from asyncrl.training.trainer import TorchTrainer
    from asyncrl.types import TrainSequence

    tokenizer = tiny_tokenizer(words=SAID)
    tiny_model(blank, kind="qwen3", hidden=64, layers=1, max_seq_len=4096, tokenizer=tokenizer)
    config = Config(model=str(blank), loss=LossConfig(kl_beta=0), optimizer=OptimizerConfig(learning_rate=1e-2))
    trainer = TorchTrainer(config, total_steps=40, weights_format="tensors")
    rng = random.Random(0)

    def said() -> TrainSequence:
        asked = [{"role": "user", "content": f"What is {rng.randrange(9)} + {rng.randrange(9)}?"}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        answer = tokenizer.encode(rng.choice(SAID) + "<|im_end|>")
        mask = [0] * len(prompt) + [1] * len(answer)
        return TrainSequence([*prompt, *answer], [0.0] * len(mask), mask, advantage=1.0, group=0)

    for _ in range(40):
        trainer.forward_backward_custom([said() for _ in range(10)], cross_entropy)
        trainer.optim_step()
    trainer.save_model(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
