"""The model that is trained: loading it, and its log-probs for packed sequences.

T tokens of a row, N targets, H hidden size. The backbone gives hidden states; log-probs come from them in
chunks (logprobs.py), never through the model's own head. What that head does is read from the config, and
how attention keeps packed sequences apart is chosen; both are checked once, against the model's own forward.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from asyncrl.config import Config
from asyncrl.errors import ConfigError, ModelError
from asyncrl.training import attention, lora
from asyncrl.training.attention import pack
from asyncrl.training.batch import Tokens, make_tokens
from asyncrl.training.logprobs import Head, TokenLogprobs, token_logprobs

log = structlog.get_logger(__name__)

# Packing, then rows padded on the right with the model's own attention, in the order of their speed.
ATTENTIONS = (attention.NAME, "sdpa", "eager")
CHECK_LENGTHS = (13, 8, 5)
FLOAT32_TOLERANCE = 2e-3
# Mean difference of log-probs; a wrong mask or head is off by nats, rounding to bfloat16 by hundredths.
BFLOAT16_TOLERANCE = 0.3


@dataclass(frozen=True, slots=True)
class PolicyModel:
    """A causal language model on its device, in eval mode: dropout would make the ratio to the sampler wrong."""

    causal_lm: PreTrainedModel
    """With LoRA, its linear layers carry the adapter."""
    adapter: lora.Adapter | None
    head: Head
    device: torch.device
    compute_dtype: torch.dtype
    source_dtype: torch.dtype
    """Of the checkpoint that was loaded, and of the one that is saved."""
    packed: bool
    """False: the sequences of a microbatch go through the model as padded rows."""
    chunk_tokens: int

    @property
    def vocab_size(self) -> int:
        return int(self.causal_lm.get_input_embeddings().weight.shape[0])

    @property
    def max_length(self) -> int | None:
        """Longest sequence that the model's positions allow; None where its config does not say."""
        length: int | None = _text_setting(self.causal_lm, "max_position_embeddings")
        return length

    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.causal_lm.parameters() if parameter.requires_grad]

    def padded_tokens(self, lengths: tuple[int, ...]) -> int:
        """Tokens of a microbatch of these sequences, with the padding that attention (or all layers) adds."""
        if self.packed and self.device.type == "cuda" and self.compute_dtype != torch.float32:
            return sum(lengths)
        return attention.padded_tokens(lengths)

    def token_logprobs(self, tokens: Tokens, temperature: float) -> TokenLogprobs:
        """Log-probs and entropies [N] of the targets."""
        with self.autocast():
            hidden = self.hidden_states(tokens)  # [T, H]
        return token_logprobs(
            hidden.index_select(0, tokens.predictors),
            self.head,
            tokens.targets,
            temperature=temperature,
            chunk_tokens=self.chunk_tokens,
            matmul_dtype=self.compute_dtype,
        )

    def hidden_states(self, tokens: Tokens) -> Tensor:
        """The last hidden state of every token, [T, H]."""
        decoder, layout = self.causal_lm.get_decoder(), pack(tokens.layout)
        if self.packed:
            output = decoder(
                input_ids=tokens.token_ids[None],
                position_ids=tokens.layout.position_ids[None],
                use_cache=False,
                packed=layout,
            )
            hidden: Tensor = output.last_hidden_state[0]
            return hidden
        ids = tokens.token_ids if layout.gather is None else tokens.token_ids[layout.gather]  # [P]
        blocks = torch.split(ids, [block.sequences * block.length for block in layout.blocks])
        rows = [
            decoder(input_ids=part.view(block.sequences, block.length), use_cache=False).last_hidden_state.flatten(0, 1)
            for part, block in zip(blocks, layout.blocks, strict=True)
        ]
        hidden = torch.cat(rows)  # [P, H]
        return hidden if layout.restore is None else hidden[layout.restore]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)


def load_policy(config: Config) -> PolicyModel:
    """Load `config.model` to train it. Raises `ModelError` or `ConfigError`."""
    device = choose_device(config.trainer.device)
    compute_dtype = _choose_dtype(config.trainer.dtype, device)
    # Full training keeps float32 weights; a base that only carries an adapter is frozen, and need not.
    weights_dtype = compute_dtype if config.lora.rank else torch.float32
    causal_lm, source_dtype = _load(config.model, weights_dtype)
    causal_lm = causal_lm.to(device).eval()
    policy = PolicyModel(
        causal_lm=causal_lm,
        adapter=None,
        head=_find_head(causal_lm),
        device=device,
        compute_dtype=compute_dtype,
        source_dtype=source_dtype,
        packed=True,
        chunk_tokens=config.trainer.logprob_chunk_tokens,
    )
    policy = _choose_attention(policy)
    if config.lora.rank:
        adapter = lora.attach(causal_lm, config.lora, config.seed)
        policy = replace(policy, adapter=adapter)
        _find_head(causal_lm)
    if config.trainer.gradient_checkpointing:
        _enable_checkpointing(causal_lm)
    return policy


def frozen_copy(policy: PolicyModel) -> PolicyModel:
    """The reference model of a full fine-tune: the weights as they are now, which never train."""
    causal_lm = copy.deepcopy(policy.causal_lm).requires_grad_(False).eval()
    return replace(policy, causal_lm=causal_lm, head=_find_head(causal_lm))


def choose_device(name: str) -> torch.device:
    """The device that a setting means. Raises `ConfigError` for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, found in there.items() if found))
    if not there[name]:
        found = ", ".join(kind for kind, found in there.items() if found)
        raise ConfigError(f"trainer.device is {name!r}, but torch {torch.__version__} finds only {found}. Use 'auto'.")
    return torch.device(name)


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _load(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, torch.dtype]:
    """The model, and the dtype of its checkpoint."""
    if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ModelError(
            f"model {name!r}: there is no such folder. Expected a folder with config.json and safetensors of a causal "
            "language model, or a name on the Hugging Face hub, such as 'Qwen/Qwen3-0.6B'."
        )
    try:
        with quiet_progress():
            model, report = AutoModelForCausalLM.from_pretrained(name, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"model {name!r} cannot be loaded: {error}\n"
            "Expected a name on the Hugging Face hub, or a folder with config.json and safetensors of a causal "
            "language model that `transformers` knows. Check the name, the path, and the connection."
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"model {name!r} lacks {len(missing)} of its weights, among them {missing[0]}: they would be random. "
            "Expected a complete checkpoint of a causal language model."
        )
    assert isinstance(model, PreTrainedModel)
    source_dtype = model.dtype
    return model.to(dtype), source_dtype


def _find_head(causal_lm: PreTrainedModel) -> Head:
    output = causal_lm.get_output_embeddings()
    if not isinstance(output, nn.Linear):
        raise ModelError(
            f"the output head of {type(causal_lm).__name__} is a {type(output).__name__}. Expected one plain linear "
            "layer: leave the head out of lora.targets, or use another model."
        )
    divisor = _text_setting(causal_lm, "logits_scaling") or 1.0
    return Head(
        weight=output.weight,
        bias=output.bias,
        softcap=_text_setting(causal_lm, "final_logit_softcapping"),
        scale=(_text_setting(causal_lm, "logit_scale") or 1.0) / divisor,
    )


def _text_setting(causal_lm: PreTrainedModel, name: str) -> Any:
    """A setting that only some architectures have, of the text part of a model; None where there is none."""
    return causal_lm.config.get_text_config().to_dict().get(name)


def _choose_attention(policy: PolicyModel) -> PolicyModel:
    """The fastest attention under which packed log-probs are those of each sequence alone.

    Some models mix tokens by other means (convolutions, recurrent states, attention sinks or caps): those
    cannot be packed, and their sequences become padded rows, which any causal model reads rightly.
    """
    causal_lm = policy.causal_lm
    sequences = [
        [(7 * (place + 3) * (length + 1)) % policy.vocab_size for place in range(length)] for length in CHECK_LENGTHS
    ]
    causal_lm.set_attn_implementation("eager")
    expected = torch.cat([_own_logprobs(policy, tokens) for tokens in sequences])
    tokens = make_tokens(sequences, policy.device)
    names, faults = _candidates(causal_lm)
    for name in names:
        packed = name == attention.NAME
        try:
            causal_lm.set_attn_implementation(name)
            candidate = replace(policy, packed=packed)
            with torch.no_grad():
                found = candidate.token_logprobs(tokens, 1.0).logprobs
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:  # a kernel or a model that refuses: try the next
            faults.append(f"{name}: {error}")
            continue
        difference = (found - expected).abs()
        exact = policy.compute_dtype == torch.float32
        close = difference.max() <= FLOAT32_TOLERANCE if exact else difference.mean() <= BFLOAT16_TOLERANCE
        if close:
            if faults:
                log.warning("attention_fallback", attention=name, padded_rows=not packed, because=faults)
            return candidate
        faults.append(f"{name}: log-probs differ by up to {float(difference.max()):.3g}")
    raise ModelError(
        f"the log-probs of {type(causal_lm).__name__} cannot be computed in chunks: they are not those of its own "
        f"forward ({'; '.join(faults)}). Its output head does more than this engine knows. Use another model."
    )


def _own_logprobs(policy: PolicyModel, token_ids: list[int]) -> Tensor:
    """Log-probs [n - 1] of one sequence alone, through the model's own forward."""
    ids = torch.tensor([token_ids], device=policy.device)
    with torch.no_grad(), policy.autocast():
        logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[0, :-1].float()  # [n - 1, V]
    logprobs: Tensor = logits.log_softmax(dim=1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1)


def _candidates(causal_lm: PreTrainedModel) -> tuple[tuple[str, ...], list[str]]:
    """The attentions to try, and why others are left out: what short sequences or small weights would not show."""
    softcap = _text_setting(causal_lm, "attn_logit_softcapping")
    if softcap is not None:
        return ("eager",), [f"attn_logit_softcapping={softcap} exists only in the model's own attention"]
    chunk = _text_setting(causal_lm, "attention_chunk_size")
    kinds = set(_text_setting(causal_lm, "layer_types") or ()) - {"full_attention", "sliding_attention"}
    if chunk or kinds:
        return ("sdpa", "eager"), [f"a pack cannot express {', '.join(sorted(kinds)) or 'chunked attention'}"]
    return ATTENTIONS, []


def _enable_checkpointing(causal_lm: PreTrainedModel) -> None:
    """Layers compute their activations again in backward. They do so only in training mode, which is given to
    the layers alone and not to what is in them, so that dropout stays off."""
    if not causal_lm.supports_gradient_checkpointing:
        raise ConfigError(
            f"trainer.gradient_checkpointing is on, but {type(causal_lm).__name__} does not support it. Switch it off."
        )
    causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    for module in causal_lm.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """No progress bars of `transformers`: this engine has its own display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
