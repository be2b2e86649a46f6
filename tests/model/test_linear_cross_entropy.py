"""The loss by chunks of tokens, against `F.cross_entropy` of all logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distmoe.bench.live_storages import LiveStorages
from distmoe.config import Config
from distmoe.config.keys import with_values
from distmoe.config.loss_chunks import MOST_LOGITS, loss_chunk_tokens
from distmoe.kernels.testing import assert_as_good_as, poisoned_empty
from distmoe.model.linear_cross_entropy import IGNORE, linear_cross_entropy
from distmoe.planner.loss_activations import loss_activations

T, H, V = 37, 24, 50
# No power of two, which bf16 would multiply by without rounding.
FACTOR = 1 / 4093


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_TH = torch.randn(T, H, generator=generator)
    weight_VH = torch.randn(V, H, generator=generator)
    label_T = torch.randint(V, (T,), generator=generator)
    label_T[::5] = IGNORE
    return x_TH.to(dtype), weight_VH.to(dtype), label_T


def results(dtype: torch.dtype, *, chunk: int, rounded: torch.dtype) -> dict[str, Tensor]:
    """Loss and gradients in ``dtype``, of numbers that were rounded to ``rounded``; chunk 0: of
    torch's."""
    x_TH, weight_VH, label_T = operands(rounded)
    x_TH, weight_VH = (t.to(dtype).requires_grad_() for t in (x_TH, weight_VH))
    if chunk:
        loss = linear_cross_entropy(x_TH, weight_VH, label_T, chunk_tokens=chunk)
    else:
        logits_TV = F.linear(x_TH, weight_VH).float()
        loss = F.cross_entropy(logits_TV, label_T, ignore_index=IGNORE, reduction="sum")
    (FACTOR * loss).backward()
    assert x_TH.grad is not None
    assert weight_VH.grad is not None
    assert x_TH.grad.dtype == weight_VH.grad.dtype == dtype
    return {"loss": loss.detach(), "dx": x_TH.grad, "dweight": weight_VH.grad}


@pytest.mark.parametrize("chunk", [T, 36, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_good_as_all_logits_at_once(dtype: torch.dtype, chunk: int) -> None:
    exact = results(torch.float32, chunk=0, rounded=dtype)
    same_dtype = results(dtype, chunk=0, rounded=dtype)
    with poisoned_empty():
        found = results(dtype, chunk=chunk, rounded=dtype)
    for name, want in exact.items():
        assert_as_good_as(found[name], same_dtype[name], want, name)


def test_without_autograd_it_is_the_same_loss() -> None:
    x_TH, weight_VH, label_T = operands(torch.float32)
    x_TH.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(x_TH, weight_VH, label_T, chunk_tokens=5)
    assert torch.equal(loss, results(torch.float32, chunk=5, rounded=torch.float32)["loss"])


def test_nothing_to_predict() -> None:
    x_TH, weight_VH, label_T = operands(torch.float32)
    x_TH.requires_grad_()
    loss = linear_cross_entropy(x_TH, weight_VH, label_T.fill_(IGNORE), chunk_tokens=5)
    loss.backward()
    assert loss == 0
    assert not x_TH.grad.any()


def test_it_goes_backward_once() -> None:
    x_TH, weight_VH, label_T = operands(torch.float32)
    loss = linear_cross_entropy(x_TH.requires_grad_(), weight_VH, label_T, chunk_tokens=5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        loss.backward()


def test_a_logit_that_is_not_finite_is_seen_in_the_loss() -> None:
    x_TH, weight_VH, label_T = operands(torch.float32)
    x_TH[1, 0] = float("inf")
    assert not linear_cross_entropy(x_TH, weight_VH, label_T, chunk_tokens=5).isfinite()


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "hidden_size", "chunk"),
    [
        # By default one chunk and three; small chunks of a wide model.
        ("bf16", 50_304, 2048, 0),
        ("bf16", 151_936, 2048, 0),
        ("bf16", 151_936, 4096, 512),
        ("fp32", 151_936, 2048, 0),
    ],
)
def test_what_exists_at_one_time_is_what_a_plan_says(
    dtype: str, vocab_size: int, hidden_size: int, chunk: int
) -> None:
    """Of tensors that have sizes and no elements."""
    values = {
        "model.vocab_size": vocab_size,
        "model.hidden_size": hidden_size,
        "data.seq_len": 8192,
        "train.micro_batch_size": 1,
        "train.loss_chunk_tokens": chunk,
    }
    config = with_values(Config(), values)
    options = {"dtype": {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]}
    storages = LiveStorages()
    with FakeTensorMode(), storages:
        x_TH = torch.empty(8192, hidden_size, requires_grad=True, **options)
        weight_VH = torch.empty(vocab_size, hidden_size, requires_grad=True, **options)
        label_T = torch.empty(8192, dtype=torch.int64)
        operands = storages.read()
        chunk_tokens = loss_chunk_tokens(config, 8192)
        linear_cross_entropy(x_TH, weight_VH, label_T, chunk_tokens=chunk_tokens).backward()
    itemsize = options["dtype"].itemsize
    predicted = loss_activations(config, itemsize=itemsize).widest + itemsize * x_TH.numel()
    assert storages.peak[""] - operands == pytest.approx(predicted, rel=0.001)


def test_chunks_are_few_and_equal() -> None:
    def tokens(vocab_size: int, num_tokens: int, given: int = 0) -> int:
        config = Config()
        model = replace(config.model, vocab_size=vocab_size)
        train = replace(config.train, loss_chunk_tokens=given)
        return loss_chunk_tokens(replace(config, model=model, train=train), num_tokens)

    assert tokens(50_304, 8192) == 8192
    # Three chunks, up to whole tiles.
    assert tokens(151_936, 8192) == 22 * 128
    assert 22 * 128 * 151_936 <= MOST_LOGITS < 8192 * 151_936 / 2
    assert tokens(151_936, 8192, given=1000) == 1000
    assert tokens(151_936, 100) == 100
