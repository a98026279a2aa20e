"""Plays a vLLM server: the routes that the sampler uses, and faults on request. Its weights are a number, the version.

A token drawn under version v is 100 + v, and every log-prob is -(v + 1) / 10, so that what is drawn says which weights
were really used. Run as a program it is a server that asyncrl starts; in a test it is one of somebody else.

    python stub_vllm.py FOLDER --port P

Files in FOLDER: `broken` makes a start end for lack of memory, `slow` makes it take for ever, `wrong` makes the server
hold other weights than it is given.
Tokens in a prompt: POISON kills the server; POST /play sets the other faults.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from aiohttp import web

POISON = 13
OPEN = ("/health", "/metrics")
FORGETFUL = "default"
ROUTES = ("/inference/v1/generate", "/v1/load_lora_adapter", "/server_info", "/pause", "/resume", "/collective_rpc")


def version_in(path: str) -> int:
    """The number at the end of a folder's or an adapter's name; 0 without one."""
    found = re.search(r"(\d+)$", path)
    return int(found[1]) if found else 0


class StubVllm:
    """One server and what it holds."""

    def __init__(self, key: str | None = None, error: float = 0.0) -> None:
        self.key = key
        self.error = error
        """Added to every log-prob."""
        self.adapters: dict[str, int] = {}
        self.version = 0
        self.label = FORGETFUL
        self.seconds_per_token = 0.002
        self.deaf = False
        self.stuck = False
        self.refuses = False
        """New weights."""
        self.loading = asyncio.Event()
        """Cleared: new weights take until it is set."""
        self.loading.set()
        self.going = asyncio.Event()
        """Cleared while it is paused."""
        self.going.set()
        self.models: Any = None
        """What /v1/models answers, where it is not that of vLLM."""
        self.running = 0
        self.generated = 0
        self.drawn: list[str] = []
        """The version of each answer, in order."""
        self._runner: web.AppRunner | None = None

    async def start(self, port: int) -> int:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/health", self._ok)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/openapi.json", self._openapi)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/weight_info", self._weight_info)
        app.router.add_post("/play", self._play)
        app.router.add_post("/pause", self._pause)
        app.router.add_post("/resume", self._resume)
        app.router.add_post("/update_weight_version", self._set_label)
        app.router.add_post("/collective_rpc", self._load_weights)
        app.router.add_post("/v1/load_lora_adapter", self._load_adapter)
        app.router.add_post("/v1/unload_lora_adapter", self._unload_adapter)
        app.router.add_post("/inference/v1/generate", self._generate)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        while True:
            if not self.deaf:
                break
            await asyncio.sleep(0.02)
        if self.key and request.path not in OPEN and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _ok(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        self.going.clear()
        return web.Response()

    async def _resume(self, request: web.Request) -> web.Response:
        self.going.set()
        return web.Response()

    async def _play(self, request: web.Request) -> web.Response:
        for fault, value in (await request.json()).items():
            assert getattr(self, fault) is not None
            setattr(self, fault, value)
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [f"vllm:num_requests_running {self.running}.0", f"vllm:generation_tokens_total {self.generated}.0"]
        return web.Response(text="\n".join(lines))

    async def _models(self, request: web.Request) -> web.Response:
        if self.models is not None:
            return web.json_response(self.models)
        models = [{"id": "base", "root": "base", "max_model_len": 256}]
        return web.json_response({"data": models + [{"id": name, "root": name} for name in self.adapters]})

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response({"paths": dict.fromkeys((*ROUTES, "/update_weight_version"))})

    async def _server_info(self, request: web.Request) -> web.Response:
        model = {"logprobs_mode": "processed_logprobs"}
        workers = {"worker_extension_cls": ""}
        settings = {"model_config": model, "lora_config": {"rank": 4}, "parallel_config": workers}
        return web.json_response({"vllm_config": settings})

    async def _weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def _set_label(self, request: web.Request) -> web.Response:
        self.label = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def _load_weights(self, request: web.Request) -> web.Response:
        arguments = (await request.json())["kwargs"]
        await asyncio.sleep(0.01)
        await self.loading.wait()
        if self.refuses:
            return web.json_response({"detail": "no room for the weights"}, status=500)
        self.version = version_in(arguments.get("source") or arguments["weights_path"])
        return web.json_response({})

    async def _load_adapter(self, request: web.Request) -> web.Response:
        asked = await request.json()
        await asyncio.sleep(0.01)
        await self.loading.wait()
        if self.refuses:
            return web.json_response({"detail": "no room for the adapter"}, status=500)
        self.adapters[asked["lora_name"]] = version_in(asked["lora_path"])
        return web.Response(text="Success")

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        gone = self.adapters.pop((await request.json())["lora_name"], None)
        return web.Response(text="Success") if gone is not None else web.json_response({}, status=404)

    async def _generate(self, request: web.Request) -> web.Response:
        asked = await request.json()
        if POISON in asked["token_ids"]:
            os.kill(os.getpid(), signal.SIGKILL)
        name = asked.get("model")
        if name is not None and name not in self.adapters:
            return web.json_response({"error": {"message": f"The model {name} does not exist."}}, status=404)
        version = self.adapters[name] if name is not None else None
        drawn = asked["sampling_params"]
        self.running += 1
        try:
            for _ in range(drawn["max_tokens"]):
                await asyncio.sleep(self.seconds_per_token)
                if self.stuck:
                    await asyncio.Event().wait()
                await self.going.wait()
                self.generated += 1
        finally:
            self.running -= 1
        # Full weights that come in the middle draw the rest; here: all of it.
        version, label = (self.version, self.label) if version is None else (version, str(name))
        self.drawn.append(label)
        return web.json_response(self._answer(asked["token_ids"], drawn, version, label))

    def _answer(self, prompt: list[int], drawn: dict[str, Any], version: int, label: str) -> dict[str, Any]:
        count, logprob = drawn["max_tokens"], -(version + 1) / 10 + self.error
        scored = [{"token_id": token, "logprob": logprob} for token in drawn.get("logprob_token_ids", ())]
        choice = {
            "token_ids": [100 + version] * count,
            "logprobs": {"content": [{"logprob": logprob, "top_logprobs": scored}] * count},
            "finish_reason": "length",
            "weight_versions": [{"version": label, "start": 0, "end": count}],
        }
        prompted = [None, *({str(token): {"logprob": logprob}} for token in prompt[1:])]
        return {"choices": [choice], "prompt_logprobs": prompted}


async def run(folder: Path, port: int) -> None:
    stub = StubVllm(os.environ["VLLM_API_KEY"], error=1.0 if (folder / "wrong").exists() else 0.0)
    await stub.start(port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if (options.folder / "broken").exists():
        raise MemoryError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    if (options.folder / "slow").exists():
        time.sleep(600)
    Path(tempfile.gettempdir(), "left").write_text("by a stub")
    asyncio.run(run(options.folder, options.port))
