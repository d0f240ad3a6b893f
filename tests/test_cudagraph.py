"""The update as a CUDA graph, tested without a GPU.

Tape stands in for torch.cuda.CUDAGraph: it records the tensor operations below Python and replays them on the same
memory, as a graph does. What it can't see is CUDA's own: streams, kernels, the memory pool.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_agent import ACTIONS, STATES, make_agent

CPU = torch.device("cpu")


class Tape(TorchDispatchMode):
    """Recording leaves no trace (a capture doesn't execute); replay() repeats the operations on the same tensors."""

    def __enter__(self):
        self.operations, self.overwritten, self.random_state = [], [], torch.get_rng_state()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(function), "reading a value in Python waits for the GPU"
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.overwritten += [(x, x.clone()) for x in tensors]
        outputs = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, outputs))
        return outputs

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, before in reversed(self.overwritten):
                tensor.copy_(before)
        torch.set_rng_state(self.random_state)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, recorded in self.operations:
            for old, new in zip(tree_leaves(recorded), tree_leaves(function(*args, **kwargs)), strict=True):
                if (
                    isinstance(old, torch.Tensor)
                    and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
                ):
                    old.copy_(new)


@pytest.fixture
def no_cuda_needed(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)


def train(script, wrap, **settings):
    """The agent after 12 updates, from a buffer that grows meanwhile, and what each update wanted to log."""
    torch.manual_seed(0)
    agent = make_agent(script, **settings)
    buffer, rng = script.ReplayBuffer(100, STATES, ACTIONS, CPU), np.random.default_rng(0)
    update = wrap(lambda update_actor: agent.update(buffer.sample(agent.args.batch_size), update_actor))
    logged = []
    for step in range(12):
        for _ in range(5):
            state, next_state, action = rng.normal(size=STATES), rng.normal(size=STATES), rng.uniform(-1, 1, ACTIONS)
            buffer.add(state, next_state, action, rng.normal(), False)
        logged.append({name: value.item() for name, value in update(step % 2 == 0).items()})
    return agent, logged


@pytest.mark.parametrize(
    "settings",
    [{}, {"lambda_mpr": 0.1, "lambda_vfc": 0.1, "lambda_curv": 0.5}, {"autotune_curv": True, "lambda_curv": 0.01}],
    ids=["plain", "pave", "autotuned"],
)
def test_replayed_updates_are_the_eager_ones(script, no_cuda_needed, settings):
    eager, eager_logged = train(script, lambda function: function, **settings)
    replayed, logged = train(script, script.cuda_graphs, **settings)
    for (name, ours), (_, theirs) in zip(replayed.state_dict().items(), eager.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name
    assert logged == eager_logged


def test_the_tape_would_notice_a_value_that_python_holds(script, no_cuda_needed):
    count = 0

    def function(flag):
        nonlocal count
        count += 1
        return torch.zeros(()) + count

    call = script.cuda_graphs(function)
    assert [call(True).item() for _ in range(6)] == [1, 2, 3, 4, 4, 4]
