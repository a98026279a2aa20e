"""Runs inside vLLM's worker process, mixed into its worker class (`--worker-extension-cls`)."""

from __future__ import annotations

from typing import Any


class HotLoad:
    """Methods that `POST /collective_rpc` can call. `self` is vLLM's worker."""

    def asyncrl_load_weights(self: Any, source: str) -> None:
        """Load the safetensors of `source` into the running model. Only while generation is paused."""
        self.reload_weights(weights_path=source)
        _pack_output_heads(self.get_model())


def _pack_output_heads(model: Any) -> None:
    """Give the output head of a model with tied embeddings its new weights on a CPU.

    vLLM's CPU kernels read a packed copy of the head. `reload_weights` (0.32.0) packs again what it loaded, but a
    tied head is loaded under the name of the embedding, and keeps the copy of the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
