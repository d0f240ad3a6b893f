# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.13.0",
#   "gymnasium[mujoco]>=1.0.0",
#   "mujoco>=3.2.0",
#   "tyro>=1.0.0",
#   "tensorboard>=2.18.0",
#   "tqdm>=4.66.0",
# ]
# ///
"""SAC + PAVE: smooth policies by shaping the critic (arXiv 2601.22970); the actor's loss stays plain SAC.

Where the action maximises Q, implicit differentiation gives da*/ds = -(d2Q/da2)^-1 d2Q/dsda. So the policy's Lipschitz
constant is at most M/mu: M, how fast the action gradient turns with the state; mu, how sharp the maximum is. PAVE adds
three losses to each critic: two make M small, the third keeps mu away from zero.

    MPR   mean (grad_a Q(s + e, a) - grad_a Q(s, a))^2,  e ~ N(0, sigma^2)    mixed-partial regularisation
    VFC   mean (grad_a Q(s', a) - grad_a Q(s, a))^2                           vector-field consistency
    Curv  mean max(0, v^T H v + delta),  H = d2Q/da2,  v = +-1                curvature preservation (Hutchinson)

    critic loss = 1/2 TD + lambda_mpr MPR + lambda_vfc VFC + lambda_curv Curv

Run it, or its plain algorithm, in which no PAVE code runs:

    python sac_pave_continuous.py --env-id HalfCheetah-v5
    python sac_pave_continuous.py --env-id HalfCheetah-v5 --lambda-mpr 0 --lambda-vfc 0 --lambda-curv 0
"""

import copy
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
LOG_INTERVAL = 200  # steps between two readings of the losses: on a GPU each reading waits for the update

# The paper's tuned (lambda_mpr, lambda_vfc, lambda_curv) for SAC; any other env starts where the paper's search does.
TUNED_LAMBDAS = {
    "LunarLanderContinuous": (0.1, 0.5, 0.05),
    "Pendulum": (0.1, 0.005, 0.5),
    "Reacher": (0.1, 0.0005, 1.0),
    "Ant": (0.1, 0.0005, 1.0),
    "Humanoid": (0.1, 0.0005, 1.0),
    "Hopper": (2.0, 0.0005, 3.0),
    "Walker2d": (2.0, 0.005, 2.0),
    "HalfCheetah": (0.1, 0.1, 0.3),  # ours (README)
}
UNTUNED_LAMBDAS = (0.1, 0.1, 0.01)
AUTOTUNE_LAMBDAS = (0.1, 0.0005, 0.01)  # with --autotune-curv: the paper's two for SAC on Ant, and lambda_curv's start
LAMBDA_CURV_BOUNDS = (1e-4, 100.0)  # of --autotune-curv: it ends at the upper one if the target can't be met
LAMBDAS = ("lambda_mpr", "lambda_vfc", "lambda_curv")


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    """Gymnasium id of an env with a vector observation and a bounded continuous action"""
    seed: int = 1
    """seed of the networks, the noise, the replay and the env"""
    total_timesteps: int = 1_000_000
    """env steps; after --learning-starts, an update each"""
    learning_starts: int = 10_000
    """steps of uniformly random actions before the first update"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    batch_size: int = 256
    """transitions in a minibatch"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target networks towards the critics, each update"""
    policy_lr: float = 3e-4
    """learning rate of the actor"""
    q_lr: float = 1e-3
    """learning rate of the critics (and of alpha)"""

    policy_frequency: int = 1
    """critic updates per actor update; the actor then makes as many steps, as in CleanRL"""
    autotune: bool = True
    """tune the entropy coefficient alpha towards an entropy of -dim(action)"""
    alpha: float = 0.2
    """fixed entropy coefficient, used with --no-autotune"""

    lambda_mpr: float | None = None
    """weight of MPR; None: the tuned value for this env, or 0.1"""
    lambda_vfc: float | None = None
    """weight of VFC; None: the tuned value for this env, or 0.1"""
    lambda_curv: float | None = None
    """weight of Curv, or where --autotune-curv starts; None: the tuned value for this env, or 0.01"""
    mpr_sigma: float = 0.01
    """standard deviation of MPR's noise, in the observation's own units"""
    curv_delta: float = 1.0
    """margin delta by which Curv wants v^T H v below zero"""
    autotune_curv: bool = False
    """tune lambda_curv towards --target-concavity from --lambda-curv; it and --curv-delta are then in units of the
    critic's action gradient (delta: times d_a/2), and lambdas that are not given are 0.1, 0.0005, 0.01"""
    target_concavity: float = 0.95
    """share of the samples that --autotune-curv wants to have v^T H v below -delta"""
    pave_batch_size: int | None = None
    """rows of the minibatch that the PAVE terms use: fewer is an unbiased, cheaper estimate; None: all"""

    cuda: bool = True
    """use a CUDA device if there is one"""
    torch_deterministic: bool = True
    """let torch use deterministic algorithms only"""
    compile: bool = True
    """torch.compile the updates: some 40 s at the start, 5 s from its cache"""
    cudagraphs: bool = True
    """on CUDA, replay each update as one CUDA graph"""
    output_dir: str = "runs"
    """where the run's folder <env>__<script>__<seed>__<time> is made"""
    eval_interval: int = 10_000
    """steps between two evaluations of the deterministic policy"""
    eval_episodes: int = 10
    """episodes in an evaluation; 0: no evaluation"""
    checkpoint_interval: int = 50_000
    """steps after which the next episode end writes checkpoint.pt and actor.pt"""
    resume: str | None = None
    """checkpoint.pt of a run to go on with, in its folder; its settings hold unless a flag says otherwise"""


class UserError(Exception):
    """Something that the user can mend; shown as one line, exit code 2."""


def validate(args: Args) -> Args:
    """Return args with each None lambda looked up for this env; UserError on a setting that makes no sense."""
    tuned = TUNED_LAMBDAS.get(re.sub(r"-v\d+$", "", args.env_id), UNTUNED_LAMBDAS)
    lambdas = dict(zip(LAMBDAS, AUTOTUNE_LAMBDAS if args.autotune_curv else tuned, strict=True))
    args = replace(args, **{name: value for name, value in lambdas.items() if getattr(args, name) is None})
    rules = {
        "total_timesteps learning_starts batch_size policy_frequency": (lambda x: x >= 1, "at least 1"),
        "eval_interval checkpoint_interval": (lambda x: x >= 1, "at least 1"),
        "eval_episodes": (lambda x: x >= 0, "0 or more"),
        "seed": (lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1"),
        "policy_lr q_lr mpr_sigma alpha": (lambda x: 0 < x < math.inf, "a positive number"),
        "lambda_mpr lambda_vfc lambda_curv curv_delta": (lambda x: 0 <= x < math.inf, "0 or a positive number"),
        "target_concavity": (lambda x: 0 < x < 1, "between 0 and 1"),
        "gamma tau": (lambda x: 0 <= x <= 1, "from 0 to 1"),
        "lambda_curv": (
            lambda x: not args.autotune_curv or LAMBDA_CURV_BOUNDS[0] <= x <= LAMBDA_CURV_BOUNDS[1],
            "from {} to {} with --autotune-curv".format(*LAMBDA_CURV_BOUNDS),
        ),
        "buffer_size": (lambda x: x >= args.batch_size, f"at least --batch-size ({args.batch_size})"),
        "pave_batch_size": (
            lambda x: x is None or 1 <= x <= args.batch_size,
            f"from 1 to --batch-size ({args.batch_size})",
        ),
    }
    for names, (holds, demand) in rules.items():
        for name in names.split():
            if not holds(getattr(args, name)):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {demand}")
    return args


# ---------------------------------------------------------------------------------------------------- environment


class NormalizedAction(gym.wrappers.RescaleAction):
    """The env with its actions, whatever their bounds, rescaled to [-1, 1]."""

    def action(self, action):
        """The action in the env's own units; clipped, since rounding can step over the bounds."""
        return np.clip(super().action(action), self.env.action_space.low, self.env.action_space.high)


def make_env(env_id: str) -> gym.Env:
    """The env with actions rescaled to [-1, 1] and raw observations; UserError where a continuous policy can't act."""
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        raise UserError(f"cannot make --env-id {env_id}: {' '.join(str(error).split())}") from error
    actions, observations = env.action_space, env.observation_space
    if not isinstance(actions, gym.spaces.Box) or len(actions.shape) != 1 or actions.dtype.kind != "f":
        raise UserError(
            f"{env_id} has the action space {actions}; this script needs a continuous vector, a 1-D float Box"
        )
    if not (np.isfinite([actions.low, actions.high]).all() and (actions.low < actions.high).all()):
        raise UserError(f"{env_id} has unbounded or locked actions ({actions}); register it with finite low < high")
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        raise UserError(
            f"{env_id} observes {type(observations).__name__}{observations.shape or ''}; this script needs a vector: "
            "register the env wrapped in gymnasium.wrappers.FlattenObservation (images also need a CNN encoder)"
        )
    # a copy each: some envs return one array that they change in place, and s would turn into s' in the buffer
    env = gym.wrappers.TransformObservation(env, lambda observation: np.array(observation, np.float32), None)
    return NormalizedAction(env, np.float32(-1), np.float32(1))


# -------------------------------------------------------------------------------------------------- replay buffer


class ReplayBuffer:
    """A ring of transitions, one row each, so that adding is one copy and sampling one gather.

    The rows live on the device, or in the host's memory, with a line that says so, where they don't fit there.
    """

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, device: torch.device):
        """Raise UserError where `capacity` rows don't fit in the host's memory either."""
        self.device = device  # of the minibatches
        self.widths = (observation_dim, observation_dim, action_dim, 1, 1)
        needed = capacity * sum(self.widths) * 4
        if device.type == "cuda" and needed > 0.9 * torch.cuda.mem_get_info(device)[0]:
            tqdm.write(
                f"the replay buffer ({needed / 1e9:.1f} GB) does not fit on {device}: it stays in the host's memory"
            )
            device = torch.device("cpu")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
        if device.type == "cpu" and needed > memory:
            raise UserError(
                f"a replay buffer of {capacity:,} transitions needs {needed / 1e9:.1f} GB, this machine has "
                f"{memory / 1e9:.1f} GB: lower --buffer-size"
            )
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.position = 0
        # on the device: a CUDA graph would not see a Python int change
        self.size = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, observation, next_observation, action, reward: float, terminated: bool) -> None:
        row = np.concatenate([observation, next_observation, action, [reward, terminated]], dtype=np.float32)
        self.rows[self.position] = torch.from_numpy(row)
        self.position = (self.position + 1) % len(self.rows)
        self.size.add_(1).clamp_(max=len(self.rows))

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """B rows drawn uniformly: s (B, d_s), s' (B, d_s), a (B, d_a) in [-1, 1], rewards (B,), terminations (B,).

        terminations is 1.0 where the episode truly ended; a time limit leaves 0.0, and s' is its true last observation.
        """
        fractions = torch.rand(batch_size, dtype=torch.float64, device=self.rows.device)
        rows = self.rows.index_select(0, (fractions * self.size).long()).to(self.device)
        observations, next_observations, actions, rewards, terminations = rows.split(self.widths, dim=1)
        return observations, next_observations, actions, rewards.squeeze(1), terminations.squeeze(1)


# ------------------------------------------------------------------------------------------------------- networks


def mlp(inputs: int, outputs: int, hidden: int = 256) -> nn.Sequential:
    """Two hidden layers of SiLU: Curv needs a second derivative, and ReLU's is zero."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
    )


class QNetwork(nn.Module):
    """Q(s, a): (B, d_s), (B, d_a) -> (B,)."""

    def __init__(self, observation_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(observation_dim + action_dim, 1)

    def forward(self, observations, actions):
        return self.net(torch.cat([observations, actions], dim=-1)).squeeze(-1)


class Actor(nn.Module):
    """The tanh-Gaussian policy; forward gives its deterministic action tanh(mean): (B, d_s) -> (B, d_a) in [-1, 1]."""

    def __init__(self, observation_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(observation_dim, 2 * action_dim)

    def forward(self, observations):
        return torch.tanh(self.net(observations).chunk(2, dim=-1)[0])

    def sample(self, observations, noise):
        """Action tanh(mean + std noise), noise ~ N(0, I) (B, d_a), and its log-probability (B,)."""
        mean, log_std = self.net(observations).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise
        gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(u)^2), written so that it stays finite where tanh rounds to 1 (SAC paper, appendix C)
        squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (gaussian - squash).sum(-1)


# -------------------------------------------------------------------- PAVE: paste from here to the next dashed line

from typing import NamedTuple  # noqa: E402  here: above the pasted block only `import torch` is needed


class PaveLosses(NamedTuple):
    mpr: torch.Tensor  # ()
    vfc: torch.Tensor  # ()
    curvature: torch.Tensor  # ()
    trace: torch.Tensor  # (B,), v^T (d2Q/da2) v, one probe's estimate: below 0 where Q is concave along it
    gradient: torch.Tensor  # (B, d_a), grad_a Q(s, a)
    q_values: torch.Tensor  # (B,), Q(s, a): the TD loss needs no second forward pass


def action_gradient(q, observations, actions):
    """The Q-gradient field: grad_a Q(s, a) (B, d_a), and Q(s, a) (B,).

    `q` is one critic, any callable (B, d_s), (B, d_a) -> (B,) that treats its rows independently (no batch norm).
    Raises ValueError if it returns another shape.
    """

    def total(a):
        q_values = q(observations, a)
        if q_values.shape != a.shape[:1]:
            raise ValueError(
                f"q must return shape ({len(a)},), not {tuple(q_values.shape)}: pass lambda s, a: q(s, a).squeeze(-1)"
            )
        return q_values.sum(), q_values  # rows are independent, so the sum's gradient is each row's own

    return torch.func.grad(total, has_aux=True)(actions)


def hutchinson_trace(q, observations, actions, probe):
    """Hutchinson's estimate of tr(d2Q/da2): v^T (d2Q/da2) v (B,), one probe v (B, d_a) a sample; no Hessian is formed.

    Its mean over Rademacher probes is the trace (Hutchinson 1989); exact if the Hessian is diagonal. Also returns, from
    the same pass, grad_a Q (B, d_a) and Q (B,). All are differentiable in the parameters of `q`, eager or compiled:
    torch.func.grad, unlike torch.autograd.grad, traces to plain operations.
    """

    def along_probe(a):
        gradient, q_values = action_gradient(q, observations, a)
        return (gradient * probe).sum(), (gradient, q_values)

    hessian_times_probe, (gradient, q_values) = torch.func.grad(along_probe, has_aux=True)(actions)
    return (hessian_times_probe * probe).sum(-1), gradient, q_values


def rademacher_like(actions):
    """A probe of independent +1 and -1 in the shape, dtype and device of `actions`."""
    return torch.randint_like(actions, 2) * 2 - 1


def pave_losses(q, observations, actions, next_observations, state_noise, probe, delta):
    """The three PAVE losses of one critic at replayed (s, a, s'); multiply by the lambdas and add to its TD loss:

        state_noise, probe = sigma * torch.randn_like(s), rademacher_like(a)  # the same for every critic
        pave = pave_losses(q, s, a, next_s, state_noise, probe, delta)
        loss = td_weight * F.mse_loss(pave.q_values, target)  # 1 in TD3, 1/2 in SAC
        loss += lambda_mpr * pave.mpr + lambda_vfc * pave.vfc + lambda_curv * pave.curvature

    q: callable (B, d_s), (B, d_a) -> (B,), rows independent; smooth (SiLU): with ReLU, Curv has no gradient
    observations, next_observations: s and s' (B, d_s); actions: a (B, d_a), in [-1, 1] if the paper's lambdas are used
    state_noise: epsilon (B, d_s), drawn from N(0, sigma^2 I); probe: v (B, d_a), see rademacher_like
    delta: the margin of curvature, in units of Q
    Means are over the batch and the action dimensions. Gradients flow to the parameters of `q` through every term.
    Keep float32: MPR subtracts nearly equal gradients, and TF32 or bf16 would lose the difference.
    """
    trace, gradient, q_values = hutchinson_trace(q, observations, actions, probe)
    states = torch.cat([observations + state_noise, next_observations])
    noisy_gradient, next_gradient = action_gradient(q, states, torch.cat([actions, actions]))[0].chunk(2)
    return PaveLosses(
        mpr=(noisy_gradient - gradient).square().mean(),
        vfc=(next_gradient - gradient).square().mean(),
        curvature=torch.relu(trace + delta).mean(),
        trace=trace,
        gradient=gradient,
        q_values=q_values,
    )


def smoothness(actions, fs=1.0):
    """sm of one episode: frequency weighted by the actions' spectrum (CAPS, Mysore et al. 2021); lower is smoother.

    actions: array (T,) or (T, d_a) in the env's own action units; fs: sampling rate, 1 for cycles per step.
    Mean over action dimensions of 2 / (T fs) * sum_k f_k |FFT(actions)_k|, k < T // 2. T < 2 gives 0.0.
    """
    actions = torch.as_tensor(actions, dtype=torch.float64)
    steps = len(actions)
    if steps < 2:
        return 0.0
    spectrum = torch.fft.rfft(actions.reshape(steps, -1), dim=0)[: steps // 2].abs()
    frequencies = torch.arange(steps // 2, dtype=torch.float64, device=actions.device) * (fs / steps)
    return (2 / (steps * fs) * (frequencies @ spectrum)).mean().item()


# ---------------------------------------------------------------------------------------------------- the updates


def compile_or_eager(function):
    """torch.compile(function), or `function` and a warning where a call of it fails (no C++ compiler, say)."""
    fast = torch.compile(function, fullgraph=True)

    def call(*inputs):
        nonlocal fast
        try:
            return fast(*inputs)
        except Exception as error:
            cause = str(error).strip().partition("\n")[0]
            tqdm.write(f"warning: torch.compile does not work here, going on without it ({cause})", file=sys.stderr)
            fast = function
            return function(*inputs)

    return call


def cuda_graphs(function):
    """`function(flag)` as one CUDA graph for each value of `flag`: hundreds of kernels for the price of one launch.

    The first calls run as they are, to compile and to allocate; then one is recorded, and from there on replayed. What
    it returns lives in the graph's own memory, which the next replay overwrites.
    """
    graphs, outputs, warm_ups, stream = {}, {}, Counter(), torch.cuda.Stream()

    def call(flag):
        warm_ups[flag] += 1
        if warm_ups[flag] <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                output = function(flag)
            torch.cuda.current_stream().wait_stream(stream)
            return output
        if flag not in graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    outputs[flag] = function(flag)
            except RuntimeError as error:
                cause = str(error).strip().partition("\n")[0]
                raise UserError(
                    f"an update can't be recorded as a CUDA graph ({cause}): add --no-cudagraphs"
                ) from error
            graphs[flag] = graph
        graphs[flag].replay()
        return outputs[flag]

    return call


class Adam(nn.Module):
    """Adam (Kingma & Ba 2015), defaults as in torch.optim, whose step does not compile into one piece with a loss."""

    def __init__(self, parameters, lr: float):
        super().__init__()
        self.lr = lr
        self.means, self.squares = (nn.ParameterList(map(torch.zeros_like, parameters)) for _ in range(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def step(self, parameters, gradients) -> None:
        self.count.add_(1)
        mean_scale, square_scale = 1 - 0.9**self.count, 1 - 0.999**self.count
        for parameter, gradient, mean, square in zip(parameters, gradients, self.means, self.squares, strict=True):
            mean.lerp_(gradient, 1 - 0.9)
            square.lerp_(gradient.square(), 1 - 0.999)
            parameter.sub_(self.lr * (mean / mean_scale) / ((square / square_scale).sqrt() + 1e-8))


class Agent(nn.Module):
    """SAC: networks, optimizers, a method for each loss; `update` is a step down each, compiled in two pieces."""

    def __init__(self, observation_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.device = args, device
        self.use_pave = args.autotune_curv or any(getattr(args, name) for name in LAMBDAS)
        self.pave_rows = args.pave_batch_size or args.batch_size
        self.td_weight = 0.5  # SAC halves each critic's squared error; the tuned lambdas are relative to that
        self.action_dim, self.target_entropy = action_dim, -action_dim
        self.actor = Actor(observation_dim, action_dim)
        self.critics = nn.ModuleList(QNetwork(observation_dim, action_dim) for _ in range(2))
        self.critic_targets = copy.deepcopy(self.critics)
        if args.autotune:
            # of shape (1,), not (): torch 2.13 loses a compiled change of the latter in float64, the tests' dtype
            self.log_alpha = nn.Parameter(torch.zeros(1))
        else:  # not in checkpoints, so that a resumed run takes a new --alpha
            self.register_buffer("log_alpha", torch.tensor([args.alpha]).log(), persistent=False)
        if args.autotune_curv:
            self.register_buffer("log_lambda_curv", torch.tensor([args.lambda_curv]).log())
            self.register_buffer("gradient_scale", torch.zeros(1))
        rates = {"critics": args.q_lr, "actor": args.policy_lr} | ({"log_alpha": args.q_lr} if args.autotune else {})
        optimizers = {part: Adam(list(self.parameters_of(part).values()), rate) for part, rate in rates.items()}
        self.optimizers = nn.ModuleDict(optimizers)
        self.requires_grad_(False)  # torch.func.grad is told what to differentiate in
        self.to(device)
        if args.compile:
            self.update_critics = compile_or_eager(self.update_critics)
            self.update_actor = compile_or_eager(self.update_actor)

    def explore(self, observation: np.ndarray) -> np.ndarray:
        """An action (d_a,) in [-1, 1] drawn from the policy."""
        observations = torch.as_tensor(observation, dtype=torch.float32, device=self.device)[None]
        noise = torch.randn(1, self.action_dim, device=self.device)
        return self.actor.sample(observations, noise)[0][0].cpu().numpy()

    def td_target(self, next_observations, rewards, terminations, noise):
        """r + gamma (min Q'(s', a') - alpha log pi(a'|s')), a' ~ pi(s'); only a termination cuts the future. (B,)"""
        next_actions, next_log_prob = self.actor.sample(next_observations, noise)
        next_q = torch.minimum(*(critic(next_observations, next_actions) for critic in self.critic_targets))
        return rewards + (1 - terminations) * self.args.gamma * (next_q - self.log_alpha.exp() * next_log_prob)

    def critic_loss(self, batch: tuple, target_noise, state_noise, probe):
        """TD + lambda_mpr MPR + lambda_vfc VFC + lambda_curv Curv, summed over the twins; and what to log."""
        observations, next_observations, actions, rewards, terminations = batch
        target_q = self.td_target(next_observations, rewards, terminations, target_noise)
        args, n = self.args, self.pave_rows
        total, twins = 0.0, []
        lambda_curv, delta = args.lambda_curv, args.curv_delta
        if args.autotune_curv:  # delta 1 is met by a paraboloid whose top is nearer than the action box is wide
            scale = self.gradient_scale.squeeze()
            delta = actions.shape[1] / 2 * delta * scale
            lambda_curv = self.log_lambda_curv.exp().squeeze() * scale
        for critic in self.critics:
            if self.use_pave:
                pave = pave_losses(
                    critic, observations[:n], actions[:n], next_observations[:n], state_noise, probe, delta
                )
                q_values = pave.q_values
                if n < len(actions):
                    q_values = torch.cat([q_values, critic(observations[n:], actions[n:])])
                total += args.lambda_mpr * pave.mpr + args.lambda_vfc * pave.vfc + lambda_curv * pave.curvature
            else:
                q_values = critic(observations, actions)
            td = F.mse_loss(q_values, target_q)
            total += self.td_weight * td
            metrics = {"losses/qf_loss": td, "losses/q_values": q_values.mean()}
            if self.use_pave:
                metrics |= {"losses/mpr": pave.mpr, "losses/vfc": pave.vfc, "losses/curvature": pave.curvature}
                metrics["geometry/curvature"] = pave.trace.mean()
                metrics["geometry/concave_fraction"] = (pave.trace < 0).float().mean()
            if args.autotune_curv:
                metrics["geometry/margin_fraction"] = (pave.trace < -delta).float().mean()
                metrics["geometry/action_gradient"] = pave.gradient.square().mean().sqrt()
                metrics["losses/lambda_curv"] = lambda_curv
            twins.append(metrics)
        return total, {name: (twins[0][name] + twins[1][name]) / 2 for name in twins[0]}

    def tune_curvature(self, metrics: dict) -> None:
        """Dual ascent: lambda_curv grows while fewer samples than --target-concavity have v^T H v < -delta.

        Its unit and delta's, gradient_scale, is a running mean of the root mean square entry of grad_a Q.
        """
        shortfall = self.args.target_concavity - metrics["geometry/margin_fraction"]
        self.log_lambda_curv.add_(0.006 * shortfall).clamp_(*map(math.log, LAMBDA_CURV_BOUNDS))
        self.gradient_scale.lerp_(metrics["geometry/action_gradient"], 0.005)

    def actor_loss(self, batch: tuple, noise):
        """Plain SAC: mean of alpha log pi(a|s) - min Q(s, a), a ~ pi(s); and the mean log-probability."""
        observations = batch[0]
        actions, log_prob = self.actor.sample(observations, noise)
        q_values = torch.minimum(*(critic(observations, actions) for critic in self.critics))
        return (self.log_alpha.exp() * log_prob - q_values).mean(), log_prob.mean()

    def alpha_loss(self, log_prob):
        """Makes alpha grow where the policy's entropy, -log_prob, is below its target; and nothing else."""
        return -(self.log_alpha * (log_prob + self.target_entropy)).sum(), ()

    def parameters_of(self, part: str) -> dict[str, nn.Parameter]:
        """The parameters of the attribute `part`, one of those that have an optimizer, by their names in the agent."""
        return {name: parameter for name, parameter in self.named_parameters() if name.split(".")[0] == part}

    def gradients(self, part: str, loss, *inputs) -> tuple:
        """Of loss(*inputs) -> (scalar, more) in the parameters of a part: {name: gradient}, (scalar, more)."""

        def loss_at(parameters):
            return torch.func.functional_call(self, parameters, (loss, *inputs))

        return torch.func.grad_and_value(loss_at, has_aux=True)(self.parameters_of(part))

    def forward(self, loss, *inputs):
        """What functional_call calls: the loss, while the parameters are those it was given."""
        return loss(*inputs)

    def descend(self, part: str, loss, *inputs) -> tuple:
        """One Adam step of a part down the gradient of loss(*inputs) -> (scalar, more); returns (scalar, more)."""
        gradients, outputs = self.gradients(part, loss, *inputs)
        self.optimizers[part].step(map(self.get_parameter, gradients), gradients.values())
        return outputs

    def polyak(self, targets: nn.Module, networks: nn.Module) -> None:
        """Polyak averaging: the targets go a step of tau towards the networks."""
        for target, parameter in zip(targets.parameters(), networks.parameters(), strict=True):
            target.lerp_(parameter, self.args.tau)

    def critic_noise(self, batch: tuple) -> tuple:
        """Noise of the target policy, MPR's, the probe; not drawn in what is compiled, so that eager draws the same."""
        observations, actions = batch[0][: self.pave_rows], batch[2][: self.pave_rows]
        target_noise = torch.randn_like(batch[2])
        if not self.use_pave:
            return target_noise, None, None
        return target_noise, self.args.mpr_sigma * torch.randn_like(observations), rademacher_like(actions)

    def update_critics(self, batch: tuple, target_noise, state_noise, probe) -> dict:
        """One step of both critics, then of their targets; returns what to log."""
        metrics = self.descend("critics", self.critic_loss, batch, target_noise, state_noise, probe)[1]
        if self.args.autotune_curv:
            self.tune_curvature(metrics)
        self.polyak(self.critic_targets, self.critics)
        return metrics

    def update_actor(self, batch: tuple, noise) -> dict:
        """One step of the actor, then of alpha; returns what to log."""
        loss, log_prob = self.descend("actor", self.actor_loss, batch, noise)
        if self.args.autotune:
            self.descend("log_alpha", self.alpha_loss, log_prob)
        return {"losses/actor_loss": loss, "losses/alpha": self.log_alpha.exp().squeeze()}

    def update(self, batch: tuple, update_actor: bool) -> dict:
        """One update from a minibatch (see ReplayBuffer.sample); returns what to log, still on the device."""
        metrics = self.update_critics(batch, *self.critic_noise(batch))
        if update_actor:
            for _ in range(self.args.policy_frequency):
                metrics |= self.update_actor(batch, torch.randn_like(batch[2]))
        return metrics


# ------------------------------------------------------------------------------------------------------- training


@torch.no_grad()
def evaluate(actor: Actor, env: gym.Env, episodes: int) -> dict[str, float]:
    """Return, sm and oscillation of the deterministic policy over `episodes` episodes, always from the same starts.

    env: from make_env. Smoothness and oscillation (mean |a_t+1 - a_t|) are in the env's own action units.
    """
    device = next(actor.parameters()).device
    returns, smooth, oscillation = [], [], []
    for episode in range(episodes):
        observation, _ = env.reset(seed=10_000 + episode)
        rewards, actions, over = [], [], False
        while not over:
            action = actor(torch.as_tensor(observation, dtype=torch.float32, device=device)[None])[0].cpu().numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            rewards.append(float(reward))
            actions.append(env.action(action))
            over = terminated or truncated
        returns.append(sum(rewards))
        smooth.append(smoothness(np.array(actions)))
        oscillation.append(np.abs(np.diff(actions, axis=0)).mean() if len(actions) > 1 else 0.0)
    means = {"return_mean": returns, "smoothness_mean": smooth, "oscillation": oscillation}
    deviations = {"return_std": returns, "smoothness_std": smooth}
    return {k: float(np.mean(v)) for k, v in means.items()} | {k: float(np.std(v)) for k, v in deviations.items()}


def save(path: Path, content: dict) -> None:
    """torch.save that leaves the old file whole until the new one is: written beside it, then renamed."""
    partial = path.with_suffix(".partial")
    try:
        torch.save(content, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk is either
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}, what was there is untouched: {error}") from error


def numpy_generators(env: gym.Env) -> tuple:
    """Every numpy generator that a run draws from: the global one, the env's and its action space's."""
    return np.random.get_bit_generator(), env.np_random.bit_generator, env.action_space.np_random.bit_generator


def save_checkpoint(run_dir: Path, step: int, agent: Agent, buffer: ReplayBuffer, env: gym.Env) -> None:
    """Write actor.pt (what a robot needs) and checkpoint.pt (all that --resume needs) into the run's folder."""
    if not all(parameter.isfinite().all() for parameter in agent.parameters()):
        raise UserError(f"training diverged at step {step:,}: a weight is not finite; the last checkpoint is untouched")
    common = {"script": SCRIPT, "args": asdict(agent.args), "step": step}
    low, high = torch.from_numpy(env.env.action_space.low), torch.from_numpy(env.env.action_space.high)
    save(run_dir / "actor.pt", common | {"actor": agent.actor.state_dict(), "action_low": low, "action_high": high})
    state = {
        "agent": agent.state_dict(),
        "buffer_rows": buffer.rows[: int(buffer.size)].to("cpu", copy=True),  # a view would save the whole ring
        "buffer_position": buffer.position,
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if agent.device.type == "cuda" else None,
        "numpy_rngs": json.dumps([generator.state for generator in numpy_generators(env)], default=np.ndarray.tolist),
    }
    save(run_dir / "checkpoint.pt", common | state)


def load_checkpoint(path: str) -> dict:
    """Read a checkpoint.pt of this script; weights_only, so it can't execute code. UserError for any other file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = str(error).strip().partition("\n")[0]
        raise UserError(f"--resume cannot read {path} ({cause}): give the checkpoint.pt of a run") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("script") != SCRIPT or "buffer_rows" not in checkpoint:
        raise UserError(f"--resume {path} was not written by {SCRIPT}.py: give the checkpoint.pt of one of its runs")
    return checkpoint


def restore(checkpoint: dict, agent: Agent, buffer: ReplayBuffer, env: gym.Env) -> int:
    """Put everything that a checkpoint holds back in place and return its step; UserError if it doesn't fit."""
    args, rows, step = agent.args, checkpoint["buffer_rows"], checkpoint["step"]
    if checkpoint["args"]["env_id"] != args.env_id:
        raise UserError(f"--resume is a run on {checkpoint['args']['env_id']}, --env-id is {args.env_id}")
    if step >= args.total_timesteps:
        raise UserError(f"--resume is at step {step:,} already: raise --total-timesteps to go on")
    if len(rows) > args.buffer_size:
        raise UserError(f"--resume holds {len(rows):,} transitions: raise --buffer-size to hold them")
    try:
        agent.load_state_dict(checkpoint["agent"])
        buffer.rows[: len(rows)] = rows
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            "--resume does not fit this env and script, or an --autotune flag differs from the run's: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    if args.autotune_curv and args.lambda_curv != checkpoint["args"]["lambda_curv"]:
        agent.log_lambda_curv.fill_(math.log(args.lambda_curv))  # a new --lambda-curv is a new start
    buffer.size.fill_(len(rows))
    full = len(rows) == args.buffer_size
    buffer.position = checkpoint["buffer_position"] % len(rows) if full else len(rows)
    torch.set_rng_state(checkpoint["torch_rng"])
    if agent.device.type == "cuda" and checkpoint["cuda_rng"] is not None:
        torch.cuda.set_rng_state(checkpoint["cuda_rng"])
    for generator, state in zip(numpy_generators(env), json.loads(checkpoint["numpy_rngs"]), strict=True):
        generator.state = state
    return step


def make_run_dir(args: Args) -> Path:
    """The folder of the run: the checkpoint's own on --resume, else a new one. UserError if it can't be written."""
    if args.resume:
        if not os.access(Path(args.resume).parent, os.W_OK):
            raise UserError(f"cannot write beside --resume {args.resume}, where the run goes on: copy its folder")
        return Path(args.resume).parent
    env_name, milliseconds = re.sub(r"[^A-Za-z0-9_.-]", "-", args.env_id), time.time_ns() // 1_000_000
    run_dir = Path(args.output_dir) / f"{env_name}__{SCRIPT}__{args.seed}__{milliseconds}"
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make a folder in --output-dir {args.output_dir} ({error}): choose another") from error
    return run_dir


def train(args: Args) -> Path:
    """Train and return the run's folder. Raises UserError; SystemExit(128 + signal) once Ctrl-C or SIGTERM is saved."""
    args = validate(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch all of the still empty buffer
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    env = make_env(args.env_id)
    eval_env = make_env(args.env_id) if args.eval_episodes else env
    env.action_space.seed(args.seed)
    (observation_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    agent = Agent(observation_dim, action_dim, args, device)
    buffer = ReplayBuffer(args.buffer_size, observation_dim, action_dim, device)
    observation, _ = env.reset(seed=args.seed)
    start = 0
    if args.resume:
        start = restore(load_checkpoint(args.resume), agent, buffer, env)
        observation, _ = env.reset()

    def sample_and_update(update_actor: bool) -> dict:
        return agent.update(buffer.sample(args.batch_size), update_actor)

    if args.cudagraphs and buffer.rows.is_cuda:
        sample_and_update = cuda_graphs(sample_and_update)
    run_dir = make_run_dir(args)
    writer = SummaryWriter(run_dir, purge_step=start + 1)  # a resumed run goes on in its own curves
    settings = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
    writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{settings}")

    if args.compile:
        tqdm.write("the first updates wait for torch.compile, a minute or so (--no-compile: no wait, slower updates)")
    stop_signal = 0

    def request_stop(signum, _frame):
        nonlocal stop_signal
        stop_signal = signum
        signal.signal(signum, signal.SIG_DFL)  # a second one stops at once

    handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    terminal = sys.stdout.isatty()
    bar = tqdm(total=args.total_timesteps, initial=start, unit="step", file=sys.stdout, disable=not terminal)
    metrics, evaluation, evaluation_line = {}, {}, ""
    episodic_return, episodic_length, began = 0.0, 0, time.time()
    next_checkpoint = (start // args.checkpoint_interval + 1) * args.checkpoint_interval
    try:
        for step in range(start + 1, args.total_timesteps + 1):
            if step <= args.learning_starts:
                action = env.action_space.sample()
            else:
                action = agent.explore(observation)
                if not np.isfinite(action).all():
                    raise UserError(f"training diverged at step {step:,}, lower --q-lr or the lambdas: a NaN action")
                metrics = sample_and_update(step % args.policy_frequency == 0)  # a GPU works at it during env.step
            next_observation, reward, terminated, truncated, _ = env.step(action)
            reward = float(reward)
            if not all(np.isfinite(value).all() for value in (observation, next_observation, reward)):
                raise UserError(f"{args.env_id} returned a NaN or infinite observation or reward at step {step:,}")
            buffer.add(observation, next_observation, action, reward, terminated)
            observation, over = next_observation, terminated or truncated
            episodic_return += reward
            episodic_length += 1

            if metrics and (device.type == "cpu" or over or step % LOG_INTERVAL == 0):
                values = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
                if not all(map(math.isfinite, values.values())):
                    raise UserError(f"training diverged at step {step:,}, lower --q-lr or the lambdas: {values}")
                if step % LOG_INTERVAL == 0:
                    for tag, value in values.items():
                        writer.add_scalar(tag, value, step)
                    writer.add_scalar("charts/SPS", (step - start) / (time.time() - began), step)
            if args.eval_episodes and (step % args.eval_interval == 0 or step == args.total_timesteps):
                evaluation = evaluate(agent.actor, eval_env, args.eval_episodes)
                for key in ("return_mean", "smoothness_mean", "oscillation"):
                    writer.add_scalar(f"eval/{key.removesuffix('_mean')}", evaluation[key], step)
                evaluation_line = f"eval return {evaluation['return_mean']:.1f}, sm {evaluation['smoothness_mean']:.3f}"
                if not terminal:
                    speed = (step - start) / (time.time() - began)
                    print(f"step {step:,}: {evaluation_line}, {speed:.0f} steps/s", flush=True)
            bar.update()
            if over:
                writer.add_scalar("charts/episodic_return", episodic_return, step)
                writer.add_scalar("charts/episodic_length", episodic_length, step)
                bar.set_postfix_str(f"episode return {episodic_return:.1f} {evaluation_line}", refresh=False)
                if step >= next_checkpoint:
                    save_checkpoint(run_dir, step, agent, buffer, env)
                    next_checkpoint = (step // args.checkpoint_interval + 1) * args.checkpoint_interval
                if step < args.total_timesteps and not stop_signal:  # else --resume does it, from the same random state
                    observation, _ = env.reset()
                episodic_return, episodic_length = 0.0, 0
            if stop_signal:
                break
        save_checkpoint(run_dir, step, agent, buffer, env)
        if step < args.total_timesteps:
            tqdm.write(f"stopped at step {step:,}; go on with --resume {run_dir / 'checkpoint.pt'}")
            raise SystemExit(128 + stop_signal)
        summary = {"algorithm": SCRIPT} | {name: getattr(args, name) for name in ("env_id", *LAMBDAS, "seed")}
        if args.autotune_curv:
            summary["lambda_curv"] = (agent.log_lambda_curv.exp() * agent.gradient_scale).item()  # as found
        summary |= {"steps": step, "steps_per_second": (step - start) / (time.time() - began)} | evaluation
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        tqdm.write(f"done: {run_dir}")
    finally:
        bar.close()
        writer.close()
        env.close()
        eval_env.close()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return run_dir


def parse_args() -> Args:
    """The command line; with --resume, the run's own settings take the place of the defaults."""
    args = tyro.cli(Args, description=__doc__)
    if args.resume:
        try:
            saved = replace(Args(**load_checkpoint(args.resume)["args"]), resume=args.resume)
        except TypeError as error:
            raise UserError(f"--resume {args.resume} is of another version of {SCRIPT}.py ({error})") from error
        args = tyro.cli(Args, description=__doc__, default=saved)
    return args


if __name__ == "__main__":
    try:
        train(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
