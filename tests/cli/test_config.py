from __future__ import annotations

from pathlib import Path

import pytest

from asyncrl.cli.config import load_config
from asyncrl.errors import ConfigError


def write(folder: Path, text: str = 'model = "m"\n') -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_and_command_line_together(tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "m"\nseed = 1\n[staleness]\nmax_staleness = 2\npolicy = "pace"\n')
    config = load_config(path, ["--staleness.max_staleness", "8", "--seed=3", "--data.epochs", "2"])
    assert (config.seed, config.data.epochs) == (3, 2)
    assert (config.staleness.max_staleness, config.staleness.policy) == (8, "pace")


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["--seed", "-1"], "seed", -1),
        (["--data.shuffle", "false"], "data.shuffle", False),
        (["--optimizer.learning_rate", "3e-6"], "optimizer.learning_rate", 3e-6),
        (["--optimizer.learning-rate=1e-4"], "optimizer.learning_rate", 1e-4),
        (["--loss.tis_cap", "none"], "loss.tis_cap", None),
        (["--loss.normalization", "none"], "loss.normalization", "none"),
        (["--loss.normalization", "512"], "loss.normalization", 512.0),
        (["--trackers", "wandb,tensorboard"], "trackers", ("wandb", "tensorboard")),
        (["--trackers", '["wandb"]'], "trackers", ("wandb",)),
        (["--sampler.urls", "http://a:1, http://b:2"], "sampler.urls", ("http://a:1", "http://b:2")),
        (["--sampler.extra_args", '["--x", "a,b"]'], "sampler.extra_args", ("--x", "a,b")),
        (["--optimizer.betas", "0.9,0.99"], "optimizer.betas", (0.9, 0.99)),
        (["--lora.targets", "all-linear"], "lora.targets", "all-linear"),
        (["--lora.targets", '["q_proj", "v_proj"]'], "lora.targets", ("q_proj", "v_proj")),
        (["--model", "123"], "model", "123"),  # text stays text, whatever it looks like
        (["--model", '"quoted name"'], "model", "quoted name"),
        (["--model", "2026-11-21"], "model", "2026-11-21"),
        (["--run_dir", "7"], "run_dir", Path("7")),
    ],
)
def test_values_on_the_command_line(tmp_path: Path, given: list[str], name: str, value: object) -> None:
    found: object = load_config(write(tmp_path), given)
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--staleness.max_stalenes", "8"], "Did you mean 'staleness.max_staleness'"),
        (["--max_staleness", "8"], "Did you mean 'staleness.max_staleness'"),
        (["--nonsense.deep.er", "8"], "there is no such setting"),
        (["--staleness", "8"], "--staleness is a section.*--staleness.policy VALUE"),
        (["--model.size", "8"], "'model' is a setting, not a section"),
        (["--seed"], "--seed needs a value"),
        (["--data.shuffle", "--seed", "1"], "--data.shuffle needs a value"),
        (["seed", "1"], "found 'seed' where a setting was expected"),
        (["--seed", "many"], "seed: found 'many'"),
        (["--sampling.temperature", "0"], "sampling.temperature is 0"),
        (["--staleness.max_staleness", "none"], "staleness.max_staleness: found 'none'"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, given: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path), given)


def test_faults_of_the_file_name_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "m"\nsampler = { kinds = "vllm" }\n')
    with pytest.raises(ConfigError, match=r"run.toml cannot be used:\nsampler.kinds: .* 'sampler.kind'"):
        load_config(path)


def test_a_misspelt_section_and_a_section_without_settings(tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "m"\nstaleness = 3\n[optimiser]\nlearning_rate = 1e-3\n')
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert "optimiser: there is no such setting. Did you mean 'optimizer'?" in str(error.value)
    assert "staleness: found 3, but it is a section. Name its settings below [staleness]." in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('model = "m"\nseed = \n', r"run.toml:2: this is not valid TOML"),
        ("model = m\n", r"run.toml:1: this is not valid TOML.*Text needs quotes"),
        ('model = "m', r"run.toml, at its end: this is not valid TOML|run.toml:1: this is not valid TOML"),
    ],
)
def test_toml_faults_have_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path, text))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config file .*none.toml"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"is a folder, .* asyncrl resume "):
        load_config(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as a config file"):
        load_config(tmp_path / "model.bin")


def test_paths_of_the_file_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, here = tmp_path / "project", tmp_path / "here"
    project.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    path = write(project, 'model = "./tiny"\ndataset = "a.jsonl"\nrollout_fn = "r.py:go"\n')
    config = load_config("../project/run.toml")
    assert config.model == str(project / "tiny")
    assert config.dataset == str(project / "a.jsonl")
    assert config.rollout_fn == f"{project / 'r.py'}:go"
    # ... and those of the command line to where the user stands
    config = load_config(path, ["--dataset", "b.jsonl", "--model", "org/name", "--rollout_fn", "pkg.mod:go"])
    assert (config.dataset, config.model, config.rollout_fn) == (str(here / "b.jsonl"), "org/name", "pkg.mod:go")
