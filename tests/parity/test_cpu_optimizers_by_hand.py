"""What DeepSpeed's CPU optimizers do beside a step: sparse gradients, numbered states, steps taken back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeedlite.ops import adagrad, adam
from deepspeedlite.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeedlite.ops.adam import DeepSpeedCPUAdam
from deepspeedlite.runtime.errors import OptimizerError


@pytest.fixture(params=["op", "torch"])
def by(request, monkeypatch) -> str:
    """The compiled op, and what stands in for it."""
    if request.param == "torch":
        for module in (adagrad, adam):
            monkeypatch.setattr(module, "is_available", lambda *_: False)
    return request.param


def embeddings() -> tuple[nn.Embedding, nn.Embedding]:
    torch.manual_seed(0)
    mine, theirs = nn.Embedding(10, 3, sparse=True), nn.Embedding(10, 3, sparse=True)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adagrad_steps_the_rows_of_a_sparse_gradient(by, decay):
    """As torch's does; with weight decay, which torch refuses, as the rows alone would be stepped."""
    mine, theirs = embeddings()
    dense = nn.Parameter(torch.ones(4))
    optimizer = DeepSpeedCPUAdagrad([*mine.parameters(), dense], lr=0.1, weight_decay=decay)
    other = torch.optim.Adagrad(theirs.parameters(), lr=0.1)
    before = mine.weight.detach().clone()
    for step in range(4):
        rows = torch.tensor([1, 3, 3, step])
        (mine(rows).pow(2).sum() + dense.sum()).backward()
        theirs(rows).pow(2).sum().backward()
        if decay:
            grad = theirs.weight.grad.coalesce()
            kept = theirs.weight.detach()[grad.indices()[0]]
            theirs.weight.grad = torch.sparse_coo_tensor(grad.indices(), grad.values() + decay * kept, grad.shape)
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    torch.testing.assert_close(mine.weight, theirs.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(optimizer.state[mine.weight]["sum"], other.state[theirs.weight]["sum"])
    assert torch.equal(mine.weight[4:], before[4:]) and not torch.equal(mine.weight[:4], before[:4])
    assert dense.max() < 1, "a dense one beside it is stepped too"


def test_other_optimizers_refuse_sparse_gradients():
    mine, _ = embeddings()
    optimizer = DeepSpeedCPUAdam(mine.parameters())
    mine(torch.tensor([1])).sum().backward()
    with pytest.raises(OptimizerError, match=r"shape \(10, 3\).*with a sparse gradient"):
        optimizer.step()


# --- a state under a number -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_a_subgroups_step_is_a_step_and_can_be_taken_back(by, adamw_mode, bias_correction):
    """One optimizer with a parameter that is two in turn, beside two optimizers."""
    torch.manual_seed(0)
    options = {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "betas": (0.8, 0.95),
        "adamw_mode": adamw_mode,
        "bias_correction": bias_correction,
    }
    values = [torch.randn(100), torch.randn(7)]
    alone = [nn.Parameter(value.clone()) for value in values]
    others = [DeepSpeedCPUAdam([param], **options) for param in alone]
    optimizer = DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))], **options)
    group, kept = optimizer.param_groups[0], {}
    for step in range(4):
        for number, value in enumerate(values):
            param = nn.Parameter(value)  # the same memory under another tensor
            param.grad = torch.randn_like(value)
            group["params"] = [param]
            state = optimizer.state[number]
            kept[number] = (value.clone(), {name: tensor.clone() for name, tensor in state.items()})
            assert optimizer.step_subgroup(number, lambda: 3.0) == 3.0
            if step == 2 and number == 1:
                assert optimizer.rollback_subgroup(number, lambda: 4.0) == 4.0
                before, moments = kept[number]
                torch.testing.assert_close(value, before, atol=1e-6, rtol=1e-5)
                for name, tensor in moments.items():
                    torch.testing.assert_close(optimizer.state[number][name], tensor, atol=1e-6, rtol=1e-5)
                optimizer.step_subgroup(number)  # and again
            alone[number].grad = param.grad
            others[number].step()
            torch.testing.assert_close(value, alone[number].detach(), atol=1e-6, rtol=1e-5)
    assert set(optimizer.state) == {0, 1} and float(optimizer.state[1]["step"]) == 4


def test_a_subgroup_that_cannot_be_stepped_or_taken_back_is_an_error():
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = DeepSpeedCPUAdam(params)
    with pytest.raises(OptimizerError, match="subgroup 3: it has made no step"):
        optimizer.rollback_subgroup(3)
    for param in params:
        param.grad = torch.ones(2)
    with pytest.raises(OptimizerError, match="subgroup 3 is the state of one parameter, and 2 have gradients"):
        optimizer.step_subgroup(3)
    largest = DeepSpeedCPUAdam(params[:1], amsgrad=True)
    largest.step_subgroup(0)
    with pytest.raises(OptimizerError, match="keeps the largest second moments"):
        largest.rollback_subgroup(0)
    optimizer.step()
    assert len(optimizer.state) == 2
