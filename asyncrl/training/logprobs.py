"""Log-probs of target tokens straight from hidden states: the whole [N, V] of logits never exists.

N tokens, H hidden size, V vocabulary, C tokens of one chunk. Forward keeps only the log-sum-exp of each
token; backward computes a chunk's logits again and turns them into a gradient on the spot, which costs a
third matrix product and saves N x V numbers. One chunk that holds all tokens is kept instead.

The size of a chunk follows from the vocabulary: C x V is constant, and so is the memory, for any N and V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Logits of one chunk, of which two copies exist at once. In float32 that is 256 MiB each: large enough for
# matrix products at full speed with a vocabulary of 150k, small beside the activations of a model with one.
CHUNK_LOGITS = 1 << 26


@dataclass(frozen=True, slots=True)
class Head:
    """The output head of a model: logits = cap * tanh(scale * (h W^T + b) / cap)."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    softcap: float | None = None
    """`final_logit_softcapping` of the model's config."""
    scale: float = 1.0
    """`logit_scale`, or 1 / `logits_scaling`, of the model's config."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    logprobs: Tensor
    """[N] float32 (float64 for float64 hidden states), natural log, after temperature."""
    entropy: Tensor
    """[N] of the distribution after temperature, in nats, without gradient."""


def token_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> TokenLogprobs:
    """Log-probs of `targets` [N] under the next-token distributions of `hidden` [N, H].

    `matmul_dtype` is that of the product with the head; softmax and sums are float32 at least. `chunk_tokens`
    None: as many as `CHUNK_LOGITS` allows.
    """
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS // head.weight.shape[0])
    logprobs, entropy = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, head, temperature, chunk_tokens, matmul_dtype or hidden.dtype
    )
    return TokenLogprobs(logprobs, entropy)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        temperature: float,
        chunk_tokens: int,
        matmul_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        size, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        product_weight = weight.to(matmul_dtype)  # [V, H]
        logprobs, log_sums, entropy = (torch.empty(size, dtype=dtype, device=hidden.device) for _ in range(3))  # [N]
        kept: Tensor | None = None
        # The softcap's slope needs the logits themselves, so only plain heads keep their one chunk.
        keep = size <= chunk_tokens and head.softcap is None and any(ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, size, chunk_tokens):
                part = slice(start, start + chunk_tokens)
                logits, _ = _logits(hidden[part], product_weight, bias, head, temperature, dtype)  # [C, V]
                highest = logits.amax(dim=1)  # [C]
                logits.sub_(highest[:, None])
                exponentials = logits.exp()  # [C, V]
                total = exponentials.sum(dim=1)  # [C]
                log_total = total.log()
                logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - log_total
                log_sums[part] = highest + log_total
                # The exponentials are there anyway. A logit of -inf has p log p = 0, not NaN, hence nansum; logits
                # that are NaN show in `log_total`.
                entropy[part] = log_total - exponentials.mul_(logits).nansum(dim=1) / total
                del exponentials
                if keep:
                    kept = logits.sub_(log_total[:, None])  # now log-probs
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums, kept)
        ctx.settings = head, temperature, chunk_tokens, matmul_dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sums, kept = ctx.saved_tensors
        head, temperature, chunk_tokens, matmul_dtype = ctx.settings
        product_weight = weight.to(matmul_dtype)
        grad = grads[0]
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], chunk_tokens):
                part = slice(start, start + chunk_tokens)
                slope: Tensor | None = None
                if kept is None:
                    logits, slope = _logits(hidden[part], product_weight, bias, head, temperature, log_sums.dtype)
                    probabilities = logits.sub_(log_sums[part, None]).exp_()  # [C, V]
                else:
                    probabilities = kept.exp()
                # d logprob / d logits = onehot(target) - p
                grad_logits = probabilities.mul_(-grad[part, None])
                grad_logits.scatter_add_(1, targets[part, None], grad[part, None])
                if slope is not None:
                    grad_logits.mul_(slope)
                grad_product = grad_logits.mul_(head.scale / temperature).to(matmul_dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad_product @ product_weight
                if grad_weight is not None and grad_weight.dtype == matmul_dtype:
                    grad_weight.addmm_(grad_product.T, hidden[part].to(matmul_dtype))  # no second [V, H]
                elif grad_weight is not None:
                    grad_weight += grad_product.T @ hidden[part].to(matmul_dtype)
                if grad_bias is not None:
                    grad_bias += grad_product.sum(dim=0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Logits after temperature [C, V] in `dtype`, and the slope of the softcap where there is one."""
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight).to(dtype)  # [C, V]
    if bias is not None:
        logits += bias
    if head.scale != 1.0:
        logits *= head.scale
    slope: Tensor | None = None
    if head.softcap is not None:
        squashed = logits.div_(head.softcap).tanh_()
        slope = 1 - squashed.square()
        logits = squashed.mul(head.softcap)
    if temperature != 1.0:
        logits /= temperature
    return logits, slope


__all__ = ["Head", "TokenLogprobs", "token_logprobs"]
