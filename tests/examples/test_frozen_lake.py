"""examples/frozen_lake.py as users run it, with a model that has just learned to say a move."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path
from types import ModuleType

import pytest

from asyncrl.config import Config, LossConfig, OptimizerConfig
from asyncrl.data import Prompt
from asyncrl.demo.model import torch_threads
from asyncrl.losses import cross_entropy
from asyncrl.testing.models import tiny_model, tiny_tokenizer
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence

pytest.importorskip("gymnasium")
FILE = Path(__file__).parents[2] / "examples" / "frozen_lake.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("frozen_lake", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Goes down or right, wherever it is: across some lakes, by luck."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(words=[example.RULES, *example.MOVES])
    blank = tiny_model(folder / "blank", hidden=32, layers=1, tokenizer=tokenizer)
    config = Config(model=str(blank), loss=LossConfig(kl_beta=0), optimizer=OptimizerConfig(learning_rate=1e-2))
    trainer = TorchTrainer(config, total_steps=30, weights_format="tensors")
    rng = random.Random(0)
    with torch_threads(1):
        for _ in range(30):
            batch = []
            for row in rng.choices(example.lakes(32, 0), k=6):
                messages = [
                    {"role": "system", "content": example.RULES},
                    {"role": "user", "content": "\n".join(" ".join(tiles) for tiles in row["lake"])},
                ]
                prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                move = tokenizer.encode(rng.choice(["down", "right"]) + "<|im_end|>")
                mask = [0] * len(prompt) + [1] * len(move)
                batch.append(TrainSequence([*prompt, *move], [0.0] * len(mask), mask, advantage=1.0, group=0))
            trainer.forward_backward_custom(batch, cross_entropy)
            trainer.optim_step()
    trainer.save_model(folder / "wanderer")
    return folder / "wanderer"


def test_it_trains(example: ModuleType, model: Path, tmp_path: Path) -> None:
    small = "--steps 2 --prompts 2 --rollouts 8 --lora-rank 0 --sampler transformers --eval-lakes 6"
    result = example.main(["--model", str(model), "--out", str(tmp_path / "run"), *small.split()])
    assert result.steps == 2
    assert result.before.n == 6
    log = (result.run_dir / "rollouts.jsonl").read_text()
    assert '"done":true' in log.replace(" ", "")
    assert re.search(r"P [FH] ", log)


def test_the_picture_shows_the_player(example: ModuleType) -> None:
    lake = ["SFHF", "FFFF", "HFFF", "FFFG"]
    env = example.make_lake(Prompt({"lake": lake}, policy=None, index=0))
    place, info = env.reset(seed=0)
    assert example.picture(env, place, info) == "P F H F\nF F F F\nH F F F\nF F F G"
    place, *_, info = env.step(example.MOVES.index("right"))
    assert example.picture(env, place, info).startswith("S P H F")


def test_lakes_are_made_again_from_their_seeds(example: ModuleType) -> None:
    assert example.lakes(3, 5)[1:] == example.lakes(2, 6)
    assert len({str(row) for row in example.lakes(20, 0)}) > 15
