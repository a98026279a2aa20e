"""Tiny random models with a real tokenizer and chat template, made in a second and without a network.

For tests and demos: `transformers`, `peft` and vLLM open the folder like any model of the hub. Head sizes are
multiples of 32, which vLLM's CPU kernels ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TURN = "<|im_end|>"
"""Ends a message, and a completion."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", END_OF_TURN)
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\nCall one: <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if not (loop.previtem is defined and loop.previtem.role == 'tool') %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif not (message.role == 'system' and tools and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""ChatML with tools in the Hermes format, laid out as the Qwen models do."""


def tiny_tokenizer(
    words: Sequence[str] = (),
    chat_template: str = CHAT_TEMPLATE,
    *,
    special: Sequence[str] = SPECIAL,
    end_of_turn: str = END_OF_TURN,
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte of UTF-8 (any text survives), the markup of chats, and `words`.

    Each of `words` becomes one token wherever it occurs, the longest first: markup that a task repeats then
    costs one token and not fifty. Decoding gives the text back. Of the `special` tokens the first one pads, and
    `end_of_turn` ends a completion; other templates than the default one need others (`testing/templates.py`).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*MARKUP, *words)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end_of_turn,
        pad_token=special[0],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = chat_template
    return wrapped


def tiny_model(
    folder: str | Path,
    *,
    kind: Literal["llama", "qwen3"] = "llama",
    hidden: int = 64,
    layers: int = 2,
    head_dim: int = 32,
    max_seq_len: int = 2048,
    tied: bool = False,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a random model and its tokenizer to `folder`, and return the folder.

    `hidden` is the width of the residual stream, a multiple of `head_dim`; the MLP is three times as wide.
    `tied` shares the embedding with the output head. The same `seed` gives the same weights.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    if hidden % head_dim:
        raise ValueError(f"hidden is {hidden}, no multiple of head_dim={head_dim}. Use {head_dim} times 1, 2...")
    heads = hidden // head_dim
    tokenizer = tokenizer if tokenizer is not None else tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_seq_len,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    config = (LlamaConfig if kind == "llama" else Qwen3Config)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
