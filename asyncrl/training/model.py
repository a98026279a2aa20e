"""The model that is trained: loading it, and its log-probs for packed sequences.

T tokens of a row, N targets, H hidden size. The backbone gives hidden states; log-probs come from them in
chunks (logprobs.py), never through the model's own head. What that head does is read from the config, and
how attention keeps packed sequences apart, and lets them share, is chosen by what is there and works. Both are
checked once, against the model's own forward.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from asyncrl.config import Config
from asyncrl.errors import ConfigError, ModelError
from asyncrl.model_facts import DATA_ALONE, why_unusable
from asyncrl.training import attention, lora
from asyncrl.training.attention import Blocks, Packed, prepare_blocks, prepare_varlen
from asyncrl.training.batch import Tokens, make_tokens
from asyncrl.training.columns import token_columns
from asyncrl.training.last_layer import narrow_last_layer
from asyncrl.training.layers import compile_layers, enable_checkpointing
from asyncrl.training.layout import Layout, padded_tokens
from asyncrl.training.logprobs import Head, TokenLogprobs, token_logprobs
from asyncrl.training.plan import Cut

log = structlog.get_logger(__name__)

# Two sequences of their own, two that share their beginning with the one before, and one that is all of it.
CHECK_LENGTHS = (13, 8, 19, 17, 9)
CHECK_SHARED = (0, 0, 0, 11, 8)
# Below this part of the row's tokens it pays to gather the ones that are read.
NARROWED_PART = 3 / 4
HALF_PRECISION = (torch.bfloat16, torch.float16)
FLOAT32_TOLERANCE = 2e-3
# Mean difference of log-probs; a wrong mask or head is off by nats, rounding to bfloat16 by hundredths.
BFLOAT16_TOLERANCE = 0.3


@dataclass(frozen=True, slots=True)
class Attention:
    """One way to compute the attention of a microbatch."""

    name: str
    """As `transformers` registers it."""
    packed: bool = False
    """False: the sequences of a microbatch go through the model as padded rows."""
    varlen: bool = False
    """Packed, and by flash attention where the device and the precision have it."""

    def __str__(self) -> str:
        if not self.packed:
            return f"{self.name} on padded rows"
        return "packed, flash attention" if self.varlen else "packed, sdpa in blocks"


VARLEN = Attention(attention.NAME, packed=True, varlen=True)
BLOCKS = Attention(attention.NAME, packed=True)
PADDED = (Attention("sdpa"), Attention("eager"))
"""Rows padded on the right, with the model's own attention: right for any causal model."""


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
    attention: Attention
    share_prompts: bool
    """`trainer.share_prompts`"""
    narrowed: bool = False
    """The last layer can be told which tokens are read (last_layer.py)."""

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

    @property
    def packed(self) -> bool:
        return self.attention.packed

    @property
    def shares(self) -> bool:
        """Whether sequences of a microbatch may have tokens in common."""
        return self.packed and self.share_prompts

    @property
    def _varlen(self) -> bool:
        return self.attention.varlen and self.device.type == "cuda" and self.compute_dtype in HALF_PRECISION

    def padded_tokens(self, layout: Layout) -> int:
        """Tokens of a row, with the padding that attention (or all layers) adds."""
        return layout.tokens if self._varlen else padded_tokens(layout)

    def token_logprobs(self, tokens: Tokens, temperature: float) -> TokenLogprobs:
        """Log-probs and entropies [N] of the targets."""
        with self.autocast():
            hidden = self.hidden_states(tokens)  # [T, H]
        return token_logprobs(
            # Shared places are read more than once: the backward of `embedding` sums them in a fixed order.
            nn.functional.embedding(tokens.predictors, hidden),
            self.head,
            tokens.targets,
            temperature=temperature,
            matmul_dtype=self.compute_dtype,
        )

    def hidden_states(self, tokens: Tokens) -> Tensor:
        """The last hidden states [T, H]; of tokens that are not read they may be anything."""
        decoder, layout = self.causal_lm.get_decoder(), tokens.layout
        if not self.packed:
            return _padded_rows(decoder, tokens.token_ids, prepare_blocks(layout, self.device))
        row: Packed = (prepare_varlen if self._varlen else prepare_blocks)(layout, self.device)
        few = self.narrowed and len(tokens.read) < NARROWED_PART * len(tokens.token_ids)
        output = decoder(
            input_ids=tokens.token_ids[None],
            position_ids=tokens.position_ids[None],
            use_cache=False,
            packed=row,
            **({"read": tokens.read} if few else {}),
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute_dtype not in HALF_PRECISION:
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
        head=find_head(causal_lm),
        device=device,
        compute_dtype=compute_dtype,
        source_dtype=source_dtype,
        attention=BLOCKS,
        share_prompts=config.trainer.share_prompts,
    )
    policy = _choose_attention(policy)
    if config.lora.rank:
        adapter = lora.attach(causal_lm, config.lora, config.seed)
        policy = replace(policy, adapter=adapter)
        find_head(causal_lm)
    if config.trainer.gradient_checkpointing:
        enable_checkpointing(causal_lm)
    if config.trainer.compile:
        _compile(policy)
        return policy
    return _narrow(policy) if policy.packed else policy


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
            model, report = AutoModelForCausalLM.from_pretrained(
                name, dtype="auto", output_loading_info=True, **DATA_ALONE
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"model {name!r} cannot be loaded: {error}\n"
            "Expected a name on the Hugging Face hub, or a folder with config.json and safetensors of a causal "
            "language model that `transformers` knows. Check the name, the path, and the connection."
            f"{why_unusable(name)}"
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


def find_head(causal_lm: PreTrainedModel) -> Head:
    """What the output head of a model does. Raises `ModelError` for one that is more than a linear layer."""
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
    sequences = _check_sequences(policy.vocab_size)
    causal_lm.set_attn_implementation("eager")
    expected = [_own_logprobs(policy, tokens) for tokens in sequences]
    candidates, faults = _candidates(policy)
    for candidate in candidates:
        try:
            causal_lm.set_attn_implementation(candidate.name)
            chosen = replace(policy, attention=candidate)
            with torch.no_grad():
                found = chosen.token_logprobs(_check_tokens(sequences, chosen), 1.0).logprobs
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:  # a kernel or a model that refuses: try the next
            faults.append(f"{candidate}: {error}")
            continue
        fault = _difference(policy, found, expected)
        if fault is None:
            if faults:
                log.warning("attention_fallback", attention=str(candidate), because=faults)
            log.debug("attention_chosen", attention=str(candidate), share_prompts=chosen.shares)
            return chosen
        faults.append(f"{candidate}: {fault}")
    raise ModelError(
        f"the log-probs of {type(causal_lm).__name__} cannot be computed in chunks: they are not those of its own "
        f"forward ({'; '.join(faults)}). Its output head does more than this engine knows. Use another model."
    )


def _narrow(policy: PolicyModel) -> PolicyModel:
    """Spare the last layer what nobody reads, where that leaves the log-probs of what is read as they are."""
    tokens = _check_tokens(_check_sequences(policy.vocab_size), policy)
    predictors, targets = tokens.predictors[::3], tokens.targets[::3]
    tokens = replace(tokens, predictors=predictors, targets=targets, read=torch.unique(predictors))
    with torch.no_grad():
        expected = policy.token_logprobs(tokens, 1.0).logprobs
        handles = narrow_last_layer(policy.causal_lm)
        narrowed = replace(policy, narrowed=bool(handles))
        try:
            found = narrowed.token_logprobs(tokens, 1.0).logprobs
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:  # parts of another kind
            fault: str | None = str(error)
        else:
            fault = _difference(policy, found, [expected])
    if fault is None:
        return narrowed
    for handle in handles:
        handle.remove()
    log.debug("last_layer_not_narrowed", because=fault)
    return policy


def _check_sequences(vocab_size: int) -> list[list[int]]:
    """Token sequences of which some share their beginning, as `CHECK_SHARED` says."""
    sequences: list[list[int]] = []
    for length, shared in zip(CHECK_LENGTHS, CHECK_SHARED, strict=True):
        common = sequences[-1][:shared] if sequences else []
        sequences.append(common + [(7 * (place + 3) * (length + 1)) % vocab_size for place in range(shared, length)])
    return sequences


def _check_tokens(sequences: list[list[int]], policy: PolicyModel) -> Tokens:
    """Their row as `policy` would have it."""
    shared = np.array(CHECK_SHARED) if policy.shares else np.zeros(len(sequences), dtype=np.int64)
    return make_tokens(token_columns(sequences), Cut(np.arange(len(sequences)), shared), policy.device)


def _difference(policy: PolicyModel, found: Tensor, expected: list[Tensor]) -> str | None:
    """How log-probs differ from those of each sequence alone, where they differ by more than rounding."""
    exact = policy.compute_dtype not in HALF_PRECISION
    parts = torch.split(found, [len(logprobs) for logprobs in expected])
    gaps = torch.stack([gap.max() if exact else gap.mean() for gap in map(_gap, parts, expected)])
    if gaps.max() <= (FLOAT32_TOLERANCE if exact else BFLOAT16_TOLERANCE):
        return None
    return f"log-probs differ by up to {float(gaps.max()):.3g}"


def _gap(found: Tensor, expected: Tensor) -> Tensor:
    return (found - expected).abs()


def _own_logprobs(policy: PolicyModel, token_ids: list[int]) -> Tensor:
    """Log-probs [n - 1] of one sequence alone, through the model's own forward."""
    ids = torch.tensor([token_ids], device=policy.device)
    with torch.no_grad(), policy.autocast():
        logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[0, :-1].float()  # [n - 1, V]
    logprobs: Tensor = logits.log_softmax(dim=1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1)


def _candidates(policy: PolicyModel) -> tuple[tuple[Attention, ...], list[str]]:
    """The attentions to try, the fastest first, and why others are left out where the check would not show it: its
    sequences are short, and the effect of small weights is small."""
    causal_lm = policy.causal_lm
    softcap = _text_setting(causal_lm, "attn_logit_softcapping")
    if softcap is not None:
        return PADDED[1:], [f"attn_logit_softcapping={softcap} exists only in the model's own attention"]
    chunk = _text_setting(causal_lm, "attention_chunk_size")
    kinds = set(_text_setting(causal_lm, "layer_types") or ()) - {"full_attention", "sliding_attention"}
    if chunk or kinds:
        return PADDED, [f"a pack cannot express {', '.join(sorted(kinds)) or 'chunked attention'}"]
    flash = policy.device.type == "cuda" and policy.compute_dtype in HALF_PRECISION
    return ((VARLEN, BLOCKS) if flash else (BLOCKS,)) + PADDED, []


def _padded_rows(decoder: nn.Module, token_ids: Tensor, row: Blocks) -> Tensor:
    """The last hidden states [T, H] of sequences that share nothing, as batches of right-padded rows."""
    ids = token_ids if row.queries is None else token_ids[row.queries]
    parts = torch.split(ids, [block.spans * block.queries for block in row.blocks])
    rows = [
        decoder(input_ids=part.view(block.spans, block.queries), use_cache=False).last_hidden_state.flatten(0, 1)
        for part, block in zip(parts, row.blocks, strict=True)
    ]
    hidden = torch.cat(rows)
    return hidden if row.restore is None else hidden[row.restore]


def _compile(policy: PolicyModel) -> None:
    """Compile the layers, forward and backward, now: what cannot be compiled shall fail at the start of a run."""
    tokens = _check_tokens(_check_sequences(policy.vocab_size), policy)
    with torch.no_grad():
        expected = policy.token_logprobs(tokens, 1.0).logprobs
    compile_layers(policy.causal_lm)
    try:
        with warnings.catch_warnings():  # torch's tracing looks at `.grad` of everything, and warns of it
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            found = policy.token_logprobs(tokens, 1.0).logprobs
            torch.autograd.backward(found.sum())
    except TorchDynamoException as error:
        raise ConfigError(
            f"trainer.compile is on, but torch {torch.__version__} cannot compile {type(policy.causal_lm).__name__} on "
            f"{policy.device.type}: {str(error).splitlines()[0]} Switch it off, or install a C++ compiler (on the CPU)."
        ) from error
    policy.causal_lm.zero_grad(set_to_none=True)
    fault = _difference(policy, found.detach(), [expected])
    if fault is not None:
        raise ConfigError(f"trainer.compile is on, but once compiled, {fault}. Switch it off.")


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
