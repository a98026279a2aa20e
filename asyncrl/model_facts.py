"""What a run must know of a model before it is loaded: sizes and stop tokens, from its configuration files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.errors import ModelError

LONGEST_DEFAULT_TOKENS = 8192
"""`max_seq_len` where the user names none: what the model allows, but not the 128k of some."""
NO_CODE = {"trust_remote_code": False}
"""For every `from_pretrained`: code that comes with a model is not run, and nobody is asked on a terminal either."""
DATA_ALONE = {**NO_CODE, "use_safetensors": True}
"""For those that read weights: a `pytorch_model.bin` is a pickle, and pickles can be programs."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    vocabulary: int
    """Token ids are below it."""
    max_seq_len: int
    """Longest sequence in tokens."""
    stop_token_ids: tuple[int, ...]
    """The model's own end-of-turn and end-of-text tokens."""


def read_facts(model: str, max_seq_len: int | None) -> ModelFacts:
    """Read the configuration of `model`, a folder or a name on the hub.

    Raises:
        ModelError: there is no such model, or `max_seq_len` is more than it can take.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, **NO_CODE)
    except (OSError, ValueError) as error:
        raise ModelError(_not_found(model, error)) from None
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary is None:
        raise ModelError(
            f"{model} is no language model: the configuration of a {config.model_type!r} has no vocab_size. "
            "Expected a causal language model."
        )
    longest = getattr(text, "max_position_embeddings", None)
    if max_seq_len is not None and longest is not None and max_seq_len > longest:
        raise ModelError(
            f"max_seq_len is {max_seq_len}, but {model} takes at most {longest} tokens. Lower max_seq_len."
        )
    return ModelFacts(
        vocabulary=vocabulary,
        max_seq_len=max_seq_len or min(longest or LONGEST_DEFAULT_TOKENS, LONGEST_DEFAULT_TOKENS),
        stop_token_ids=_stop_tokens(model, text),
    )


def load_tokenizer(model: str) -> Any:
    """The `transformers` tokenizer of `model`.

    Raises:
        ModelError: it has none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, **NO_CODE)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the tokenizer of {model} cannot be loaded: {_first_line(error)} Expected tokenizer.json and "
            "tokenizer_config.json beside the model, as the save_pretrained of a tokenizer writes them."
        ) from None


def _stop_tokens(model: str, config: Any) -> tuple[int, ...]:
    from transformers import GenerationConfig

    found: list[int] = []
    try:
        sources = [config, GenerationConfig.from_pretrained(model, **NO_CODE)]
    except OSError:
        sources = [config]
    for source in sources:
        ids = source.eos_token_id
        found += [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    return tuple(sorted(set(found)))


def why_unusable(model: str) -> str:
    """What keeps a folder from being a model that asyncrl opens, where that can be told; else nothing."""
    pickles = sorted(path.name for path in Path(model).glob("*.bin")) if Path(model).is_dir() else []
    if not pickles or any(Path(model).glob("*.safetensors")):
        return ""
    return (
        f" {pickles[0]} is a pickle, which can run code as it is opened. If you trust it, convert it once: "
        f"AutoModelForCausalLM.from_pretrained({model!r}).save_pretrained('new-folder'), and the tokenizer likewise."
    )


def _not_found(model: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{model} comes with code of its own, and asyncrl does not run code that comes with a model. Expected an "
            "architecture that `transformers` itself knows."
        )
    if Path(model).exists():
        return (
            f"{model} holds no model that transformers can open: {_first_line(error)} "
            "Expected a folder with config.json and safetensors, as save_pretrained writes it."
        )
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        return (
            f"there is no model {model!r}: no such folder (looked in {Path.cwd()}). Expected a folder with config.json "
            "and safetensors, as save_pretrained writes it, or a name on the Hugging Face hub: 'Qwen/Qwen3-0.6B'."
        )
    return (
        f"there is no model {model!r}: no such folder here, and the Hugging Face hub did not give it "
        f"({_first_line(error)}). Check the name, the network, and `hf auth login` for gated models."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:") + "."
