# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.13.0",
#     "gymnasium[mujoco]>=1.0.0",
#     "mujoco>=3.2.0",
#     "tyro>=1.0.0",
#     "tensorboard>=2.18.0",
#     "tqdm>=4.66.0",
# ]
# ///
"""SAC + PAVE: smooth policies by shaping the critic (arXiv 2601.22970). The actor's loss stays plain SAC.

Why a policy chatters. The actor is trained towards actions with a high Q(s, a); let a*(s) be the best one. At a maximum
inside the action's limits grad_a Q(s, a*(s)) = 0; differentiating this by s gives the slope of a*:

    da*/ds = -[d2Q/da2]^-1 d2Q/dsda,    so that |da*/ds| <= M / mu

    M    the largest norm of d2Q/dsda over the states: how fast the action gradient grad_a Q turns as the state moves
    mu   the least curvature of Q at its maximum, over all states and directions of a: how sharp the maximum is

So the action jumps where the critic's gradient turns fast or where its maximum is flat. PAVE adds three losses to each
critic, at the replayed states and actions. The first two work for a small M, the third for a large mu:

    MPR   mean (grad_a Q(s + e, a) - grad_a Q(s, a))^2,  e ~ N(0, sigma^2)   mixed-partial regularisation
    VFC   mean (grad_a Q(s', a) - grad_a Q(s, a))^2,  s' the next state      vector-field consistency
    Curv  mean max(0, v^T H v + delta),  H = d2Q/da2,  v in {-1, 1}^d_a      curvature preservation (Hutchinson)

    critic loss = 1/2 TD + lambda_mpr MPR + lambda_vfc VFC + lambda_curv Curv

What each tends to. For small sigma MPR is sigma^2 |d2Q/dsda|_F^2 / d_a: it sees every direction of the state. VFC sees
only the direction in which the agent moves, s' - s. Neither minds a Q that is flat in a, and the maximum of a flat Q is
anywhere: mu is zero, and the action jumps. Curv works against that: it punishes each v^T H v above -delta. Their mean
over probes is the trace of H, the sum of its eigenvalues. With one action dimension that is the curvature itself; with
more, a direction may stay flat while the others are sharp.

Conventions that the lambdas depend on. Means are over the batch and, in MPR and VFC, over the d_a action dimensions,
too. The TD loss is halved, as in SAC's paper. The critic sees actions in [-1, 1].

How to read this file. THE METHOD is the networks, PAVE, the losses and the update. Read it from top to bottom; above it
you need only the names of the settings (Args) and what a minibatch is (Batch). What stands below it keeps a run going,
and the line over each part says what it is for.

    python sac_pave_continuous.py --env-id HalfCheetah-v5
    python sac_pave_continuous.py --lambda-mpr 0 --lambda-vfc 0 --lambda-curv 0    # plain SAC
    python sac_pave_continuous.py --warm-start RUN/checkpoint.pt --total-timesteps 30000    # smooth a trained agent
"""

import contextlib
import copy
import json
import math
import os
import random
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows, where two processes on one run folder are not noticed
    fcntl = None

SCRIPT = Path(__file__).stem

# ======== SETTINGS: every flag and the lambdas of each env. For the method, skim them.


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"  # Gymnasium env with bounded continuous actions; module:Env-v0 imports the module
    seed: int = 1  # of the networks, the noise, the replay and the env
    total_timesteps: int = 1_000_000  # env steps; after --learning-starts, an update each
    learning_starts: int = 10_000  # steps of uniformly random actions before the first update
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    batch_size: int = 256  # transitions in a minibatch
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the target networks towards the critics, each update
    policy_lr: float = 3e-4  # learning rate of the actor
    q_lr: float = 1e-3  # learning rate of the critics (and of alpha)
    policy_frequency: int = 1  # critic updates per update of the actor
    autotune: bool = True  # tune the entropy coefficient alpha towards an entropy of -dim(action)
    alpha: float = 0.2  # fixed entropy coefficient, used with --no-autotune
    lambda_mpr: float | None = None  # weight of MPR; None: the env's own, else 0.1; with --autotune-curv 0.1
    lambda_vfc: float | None = None  # weight of VFC; None: the env's own, else 0.1; with --autotune-curv 0.0005
    lambda_curv: float | None = None  # weight of Curv; None: the env's own, else 0.01; --autotune-curv starts at 0.01
    mpr_sigma: float = 0.01  # standard deviation of MPR's noise, in the observation's own units
    curv_delta: float = 1.0  # margin delta by which Curv wants v^T H v below zero
    pave_batch_size: int | None = None  # rows of the minibatch that the PAVE losses use: unbiased, cheaper; None: all
    autotune_curv: bool = False  # tune lambda_curv; it and delta then scale with the critic's action gradient
    target_concavity: float = 0.95  # share of the samples that --autotune-curv wants to have v^T H v below its margin
    cuda: bool = True  # use a CUDA device if there is one
    torch_deterministic: bool = True  # let torch use deterministic algorithms only
    compile: bool = True  # torch.compile the losses: up to a minute at the start, 5 s from its cache
    cudagraphs: bool = True  # on CUDA, replay each update as one CUDA graph
    output_dir: str = "runs"  # where the run's folder <env>__<script>__<seed>__<time> is made
    eval_interval: int = 10_000  # steps between two evaluations of the deterministic policy
    eval_episodes: int = 10  # episodes in an evaluation; 0: no evaluation
    checkpoint_interval: int = 50_000  # steps after which the next episode end writes checkpoint.pt and actor.pt
    resume: str | None = None  # checkpoint.pt of a run that was stopped: goes on with it, in its folder, as it was
    warm_start: str | None = None  # checkpoint.pt of any run: a new run begins with its agent and replay


# Settings that a resumed run may change, for they say where and how it runs, not what it learns; total_timesteps may
# change, too. (What a warm-started run began from is told by the checkpoint's "origin", not by the path in warm_start.)
FREE_SETTINGS = {"output_dir", "resume", "warm_start", "eval_interval", "eval_episodes", "checkpoint_interval"}
FREE_SETTINGS |= {"cuda", "torch_deterministic", "compile", "cudagraphs"}

# The weights of the three losses, in this order. `validate` looks up those that no flag gives: the tuned ones (the
# paper's for SAC) where the env has some; else those at which the paper's search starts, which tunes lambda_curv, then
# lambda_vfc, then lambda_mpr. With --autotune-curv every env has the same: the first two of the paper's SAC on
# Ant, and a small lambda_curv to start from.
LAMBDAS = ("lambda_mpr", "lambda_vfc", "lambda_curv")
TUNED_LAMBDAS = {
    "LunarLanderContinuous": (0.1, 0.5, 0.05),
    "Pendulum": (0.1, 0.005, 0.5),
    "Reacher": (0.1, 0.0005, 1.0),
    "Ant": (0.1, 0.0005, 1.0),
    "Humanoid": (0.1, 0.0005, 1.0),
    "Hopper": (2.0, 0.0005, 3.0),
    "Walker2d": (2.0, 0.005, 2.0),
    "HalfCheetah": (0.1, 0.1, 0.3),  # ours, see README
}
UNTUNED_LAMBDAS = (0.1, 0.1, 0.01)
AUTOTUNE_LAMBDAS = (0.1, 0.0005, 0.01)
LAMBDA_CURV_BOUNDS = (1e-4, 100.0)  # of what --autotune-curv finds


def env_name(env_id: str) -> str:
    """An --env-id without module, namespace and version: Pendulum of my_module:filter/Pendulum-v1."""
    return re.fullmatch(r"(?:.*[:/])?(.*?)(?:-v\d+)?", env_id)[1]


class UserError(Exception):
    """Something that the user can mend; shown as one line, exit code 2."""


def require(holds: bool, message: str) -> None:
    """UserError(message) unless it holds."""
    if not holds:
        raise UserError(message)


def require_range(args: Args, low: float, high: float, *names: str) -> None:
    """UserError unless each of these settings is None or a finite number from low to high."""
    for name in names:
        value = getattr(args, name)
        fits = value is None or (math.isfinite(value) and low <= value <= high)
        require(fits, f"--{name.replace('_', '-')} is {value}; it must be from {low} to {high}")


def validate(args: Args) -> Args:
    """Return args complete: with the lambdas that are None looked up. UserError on a setting that makes no sense."""
    lambdas = AUTOTUNE_LAMBDAS if args.autotune_curv else TUNED_LAMBDAS.get(env_name(args.env_id), UNTUNED_LAMBDAS)
    for name, value in zip(LAMBDAS, lambdas, strict=True):
        if getattr(args, name) is None:
            args = replace(args, **{name: value})
    if args.warm_start:
        args = replace(args, learning_starts=0)  # the agent acts from the first step on
    else:
        require_range(args, 1, math.inf, "learning_starts")
    require_range(args, 1, math.inf, "total_timesteps", "batch_size", "policy_frequency")
    require_range(args, 1, math.inf, "eval_interval", "checkpoint_interval")
    require_range(args, args.batch_size, math.inf, "buffer_size")
    require_range(args, 1, args.batch_size, "pave_batch_size")
    require_range(args, 0, 2**32 - 1, "seed")
    require_range(args, 0, 1, "gamma", "tau")
    require_range(args, 1e-12, math.inf, "policy_lr", "q_lr", "mpr_sigma", "alpha")
    require_range(args, 0, math.inf, "eval_episodes", "curv_delta", *LAMBDAS)
    require_range(args, 0.001, 0.999, "target_concavity")
    if args.autotune_curv:
        require_range(args, *LAMBDA_CURV_BOUNDS, "lambda_curv")
    return args


# ======== ENVIRONMENT: any env that fits, with actions in [-1, 1]. May be skipped.

OLD_INTERFACE = (
    "{} has the interface of the old Gym: Gymnasium's reset(seed=None, options=None) returns (observation, info), "
    "its step(action) returns (observation, reward, terminated, truncated, info)"
)


class ContinuousEnv(gym.Wrapper):
    """An env as the agent sees it: flat float32 observations, unscaled, and flat actions in [-1, 1].

    The critic must see actions in that unit, for grad_a Q, and with it the lambdas, scale with the action's range.
    A NaN or infinite observation or reward is a UserError: it never reaches the agent.

    A wrapper inside may tell two things about itself by attributes. `sent_action`: the action that the robot really got
    in the last step, in its own units, where the wrapper changes it (a filter): smoothness is measured on it.
    `evaluation_id`: the --env-id of the env to evaluate in, where the training's has another reward (a penalty).
    The lambdas are looked up by the name of the env itself: that of filter/Pendulum-v1 is Pendulum (see env_name).
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.low = np.float64(env.action_space.low).ravel()
        self.high = np.float64(env.action_space.high).ravel()
        self.observation_dim = gym.spaces.flatdim(env.observation_space)
        self.action_space = gym.spaces.Box(-1, 1, self.low.shape)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.observation_dim,))

    def action(self, action: np.ndarray) -> np.ndarray:
        """From flat in [-1, 1] to the env's own units, type and shape."""
        space = self.env.action_space
        action = self.low + (np.float64(action) + 1) / 2 * (self.high - self.low)
        action = np.clip(action, self.low, self.high)  # rounding may have passed a limit
        return action.astype(space.dtype).reshape(space.shape)

    def finite(self, values, size: int) -> np.ndarray:
        """The values as a new float32 array: some envs change one array in place."""
        values = np.array(values, np.float32)
        fits = values.size == size and np.isfinite(values).all()
        require(fits, f"the env returned a NaN or infinite observation or reward, or not {size} in number")
        return values

    def observe(self, observation) -> np.ndarray:
        return self.finite(gym.spaces.flatten(self.env.observation_space, observation), self.observation_dim)

    def reset(self, *, seed=None, options=None):
        try:
            result = self.env.reset(seed=seed, options=options)
        except TypeError as error:
            require("reset() got an unexpected keyword" not in str(error), OLD_INTERFACE.format(self.env.spec.id))
            raise
        require(isinstance(result, tuple) and len(result) == 2, OLD_INTERFACE.format(self.env.spec.id))
        observation, info = result
        return self.observe(observation), info

    def step(self, action: np.ndarray):
        env_action = self.action(action)
        try:
            observation, reward, terminated, truncated, info = self.env.step(env_action)
        except ValueError as error:
            require("expected 5, got 4" not in str(error), OLD_INTERFACE.format(self.env.spec.id))
            raise
        changed = self.env.has_wrapper_attr("sent_action")
        self.sent_action = self.env.get_wrapper_attr("sent_action") if changed else env_action
        return self.observe(observation), self.finite(reward, 1).item(), bool(terminated), bool(truncated), info


def make_env(env_id: str) -> ContinuousEnv:
    """The env, wrapped; UserError where a policy of this script can't act in it."""
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        raise UserError(f"cannot make --env-id {env_id}: {' '.join(str(error).split())}") from error
    except TypeError as error:
        require("must inherit from" not in str(error), OLD_INTERFACE.format(env_id))
        raise
    actions, observations = env.action_space, env.observation_space
    usable = isinstance(actions, gym.spaces.Box) and actions.dtype.kind == "f" and actions.is_bounded()
    require(usable, f"{env_id} has the action space {actions}; this script needs a float Box with finite bounds")
    usable = observations.is_np_flattenable and not re.search(r"\d+, \d+, \d+\), uint8", str(observations))
    require(usable, f"{env_id} observes {observations}; these networks need a vector: no images, no varying length")
    wrapper = env
    while isinstance(wrapper, gym.Wrapper):
        running = hasattr(wrapper, "obs_rms")  # NormalizeObservation and its kind
        cure = "scale by fixed constants, gymnasium.wrappers.TransformObservation, which the robot can have, too"
        require(not running, f"{env_id} scales observations by running statistics, which actor.pt lacks: {cure}")
        if hasattr(wrapper, "return_rms"):  # NormalizeReward
            gym.logger.warn(f"{env_id} scales rewards by running statistics: evaluations have others than the training")
        wrapper = wrapper.env
    if not env.spec.max_episode_steps:
        gym.logger.warn(f"{env_id} has no time limit, episodes end at 10,000 steps: register it with max_episode_steps")
        env = gym.wrappers.TimeLimit(env, 10_000)
    return ContinuousEnv(env)


def make_evaluation_env(env_id: str, env: ContinuousEnv) -> ContinuousEnv:
    """A second env for evaluations: the training's, or the one that it names (see ContinuousEnv)."""
    return make_env(env.get_wrapper_attr("evaluation_id") if env.has_wrapper_attr("evaluation_id") else env_id)


# ======== REPLAY: what a minibatch is. For the method, read Batch alone.


class Batch(NamedTuple):
    """A minibatch of B transitions, each drawn independently: the first rows are as fair a sample as all of them."""

    observations: torch.Tensor  # s (B, d_s), raw
    next_observations: torch.Tensor  # s' (B, d_s): never the next episode's start
    actions: torch.Tensor  # a (B, d_a), in [-1, 1]
    rewards: torch.Tensor  # r (B,)
    terminations: torch.Tensor  # (B,): 1 where the episode truly ended, 0 also where a time limit cut it


class ReplayBuffer:
    """A ring of transitions on the device, one row each, so that adding is one copy and sampling one gather."""

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, device: torch.device):
        self.widths = (observation_dim, observation_dim, action_dim, 1, 1)
        size = 4 * capacity * sum(self.widths)
        memory = math.inf
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[0]
        elif hasattr(os, "sysconf"):  # not on Windows; Linux grants more than it has, and kills the run later
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        require(size < memory, f"no memory for a replay buffer of {size / 1e9:,.1f} GB: lower --buffer-size")
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.position = 0  # of the next row to write
        self.size = 0

    def add(self, observation, next_observation, action, reward: float, terminated: bool) -> None:
        """Store s, s', a in [-1, 1], r. `terminated`: the episode truly ended; False where a time limit cut it."""
        row = np.concatenate([observation, next_observation, action, [reward, terminated]], dtype=np.float32)
        self.rows[self.position].copy_(torch.from_numpy(row), non_blocking=True)  # no wait for a GPU's update
        self.position = (self.position + 1) % len(self.rows)
        self.size = min(self.size + 1, len(self.rows))

    def sample(self, batch_size: int) -> Batch:
        rows = self.rows[torch.randint(self.size, (batch_size,), device=self.rows.device)]
        observations, next_observations, actions, rewards, terminations = rows.split(self.widths, dim=1)
        return Batch(observations, next_observations, actions, rewards.squeeze(1), terminations.squeeze(1))


# ======== THE METHOD, 1 of 3: the networks. Read from here to the end of Agent.


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of SiLU: Curv needs a second derivative, and ReLU's is zero. The actor uses it, too."""
    return nn.Sequential(nn.Linear(inputs, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, outputs))


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
        mean, _ = self.net(observations).chunk(2, dim=-1)
        return torch.tanh(mean)

    def sample(self, observations, noise):
        """Action a = tanh(u), u = mean + std noise, noise ~ N(0, I) (B, d_a); and its log-probability (B,).

        Change of variables: log pi(a) = sum over dimensions of log N(u; mean, std^2) - log da/du, and da/du is
        1 - tanh(u)^2.
        """
        mean, log_std = self.net(observations).chunk(2, dim=-1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise
        log_gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # 1 - tanh(u)^2 = 4 e^-2u / (1 + e^-2u)^2; in this form its logarithm is finite also where tanh(u) rounds to 1
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), (log_gaussian - log_slope).sum(-1)


# ======== THE METHOD, 2 of 3: the three losses of PAVE.
# -------------------------------------------------------------------- PAVE: paste from here to the next dashed line

from collections import namedtuple  # noqa: E402  here, so that the block needs only `import torch` above it

PaveLosses = namedtuple("PaveLosses", "mpr vfc curvature vhv gradient q_values")  # see pave_losses


def action_gradient(q, observations, actions):
    """The Q-gradient field: grad_a Q(s, a) (B, d_a), and Q(s, a) (B,). ValueError if `q` returns another shape.

    torch.func.grad(f) is the function that returns the derivative of f by its first argument, here the actions. The
    parameters of `q` are not touched by that: autograd still records how the result depends on them, so that a loss of
    it can be backpropagated. With has_aux=True f may return a second value, which is handed through.
    """

    def total(a):
        q_values = q(observations, a)
        if q_values.shape != a.shape[:1]:
            raise ValueError(f"q must be one critic and return ({len(a)},), not {tuple(q_values.shape)}: squeeze(-1)?")
        # grad needs a single number. Row i of Q depends on row i of the actions alone, so the derivative of the sum by
        # row i is row i's own gradient.
        return q_values.sum(), q_values

    return torch.func.grad(total, has_aux=True)(actions)


def hutchinson_trace(q, observations, actions, probe):
    """Hutchinson's estimate of tr(d2Q/da2): v^T H v (B,), H = d2Q/da2, one probe v (B, d_a) a sample.

    H itself is never formed: H v = grad_a (grad_a Q . v), the gradient of a number. The mean of v^T H v over Rademacher
    probes is the trace of H. From the same pass: grad_a Q (B, d_a) and Q (B,). All are differentiable in the parameters
    of `q`, eager or compiled.
    """

    def along_probe(a):
        gradient, q_values = action_gradient(q, observations, a)
        # The first value is what is differentiated, grad_a Q . v, summed over independent rows; the pair is handed on.
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
        loss = td_weight * F.mse_loss(pave.q_values, target)  # target (B,); td_weight 1 in TD3, 1/2 in SAC
        loss += lambda_mpr * pave.mpr + lambda_vfc * pave.vfc + lambda_curv * pave.curvature

    q: one critic, any callable (B, d_s), (B, d_a) -> (B,)
    observations, next_observations: s, s' (B, d_s)
    actions: a (B, d_a), in [-1, 1] if the paper's lambdas are used
    state_noise: e (B, d_s) ~ N(0, sigma^2 I); probe: v (B, d_a), see rademacher_like; delta: in units of Q
    Returns the scalars mpr, vfc, curvature; vhv (B,), v^T H v for one probe; gradient (B, d_a), grad_a Q(s, a);
    q_values (B,), Q(s, a), so that the TD loss needs no second pass. Through each, gradients flow to the parameters of
    `q`. The means in MPR and VFC are over the action dimensions, too: a squared norm needs lambdas d_a times smaller.

    With a critic of your own, these mistakes are silent:
    - It must be smooth: SiLU, not ReLU, which has no curvature.
    - Its rows must be independent and repeatable: no batch norm, no dropout.
    - Normalise layers by nn.GroupNorm(1, H), not by nn.LayerNorm(H), which is the same function: Curv's gradient is a
      third derivative, and torch's own of LayerNorm is wrong (pytorch#175754).
    - Use float32 throughout, no TF32, no bf16: MPR subtracts nearly equal gradients.
    Under autocast it is a ValueError. To be faster, compile the function that calls pave_losses, not `q`.
    """
    if torch.is_autocast_enabled(actions.device.type):
        raise ValueError("PAVE needs float32: call pave_losses under torch.autocast(device_type, enabled=False)")
    vhv, gradient, q_values = hutchinson_trace(q, observations, actions, probe)
    # The same a at each of the three states, for only the state may make the gradients differ.
    states = torch.cat([observations + state_noise, next_observations])  # (2 B, d_s), so that one pass does both
    gradients, _ = action_gradient(q, states, torch.cat([actions, actions]))
    noisy_gradient, next_gradient = gradients.chunk(2)
    mpr = (noisy_gradient - gradient).square().mean()
    vfc = (next_gradient - gradient).square().mean()
    curvature = torch.relu(vhv + delta).mean()
    return PaveLosses(mpr, vfc, curvature, vhv, gradient, q_values)


# ------------------------------------------------------------------------------------------- PAVE: the block ends here
# ======== THE METHOD, 3 of 3: SAC's losses with PAVE, the update.


def add_gradients(loss_function, parameters: list, *arguments) -> dict:
    """(loss, metrics) = loss_function(*arguments): add d loss / d parameters to their .grad, and return the metrics.

    No other tensor gets a gradient: the actor's loss leaves nothing in the critics, through which it passes.
    """
    loss, metrics = loss_function(*arguments)
    loss.backward(inputs=parameters)
    return {name: value.detach() for name, value in metrics.items()}


class Agent(nn.Module):
    """SAC: the networks, their losses and `update`. After the first, random steps, an env step of the training is:

        action = agent.explore(observation)
        agent.update(buffer.sample(batch_size), update_actor)  # the actor, too: at each policy_frequency-th step
        next_observation, reward, terminated, truncated, _ = env.step(action)
        buffer.add(observation, next_observation, action, reward, terminated)
        observation = next_observation  # or that of env.reset(), if the episode is over

    The losses return what is to be minimised, and a dict of numbers to log.
    """

    def __init__(self, observation_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args = args = validate(args)  # looks up the lambdas that are None
        self.device, self.action_dim = device, action_dim
        self.actor = Actor(observation_dim, action_dim)
        self.critics = nn.ModuleList([QNetwork(observation_dim, action_dim), QNetwork(observation_dim, action_dim)])
        self.critic_targets = copy.deepcopy(self.critics).requires_grad_(False)

        # PAVE uses the first rows of a minibatch, by default all of them; plain SAC uses none.
        use_pave = args.autotune_curv or args.lambda_mpr > 0 or args.lambda_vfc > 0 or args.lambda_curv > 0
        self.pave_rows = (args.pave_batch_size or args.batch_size) if use_pave else 0
        # PAVE's numbers are tensors, so that a recorded CUDA graph reads them anew each time. The settings hold them,
        # not the checkpoint; except for a lambda_curv that is learnt (--autotune-curv, optional, see CurvAutotuner).
        self.register_buffer("lambda_mpr", torch.tensor(args.lambda_mpr), persistent=False)
        self.register_buffer("lambda_vfc", torch.tensor(args.lambda_vfc), persistent=False)
        self.register_buffer("lambda_curv", torch.tensor(args.lambda_curv), persistent=args.autotune_curv)
        self.register_buffer("mpr_sigma", torch.tensor(args.mpr_sigma), persistent=False)
        self.register_buffer("curv_delta", torch.tensor(args.curv_delta), persistent=False)
        if args.autotune_curv:
            self.curv_autotuner = CurvAutotuner(args.target_concavity, action_dim)
            self.register_buffer("gradient_scale", torch.zeros(()))
        self.to(device)

        self.critic_parameters = list(self.critics.parameters())
        self.actor_parameters = list(self.actor.parameters())
        adam = {"fused": True, "capturable": True}  # one kernel a step, which a CUDA graph can hold
        self.q_optimizer = torch.optim.Adam(self.critic_parameters, lr=args.q_lr, **adam)
        self.actor_optimizer = torch.optim.Adam(self.actor_parameters, lr=args.policy_lr, **adam)
        if args.autotune:  # alpha is learnt by the actor's optimizer, with a learning rate of its own
            self.log_alpha = nn.Parameter(torch.zeros((), device=device))
            self.actor_parameters.append(self.log_alpha)
            self.actor_optimizer.add_param_group({"params": [self.log_alpha], "lr": args.q_lr})
        else:
            self.register_buffer("log_alpha", torch.tensor(args.alpha, device=device).log(), persistent=False)
        self.optimizers = {"critics": self.q_optimizer, "actor": self.actor_optimizer}
        self.add_gradients = CompiledOrEager(add_gradients) if args.compile else add_gradients  # the same, only faster

    @torch.no_grad()
    def explore(self, observation: np.ndarray) -> np.ndarray:
        """An action (d_a,) in [-1, 1] drawn from the policy."""
        observations = torch.as_tensor(observation, dtype=torch.float32).to(self.device, non_blocking=True)[None]
        actions, _ = self.actor.sample(observations, torch.randn(1, self.action_dim, device=self.device))
        return actions[0].cpu().numpy()

    def update(self, batch: Batch, update_actor: bool) -> dict:
        """One update from a minibatch; returns what to log, still on the device."""
        batch = Batch(*batch)  # a plain tuple will do
        n = self.pave_rows
        # Noise is drawn here, not in the losses, so that compiled and eager updates draw the same.
        target_noise = torch.randn_like(batch.actions)
        state_noise = self.mpr_sigma * torch.randn_like(batch.observations[:n])
        probe = rademacher_like(batch.actions[:n])
        metrics = self.add_gradients(self.critic_loss, self.critic_parameters, batch, target_noise, state_noise, probe)
        self.q_optimizer.step()
        self.q_optimizer.zero_grad()  # here, not before the loss, so that all gradients are None while it is compiled
        if self.args.autotune_curv:
            self.curv_autotuner.step(self.lambda_curv, self.gradient_scale, metrics)
        with torch.no_grad():  # Polyak averaging: target += tau (critic - target)
            torch._foreach_lerp_(list(self.critic_targets.parameters()), self.critic_parameters, self.args.tau)
        if update_actor:
            actor_noise = torch.randn_like(batch.actions)
            metrics |= self.add_gradients(self.actor_loss, self.actor_parameters, batch, actor_noise)
            self.actor_optimizer.step()  # of alpha, too, with --autotune
            self.actor_optimizer.zero_grad()
        return metrics

    def critic_loss(self, batch: Batch, target_noise, state_noise, probe):
        """The sum of both critics' losses; and what to log, the mean of the two."""
        target = self.td_target(batch, target_noise)
        first, second = self.critics
        first_loss, first_metrics = self.one_critic_loss(first, batch, target, state_noise, probe)
        second_loss, second_metrics = self.one_critic_loss(second, batch, target, state_noise, probe)
        metrics = {name: (first_metrics[name] + second_metrics[name]) / 2 for name in first_metrics}
        return first_loss + second_loss, metrics

    @torch.no_grad()
    def td_target(self, batch: Batch, noise):
        """r + gamma (min Q'(s', a') - alpha log pi(a'|s')), a' ~ pi(s'); only a termination cuts the future. (B,)"""
        next_actions, next_log_prob = self.actor.sample(batch.next_observations, noise)
        first, second = self.critic_targets
        first_q = first(batch.next_observations, next_actions)
        second_q = second(batch.next_observations, next_actions)
        next_value = torch.minimum(first_q, second_q) - self.log_alpha.exp() * next_log_prob
        return batch.rewards + (1 - batch.terminations) * self.args.gamma * next_value

    def one_critic_loss(self, critic: QNetwork, batch: Batch, target, state_noise, probe):
        """1/2 TD + lambda_mpr MPR + lambda_vfc VFC + lambda_curv Curv of one critic; and what to log."""
        if self.pave_rows > 0:
            q_values, pave_loss, metrics = self.pave_terms(critic, batch, state_noise, probe)
        else:
            q_values, pave_loss, metrics = critic(batch.observations, batch.actions), 0.0, {}
        td_loss = F.mse_loss(q_values, target)
        metrics["losses/qf_loss"] = td_loss
        metrics["losses/q_values"] = q_values.mean()
        return 0.5 * td_loss + pave_loss, metrics  # SAC's paper halves TD, TD3's does not

    def pave_terms(self, critic: QNetwork, batch: Batch, state_noise, probe):
        """Q(s, a) (B,) of the whole minibatch; the three weighted PAVE losses of its first n rows; and what to log."""
        observations, next_observations, actions, _, _ = batch
        n = self.pave_rows  # by default n = B: [:n] is the whole minibatch, and [n:] is empty
        weight, margin = self.lambda_curv, self.curv_delta
        if self.args.autotune_curv:  # in units of the action gradient
            weight, margin = self.curv_autotuner.scaled(weight, margin, self.gradient_scale)
        other_q_values = critic(observations[n:], actions[n:])  # none by default; else TD needs them
        pave = pave_losses(critic, observations[:n], actions[:n], next_observations[:n], state_noise, probe, margin)
        loss = self.lambda_mpr * pave.mpr + self.lambda_vfc * pave.vfc + weight * pave.curvature
        return torch.cat([pave.q_values, other_q_values]), loss, pave_metrics(pave, weight, margin)

    def actor_loss(self, batch: Batch, noise):
        """Plain SAC: mean of alpha log pi(a|s) - min Q(s, a), a ~ pi(s), plus the loss of alpha; and what to log."""
        actions, log_prob = self.actor.sample(batch.observations, noise)
        first, second = self.critics
        q_values = torch.minimum(first(batch.observations, actions), second(batch.observations, actions))
        alpha, entropy = self.log_alpha.exp().detach(), -log_prob.detach().mean()
        loss = (alpha * log_prob - q_values).mean()
        # Minimised, this raises alpha while the entropy is below its target of -d_a, and lowers it while it is above.
        # With --no-autotune log_alpha is no parameter, and this only adds a constant.
        alpha_loss = self.log_alpha * (entropy + self.action_dim)
        return loss + alpha_loss, {"losses/actor_loss": loss, "losses/entropy": entropy, "losses/alpha": alpha}


def pave_metrics(pave: PaveLosses, weight, margin) -> dict:
    """What to log of one critic's PAVE losses; weight, margin: of Curv."""
    return {
        "losses/mpr": pave.mpr,
        "losses/vfc": pave.vfc,
        "losses/curvature": pave.curvature,
        "losses/lambda_curv": weight,
        "geometry/vhv": pave.vhv.mean(),
        "geometry/negative_fraction": (pave.vhv < 0).float().mean(),
        "geometry/margin_fraction": (pave.vhv < -margin).float().mean(),
        "geometry/action_gradient": pave.gradient.square().mean().sqrt(),
    }


# ======== --autotune-curv: finds lambda_curv. Ours, not the paper's, off by default: may be skipped.


class CurvAutotuner:
    """Finds lambda_curv, whatever the scale of the rewards.

    What it aims at: that Curv's condition, v^T H v < -margin, holds for a share of the samples, target_concavity.
    lambda_curv rises while it holds for fewer, and falls while it holds for more (dual ascent, as SAC tunes alpha).

    Units. Multiply the rewards by c: Q, v^T H v and grad_a Q grow c-fold, TD, MPR and VFC c^2-fold, Curv some c-fold.
    So both the weight of Curv and its margin are taken in units of the gradient: g, a running mean of the RMS of
    grad_a Q over samples and action dimensions (`gradient_scale`; 0 at the start, so that Curv fades in).

        weight = lambda_curv g        margin = delta g d_a / 2

    Why d_a / 2. Let Q be a paraboloid with its maximum at a* and the same curvature mu in every action dimension,
    Q = -mu/2 |a - a*|^2.
        1. H = -mu I, and v_i^2 = 1, so that v^T H v = -mu d_a for every probe.
        2. grad_a Q = -mu (a - a*), so that g = mu r, where r is the RMS of the distances a_i - a*_i.
        3. v^T H v < -margin  says  mu d_a > delta mu r d_a / 2,  which is  r < 2 / delta.
    Actions and a maximum inside [-1, 1] are at most 2 apart. So with delta = 1 every such paraboloid meets the
    condition, whatever its mu: Q has no absolute scale, and so no absolute curvature. What fails it is a Q whose
    gradient is too large for its curvature: a slope that goes on beyond the action's limits, without a maximum inside.
    (g is one number for all states; where mu differs from state to state, the flattest fail it first.)
    """

    RATE = 0.006  # in an update, log lambda_curv moves by this times the share that is missing
    AVERAGING = 0.005  # in an update, g moves by this share towards the newest RMS: a mean over some 200 updates

    def __init__(self, target_concavity: float, action_dim: int):
        self.target_concavity, self.action_dim = target_concavity, action_dim

    def scaled(self, lambda_curv, delta, gradient_scale):
        """The weight and the margin of Curv, as above."""
        weight = lambda_curv * gradient_scale
        margin = self.action_dim / 2 * delta * gradient_scale
        return weight, margin

    def step(self, lambda_curv, gradient_scale, metrics: dict) -> None:
        """Move the agent's two tensors, in place, by what the critics' last loss measured."""
        shortfall = self.target_concavity - metrics["geometry/margin_fraction"]
        lambda_curv.mul_((self.RATE * shortfall).exp()).clamp_(*LAMBDA_CURV_BOUNDS)
        gradient_scale.lerp_(metrics["geometry/action_gradient"], self.AVERAGING)


# ======== THE MACHINERY, from here to the end: not needed for the method. First, evaluation.

EVALUATION_SEED = 10_000  # of an evaluation's first episode; training's seeds are above 2^20


def smoothness(actions, fs=1.0):
    """sm of one episode (CAPS, Mysore et al. 2021), lower is smoother: the mean over action dimensions of
    2 / (T fs) * sum_k f_k |FFT(actions)_k|, k < T // 2. actions: (T,) or (T, d_a), in env units; fs: sampling rate."""
    steps = len(actions)
    spectrum = np.abs(np.fft.rfft(np.reshape(actions, (steps, -1)), axis=0))[: steps // 2]
    frequencies = np.fft.rfftfreq(steps, 1 / fs)[: steps // 2]
    return float((2 / (steps * fs) * frequencies @ spectrum).mean())


def seed_episode(env: gym.Env, seed: int) -> np.ndarray:
    """Reset the env to the start that belongs to a seed, also if it draws from Python's or numpy's global generator."""
    random.seed(seed)
    np.random.seed(seed)
    observation, _ = env.reset(seed=seed)
    return observation


@contextlib.contextmanager
def separate_random_streams():
    """What is drawn inside from the global generators of Python, numpy and torch (on the CPU) is not drawn outside."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@torch.no_grad()
@separate_random_streams()
def evaluate(actor: Actor, env: gym.Env, episodes: int) -> dict[str, float]:
    """Episodes of the deterministic policy, always from the same starts: means of return, sm, oscillation and length.

    oscillation: mean |a_t+1 - a_t| over steps and action dimensions. It and sm are in the env's action units, of the
    actions that the robot really got.
    """
    device = next(actor.parameters()).device
    returns, smoothnesses, oscillations, lengths = [], [], [], []
    for episode in range(episodes):
        observation = seed_episode(env, EVALUATION_SEED + episode)
        rewards, sent_actions, over = [], [], False
        while not over:
            action = actor(torch.as_tensor(observation, device=device)[None])[0].cpu().numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            rewards.append(reward)
            sent_actions.append(np.ravel(env.get_wrapper_attr("sent_action")))
        returns.append(sum(rewards))
        smoothnesses.append(smoothness(np.array(sent_actions)))
        oscillations.append(np.abs(np.diff(sent_actions, axis=0)).mean() if len(rewards) > 1 else 0.0)
        lengths.append(len(rewards))
    return {
        "return_mean": float(np.mean(returns)),
        "smoothness_mean": float(np.mean(smoothnesses)),
        "oscillation": float(np.mean(oscillations)),
        "length_mean": float(np.mean(lengths)),
        "return_std": float(np.std(returns)),
        "smoothness_std": float(np.std(smoothnesses)),
    }


# ======== SPEED: the update compiled, and on CUDA recorded as a graph: the same up to rounding.


class CompiledOrEager:
    """The function `add_gradients`, compiled by torch in one piece; where that fails, a warning, then eager code.

    It can fail at once (a torch without the private switch below), at the first call (no C++ compiler) or later (a
    Ctrl-C that also reaches the compiler).
    """

    def __init__(self, function):
        self.function = function
        self.compiled = None
        try:
            torch._dynamo.config.trace_autograd_ops = True  # lets loss.backward() be compiled together with the loss
            self.compiled = torch.compile(function, fullgraph=True)
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        tqdm.write(f"warning: going on without torch.compile, it fails here ({error!r:.200})", sys.stderr)
        self.compiled = None

    def __call__(self, loss_function, parameters: list, *inputs) -> dict:
        if self.compiled:
            try:
                return self.compiled(loss_function, parameters, *inputs)
            except Exception as error:
                self.give_up(error)
                for parameter in parameters:
                    parameter.grad = None  # the call that failed may have left a part of it
        return self.function(loss_function, parameters, *inputs)


class CudaGraphUpdate:
    """`Agent.update` as CUDA graphs, one for each value of update_actor: a replay is one launch instead of hundreds.

    The first call makes a real update, which compiles and allocates, and then records another; later calls replay that.
    Python's numbers (learning rates, gamma, tau) stay as recorded; tensors (the lambdas, sigma, delta) and noise move
    on. The metrics that a replay returns are overwritten by the next.
    """

    def __init__(self, update):
        self.update = update
        self.recorded = {}

    def __call__(self, batch: Batch, update_actor: bool) -> dict:
        if update_actor not in self.recorded:
            inputs = Batch(*[tensor.clone() for tensor in batch])
            metrics = self.update(inputs, update_actor)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, computes nothing
                recorded_metrics = self.update(inputs, update_actor)
            self.recorded[update_actor] = graph, inputs, recorded_metrics
            return metrics
        graph, inputs, metrics = self.recorded[update_actor]
        torch._foreach_copy_(list(inputs), list(batch))
        graph.replay()
        return metrics


def set_up_torch(args: Args) -> torch.device:
    """Choose the device and make its results repeatable."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.autograd.set_multithreading_enabled(False)  # else a GPU's gradients are summed in an order that varies
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch all of the still empty buffer
    torch.manual_seed(args.seed)
    return device


# ======== CHECKPOINTS: what a run saves, and how another or the same goes on.

DIVERGED = "training diverged, lower --q-lr or the lambdas; the last checkpoint is untouched"


def save_checkpoint(run_dir: Path, step: int, agent: Agent, buffer: ReplayBuffer, env: gym.Env, origin=None) -> None:
    """Write actor.pt (for a robot) and checkpoint.pt: networks, targets, optimizers, replay, and torch's generators,
    which also seed the episodes: all that a run needs to go on bit-identically from an episode's end.

    origin: where a warm-started run began (see origin_of), None for a run from scratch. UserError, and the old files
    stay, where a weight is not finite or the disk is full.
    """
    optimizers = {name: optimizer.state_dict()["state"] for name, optimizer in agent.optimizers.items()}
    tensors = list(agent.parameters())
    for states in optimizers.values():
        for state in states.values():
            tensors += state.values()
    require(all(t.isfinite().all() for t in tensors), f"step {step:,}: {DIVERGED} (NaN weight)")
    about = {"script": SCRIPT, "args": asdict(agent.args), "step": step, "origin": origin}
    ones = np.ones(env.action_space.shape)
    actor = {
        "actor": agent.actor.state_dict(),
        "action_low": torch.as_tensor(env.action(-ones)).flatten(),
        "action_high": torch.as_tensor(env.action(ones)).flatten(),
    }
    checkpoint = {
        "agent": agent.state_dict(),
        "optimizers": optimizers,
        "buffer_rows": buffer.rows[: buffer.size].to("cpu", copy=True),  # a view would save the whole ring
        "buffer_position": buffer.position,
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if buffer.rows.is_cuda else [],
    }
    for name, content in {"actor.pt": about | actor, "checkpoint.pt": about | checkpoint}.items():
        partial = run_dir / f"{name}.partial"
        try:
            torch.save(content, partial)
            partial.replace(run_dir / name)  # the old file stays whole until the new one is
        except (OSError, RuntimeError) as error:  # a full disk is either
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write {run_dir / name}, what was there is untouched: {error}") from error


def load_checkpoint(path: str, settings=Args) -> dict:
    """Read a checkpoint.pt of this script; weights_only, so it can't execute code. UserError for any other file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        require(checkpoint["script"] == SCRIPT and "buffer_rows" in checkpoint, "another script's, or no checkpoint")
        return {"origin": None} | checkpoint | {"args": settings(**checkpoint["args"])}
    except Exception as error:
        raise UserError(f"cannot go on from {path} ({error!r:.200}): give a checkpoint.pt of {SCRIPT}.py") from error


def origin_of(checkpoint: dict, path: str) -> dict:
    """What a warm-started run tells of its source: the run, its step, its settings, and where that one began."""
    source = {"run": Path(path).resolve().parent.name, "step": checkpoint["step"]}
    return source | {"args": asdict(checkpoint["args"]), "origin": checkpoint["origin"]}


def check_resume(args: Args, checkpoint: dict) -> None:
    """UserError where --resume would make another training of a run, or write to one that is finished."""
    new_run = f"--warm-start {args.resume} begins a new run from it"
    saved, step = checkpoint["args"], checkpoint["step"]
    finished = (Path(args.resume).parent / "summary.json").exists()
    require(not finished, f"--resume: the run is finished, at step {step:,}, and stays as it is; {new_run}")
    for name, value in asdict(saved).items():
        same = name in FREE_SETTINGS or name == "total_timesteps" or getattr(args, name) == value
        flag = f"--{name.replace('_', '-')}"
        require(same, f"--resume goes on with the same training, whose {flag} is {value}; {new_run}, with your {flag}")
    enough = step <= args.total_timesteps
    require(enough, f"--resume: the run is at step {step:,} already, --total-timesteps is {args.total_timesteps:,}")


def restore(checkpoint: dict, agent: Agent, buffer: ReplayBuffer) -> None:
    """Put networks, targets, optimizers and replay back in place; UserError if they don't fit."""
    rows, own = checkpoint["buffer_rows"], agent.state_dict()
    require(len(rows) <= len(buffer.rows), f"the checkpoint holds {len(rows):,} transitions: raise --buffer-size")
    weights = dict(checkpoint["agent"])
    for name in ("lambda_curv", "gradient_scale"):  # of --autotune-curv, which a warm start may switch on or off
        if name in own:
            weights.setdefault(name, own[name])
        else:
            weights.pop(name, None)
    saved_shapes = {name: tensor.shape for name, tensor in weights.items()}
    shapes = {name: tensor.shape for name, tensor in own.items()}
    fits = saved_shapes == shapes and rows.shape[1] == buffer.rows.shape[1]
    require(fits, "the checkpoint does not fit: its env has other sizes, or its --autotune differs")
    agent.load_state_dict(weights)
    for name, optimizer in agent.optimizers.items():  # its moments, not its learning rate
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizers"][name]})
    position = checkpoint["buffer_position"]  # where the next row goes: in a full ring, on the oldest one
    if len(rows) == len(buffer.rows):  # the same ring: nothing moves, so that the same draws give the same rows
        buffer.position = position % len(rows)
    else:  # a larger one: the oldest row comes first, so that it is overwritten first
        rows = rows.roll(-position, 0)
        buffer.position = len(rows)
    buffer.rows[: len(rows)] = rows
    buffer.size = len(rows)


def restore_random_streams(checkpoint: dict) -> None:
    torch.set_rng_state(checkpoint["torch_rng"])
    torch.cuda.set_rng_state_all(checkpoint["cuda_rng"][: torch.cuda.device_count()])


# ======== TRAINING: the loop and what surrounds it.

LOG_INTERVAL = 200  # steps between two readings of the losses: on a GPU each reading waits for the update


def open_run_folder(args: Args):
    """Make or open the run's folder and keep other processes out of it; returns it and the lock, to be closed."""
    if args.resume:
        run_dir = Path(args.resume).parent
    else:
        env = re.sub(r"[^A-Za-z0-9_.-]", "-", args.env_id)
        run_dir = Path(args.output_dir) / f"{env}__{SCRIPT}__{args.seed}__{time.time_ns() // 1_000_000}"
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        lock = open(run_dir / ".lock", "w")  # noqa: SIM115  held until the run ends, also if it is killed
    except OSError as error:
        raise UserError(f"cannot write to {run_dir} ({error}): choose another --output-dir or copy the run") from error
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UserError(f"another process is training {run_dir}: stop it first, or --warm-start a new run") from error
    return run_dir, lock


class StopSignals:
    """Ctrl-C and SIGTERM are noted, for the loop to stop after its step; a second one of a kind stops at once."""

    def __enter__(self):
        self.received = []
        self.handlers = {signum: signal.signal(signum, self.note) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self.received

    def note(self, signum, _frame) -> None:
        self.received.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    def __exit__(self, *_exception) -> None:
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def saving_if_it_fails(save):
    """Where the env raises (a simulator became unstable, say), save() first; its error then goes on to its author."""
    try:
        yield
    except Exception:
        save()
        raise


def read_metrics(metrics: dict, step: int) -> dict[str, float]:
    """The update's metrics as numbers, in one transfer; UserError where one is not finite."""
    values = torch.stack(list(metrics.values())).tolist()
    scalars = dict(zip(metrics, values, strict=True))
    require(all(map(math.isfinite, values)), f"step {step:,}: {DIVERGED} ({scalars})")
    return scalars


def train(args: Args, make_agent=Agent) -> Path:
    """Train and return the run's folder. Raises UserError; SystemExit(128 + signal) once Ctrl-C or SIGTERM is saved."""
    lambda_curv_given = args.lambda_curv is not None
    args = validate(args)
    checkpoint = None
    if args.resume or args.warm_start:
        checkpoint = load_checkpoint(args.resume or args.warm_start, type(args))
    if args.resume:
        check_resume(args, checkpoint)
    device = set_up_torch(args)
    env = make_env(args.env_id)
    eval_env = make_evaluation_env(args.env_id, env) if args.eval_episodes else None
    (observation_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    agent = make_agent(observation_dim, action_dim, args, device)
    buffer = ReplayBuffer(args.buffer_size, observation_dim, action_dim, device)

    start, origin = 0, None
    if args.resume:
        restore(checkpoint, agent, buffer)
        restore_random_streams(checkpoint)
        start, origin = checkpoint["step"], checkpoint["origin"]
    elif args.warm_start:
        restore(checkpoint, agent, buffer)
        origin = origin_of(checkpoint, args.warm_start)
        if args.autotune_curv and lambda_curv_given:
            agent.lambda_curv.fill_(args.lambda_curv)  # a new start; else it goes on from the source's, if that has one
        weights = ", ".join(f"{name} {getattr(args, name):g}" for name in LAMBDAS)
        tqdm.write(f"a new run from step {origin['step']:,} of {origin['run']}, with {weights}")
    elif args.learning_starts >= args.total_timesteps:
        numbers = f"--learning-starts {args.learning_starts:,} is not below --total-timesteps {args.total_timesteps:,}"
        tqdm.write(f"warning: {numbers}: all actions will be random, the policy will not be trained", sys.stderr)

    run_dir, lock = open_run_folder(args)
    writer = SummaryWriter(run_dir, purge_step=start + 1)  # a resumed run goes on in its own curves
    writer.add_text("hyperparameters", f"```\n{json.dumps(asdict(args), indent=2)}\n```")
    update = CudaGraphUpdate(agent.update) if args.cudagraphs and device.type == "cuda" else agent.update
    if args.compile:
        tqdm.write("the first updates wait for torch.compile, up to a minute (--no-compile: no wait, slower updates)")
    bar = tqdm(total=args.total_timesteps, initial=start, unit="step", file=sys.stdout, disable=None)
    completed = start  # the last step whose transition is in the buffer
    saved_at = start  # the last step of which there is a checkpoint
    steps_per_second, began = 0.0, time.time()
    metrics, evaluation, over = {}, {}, True

    def save() -> None:
        nonlocal saved_at
        save_checkpoint(run_dir, completed, agent, buffer, env, origin)
        saved_at = completed

    def save_after_failure() -> None:
        if completed == start:
            return  # nothing was learnt yet
        try:
            save()
            how = f"go on with --resume {run_dir / 'checkpoint.pt'}"
            tqdm.write(f"the env failed after step {completed:,}; what was learnt is saved, {how}", sys.stderr)
        except UserError as error:
            tqdm.write(f"the env failed after step {completed:,}; not saved: {error}", sys.stderr)

    try:
        with StopSignals() as stop_signals:
            for step in range(start + 1, args.total_timesteps + 1):
                if over:
                    seed = int(torch.randint(2**20, 2**31, ()))  # above all of evaluate's
                    with saving_if_it_fails(save_after_failure):
                        observation = seed_episode(env, seed)
                    episode_return, episode_length = 0.0, 0
                # the algorithm, from here to the next blank line
                if step <= args.learning_starts:
                    action = 2 * torch.rand(action_dim).numpy() - 1
                else:
                    action = agent.explore(observation)
                    require(np.isfinite(action).all(), f"step {step:,}: {DIVERGED} (a NaN action)")
                    update_actor = step % args.policy_frequency == 0
                    metrics |= update(buffer.sample(args.batch_size), update_actor)  # the actor's stay until its next
                with saving_if_it_fails(save_after_failure):  # after the update, so that a GPU works meanwhile
                    next_observation, reward, terminated, truncated, _ = env.step(action)
                buffer.add(observation, next_observation, action, reward, terminated)
                observation, over, completed = next_observation, terminated or truncated, step
                episode_return += reward
                episode_length += 1

                scalars, steps_per_second = {}, (step - start) / (time.time() - began)
                if metrics and step % LOG_INTERVAL == 0:
                    scalars = read_metrics(metrics, step)
                    scalars["charts/SPS"] = steps_per_second
                if eval_env and (step % args.eval_interval == 0 or step == args.total_timesteps):
                    with saving_if_it_fails(save_after_failure):
                        evaluation = evaluate(agent.actor, eval_env, args.eval_episodes)
                    scalars["eval/return"] = evaluation["return_mean"]
                    scalars["eval/smoothness"] = evaluation["smoothness_mean"]
                    scalars["eval/oscillation"] = evaluation["oscillation"]
                    scalars["eval/length"] = evaluation["length_mean"]
                    line = "step {:,}: eval return {return_mean:.1f}, sm {smoothness_mean:.3f}, "
                    line += "oscillation {oscillation:.4f}, {:.0f} steps/s"
                    tqdm.write(line.format(step, steps_per_second, **evaluation))
                    sys.stdout.flush()
                bar.update()
                if over:
                    scalars["charts/episodic_return"] = episode_return
                    scalars["charts/episodic_length"] = episode_length
                    bar.set_postfix_str(f"episode return {episode_return:.1f}", refresh=False)
                for tag, scalar in scalars.items():
                    writer.add_scalar(tag, scalar, step)
                if over and step // args.checkpoint_interval > saved_at // args.checkpoint_interval:
                    save()
                if stop_signals:
                    break
            if completed > saved_at:
                save()
            if completed < args.total_timesteps:
                tqdm.write(f"stopped at step {completed:,}; go on with --resume {run_dir / 'checkpoint.pt'}")
                raise SystemExit(128 + stop_signals[0])
        if eval_env and not evaluation:  # a run that was killed between its last step and its summary
            evaluation = evaluate(agent.actor, eval_env, args.eval_episodes)
        summary = asdict(args) | {"algorithm": SCRIPT, "steps": completed, "origin": origin}
        summary |= {"steps_per_second": steps_per_second} | evaluation
        if args.autotune_curv:
            summary["curv_weight_found"] = (agent.lambda_curv * agent.gradient_scale).item()
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        tqdm.write(f"done: {run_dir}")
    finally:
        for resource in (bar, writer, env, eval_env, lock):
            if resource is not None:
                resource.close()
    return run_dir


# ======== COMMAND LINE: --resume and --warm-start bring settings.


def parse_args(settings=Args) -> Args:
    """The command line. With --resume or --warm-start the run's own settings take the place of the defaults; a warm
    start looks the lambdas up as for a new run, so that a plain source does not make the new run plain."""
    args = tyro.cli(settings, description=__doc__)
    require(not (args.resume and args.warm_start), "give --resume or --warm-start, not both")
    if args.resume:
        defaults = replace(load_checkpoint(args.resume, settings)["args"], resume=args.resume)
    elif args.warm_start:
        saved = load_checkpoint(args.warm_start, settings)["args"]
        defaults = replace(saved, warm_start=args.warm_start, resume=None, **dict.fromkeys(LAMBDAS))
    else:
        return args
    return tyro.cli(settings, description=__doc__, default=defaults)


if __name__ == "__main__":
    try:
        train(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
