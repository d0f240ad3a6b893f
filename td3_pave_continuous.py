"""TD3 + PAVE: smooth policies by shaping the critic (arXiv 2601.22970); the actor's loss stays plain TD3.

Where the action maximises Q, implicit differentiation gives da*/ds = -(d2Q/da2)^-1 d2Q/dsda. So the policy's Lipschitz
constant is at most M/mu: M, how fast the action gradient turns with the state; mu, how sharp the maximum is. PAVE adds
three losses to each critic: two make M small, the third pushes the trace of d2Q/da2 below zero: mu up, on average.

    MPR   mean (grad_a Q(s + e, a) - grad_a Q(s, a))^2,  e ~ N(0, sigma^2)    mixed-partial regularisation
    VFC   mean (grad_a Q(s', a) - grad_a Q(s, a))^2                           vector-field consistency
    Curv  mean max(0, v^T H v + delta),  H = d2Q/da2,  v in {-1, 1}^d_a       curvature preservation (Hutchinson)

    critic loss = TD + lambda_mpr MPR + lambda_vfc VFC + lambda_curv Curv

Means are over the batch; in MPR and VFC over the d_a action dimensions, too: the lambdas assume this. For small sigma
MPR tends to sigma^2 |d2Q/dsda|_F^2 / d_a; VFC sees d2Q/dsda along the motion s' - s. Alone, both are also least for a Q
that is flat in a: mu is zero, and the action jumps between the limits. Curv works against that.

    python td3_pave_continuous.py --env-id HalfCheetah-v5
    python td3_pave_continuous.py --lambda-mpr 0 --lambda-vfc 0 --lambda-curv 0    # plain TD3
"""

import copy
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

SCRIPT = Path(__file__).stem
LOG_INTERVAL = 200  # steps between two readings of the losses: on a GPU each reading waits for the update
DIVERGED = "training diverged, lower --q-lr or the lambdas; the last checkpoint is untouched"

# The paper's tuned (lambda_mpr, lambda_vfc, lambda_curv) for TD3; any other env starts where the paper's search does.
TUNED_LAMBDAS = {
    "LunarLanderContinuous": (0.1, 0.1, 0.01), "Pendulum": (2.0, 0.005, 2.0), "Reacher": (0.1, 0.1, 0.01),
    "Ant": (0.1, 0.005, 0.5), "Humanoid": (0.1, 0.005, 0.5), "Hopper": (0.1, 0.005, 0.5),
    "Walker2d": (0.1, 0.1, 0.01),
}  # fmt: skip
LAMBDAS, UNTUNED_LAMBDAS = ("lambda_mpr", "lambda_vfc", "lambda_curv"), (0.1, 0.1, 0.01)
# --autotune-curv (ours): the paper's first two lambdas for SAC on Ant; where lambda_curv starts and its bounds
AUTOTUNE_LAMBDAS, LAMBDA_CURV_BOUNDS = (0.1, 0.0005, 0.01), (1e-4, 100.0)


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"  # Gymnasium env with bounded continuous actions; module:Env-v0 imports the module
    seed: int = 1  # of the networks, the noise, the replay and the env
    total_timesteps: int = 1_000_000  # env steps; after --learning-starts, an update each
    learning_starts: int = 10_000  # steps of uniformly random actions before the first update
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    batch_size: int = 256  # transitions in a minibatch
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the target networks towards their own, each actor update
    policy_lr: float = 1e-3  # learning rate of the actor
    q_lr: float = 1e-3  # learning rate of the critics
    policy_frequency: int = 2  # critic updates per update of the actor and the target networks
    exploration_noise: float = 0.1  # standard deviation of the noise on the actions taken, in units of [-1, 1]
    policy_noise: float = 0.2  # standard deviation of the noise on the target policy's actions, in units of [-1, 1]
    noise_clip: float = 0.5  # bound of that noise
    lambda_mpr: float | None = None  # weight of MPR; None: tuned for this env, else (or with --autotune-curv) 0.1
    lambda_vfc: float | None = None  # weight of VFC; None: tuned for this env, else 0.1; with --autotune-curv 0.0005
    lambda_curv: float | None = None  # weight of Curv; None: tuned for this env, else (or to start the autotuning) 0.01
    mpr_sigma: float = 0.01  # standard deviation of MPR's noise, in the observation's own units
    curv_delta: float = 1.0  # margin delta by which Curv wants v^T H v below zero
    pave_batch_size: int | None = None  # rows of the minibatch that the PAVE terms use: unbiased, cheaper; None: all
    autotune_curv: bool = False  # tune lambda_curv; it and delta then scale with the critic's action gradient
    target_concavity: float = 0.95  # share of the samples that --autotune-curv wants to have v^T H v below -delta
    cuda: bool = True  # use a CUDA device if there is one
    torch_deterministic: bool = True  # let torch use deterministic algorithms only
    compile: bool = True  # torch.compile the losses: up to a minute at the start, 5 s from its cache
    cudagraphs: bool = True  # on CUDA, replay each update as one CUDA graph
    output_dir: str = "runs"  # where the run's folder <env>__<script>__<seed>__<time> is made
    eval_interval: int = 10_000  # steps between two evaluations of the deterministic policy
    eval_episodes: int = 10  # episodes in an evaluation; 0: no evaluation
    checkpoint_interval: int = 50_000  # steps after which the next episode end writes checkpoint.pt and actor.pt
    resume: str | None = None  # checkpoint.pt of a run to go on with; its settings hold unless a flag says otherwise


class UserError(Exception):
    """Something that the user can mend; shown as one line, exit code 2."""


def require(holds: bool, message: str) -> None:
    """UserError(message) unless it holds."""
    if not holds:
        raise UserError(message)


def validate(args: Args) -> Args:
    """Return args with each None lambda looked up for this env; UserError on a setting that makes no sense."""
    tuned = TUNED_LAMBDAS.get(re.sub(r"-v\d+$", "", args.env_id), UNTUNED_LAMBDAS)
    lambdas = dict(zip(LAMBDAS, AUTOTUNE_LAMBDAS if args.autotune_curv else tuned, strict=True))
    args = replace(args, **{name: value for name, value in lambdas.items() if getattr(args, name) is None})
    limits = {
        "total_timesteps learning_starts batch_size policy_frequency eval_interval checkpoint_interval": (1, math.inf),
        "eval_episodes lambda_mpr lambda_vfc curv_delta exploration_noise policy_noise noise_clip": (0, math.inf),
        "lambda_curv": LAMBDA_CURV_BOUNDS if args.autotune_curv else (0, math.inf), "gamma tau": (0, 1),
        "policy_lr q_lr mpr_sigma": (1e-12, math.inf), "target_concavity": (0.001, 0.999), "seed": (0, 2**32 - 1),
        "buffer_size": (args.batch_size, math.inf), "pave_batch_size": (1, args.batch_size),
    }  # fmt: skip
    for names, (low, high) in limits.items():
        for name in names.split():
            fits = (value := getattr(args, name)) is None or (low <= value <= high and math.isfinite(value))
            require(fits, f"--{name.replace('_', '-')} is {value}; it must be from {low} to {high}")
    return args


def make_env(env_id: str) -> gym.Env:
    """The env with actions in [-1, 1] and flat raw observations; UserError where a continuous policy can't act."""
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        raise UserError(f"cannot make --env-id {env_id}: {' '.join(str(error).split())}") from error
    actions, observations = env.action_space, env.observation_space
    usable = isinstance(actions, gym.spaces.Box) and actions.dtype.kind == "f" and actions.is_bounded()
    require(usable, f"{env_id} has the action space {actions}; this script needs a float Box with finite bounds")
    usable = observations.is_np_flattenable and not re.search(r"\d+, \d+, \d+\), uint8", str(observations))
    require(usable, f"{env_id} observes {observations}; these networks need a vector: no images, no varying length")
    low, high = (np.float64(bound).ravel() for bound in (actions.low, actions.high))

    def env_action(action):
        """From flat in [-1, 1] to the env's own; the lambdas hang on that unit, as grad_a Q scales with the range."""
        action = np.clip(low + (np.float64(action) + 1) / 2 * (high - low), low, high)  # whatever rounding does
        return action.astype(actions.dtype).reshape(actions.shape)

    def finite(values, size):
        values = np.array(values, np.float32)  # a copy: some envs change one array in place
        fits = values.size == size and np.isfinite(values).all()
        require(fits, f"the env returned a NaN or infinite observation or reward, or not {size} in number")
        return values

    if not env.spec.max_episode_steps:
        gym.logger.warn(f"{env_id} has no time limit, episodes end at 10,000 steps: register it with max_episode_steps")
        env = gym.wrappers.TimeLimit(env, 10_000)
    size = gym.spaces.flatdim(observations)
    env = gym.wrappers.TransformObservation(gym.wrappers.FlattenObservation(env), lambda o: finite(o, size), None)
    env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TransformReward(env, lambda r: finite(r, 1).item()))
    return gym.wrappers.TransformAction(env, env_action, gym.spaces.Box(-1, 1, low.shape))


class ReplayBuffer:
    """A ring of transitions on the device, one row each, so that adding is one copy and sampling one gather."""

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, device: torch.device):
        self.widths = (observation_dim, observation_dim, action_dim, 1, 1)
        size, sysconf = 4 * capacity * sum(self.widths), getattr(os, "sysconf", lambda _: math.inf)  # not on Windows
        memory = sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES")  # Linux grants more, and kills the run later
        memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory
        require(size < memory, f"no memory for a replay buffer of {size / 1e9:,.1f} GB: lower --buffer-size")
        self.rows = torch.empty(capacity, sum(self.widths), device=device)
        self.position = self.size = 0

    def add(self, observation, next_observation, action, reward: float, terminated: bool) -> None:
        """Store s, s', a in [-1, 1], r. `terminated`: the episode truly ended; False where a time limit cut it."""
        row = np.concatenate([observation, next_observation, action, [reward, terminated]], dtype=np.float32)
        self.rows[self.position].copy_(torch.from_numpy(row), non_blocking=True)  # no wait for a GPU's update
        self.position = (self.position + 1) % len(self.rows)
        self.size = min(self.size + 1, len(self.rows))

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """B rows, each drawn on its own, so that the first n are as fair a sample (--pave-batch-size): s, s' (B, d_s),
        s' never the next episode's start; a (B, d_a); rewards, terminations (B,)."""
        rows = self.rows[torch.randint(self.size, (batch_size,), device=self.rows.device)]
        observations, next_observations, actions, rewards, terminations = rows.split(self.widths, dim=1)
        return observations, next_observations, actions, rewards.squeeze(1), terminations.squeeze(1)


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers of SiLU: Curv needs a second derivative, and ReLU's is zero."""
    return nn.Sequential(nn.Linear(inputs, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, outputs))


class QNetwork(nn.Module):
    """Q(s, a): (B, d_s), (B, d_a) -> (B,)."""

    def __init__(self, observation_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(observation_dim + action_dim, 1)

    def forward(self, observations, actions):
        return self.net(torch.cat([observations, actions], dim=-1)).squeeze(-1)


class Actor(nn.Module):
    """The deterministic policy: (B, d_s) -> (B, d_a) in [-1, 1]."""

    def __init__(self, observation_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(observation_dim, action_dim)

    def forward(self, observations):
        return torch.tanh(self.net(observations))


# -------------------------------------------------------------------- PAVE: paste from here to the next dashed line

from collections import namedtuple  # noqa: E402  here, so that the block needs only `import torch` above it

PaveLosses = namedtuple("PaveLosses", "mpr vfc curvature vhv gradient q_values")  # see pave_losses


def action_gradient(q, observations, actions):
    """The Q-gradient field: grad_a Q(s, a) (B, d_a), and Q(s, a) (B,). ValueError if `q` returns another shape."""

    def total(a):
        q_values = q(observations, a)
        if q_values.shape != a.shape[:1]:
            raise ValueError(f"q must be one critic and return ({len(a)},), not {tuple(q_values.shape)}: squeeze(-1)?")
        return q_values.sum(), q_values  # rows are independent, so the sum's gradient is each row's own

    return torch.func.grad(total, has_aux=True)(actions)


def hutchinson_trace(q, observations, actions, probe):
    """Hutchinson's estimate of tr(d2Q/da2): v^T (d2Q/da2) v (B,), one probe v (B, d_a) a sample; no Hessian is formed.

    Its mean over Rademacher probes is the trace. From the same pass: grad_a Q (B, d_a) and Q (B,). Differentiable in
    the parameters of `q`, eager or compiled: torch.func.grad, unlike torch.autograd.grad, traces to plain operations.
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
        loss = td_weight * F.mse_loss(pave.q_values, target)  # target (B,); td_weight 1 in TD3, 1/2 in SAC
        loss += lambda_mpr * pave.mpr + lambda_vfc * pave.vfc + lambda_curv * pave.curvature

    q: one critic, any callable (B, d_s), (B, d_a) -> (B,): smooth (SiLU, not ReLU), rows independent and repeatable (no
        batch norm, no dropout); nn.GroupNorm(1, H), not nn.LayerNorm(H), whose Curv gradient is wrong (pytorch#175754)
    observations, next_observations: s, s' (B, d_s); actions: a (B, d_a), in [-1, 1] if the paper's lambdas are used
    state_noise: epsilon (B, d_s) ~ N(0, sigma^2 I); probe: v (B, d_a), see rademacher_like; delta: in units of Q
    Returns the scalars mpr, vfc, curvature; vhv (B,), v^T (d2Q/da2) v for one probe; gradient (B, d_a), grad_a Q(s, a);
    q_values (B,), Q(s, a), so that the TD loss needs no second pass. Gradients flow to the parameters of `q` through
    each. MPR and VFC are means over the action dimensions, too: a squared norm needs lambdas d_a times smaller.
    ValueError under autocast: MPR subtracts nearly equal gradients, and bf16 loses the difference (so does TF32).
    Compile the function that calls pave_losses, not `q`.
    """
    if torch.is_autocast_enabled(actions.device.type):
        raise ValueError("PAVE needs float32: call pave_losses under torch.autocast(device_type, enabled=False)")
    vhv, gradient, q_values = hutchinson_trace(q, observations, actions, probe)
    states = torch.cat([observations + state_noise, next_observations])
    # the same a at every state: VFC is to see the field turn with s alone; Curv wants it to change with a
    noisy_gradient, next_gradient = action_gradient(q, states, torch.cat([actions, actions]))[0].chunk(2)
    mpr, vfc = (noisy_gradient - gradient).square().mean(), (next_gradient - gradient).square().mean()
    return PaveLosses(mpr, vfc, torch.relu(vhv + delta).mean(), vhv, gradient, q_values)


# ----------------------------------------------------------------------------------------------------- the update


class Agent(nn.Module):
    """TD3: networks, optimizers, `update` and the losses that it steps down."""

    def __init__(self, observation_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        args = self.args = validate(args)  # lambdas that are None would silently be no PAVE
        self.device, self.graphs = device, {}  # see graphed_update
        use_pave = args.autotune_curv or any(getattr(args, name) for name in LAMBDAS)
        self.pave_rows = (args.pave_batch_size or args.batch_size) if use_pave else 0  # rows of a minibatch for PAVE
        self.actor = Actor(observation_dim, action_dim)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critics = nn.ModuleList(QNetwork(observation_dim, action_dim) for _ in range(2))
        self.critic_targets = copy.deepcopy(self.critics).requires_grad_(False)
        if args.autotune_curv:
            self.register_buffer("lambda_curv", torch.tensor(args.lambda_curv))  # times gradient_scale: the weight
            self.register_buffer("gradient_scale", torch.zeros(()))  # running mean of grad_a Q's RMS; 0: no Curv
        self.to(device)
        self.critic_parameters, self.actor_parameters = [*self.critics.parameters()], [*self.actor.parameters()]
        self.q_optimizer = torch.optim.Adam(self.critic_parameters, lr=args.q_lr, fused=True, capturable=True)
        self.actor_optimizer = torch.optim.Adam(self.actor_parameters, lr=args.policy_lr, fused=True, capturable=True)
        self.optimizers = {"critics": self.q_optimizer, "actor": self.actor_optimizer}
        if args.compile:
            torch._dynamo.config.trace_autograd_ops = True  # lets `backward`, the next method, compile in one piece
            eager, compiled = self.backward, torch.compile(self.backward, fullgraph=True)

            def compiled_or_eager(*arguments) -> dict:
                try:
                    return compiled(*arguments)
                except Exception as error:  # no C++ compiler, or a Ctrl-C that killed it
                    tqdm.write(f"warning: going on without torch.compile, it fails here ({error!r:.200})", sys.stderr)
                    self.backward = eager
                    self.zero_grad()  # the call that failed may have left gradients
                    return eager(*arguments)

            self.backward = compiled_or_eager

    def backward(self, loss_function, parameters: list, *arguments) -> dict:
        """loss.backward() for loss_function(*arguments) -> (loss, metrics); with --compile one compiled piece."""
        loss, metrics = loss_function(*arguments)
        loss.backward(inputs=parameters)  # the actor's loss leaves nothing in the critics, through which it passes
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def explore(self, observation: np.ndarray) -> np.ndarray:
        """The policy's action (d_a,) with exploration noise, in [-1, 1]."""
        observations = torch.as_tensor(observation, dtype=torch.float32).to(self.device, non_blocking=True)[None]
        action = self.actor(observations)[0]
        return (action + self.args.exploration_noise * torch.randn_like(action)).clamp(-1, 1).cpu().numpy()

    def update(self, batch: tuple, update_actor: bool) -> dict:
        """One update from a minibatch (see ReplayBuffer.sample); returns what to log, still on the device."""
        args, n, (observations, _, actions, _, _) = self.args, self.pave_rows, batch
        target_noise = torch.randn_like(actions)  # drawn here, not in `backward`: eager and compiled draw the same
        state_noise, probe = args.mpr_sigma * torch.randn_like(observations[:n]), rademacher_like(actions[:n])
        metrics = self.backward(self.critic_loss, self.critic_parameters, batch, target_noise, state_noise, probe)
        self.q_optimizer.step()
        self.q_optimizer.zero_grad()
        if args.autotune_curv:  # dual ascent: lambda_curv grows while fewer v^T H v than aimed at are below -delta
            shortfall = args.target_concavity - metrics["geometry/margin_fraction"]
            self.lambda_curv.mul_((0.006 * shortfall).exp()).clamp_(*LAMBDA_CURV_BOUNDS)  # by up to 0.6 %
            self.gradient_scale.lerp_(metrics["geometry/action_gradient"], 0.005)  # grad_a Q's RMS, 200 updates' mean
        if update_actor:
            metrics |= self.backward(self.actor_loss, self.actor_parameters, batch)
            self.actor_optimizer.step()
            self.actor_optimizer.zero_grad()
            targets = [*self.critic_targets.parameters(), *self.actor_target.parameters()]
            with torch.no_grad():  # Polyak averaging
                torch._foreach_lerp_(targets, self.critic_parameters + self.actor_parameters, args.tau)
        return metrics

    @torch.no_grad()
    def td_target(self, next_observations, rewards, terminations, noise):
        """r + gamma min Q'(s', clip(pi'(s') + clipped noise)); only a termination cuts the future. (B,)"""
        noise = (self.args.policy_noise * noise).clamp(-self.args.noise_clip, self.args.noise_clip)
        next_actions = (self.actor_target(next_observations) + noise).clamp(-1, 1)
        next_q = torch.minimum(*(critic(next_observations, next_actions) for critic in self.critic_targets))
        return rewards + (1 - terminations) * self.args.gamma * next_q

    def critic_loss(self, batch: tuple, target_noise, state_noise, probe):
        """TD + lambda_mpr MPR + lambda_vfc VFC + lambda_curv Curv, summed over the twins; and what to log."""
        observations, next_observations, actions, rewards, terminations = batch
        target_q = self.td_target(next_observations, rewards, terminations, target_noise)
        args, n, pave_loss, metrics = self.args, self.pave_rows, 0.0, {}
        # PAVE takes the rows [:n], by default all of them, and has Q there from its own passes; plain TD3 has n = 0
        q_values = torch.stack([critic(observations[n:], actions[n:]) for critic in self.critics])
        if n:
            curv_weight, delta = args.lambda_curv, args.curv_delta
            if args.autotune_curv:  # paraboloid: v^T H v = -mu d_a, RMS grad_a Q = mu RMS distance; delta 1: it is < 2
                curv_weight = self.lambda_curv * self.gradient_scale
                delta = actions.shape[1] / 2 * delta * self.gradient_scale
            rows = observations[:n], actions[:n], next_observations[:n]
            twins = [pave_losses(critic, *rows, state_noise, probe, delta) for critic in self.critics]
            pave = PaveLosses(*map(torch.stack, zip(*twins, strict=True)))  # twins first: mpr (2,), vhv (2, n)
            q_values = torch.cat([pave.q_values, q_values], dim=1)  # rows [:n] first, as in target_q
            pave_loss = args.lambda_mpr * pave.mpr + args.lambda_vfc * pave.vfc + curv_weight * pave.curvature
            metrics = {"losses/mpr": pave.mpr, "losses/vfc": pave.vfc, "losses/curvature": pave.curvature}
            metrics |= {"geometry/vhv": pave.vhv, "geometry/concave_fraction": (pave.vhv < 0).float()}
            if args.autotune_curv:
                metrics |= {"losses/lambda_curv": curv_weight, "geometry/margin_fraction": (pave.vhv < -delta).float()}
                metrics["geometry/action_gradient"] = pave.gradient.square().mean(dim=(1, 2)).sqrt()
        td = (q_values - target_q).square().mean(dim=1)  # SAC's paper halves it, TD3's not: tuned lambdas hang on it
        metrics |= {"losses/qf_loss": td, "losses/q_values": q_values}
        return (td + pave_loss).sum(), {name: value.mean() for name, value in metrics.items()}

    def actor_loss(self, batch: tuple):
        """Plain TD3: mean of -Q1(s, pi(s)); and what to log."""
        loss = -self.critics[0](batch[0], self.actor(batch[0])).mean()
        return loss, {"losses/actor_loss": loss}

    def graphed_update(self, batch: tuple, update_actor: bool) -> dict:
        """`update` as CUDA graphs, one per value of update_actor: one launch, not hundreds. The first call is a real
        update, which compiles and allocates; a second is recorded and replayed from then on. Python's numbers (learning
        rates, lambdas) stay as recorded, tensors and noise move on; the next replay overwrites the metrics."""
        if update_actor not in self.graphs:
            graph, inputs = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in batch]
            metrics = self.update(inputs, update_actor)
            with torch.cuda.graph(graph):  # records, computes nothing
                self.graphs[update_actor] = graph, inputs, self.update(inputs, update_actor)
            return metrics
        graph, inputs, metrics = self.graphs[update_actor]
        torch._foreach_copy_(inputs, batch)
        graph.replay()
        return metrics


def smoothness(actions, fs=1.0):
    """sm of one episode (CAPS, Mysore et al. 2021), lower is smoother: the mean over action dimensions of
    2 / (T fs) * sum_k f_k |FFT(actions)_k|, k < T // 2. actions: (T,) or (T, d_a), in env units; fs: sampling rate."""
    steps = len(actions)
    spectrum = np.abs(np.fft.rfft(np.reshape(actions, (steps, -1)), axis=0))[: steps // 2]
    frequencies = np.fft.rfftfreq(steps, 1 / fs)[: steps // 2]
    return float((2 / (steps * fs) * frequencies @ spectrum).mean())


@torch.no_grad()
def evaluate(actor: Actor, env: gym.Env, episodes: int) -> dict[str, float]:
    """Return, sm, oscillation (mean |a_t+1 - a_t|, like sm in env action units), length: no noise, the same starts."""
    device, results = next(actor.parameters()).device, []
    for episode in range(episodes):
        np.random.seed(10_000 + episode)  # see train
        observation, _ = env.reset(seed=10_000 + episode)
        rewards, env_actions, terminated, truncated = [], [], False, False
        while not (terminated or truncated):
            action = actor(torch.as_tensor(observation, device=device)[None])[0].cpu().numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            env_actions.append(env.action(action).ravel())
        oscillation = np.abs(np.diff(env_actions, axis=0)).mean() if len(rewards) > 1 else 0.0
        results.append((sum(rewards), smoothness(np.array(env_actions)), oscillation, len(rewards)))
    names = ("return_mean", "smoothness_mean", "oscillation", "length_mean", "return_std", "smoothness_std")
    return dict(zip(names, [*np.mean(results, axis=0), *np.std(results, axis=0)], strict=False))


def save_checkpoint(run_dir: Path, step: int, agent: Agent, buffer: ReplayBuffer, env: gym.Env) -> None:
    """Write actor.pt (for a robot) and checkpoint.pt: networks, targets, optimizers, replay, and torch's generators,
    which also seed the episodes: all that a run needs to go on bit-identically from an episode's end."""
    optimizers = {name: optimizer.state_dict()["state"] for name, optimizer in agent.optimizers.items()}
    moments = [value for states in optimizers.values() for state in states.values() for value in state.values()]
    require(all(t.isfinite().all() for t in [*agent.parameters(), *moments]), f"step {step:,}: {DIVERGED} (NaN weight)")
    about = {"script": SCRIPT, "args": asdict(agent.args), "step": step}
    low, high = (torch.as_tensor(env.action(sign * np.ones(env.action_space.shape))).flatten() for sign in (-1, 1))
    state = {
        "agent": agent.state_dict(), "optimizers": optimizers, "buffer_position": buffer.position,
        "buffer_rows": buffer.rows[: buffer.size].to("cpu", copy=True),  # a view would save the whole ring
        "torch_rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all() if buffer.rows.is_cuda else [],
    }  # fmt: skip
    robot = {"actor": agent.actor.state_dict(), "action_low": low, "action_high": high}  # the bounds flat, as actions
    for name, content in {"actor.pt": about | robot, "checkpoint.pt": about | state}.items():
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
        return checkpoint | {"args": settings(**checkpoint["args"])}
    except Exception as error:
        raise UserError(f"--resume cannot use {path} ({error!r:.200}): give a checkpoint.pt of {SCRIPT}.py") from error


def restore(checkpoint: dict, agent: Agent, buffer: ReplayBuffer) -> int:
    """Put everything that a checkpoint holds back in place and return its step; UserError if it doesn't fit."""
    args, saved, rows, step = agent.args, checkpoint["args"], checkpoint["buffer_rows"], checkpoint["step"]
    require(saved.env_id == args.env_id, f"--resume is a run on {saved.env_id}, --env-id is {args.env_id}")
    require(step < args.total_timesteps, f"--resume is at step {step:,} already: raise --total-timesteps to go on")
    require(len(rows) <= args.buffer_size, f"--resume holds {len(rows):,} transitions: raise --buffer-size")
    shapes, own = ({k: v.shape for k, v in state.items()} for state in (checkpoint["agent"], agent.state_dict()))
    require(shapes == own, "--resume does not fit this env, or an --autotune flag differs from the run's")
    agent.load_state_dict(checkpoint["agent"])
    for name, optimizer in agent.optimizers.items():  # only its state: a flag may have changed the learning rate
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizers"][name]})
    buffer.rows[: len(rows)] = rows
    if args.autotune_curv and args.lambda_curv != saved.lambda_curv:
        agent.lambda_curv.fill_(args.lambda_curv)  # a new --lambda-curv is a new start
    buffer.size = len(rows)
    buffer.position = checkpoint["buffer_position"] % len(rows) if len(rows) == args.buffer_size else len(rows)
    torch.set_rng_state(checkpoint["torch_rng"])
    torch.cuda.set_rng_state_all(checkpoint["cuda_rng"][: torch.cuda.device_count()])
    return step


def train(args: Args, make_agent=Agent) -> Path:
    """Train and return the run's folder. Raises UserError; SystemExit(128 + signal) once Ctrl-C or SIGTERM is saved."""
    args = validate(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.autograd.set_multithreading_enabled(False)  # else a GPU's gradients are summed in an order that varies
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would touch all of the still empty buffer
    torch.manual_seed(args.seed)
    env, eval_env = make_env(args.env_id), make_env(args.env_id)
    (observation_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    agent = make_agent(observation_dim, action_dim, args, device)
    update = agent.graphed_update if args.cudagraphs and device.type == "cuda" else agent.update
    buffer = ReplayBuffer(args.buffer_size, observation_dim, action_dim, device)
    start = restore(load_checkpoint(args.resume, type(args)), agent, buffer) if args.resume else 0
    name = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', args.env_id)}__{SCRIPT}__{args.seed}__{time.time_ns() // 1_000_000}"
    run_dir = Path(args.resume).parent if args.resume else Path(args.output_dir) / name
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        writer = SummaryWriter(run_dir, purge_step=start + 1)  # a resumed run goes on in its own curves
    except OSError as error:
        raise UserError(f"cannot write to {run_dir} ({error}): choose another --output-dir or copy the run") from error
    writer.add_text("hyperparameters", f"```\n{json.dumps(asdict(args), indent=2)}\n```")
    if args.compile:
        tqdm.write("the first updates wait for torch.compile, up to a minute (--no-compile: no wait, slower updates)")
    stop_signals = []  # a second one of a kind stops at once

    def request_stop(signum, _frame):
        stop_signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=args.total_timesteps, initial=start, unit="step", file=sys.stdout, disable=None)
    metrics, evaluation, over, saved_at, began = {}, {}, True, start, time.time()
    try:
        for step in range(start + 1, args.total_timesteps + 1):
            if over:
                seed = int(torch.randint(2**20, 2**31, ()))  # above all of evaluate's
                np.random.seed(seed)  # for an env that draws from numpy's global generator
                observation, _ = env.reset(seed=seed)
            if step <= args.learning_starts:
                action = 2 * torch.rand(action_dim).numpy() - 1
            else:
                action = agent.explore(observation)
                require(np.isfinite(action).all(), f"step {step:,}: {DIVERGED} (a NaN action)")
                metrics |= update(buffer.sample(args.batch_size), step % args.policy_frequency == 0)
            next_observation, reward, terminated, truncated, info = env.step(action)  # while a GPU is at the update
            buffer.add(observation, next_observation, action, reward, terminated)
            observation, over = next_observation, terminated or truncated
            scalars, steps_per_second = {}, (step - start) / (time.time() - began)
            if metrics and step % LOG_INTERVAL == 0:
                scalars = dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))
                require(all(map(math.isfinite, scalars.values())), f"step {step:,}: {DIVERGED} ({scalars})")
                scalars["charts/SPS"] = steps_per_second
            if args.eval_episodes and (step % args.eval_interval == 0 or step == args.total_timesteps):
                evaluation = evaluate(agent.actor, eval_env, args.eval_episodes)
                scalars |= {f"eval/{k.removesuffix('_mean')}": v for k, v in evaluation.items() if "std" not in k}
                line = "step {:,}: eval return {return_mean:.1f}, sm {smoothness_mean:.3f}, {:.0f} steps/s"
                tqdm.write(line.format(step, steps_per_second, **evaluation))
                sys.stdout.flush()
            bar.update()
            if over:
                scalars |= {f"charts/episodic_{name}": info["episode"][name[0]] for name in ("return", "length")}
                bar.set_postfix_str(f"episode return {info['episode']['r']:.1f}", refresh=False)
            for tag, scalar in scalars.items():
                writer.add_scalar(tag, scalar, step)
            if over and step // args.checkpoint_interval > saved_at // args.checkpoint_interval:
                save_checkpoint(run_dir, step, agent, buffer, env)
                saved_at = step
            if stop_signals:
                break
        save_checkpoint(run_dir, step, agent, buffer, env)
        if step < args.total_timesteps:
            tqdm.write(f"stopped at step {step:,}; go on with --resume {run_dir / 'checkpoint.pt'}")
            raise SystemExit(128 + stop_signals[0])
        summary = asdict(args) | {"algorithm": SCRIPT, "steps": step, "steps_per_second": steps_per_second} | evaluation
        if args.autotune_curv:
            summary["lambda_curv"] = (agent.lambda_curv * agent.gradient_scale).item()  # the weight that was found
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        tqdm.write(f"done: {run_dir}")
    finally:
        for resource in (bar, writer, env, eval_env):
            resource.close()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return run_dir


def parse_args(settings=Args) -> Args:
    """The command line; with --resume, the run's own settings take the place of the defaults."""
    args = tyro.cli(settings, description=__doc__)
    if args.resume:
        saved = replace(load_checkpoint(args.resume, settings)["args"], resume=args.resume)
        args = tyro.cli(settings, description=__doc__, default=saved)
    return args


if __name__ == "__main__":
    try:
        train(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
