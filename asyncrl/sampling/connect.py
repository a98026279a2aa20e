"""What is asked of a vLLM server before the first request, so that a server without the right flags is found now."""

from __future__ import annotations

import json
from typing import Any

from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.sampling.endpoint import Endpoint
from asyncrl.sampling.load import EngineLoad
from asyncrl.sampling.params import GENERATE_PATH

ANSWER_TIMEOUT_S = 60.0

NEEDS = {
    GENERATE_PATH: "--enable-scale-out (vLLM >= 0.32)",
    "/server_info": "the environment variable VLLM_SERVER_DEV_MODE=1",
}
NEEDS_LORA = {"/v1/load_lora_adapter": "--enable-lora and the environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"}
NEEDS_FULL = dict.fromkeys(("/pause", "/resume", "/collective_rpc", "/update_weight_version"), NEEDS["/server_info"])


async def connect(endpoint: Endpoint, *, lora: bool) -> None:
    """Learn the server's context length, and bring it to version 0: the base model.

    A server of somebody else is checked, and cleared of what an earlier run, or this one, left in it.
    Raises `SamplerError` that names the flag that is missing, `SamplerRequestError` when there is no answer.
    """
    answer = await _get(endpoint, "/v1/models")
    try:
        models = answer["data"]
        endpoint.model, endpoint.context_tokens = models[0]["root"], models[0]["max_model_len"]
    except (KeyError, IndexError, TypeError):
        raise SamplerError(
            f"{endpoint.name} is no vLLM server: its /v1/models names no model with `root` and `max_model_len`, but "
            f"answers {str(answer)[:200]}. Other servers of the OpenAI API cannot be trained with; see docs/vllm.md."
        ) from None
    if endpoint.server is None:
        await _check_flags(endpoint, lora=lora)
        await _clear(endpoint, [model["id"] for model in models], lora=lora)
    elif not lora:
        await endpoint.set_version("0")


async def loaded_models(endpoint: Endpoint) -> set[str]:
    """Names of the base model and the adapters that the server knows."""
    return {model["id"] for model in (await _get(endpoint, "/v1/models"))["data"]}


async def weight_label(endpoint: Endpoint) -> str:
    """How the server labels its tokens; "default" where nobody said."""
    return str((await _get(endpoint, "/weight_info"))["weight_version"])


async def _get(endpoint: Endpoint, path: str) -> Any:
    text = await endpoint.get(path, timeout_s=ANSWER_TIMEOUT_S)
    try:
        return json.loads(text)
    except ValueError:  # something else answers there now
        raise SamplerRequestError(f"{endpoint.name}: {path} answered no JSON but {text[:100]!r}") from None


async def _check_flags(endpoint: Endpoint, *, lora: bool) -> None:
    paths = (await _get(endpoint, "/openapi.json"))["paths"]
    needs = NEEDS | (NEEDS_LORA if lora else NEEDS_FULL)
    missing = [f"{path} (needs {flag})" for path, flag in needs.items() if path not in paths]
    if missing:
        raise SamplerError(f"{endpoint.name} has no {', no '.join(missing)}. docs/vllm.md has the whole command line.")
    endpoint.counted_from = EngineLoad()
    endpoint.counted_from = await endpoint.load()  # raises where the stats are switched off
    settings = await _get(endpoint, "/server_info?config_format=json")
    _check_settings(endpoint, settings["vllm_config"], lora=lora)


def _check_settings(endpoint: Endpoint, settings: dict[str, Any], *, lora: bool) -> None:
    mode = settings["model_config"]["logprobs_mode"]
    if mode != "processed_logprobs":
        raise SamplerError(
            f"{endpoint.name} gives {mode}, which are not those of the distribution that it draws from when the "
            "temperature is not 1. Start it with --logprobs-mode processed_logprobs."
        )
    if lora and not settings.get("lora_config"):
        raise SamplerError(f"{endpoint.name} serves no adapters, but lora.rank is set. Start it with --enable-lora.")
    endpoint.repacks = "asyncrl" in (settings["parallel_config"]["worker_extension_cls"] or "")


async def _clear(endpoint: Endpoint, models: list[str], *, lora: bool) -> None:
    if lora:
        for name in models:
            if name.startswith("policy-v"):
                await endpoint.unload_adapter(name, ANSWER_TIMEOUT_S)
        return
    if await weight_label(endpoint) != "default":
        await endpoint.load_weights(0, endpoint.model, "interrupt")
    await endpoint.set_version("0")
