"""Chat templates in the styles that models of the hub have, for tests of agents without a hub.

They are written for asyncrl, and lay conversations out as the originals do where that matters to an agent:

| style   | like       | what is hard about it                                                               |
|---------|------------|-------------------------------------------------------------------------------------|
| chatml  | Hermes     | nothing                                                                             |
| qwen3   | Qwen3      | thoughts leave the history when the user speaks again; `enable_thinking=False`      |
| llama3  | Llama 3.1  | one call per turn; text is trimmed; a turn may end in two ways                      |
| mistral | Mistral v3 | the assistant has no mark; tools move with the last user message; strict roles, ids |
| xml     | -          | calls as XML, whose values have no types                                            |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from asyncrl.testing.models import CHAT_TEMPLATE, END_OF_TURN, SPECIAL, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

Style = Literal["chatml", "qwen3", "llama3", "mistral", "xml"]

QWEN3 = """\
{%- set question = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set question.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- set opened = messages[0].role == 'system' %}
{%- if tools %}
    {{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if opened else '') + '# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\n\\nCall with <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}
{%- elif opened %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set text = message.content %}
        {%- set thoughts = message.reasoning_content or '' %}
        {%- if not thoughts and '</think>' in text %}
            {%- set thoughts = text.split('</think>')[0].split('<think>')[-1] %}
            {%- set text = text.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > question.last and (thoughts or loop.last) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- text.lstrip('\\n') }}
        {%- for call in message.tool_calls or [] %}
            {%- if text or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif not (opened and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
"""Takes `enable_thinking`. A tool result is no question: thoughts stay while the model works on one answer."""

LLAMA3 = """\
{{- bos_token }}
{%- set opened = messages[0].role == 'system' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- (messages[0].content | trim if opened else '') + '<|eot_id|>' }}
{%- set pending = namespace(tools=tools) %}
{%- for message in messages %}
    {%- if message.role in ('tool', 'ipython') %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model makes one call per turn.') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- if builtin_tools is defined and call.name in builtin_tools %}
            {{- '<|python_tag|>' + call.name + '.call(' }}
            {%- for key, value in call.arguments | items %}
                {{- key + '=' + (value | tojson) }}
                {%- if not loop.last %}{{- ', ' }}{%- endif %}
            {%- endfor %}
            {{- ')<|eom_id|>' }}
        {%- else %}
            {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
        {%- endif %}
    {%- elif not (opened and loop.first) %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
        {%- if pending.tools and message.role == 'user' %}
            {{- 'Answer with {"name": ..., "parameters": {...}} to call a function.\\n\\n' }}
            {%- for tool in pending.tools %}{{- tool | tojson + '\\n\\n' }}{%- endfor %}
            {%- set pending.tools = none %}
        {%- endif %}
        {{- (message.content | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
"""Tools stand in the first user message. `builtin_tools`: names of tools that are called as Python, ended by eom."""

MISTRAL = """\
{{- bos_token }}
{%- set opened = messages[0].role == 'system' %}
{%- set question = namespace(last=-1, due=true) %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {%- if (message.role == 'user') != question.due %}
            {{- raise_exception('User and assistant must take turns.') }}
        {%- endif %}
        {%- set question.due = not question.due %}
        {%- if message.role == 'user' %}{%- set question.last = loop.index0 %}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.index0 == question.last %}
            {{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}
        {%- if opened and loop.index0 == question.last %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
        {{- message.content + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {%- if not call.id is defined or call.id | length != 9 %}
                {{- raise_exception('A call id has nine letters or digits.') }}
            {%- endif %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
            {{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}
            {{- raise_exception('A tool result names its call by an id of nine letters or digits.') }}
        {%- endif %}
        {{- '[TOOL_RESULTS]{"content": ' + (message.content | tojson) }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- elif not (opened and loop.first) %}
        {{- raise_exception('Roles are system (first), user, assistant and tool.') }}
    {%- endif %}
{%- endfor %}
"""
"""System message and tools stand in the last user message, wherever that is."""

XML = """\
{%- if tools %}
    {{- '<|system|>\\n' }}
    {%- for tool in tools %}
        {{- '<tool name="' + tool.function.name + '">' + (tool.function | tojson) + '</tool>\\n' }}
    {%- endfor %}
    {{- 'Call one as <tool name="its name"><argument>value</argument></tool>.<|end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' }}
    {%- if message.role == 'tool' %}{{- '<result>' + message.content + '</result>' }}
    {%- else %}{{- message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool name="' + call.function.name + '">' }}
        {%- for key, value in call.function.arguments | items %}
            {{- '<' + key + '>' + (value if value is string else value | tojson) + '</' + key + '>' }}
        {%- endfor %}
        {{- '</tool>' }}
    {%- endfor %}
    {{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""
"""A message per role mark, and calls in plain XML."""

_LLAMA3_TOKENS = (
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
_MISTRAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
_XML_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")

# template, special tokens (the first one pads), the token that ends a turn, the token that opens a text
_STYLES: dict[Style, tuple[str, Sequence[str], str, str | None]] = {
    "chatml": (CHAT_TEMPLATE, SPECIAL, END_OF_TURN, None),
    "qwen3": (QWEN3, SPECIAL, END_OF_TURN, None),
    "llama3": (LLAMA3, _LLAMA3_TOKENS, "<|eot_id|>", "<|begin_of_text|>"),
    "mistral": (MISTRAL, _MISTRAL_TOKENS, "</s>", "<s>"),
    "xml": (XML, _XML_TOKENS, "<|end|>", None),
}


def styled_tokenizer(style: Style, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A `tiny_tokenizer` with the chat template, special tokens and end-of-turn token of a style.

    `tiny_model(folder, tokenizer=styled_tokenizer("llama3"))` makes a model that goes with it.
    """
    template, special, end_of_turn, begin = _STYLES[style]
    tokenizer = tiny_tokenizer(words, template, special=special, end_of_turn=end_of_turn)
    if begin is not None:
        tokenizer.bos_token = begin
    return tokenizer
