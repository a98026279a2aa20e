"""Chunked log-probs against the plain ones, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asyncrl.training import logprobs
from asyncrl.training.logprobs import Head, token_logprobs

N, H, V = 23, 8, 31


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(V, (N,), generator=generator)


def plain(head: Head, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / temperature).log_softmax(dim=1)


@pytest.mark.parametrize("chunk_tokens", [1, 5, N, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("softcap", "scale", "biased"), [(None, 1.0, False), (None, 0.5, True), (3.0, 1.0, True)])
def test_equal_to_plain(
    chunk_tokens: int, temperature: float, softcap: float | None, scale: float, biased: bool
) -> None:
    hidden, weight, bias, targets = case()
    head = Head(weight, bias if biased else None, softcap, scale)
    leaves = [hidden, weight, *([bias] if biased else [])]
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)

    expected = plain(head, hidden, temperature)
    picked = expected.gather(1, targets[:, None]).squeeze(1)
    wanted = torch.autograd.grad((picked * upstream).sum(), leaves)
    found = token_logprobs(hidden, head, targets, temperature=temperature, chunk_tokens=chunk_tokens)
    got = torch.autograd.grad((found.logprobs * upstream).sum(), leaves)

    torch.testing.assert_close(found.logprobs, picked, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.entropy, -(expected.exp() * expected).sum(1), rtol=1e-12, atol=1e-12)
    assert not found.entropy.requires_grad
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, bias, targets = case()

    def function(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return token_logprobs(hidden, Head(weight, bias, softcap=4.0), targets, chunk_tokens=7).logprobs

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, targets = case()
    head = Head(weight.detach())
    token_logprobs(hidden, head, targets, chunk_tokens=5).logprobs.sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_bfloat16_product_keeps_a_float32_softmax() -> None:
    hidden, weight, _, targets = case(torch.float32)
    found = token_logprobs(hidden, Head(weight), targets, matmul_dtype=torch.bfloat16)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    expected = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    assert found.logprobs.dtype == torch.float32
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-6, atol=1e-6)
    found.logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_the_whole_logits_never_exist() -> None:
    """Each tensor that autograd keeps is far smaller than [N, V]."""
    hidden, weight, _, targets = case()
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_logprobs(hidden, Head(weight), targets, chunk_tokens=4).logprobs.sum().backward()
    assert max(sizes) <= max(V * H, N * H) < N * V


def test_a_chunk_follows_from_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward hold the same number of logits for any N and V."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 4 * V + 3)
    hidden, weight, _, targets = case()
    sizes: list[tuple[int, ...]] = []
    plain_logits = logprobs._logits

    def noted(*arguments: Any) -> Any:
        found = plain_logits(*arguments)
        sizes.append(tuple(found[0].shape))
        return found

    monkeypatch.setattr(logprobs, "_logits", noted)
    token_logprobs(hidden, Head(weight), targets).logprobs.sum().backward()
    assert sizes == [(4, V)] * 5 + [(3, V)] + [(4, V)] * 5 + [(3, V)]
    sizes.clear()
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 5)  # less than one token's
    token_logprobs(hidden, Head(weight), targets)
    assert sizes == [(1, V)] * N


def test_a_token_that_cannot_be_has_no_entropy() -> None:
    """p log p is 0 for a logit of -inf; a logit that is NaN is not hidden."""
    hidden, weight, bias, targets = case()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = -torch.inf
    found = token_logprobs(hidden, Head(weight.detach(), bias), targets % 3)
    expected = (hidden @ weight.T + bias).log_softmax(dim=1)
    entropy = -(expected.exp() * expected.masked_fill(expected.isinf(), 0.0)).sum(dim=1)
    torch.testing.assert_close(found.entropy, entropy.detach(), rtol=1e-12, atol=1e-12)
    bias[4] = torch.nan
    found = token_logprobs(hidden, Head(weight.detach(), bias), targets)
    assert found.entropy.isnan().all()
    assert found.logprobs.isnan().all()


@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_float32_is_exact_with_a_large_vocabulary(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(50_000, 4, generator=generator), torch.randn(8, 4, generator=generator)
    bias, targets = torch.full((50_000,), shift), torch.arange(8)
    found = token_logprobs(hidden, Head(weight, bias), targets)
    exact = token_logprobs(hidden.double(), Head(weight.double(), bias.double()), targets)
    torch.testing.assert_close(found.logprobs.double(), exact.logprobs, rtol=0, atol=4e-7 * (12 + shift))
    torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=0, atol=4e-7 * (12 + shift))


def test_no_targets() -> None:
    hidden, weight, _, targets = case()
    found = token_logprobs(hidden[:0], Head(weight), targets[:0])
    assert found.logprobs.shape == (0,)
    found.logprobs.sum().backward()
