"""check_critic finds what makes PAVE wrong on a critic, and passes what is right: the real modules, no stand-ins."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from benchmarks.check_critic import check_critic

STATES, ACTIONS, ROWS, WIDTH = 5, 3, 32, 32


class Critic(nn.Module):
    def __init__(self, *middle):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(STATES + ACTIONS, WIDTH), *middle, nn.Linear(WIDTH, 1))

    def forward(self, s, a):
        return self.net(torch.cat([s, a], 1)).squeeze(1)


class BatchStatistics(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / x.std(0)


class HandWrittenLayerNorm(nn.Module):
    def forward(self, x):
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


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


class OwnFunction(nn.Module):
    def forward(self, x):
        return Square.apply(x)


class Detach(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x.detach())


def data():
    torch.manual_seed(0)
    return torch.randn(ROWS, STATES), torch.rand(ROWS, ACTIONS) * 2 - 1


def failures(capsys, *arguments, **keywords):
    """The names of the checks that failed, each with what is said about it."""
    capsys.readouterr()
    holds = check_critic(*arguments, **keywords)
    found = {line.split(" (")[0]: line for line in capsys.readouterr().out.split("FAILS ")[1:]}
    assert holds == (not found)
    return found


@pytest.mark.parametrize(
    "middle",
    [
        [nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()],
        [nn.GroupNorm(1, WIDTH), nn.SiLU()],
        [nn.RMSNorm(WIDTH), nn.Tanh()],
        [HandWrittenLayerNorm(), nn.GELU()],
    ],
    ids=["mlp", "group norm", "rms norm", "layer norm by hand"],
)
def test_a_right_critic_passes(capsys, middle):
    assert failures(capsys, Critic(*middle), *data(), compile=isinstance(middle[0], nn.GroupNorm)) == {}


WRONG = {  # name: the layers, the checks that must fail, a word of the cure; others may fail with them
    "dropout": ([nn.SiLU(), nn.Dropout(0.1)], {"the same call twice gives the same"}, "leave it out"),
    "batch norm": ([nn.BatchNorm1d(WIDTH), nn.SiLU()], {"the same call twice gives the same"}, "GroupNorm"),
    "batch norm without running statistics": (
        [nn.BatchNorm1d(WIDTH, track_running_stats=False), nn.SiLU()],
        {"a row alone is as in its batch", "MPR is 0 at sigma = 0"},
        "GroupNorm",
    ),
    "batch statistics by hand": (
        [BatchStatistics(), nn.SiLU()],
        {"a row alone is as in its batch", "MPR is 0 at sigma = 0"},
        "GroupNorm",
    ),
    "relu": ([nn.ReLU()], {"v^T H v is not 0 everywhere"}, "nn.SiLU"),
    "detach": ([Detach()], {"gradient of mpr", "gradient of vfc"}, "plain operations"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_critic_is_told_with_its_cure(capsys, name):
    middle, expected, cure = WRONG[name]
    found = failures(capsys, Critic(*middle), *data(), compile=False)
    assert expected <= set(found)
    assert all(cure in found[check] for check in expected), found


def test_layer_norm_is_the_one_wrong_gradient_until_pytorch_mends_it(capsys):
    found = failures(capsys, Critic(nn.LayerNorm(WIDTH), nn.SiLU()), *data(), compile=False)
    assert found, (
        "Good news: this torch differentiates nn.LayerNorm right (pytorch#175754). Take the GroupNorm advice out of the "
        "PAVE block's docstring and README, out of benchmarks/check_critic.py, and this test; raise requirements.txt."
    )
    assert set(found) == {"gradient of curvature"}
    assert "GroupNorm(1, H)" in found["gradient of curvature"]
    layer_norm, group_norm = Critic(nn.LayerNorm(WIDTH), nn.SiLU()), Critic(nn.GroupNorm(1, WIDTH), nn.SiLU())
    group_norm.load_state_dict(layer_norm.state_dict())  # the cure keeps the function and the checkpoint
    torch.testing.assert_close(group_norm(*data()), layer_norm(*data()))


def test_a_function_of_ones_own_goes_wrong_under_compile_alone(capsys):
    critic = Critic(OwnFunction())
    assert set(failures(capsys, critic, *data())) == {"compiled equals eager"}
    assert failures(capsys, critic, *data(), compile=False) == {}


def test_actions_in_the_envs_units_and_wrong_shapes_are_told(capsys):
    (s, a), critic = data(), Critic(nn.SiLU())
    assert set(failures(capsys, critic, s, 2 * a, compile=False)) == {"actions are in [-1, 1]"}
    found = failures(capsys, lambda s, a: critic(s, a)[:, None], s, a, critic, compile=False)
    assert "squeeze(-1)" in found["the same call twice gives the same"]


def test_a_function_of_a_module_and_the_module_is_as_before(capsys):
    critic = Critic(nn.LayerNorm(WIDTH), nn.SiLU())
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}
    found = failures(capsys, lambda s, a: -critic(s, a), *data(), critic, compile=False)
    assert set(found) == {"gradient of curvature"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in critic.state_dict().items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in critic.parameters())
    with pytest.raises(TypeError, match="pass the module"):
        check_critic(lambda s, a: critic(s, a), *data())


def test_as_a_program_it_ends_with_exit_code_1_where_a_check_fails(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from sac_pave_continuous import QNetwork\n"
        "data = torch.randn(8, 3), torch.rand(8, 1)\n"
        "good = lambda: (QNetwork(3, 1), *data, None, False)\n"
        "bad = lambda: (nn.Bilinear(3, 1, 1), *data, None, False)\n"
    )
    for name, code in ("good", 0), ("bad", 1):
        command = [sys.executable, ROOT / "benchmarks" / "check_critic.py", f"mine:{name}"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == code, ended.stdout + ended.stderr
        assert ("FAILS" in ended.stdout) == bool(code)
