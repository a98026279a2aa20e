"""What is said to a vLLM server, and how its answers are read. Pure: no clock, no I/O.

The endpoint is `POST /inference/v1/generate` (vLLM >= 0.32 with `--enable-scale-out`): token ids in, token ids out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from asyncrl.errors import SamplerRequestError
from asyncrl.types import Completion, FinishReason, SamplingParams

GENERATE_PATH = "/inference/v1/generate"

NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sent with every request: a server may fill what is missing from the model's generation config."""

RECOVERABLE_STATUS = frozenset({408, 429})
"""Beside every 5xx. Other 4xx are faults of the request: the same request fails again."""


def adapter_name(version: int) -> str:
    return f"policy-v{version}"


def sampling_body(
    token_ids: Sequence[int], params: SamplingParams, *, max_tokens: int, model: str | None, cache_salt: str
) -> dict[str, Any]:
    """Draw up to `max_tokens` tokens, with the log-prob of each drawn token and of no other."""
    drawn: dict[str, Any] = {
        **NEUTRAL,
        "max_tokens": max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "stop_token_ids": list(params.stop_token_ids),
        "logprobs": 0,
        "detokenize": False,
    }
    if params.seed is not None:
        drawn["seed"] = params.seed
    return _body(token_ids, drawn, model, cache_salt)


def scoring_body(token_ids: Sequence[int], *, model: str | None, cache_salt: str) -> dict[str, Any]:
    """The log-prob of each token of the prompt, at temperature 1. The one token that must be drawn is ignored."""
    drawn = {
        **NEUTRAL,
        "max_tokens": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "prompt_logprobs": 0,
        "detokenize": False,
    }
    return _body(token_ids, drawn, model, cache_salt)


def next_token_bodies(
    token_ids: Sequence[int], *, start: int, model: str | None, cache_salt: str
) -> list[dict[str, Any]]:
    """The same scores by one request for each token [N - start]: what would be drawn after the tokens before it?

    For adapters: `prompt_logprobs` of a request kills the engine when others run beside it (vLLM 0.32: the LoRA
    logits of the prompt are computed with the row mapping of the tokens that are drawn).
    """
    asked = {**NEUTRAL, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "detokenize": False}
    return [
        # Named twice: the server shows as many entries as there are names, and the drawn token comes first.
        _body(token_ids[:n], {**asked, "logprobs": 2, "logprob_token_ids": [token_ids[n]] * 2}, model, cache_salt)
        for n in range(start, len(token_ids))
    ]


def read_next_token(answer: Mapping[str, Any], token: int) -> float:
    """The log-prob of `token` from an answer to one of `next_token_bodies`."""
    try:
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return float(next(entry["logprob"] for entry in entries if entry["token_id"] == token))
    except (KeyError, IndexError, TypeError, StopIteration):
        raise SamplerRequestError(
            f"vLLM did not score token {token}: it does not answer logprob_token_ids here.", recoverable=False
        ) from None


def _body(token_ids: Sequence[int], drawn: dict[str, Any], model: str | None, cache_salt: str) -> dict[str, Any]:
    body: dict[str, Any] = {"token_ids": list(token_ids), "sampling_params": drawn, "cache_salt": cache_salt}
    if model is not None:
        body["model"] = model
    return body


def read_completion(answer: Any, *, version: int | None) -> Completion:
    """The completion in an answer of the generate endpoint.

    `version` is that of the adapter that was asked for; None reads the version of every token from the spans
    that the server reports. Raises `SamplerRequestError` for an answer that is not a whole completion.
    """
    try:
        choice = answer["choices"][0]
        tokens, said = choice["token_ids"] or [], choice["finish_reason"]
        logprobs = [entry["logprob"] for entry in (choice["logprobs"] or {}).get("content") or []]
    except (KeyError, IndexError, TypeError):
        raise SamplerRequestError(
            f"vLLM answered {str(answer)[:200]!r}; expected a completion. What is between asyncrl and the server?"
        ) from None
    finish = finish_reason(said)
    if len(logprobs) != len(tokens) or not tokens:
        raise SamplerRequestError(
            f"vLLM answered with {len(tokens)} tokens and {len(logprobs)} log-probs; expected as many of both, "
            "and at least one. The answer is dropped."
        )
    versions = (
        [version] * len(tokens) if version is not None else read_spans(choice.get("weight_versions"), len(tokens))
    )
    return Completion(tokens=tokens, logprobs=logprobs, versions=versions, finish_reason=finish)


def finish_reason(said: str | None) -> FinishReason:
    """`stop` or `length`. What vLLM stopped early is a fragment of a completion, and never a sample."""
    if said in ("stop", "length"):
        return said  # type: ignore[return-value]
    raise SamplerRequestError(f"vLLM ended the request early (finish_reason {said!r}); its tokens are dropped.")


def read_spans(spans: Sequence[Mapping[str, Any]] | None, count: int) -> list[int]:
    """The version of each of `count` tokens, from spans `{version, start, end}` that must cover them all."""
    versions: list[int] = []
    for span in spans or ():
        label = str(span["version"])
        if not label.isdecimal() or span["start"] != len(versions):
            break
        versions += [int(label)] * (span["end"] - span["start"])
    if len(versions) != count:
        raise SamplerRequestError(
            f"vLLM did not say which weights drew the tokens: {count} tokens, weight_versions {spans!r}. Expected "
            "spans labelled by this run; use vLLM >= 0.32, and let nothing else update the weights of this server.",
            recoverable=bool(spans),  # a server that was started again is labelled anew as soon as that is seen
        )
    return versions


def read_scores(answer: Mapping[str, Any], token_ids: Sequence[int], start: int) -> list[float]:
    """Log-probs [N - start] of `token_ids[start:]` from an answer to `scoring_body`."""
    entries = answer.get("prompt_logprobs") or []
    if len(entries) != len(token_ids):
        raise SamplerRequestError(
            f"vLLM scored {len(entries)} tokens of {len(token_ids)}: it does not answer prompt_logprobs here.",
            recoverable=False,
        )
    return [entry[str(token)]["logprob"] for token, entry in zip(token_ids[start:], entries[start:], strict=True)]


def refusal(where: str, status: int, text: str) -> SamplerRequestError:
    """The error for an HTTP status other than 200, with what the server said about it."""
    recoverable = status >= 500 or status in RECOVERABLE_STATUS
    return SamplerRequestError(
        f"{where} answered HTTP {status}: {server_message(text)}", status=status, recoverable=recoverable
    )


def server_message(text: str) -> str:
    """The message in an error answer of vLLM or FastAPI, else the beginning of the text, in one line."""
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        error = answer.get("error", answer.get("detail"))
        said = error.get("message") if isinstance(error, dict) else error
        if said:
            return str(said)
    if text.lstrip().startswith("<"):  # a page for browsers: something else answers there
        text = re.sub(r"<[^>]*>", " ", text)
    return " ".join(text.split())[:500] or "(no message)"
