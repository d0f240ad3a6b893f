"""check_critic passes what is right and finds what isn't, on the real modules; each cure is tried, too."""

import functools

import pytest
import torch
from helper_programs import run_program
from torch import nn

from benchmarks.check_critic import check_critic

STATES, ACTIONS, ROWS, H = 5, 3, 32, 32


class Critic(nn.Module):
    def __init__(self, *middle):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(STATES + ACTIONS, H), *middle, nn.Linear(H, 1))

    def forward(self, s, a):
        return self.net(torch.cat([s, a], 1)).squeeze(1)


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


def failures(capsys, critic, *rest, actions=1.0, compile=False):
    """What check_critic prints for each check that fails, by the check's name."""
    torch.manual_seed(0)
    s, a = torch.randn(ROWS, STATES), actions * (2 * torch.rand(ROWS, ACTIONS) - 1)
    holds = check_critic(critic, s, a, *rest, compile=compile)
    found = {text.partition(" (")[0]: text for text in capsys.readouterr().out.split("FAILS ")[1:]}
    assert holds == (not found)
    return found


HALF = "half the batch gives the same"
MPR, VFC, CURV = (f"parameter gradient of {term}" for term in ("mpr", "vfc", "curvature"))
BATCH_NORM, DETACHED = nn.BatchNorm1d(H, track_running_stats=False), Layer(lambda x: x.tanh() * x.detach().sigmoid())
OWN = Layer(Square.apply)  # its gradients are wrong under torch.compile alone
CRITICS = {  # name: the layers, the checks that must fail and no other, the cure that each must name
    "mlp": ((nn.SiLU(), nn.Linear(H, H), nn.SiLU()), {}, ""), "group norm": ((nn.GroupNorm(1, H), nn.SiLU()), {}, ""),
    "rms norm": ((nn.RMSNorm(H), nn.Tanh()), {}, ""), "own function": ((OWN,), {}, ""),
    "dropout, eval()": ((nn.SiLU(), nn.Dropout().eval()), {}, ""),
    "dropout": ((nn.SiLU(), nn.Dropout(0.1)), {"the same twice"}, "leave it out"),
    "batch norm": ((nn.BatchNorm1d(H), nn.SiLU()), {"RuntimeError: During a grad"}, "GroupNorm(1, H)"),
    "batch norm, nothing tracked": ((BATCH_NORM, nn.SiLU()), {HALF, CURV}, "GroupNorm(1, H)"),  # pytorch#186256
    "layer norm": ((nn.LayerNorm(H), nn.SiLU()), {CURV}, "GroupNorm(1, H)"),
    "relu": ((nn.ReLU(),), {"v^T H v is not 0"}, "nn.SiLU"), "detach": ((DETACHED,), {MPR, VFC, CURV}, "take"),
    "own function, compiled": ((OWN,), {"compiled equals eager"}, "don't compile"),
    "the env's units": ((nn.SiLU(),), {"actions are in [-1, 1]"}, "rescale"),
}  # fmt: skip


@pytest.mark.parametrize("name", CRITICS)
def test_a_right_critic_passes_and_a_wrong_one_is_told_with_its_cure(capsys, name):
    layers, expected, cure = CRITICS[name]
    compile, actions = name in ("group norm", "own function, compiled"), 2.0 if "units" in name else 1.0
    found = failures(capsys, Critic(*layers), actions=actions, compile=compile)
    assert found or name != "layer norm", (
        "Good news: this torch differentiates nn.LayerNorm right (pytorch#175754). Take the GroupNorm advice out of "
        "the block's docstring, README, check_critic and the tests, and raise the torch in requirements.txt."
    )
    assert found.keys() == set(expected) and all(cure in text for text in found.values()), found


def test_one_of_twins_is_checked_with_a_forward_and_they_stay_as_they_were(capsys):
    twins = nn.ModuleList([Critic(nn.LayerNorm(H), nn.SiLU()), Critic(nn.GroupNorm(1, H), nn.SiLU())])
    twins[1].load_state_dict(twins[0].state_dict())  # the cure keeps the function and the checkpoint
    s, a = torch.randn(ROWS, STATES), torch.randn(ROWS, ACTIONS)
    torch.testing.assert_close(twins[1](s, a), twins[0](s, a))
    before = {name: tensor.clone() for name, tensor in twins.state_dict().items()}
    assert list(failures(capsys, twins, lambda twins, s, a: twins[0](s, a))) == [CURV]
    assert list(failures(capsys, twins, lambda twins, s, a: twins[0](s, a) - 9 * (a**2).sum(1))) == [CURV]  # Curv is 0
    assert failures(capsys, twins, lambda twins, s, a: -twins[1](s, a)) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in twins.state_dict().items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in twins.parameters())


def bad(*layers):
    """check_critic's arguments; a linear critic has no curvature."""
    return Critic(*layers), torch.randn(ROWS, STATES), torch.rand(ROWS, ACTIONS), nn.Module.__call__, False


good = functools.partial(bad, nn.SiLU())


@pytest.mark.parametrize(("name", "code"), [("good", 0), ("bad", 1), ("missing", 2)])
def test_as_a_command_its_exit_code_tells(capsys, name, code):
    with pytest.raises(SystemExit) as ended:
        run_program("benchmarks.check_critic", f"{__name__}:{name}")
    out, errors = capsys.readouterr()
    assert ended.value.code == code and ("FAILS" in out) == (code == 1)
    assert errors.count("\n") == ("give module:function" in errors) == (code == 2)
