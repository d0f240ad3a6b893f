"""Many agents at once on one device: all lambdas and seeds of a search in one launch.

    python -m benchmarks.population td3_pave_continuous --env-id Pendulum-v1 --seeds 101 102 --lambda-curv 0.5 1 2
    python -m benchmarks.population sac_pave_continuous --env-id HalfCheetah-v5 --members members.toml

The product of the lists gives the members: here 3 x 2. A lambda without a list is the env's own. All other flags are
the script's. A TOML file gives several products; what one of its tables lacks is as on the command line:

    [[population]]
    seeds = [1, 2, 3]
    lambda-mpr = [0]
    lambda-vfc = [0]
    lambda-curv = [0]       # plain SAC

    [[population]]
    autotune-curv = [true]

A member is the run that the script itself makes with that seed and those lambdas: on a CPU it draws the same random
numbers and differs by rounding alone. So it does not hang on its neighbours. It leaves what a run leaves, in
<output-dir>/<env>__<script>__<lambdas>__<seed>/: evaluate, report, plot and the script's own --resume take it.

Ctrl-C and SIGTERM save all members; the same command goes on. A member that diverges, or whose env fails, is told and
left out, the others go on. Exit code: 1 if a member was lost, 2 for bad input, 128 + signal if it was stopped.

How it works. The members' parameters are stacked, (N, ...) each, and torch.func.vmap maps the gradient of the script's
own loss over them: one update for all, compiled, and on CUDA replayed as one graph. Adam and Polyak averaging are
elementwise, so they step stacked tensors as they are. Members whose update is other code form groups: by the lambdas
that are 0, by --autotune-curv, and those that a kill left at another step. Envs are in worker processes.
"""

import contextlib
import copy
import inspect
import itertools
import json
import os
import re
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from benchmarks.common import SCRIPTS, USER_ERRORS, UserError, read_json, require, user_errors


@dataclass
class Args:
    script: Annotated[Literal[tuple(SCRIPTS)], tyro.conf.Positional]  # whose agents; its flags are taken, too
    seeds: tuple[int, ...] = (1,)  # a member for each
    lambda_mpr: tuple[float, ...] = ()  # weights of MPR, a member for each; none: the env's own
    lambda_vfc: tuple[float, ...] = ()  # weights of VFC, likewise
    lambda_curv: tuple[float, ...] = ()  # weights of Curv, likewise
    autotune_curv: tuple[bool, ...] = (False,)  # `False True`: a member without, and one with it
    members: Path | None = None  # TOML file of [[population]] tables of these lists
    output_dir: Path = Path("runs/population")  # where the members' folders are


# ------------------------------------------------------------------------------------------------------- the members


def read_tables(args: Args) -> list[Args]:
    """The tables of --members, each over what the command line says; or that alone."""
    if not args.members:
        return [args]
    tables = []
    try:
        for table in tomllib.loads(args.members.read_text())["population"]:
            flags = [args.script]
            for name, values in table.items():
                flags += [f"--{name}", *map(str, values)]
            tables.append(tyro.cli(Args, args=flags, default=args))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"--members {args.members} is no TOML file with [[population]] tables ({error!r})") from error
    return tables


def member_name(script, args) -> str:
    """The name of a member's folder: what sets it apart from the others, and all that the lists can change."""
    weights = "-".join(f"{getattr(args, name):.12g}" for name in script.LAMBDAS)
    weights = f"auto-{weights}" if args.autotune_curv else weights
    env = re.sub(r"[^A-Za-z0-9_.-]", "-", args.env_id)
    return f"{env}__{script.SCRIPT}__{weights}__{args.seed}"


def make_members(args: Args, common) -> dict:
    """Folder's name -> the settings of each member, once. `common`: the script's Args without seed and lambdas."""
    script, members = SCRIPTS[args.script], {}
    require(common.seed == script.Args.seed, "give --seeds, not --seed")
    scratch = not (common.resume or common.warm_start)
    require(scratch, "a population takes no --resume and no --warm-start: the same command goes on with it")
    for table in read_tables(args):
        lists = [getattr(table, name) or (None,) for name in script.LAMBDAS]
        for autotune_curv, *weights, seed in itertools.product(table.autotune_curv, *lists, table.seeds):
            settings = dict(zip(script.LAMBDAS, weights, strict=True)) | {"seed": seed, "autotune_curv": autotune_curv}
            member = script.validate(replace(common, **settings))
            name = member_name(script, member)
            members[name] = replace(member, output_dir=str(args.output_dir / name))
    require(len(members) > 0, "no member: give --seeds and --autotune-curv at least one value")
    return members


class Start(NamedTuple):
    """Where a member begins."""

    name: str
    args: object  # the script's Args
    checkpoint: dict | None  # None: from scratch


def find_start(script, name: str, args) -> Start | str:
    """Where the member's training begins or goes on; or, as a line, why there is nothing to train.

    UserError where its folder holds another training.
    """
    for run in sorted(Path(args.output_dir).glob("*__*__*__*/"), reverse=True):  # the newest first
        lost, summary, checkpoint = read_json(run / "lost.json"), read_json(run / "summary.json"), None
        if lost:
            return f"{name}: lost before, {lost['reason']}"
        if not summary:
            if not (run / "checkpoint.pt").exists():
                continue  # killed before its first checkpoint
            checkpoint = script.load_checkpoint(str(run / "checkpoint.pt"))
        saved = summary or asdict(checkpoint["args"]) | {"steps": checkpoint["step"]}
        for setting, value in asdict(args).items():
            same = setting in script.FREE_SETTINGS or setting == "total_timesteps" or saved.get(setting) == value
            told = f"{run} was trained with {setting} {saved.get(setting)}, not {value}: give another --output-dir"
            require(same, told)
        steps, total = saved["steps"], args.total_timesteps
        require(steps == total or not summary, f"{run} is finished with {steps:,} steps: give another --output-dir")
        require(steps <= total, f"{run} is at step {steps:,} already: raise --total-timesteps")
        if summary:
            return f"{name}: finished before"
        return Start(name, replace(args, resume=str(run / "checkpoint.pt")), checkpoint)
    return Start(name, args, None)


def group_of(script, start: Start) -> tuple:
    """Members with the same have the same update: lambdas that are 0, --autotune-curv, and the step."""
    used = tuple(getattr(start.args, name) > 0 for name in script.LAMBDAS)
    return used, start.args.autotune_curv, start.checkpoint["step"] if start.checkpoint else 0


# ------------------------------------------------------------------------------------------------------------ the envs


class MemberEnv(gym.Wrapper):
    """The env of one member in its worker process. It never raises, which would end the other members, too: what
    failed is told in info["failed"], and from then on, or for a NaN action, it stands still."""

    def __init__(self, script, env_id: str, main_process: int):
        super().__init__(script.make_env(env_id))
        self.script, self.env_id, self.evaluation_env, self.weights = script, env_id, None, None
        self.failed, self.no_observation = False, np.zeros(self.observation_space.shape, np.float32)
        if os.getpid() != main_process:  # AsyncVectorEnv makes one more there, to see its spaces
            os.setsid()  # a terminal's Ctrl-C is for the main process alone
            torch.set_num_threads(1)

    def fail(self, error: Exception) -> dict:
        self.failed = True
        return {"failed": repr(error)[:200]}

    def reset(self, *, seed=None, options=None):
        """An episode that begins as train()'s does."""
        try:
            return self.script.seed_episode(self.env, seed), {}
        except Exception as error:
            return self.no_observation, self.fail(error)

    def step(self, action):
        info = {}
        if not self.failed and np.isfinite(action).all():
            try:
                observation, reward, terminated, truncated, _ = self.env.step(action)
                return observation, reward, terminated, truncated, info
            except Exception as error:
                info = self.fail(error)
        return self.no_observation, 0.0, False, False, info

    def evaluate(self, episodes: int) -> dict | None:
        """script.evaluate of the actor whose weights are `weights`; None where those are."""
        if self.weights is None:
            return None
        try:
            if self.evaluation_env is None:
                self.evaluation_env = self.script.make_evaluation_env(self.env_id, self.env)
            actor = self.script.Actor(*self.observation_space.shape, *self.action_space.shape)
            actor.load_state_dict({name: torch.from_numpy(weight) for name, weight in self.weights.items()})
            return self.script.evaluate(actor, self.evaluation_env, episodes)
        except Exception as error:
            return self.fail(error)


# ------------------------------------------------------------------------------------------------------- the update


TERMS = ("mpr", "vfc", "curvature")  # of pave_losses, in the order of LAMBDAS
KINDS = {"critic_loss": "critics", "actor_loss": "actor"}  # loss -> the name of its optimizer


def member_class(script):
    """The script's Agent, callable by the name of a method: functional_call, which gives it other weights, calls it."""

    class Member(script.Agent):
        def forward(self, method: str, *arguments):
            return getattr(self, method)(*arguments)

        def act(self, observation, noise):
            """As explore(), of tensors (d_s,) and (d_a,), the noise being N(0, 1)."""
            if hasattr(self.actor, "sample"):
                actions, _ = self.actor.sample(observation[None], noise[None])
                return actions[0]
            return (self.actor(observation) + self.args.exploration_noise * noise).clamp(-1, 1)

        def pave_losses(self, *inputs):
            """The script's; a term whose lambda is 0 is measured alone: 0 times a NaN gradient would be NaN."""
            pave = script_pave_losses(*inputs)
            unused = [term for term, name in zip(TERMS, script.LAMBDAS, strict=True) if getattr(self.args, name) == 0]
            return pave._replace(**{term: getattr(pave, term).detach() for term in unused})

    script_pave_losses = script.pave_losses
    return Member


class Population:
    """Members with one update for all of them, their replay and their envs. A step is begin_step() and end_step().

    settings: the script's Args of each, which differ in seed and lambdas, but not in which lambdas are 0; checkpoints:
    of the same step.
    """

    def __init__(self, script, settings: list, device: torch.device, checkpoints: list | None = None):
        self.script, self.settings, self.device = script, settings, device
        self.args, count = settings[0], len(settings)  # the first's settings, where they are everyone's
        self.env = script.make_env(self.args.env_id)
        sizes = self.env.observation_space.shape[0], self.env.action_space.shape[0]
        ring = script.ReplayBuffer(count * self.args.buffer_size, *sizes, device)  # one tensor for all
        self.rows, self.widths = ring.rows.view(count, self.args.buffer_size, -1), ring.widths
        make_env = partial(MemberEnv, script, self.args.env_id, os.getpid())
        # No autoreset: s' is what step() returned, whether the episode ended or not; `start_episodes` resets by seed.
        self.envs = AsyncVectorEnv([make_env] * count, autoreset_mode=AutoresetMode.DISABLED)

        self.agents, self.generators, self.buffers = [], [], []
        make_agent = member_class(script)
        for i, (args, checkpoint) in enumerate(zip(settings, checkpoints or [None] * count, strict=True)):
            torch.manual_seed(args.seed)
            agent, buffer = make_agent(*sizes, args, device), copy.copy(ring)
            generator = torch.Generator().set_state(torch.get_rng_state())  # goes on where the weights' draws ended
            buffer.rows = self.rows[i]
            if checkpoint:
                script.restore(checkpoint, agent, buffer)
                generator.set_state(checkpoint["torch_rng"])
            self.agents.append(agent)
            self.buffers.append(buffer)
            self.generators.append(generator)
        self.step = checkpoints[0]["step"] if checkpoints and checkpoints[0] else 0
        self.position, self.size = self.buffers[0].position, self.buffers[0].size  # in step, so the same for all
        self.stack()
        self.pave_losses = self.agents[0].pave_losses

        batch, n, (d_s, d_a) = self.args.batch_size, self.agents[0].pave_rows, sizes
        shapes = {"action": (d_a,), "target": (batch, d_a), "state": (n, d_s), "probe": (n, d_a), "actor": (batch, d_a)}
        cuda = device.type == "cuda"
        self.drawn = {name: torch.zeros(count, *shape, pin_memory=cuda) for name, shape in shapes.items()}
        self.drawn["index"] = torch.zeros(count, batch, dtype=torch.int64, pin_memory=cuda)
        self.noise = {name: tensor.to(device) for name, tensor in self.drawn.items()}  # on a CPU the same tensors
        self.offsets = self.args.buffer_size * torch.arange(count, device=device)[:, None]
        self.actor_takes_noise = "noise" in inspect.signature(script.Agent.actor_loss).parameters
        if self.args.compile:
            torch._dynamo.config.automatic_dynamic_shapes = False  # a group of another size is compiled for its own
            self.gradients = script.CompiledOrEager(self.gradients)
        self.fast_update = script.CudaGraphUpdate(self.update) if cuda and self.args.cudagraphs else self.update

        self.lost = {}  # member -> why
        self.over = np.ones(count, bool)  # whether a new episode begins
        self.observations = np.zeros((count, d_s), np.float32)
        self.returns, self.lengths, self.metrics = np.zeros(count), np.zeros(count, int), {}

    def stack(self) -> None:
        """Every parameter and buffer (the lambdas are among them) of the agents as one tensor (N, ...); Adam's state,
        too, whose count of steps is the same for all."""
        parameters, buffers = stack_module_state(self.agents)
        self.tensors = {name: tensor.detach() for name, tensor in (parameters | buffers).items()}
        names = {parameter: name for name, parameter in self.agents[0].named_parameters()}
        self.trained, self.optimizers = {}, {}  # of each optimizer: the names of its parameters; its stacked twin
        for kind, optimizer in self.agents[0].optimizers.items():
            groups, self.trained[kind] = [], []
            for group in optimizer.param_groups:
                own_names = [names[parameter] for parameter in group["params"]]
                self.trained[kind] += own_names
                groups.append({"params": [self.tensors[name] for name in own_names], "lr": group["lr"]})
            self.optimizers[kind] = torch.optim.Adam(groups, **optimizer.defaults)
            states = [agent.optimizers[kind].state_dict()["state"] for agent in self.agents]
            for i, first in states[0].items():  # none before the first update
                state = {key: torch.stack([own[i][key] for own in states]) for key in ("exp_avg", "exp_avg_sq")}
                state["step"] = first["step"].clone()
                self.optimizers[kind].state[self.tensors[self.trained[kind][i]]] = state
        self.targets, self.sources = [], []  # of Polyak averaging
        for name, tensor in self.tensors.items():
            source = name.replace("critic_targets.", "critics.").replace("actor_target.", "actor.")
            if source != name:
                self.targets.append(tensor)
                self.sources.append(self.tensors[source])

    def member(self, i: int):
        """Its agent and replay as of now, for save_checkpoint."""
        agent, buffer = self.agents[i], self.buffers[i]
        with torch.no_grad():
            for name, tensor in itertools.chain(agent.named_parameters(), agent.named_buffers()):
                tensor.copy_(self.tensors[name][i])
        for kind, optimizer in agent.optimizers.items():
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for parameter, name in zip(parameters, self.trained[kind], strict=True):
                state = self.optimizers[kind].state.get(self.tensors[name], {})
                own = {key: value if key == "step" else value[i] for key, value in state.items()}
                optimizer.state[parameter] = {key: value.clone() for key, value in own.items()}
        buffer.position, buffer.size = self.position, self.size
        return agent, buffer

    def gradients(self, loss: str, parameters: list, others: dict, *inputs) -> tuple[list, dict]:
        """Of each member: the gradient of its own loss by its own parameters, and its metrics. (N, ...) each."""
        names = self.trained[KINDS[loss]]

        def member_loss(own_parameters, own_others, *own_inputs):
            weights = own_others | dict(zip(names, own_parameters, strict=True))
            return functional_call(self.agents[0], weights, (loss, *own_inputs))

        return vmap(grad(member_loss, has_aux=True))(parameters, others, *inputs)

    def descend(self, loss: str, *inputs) -> dict:
        """One step of each member down its own loss; returns the metrics."""
        kind = KINDS[loss]
        names = self.trained[kind]
        parameters = [self.tensors[name] for name in names]
        others = {name: tensor for name, tensor in self.tensors.items() if name not in names}
        with self.own_pave_losses():
            gradients, metrics = self.gradients(loss, parameters, others, *inputs)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizers[kind].step()
        self.optimizers[kind].zero_grad()
        return metrics

    @contextlib.contextmanager
    def own_pave_losses(self):
        """The script's losses call Member.pave_losses in here."""
        before, self.script.pave_losses = self.script.pave_losses, self.pave_losses
        try:
            yield
        finally:
            self.script.pave_losses = before

    @torch.no_grad()  # torch.func.grad takes its own
    def update(self, batch, update_actor: bool) -> dict:
        """One update of each member from its own minibatch (N, B, ...) and `noise`, in the order of Agent.update."""
        agent, tensors, noise = self.agents[0], self.tensors, self.noise
        state_noise, probe = agent.mpr_sigma * noise["state"], 2 * noise["probe"] - 1
        metrics = self.descend("critic_loss", batch, noise["target"], state_noise, probe)
        if self.args.autotune_curv:
            agent.curv_autotuner.step(tensors["lambda_curv"], tensors["gradient_scale"], metrics)
        if update_actor:
            metrics |= self.descend("actor_loss", batch, *[noise["actor"]] * self.actor_takes_noise)
        if update_actor or "actor_target.net.0.weight" not in tensors:  # TD3's targets wait for its actor
            torch._foreach_lerp_(self.targets, self.sources, self.args.tau)
        return metrics

    # -------------------------------------------------------------------------------------- a step, draws as train()'s

    def to_device(self, *names: str) -> None:
        for name in names:
            self.noise[name].copy_(self.drawn[name], non_blocking=True)

    def learn(self, update_actor: bool) -> None:
        """Draw each member's minibatch and noise from its own generator, in the order of Agent.update; update."""
        drawn = self.drawn
        for i, generator in enumerate(self.generators):
            drawn["index"][i].random_(0, self.size, generator=generator)
            drawn["target"][i].normal_(generator=generator)
            drawn["state"][i].normal_(generator=generator)
            drawn["probe"][i].random_(0, 2, generator=generator)
            if update_actor and self.actor_takes_noise:
                drawn["actor"][i].normal_(generator=generator)
        self.to_device("index", "target", "state", "probe", "actor")
        rows = self.rows.flatten(0, 1)[self.noise["index"] + self.offsets]  # (N, B, width)
        *parts, rewards, terminations = rows.split(self.widths, dim=2)
        batch = self.script.Batch(*parts, rewards.squeeze(2), terminations.squeeze(2))
        self.metrics |= self.fast_update(batch, update_actor)

    def actor_weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith("actor.")}

    @torch.no_grad()
    def explore(self) -> np.ndarray:
        """An action (d_a,) of each member, in [-1, 1]."""
        for i, generator in enumerate(self.generators):
            self.drawn["action"][i].normal_(generator=generator)
        self.to_device("action")
        observations = torch.as_tensor(self.observations, dtype=self.rows.dtype).to(self.device, non_blocking=True)
        act = vmap(lambda *member: functional_call(self.agents[0], member[0], ("act", *member[1:])))
        return act(self.actor_weights(), observations, self.noise["action"]).cpu().numpy()

    def start_episodes(self) -> None:
        seeds = [None] * len(self.over)
        for i in np.flatnonzero(self.over):
            seeds[i] = int(torch.randint(2**20, 2**31, (), generator=self.generators[i]))
        self.observations, info = self.envs.reset(seed=seeds, options={"reset_mask": self.over})
        self.note_failures(info)
        self.returns[self.over], self.lengths[self.over], self.over[:] = 0, 0, False

    def note_failures(self, info: dict) -> None:
        for i, failed in enumerate(info.get("failed", ())):
            if failed:
                self.lose(i, f"the env failed ({failed})")

    def lose(self, i: int, why: str) -> None:
        """Leave a member out from now on."""
        self.lost.setdefault(i, f"step {self.step:,}: {why}")

    def alive(self) -> list[int]:
        return [i for i in range(len(self.settings)) if i not in self.lost]

    def begin_step(self) -> None:
        """Each member acts, and learns while its env steps."""
        if self.over.any():
            self.start_episodes()
        if self.step < self.args.learning_starts:
            draws = [torch.rand(self.drawn["action"].shape[1], generator=generator) for generator in self.generators]
            self.actions = 2 * torch.stack(draws).numpy() - 1
        else:
            self.actions = self.explore()
        for i in self.alive():
            if not np.isfinite(self.actions[i]).all():
                self.lose(i, "training diverged (a NaN action)")
        self.actions[list(self.lost)] = np.nan  # stands still
        self.envs.step_async(self.actions)
        if self.step >= self.args.learning_starts:
            self.learn((self.step + 1) % self.args.policy_frequency == 0)

    def end_step(self) -> None:
        """The transitions; `over` then says whose episode ended, with `returns` and `lengths`."""
        next_observations, rewards, terminations, truncations, info = self.envs.step_wait()
        self.note_failures(info)
        columns = self.observations, next_observations, self.actions, rewards[:, None], terminations[:, None]
        rows = np.concatenate(columns, axis=1, dtype=np.float32)
        self.rows[:, self.position].copy_(torch.from_numpy(rows), non_blocking=True)
        self.position = (self.position + 1) % self.args.buffer_size
        self.size = min(self.size + 1, self.args.buffer_size)
        self.observations, self.over = next_observations, terminations | truncations
        self.over[list(self.lost)] = False
        self.returns += rewards
        self.lengths += 1
        self.step += 1

    def read_metrics(self) -> list[dict[str, float]]:
        """The last metrics of each member, in one transfer; a member whose critic's loss is not finite is lost."""
        values = torch.stack(list(self.metrics.values()), dim=1).tolist()
        scalars = [dict(zip(self.metrics, row, strict=True)) for row in values]
        for i in self.alive():
            if not np.isfinite(scalars[i]["losses/qf_loss"]):
                self.lose(i, f"training diverged ({scalars[i]})")
        return scalars

    def evaluate(self) -> list[dict | None]:
        """script.evaluate of each member in its worker process, all at once; None where it is lost."""
        weights = [{} for _ in self.settings]
        for name, tensor in self.actor_weights().items():
            for own, weight in zip(weights, tensor.cpu().numpy(), strict=True):
                own[name.removeprefix("actor.")] = weight
        for i in self.lost:
            weights[i] = None
        self.envs.set_attr("weights", weights)
        evaluations = list(self.envs.call("evaluate", self.args.eval_episodes))
        self.note_failures({"failed": [e and e.get("failed") for e in evaluations]})
        return [None if i in self.lost else evaluation for i, evaluation in enumerate(evaluations)]

    def close(self) -> None:
        self.envs.close(terminate=True)  # also where a worker died or has not answered
        self.env.close()


# ----------------------------------------------------------------------------------------------------- the run folders


class Runs:
    """A population with the run folder of each member: curves, checkpoints, summary.json."""

    def __init__(self, script, starts: list[Start], device: torch.device):
        self.script, self.names = script, [start.name for start in starts]
        settings, checkpoints = [start.args for start in starts], [start.checkpoint for start in starts]
        self.folders, self.locks, self.writers = [], [], []
        self.population = population = Population(script, settings, device, checkpoints)
        self.start = self.saved_at = population.step
        self.began, self.told = time.time(), set()
        self.evaluations, self.last_returns = [None] * len(starts), {}
        for args in settings:
            folder, lock = script.open_run_folder(args)
            writer = SummaryWriter(folder, purge_step=self.start + 1)
            writer.add_text("hyperparameters", f"```\n{json.dumps(asdict(args), indent=2)}\n```")
            self.folders.append(folder)
            self.locks.append(lock)
            self.writers.append(writer)

    def is_over(self) -> bool:
        return self.population.step >= self.population.args.total_timesteps or not self.population.alive()

    def steps_per_second(self) -> float:
        return (self.population.step - self.start) / max(time.time() - self.began, 1e-9)

    def end_step(self) -> None:
        """As train() does after the env's step: curves, evaluation, checkpoint."""
        population = self.population
        population.end_step()
        args, step = population.args, population.step
        scalars = [{} for _ in self.names]
        if population.metrics and step % self.script.LOG_INTERVAL == 0:
            for own, metrics in zip(scalars, population.read_metrics(), strict=True):
                own |= metrics | {"charts/SPS": self.steps_per_second()}
        if args.eval_episodes and (step % args.eval_interval == 0 or step == args.total_timesteps):
            self.evaluations = population.evaluate()
            for own, evaluation in zip(scalars, self.evaluations, strict=True):
                if evaluation:
                    own["eval/return"] = evaluation["return_mean"]
                    own["eval/smoothness"] = evaluation["smoothness_mean"]
                    own["eval/oscillation"] = evaluation["oscillation"]
                    own["eval/length"] = evaluation["length_mean"]
        for i in np.flatnonzero(population.over):
            self.last_returns[i] = population.returns[i]
            scalars[i]["charts/episodic_return"] = population.returns[i]
            scalars[i]["charts/episodic_length"] = population.lengths[i]
        for i in population.alive():
            for tag, scalar in scalars[i].items():
                self.writers[i].add_scalar(tag, scalar, step)
        if step % args.checkpoint_interval == 0:
            self.save()
        self.tell_lost()

    def tell_lost(self) -> None:
        for i in self.population.lost.keys() - self.told:
            self.told.add(i)
            reason = self.population.lost[i]
            (self.folders[i] / "lost.json").write_text(json.dumps({"reason": reason}) + "\n")
            tqdm.write(f"{self.names[i]} is left out, {reason}", sys.stderr)

    def save(self) -> None:
        """A checkpoint of each member: its own generator takes the place of the global one, which the script saves."""
        population = self.population
        for i in population.alive() if population.step > self.saved_at else ():
            agent, buffer = population.member(i)
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(population.generators[i].get_state())
                try:
                    self.script.save_checkpoint(self.folders[i], population.step, agent, buffer, population.env)
                except USER_ERRORS as error:
                    if self.script.DIVERGED not in str(error):
                        raise
                    population.lose(i, "training diverged (NaN weight)")
        self.saved_at = population.step
        self.tell_lost()

    def finish(self) -> None:
        """The last checkpoint and summary.json of each member."""
        population = self.population
        self.save()
        if population.args.eval_episodes and self.evaluations == [None] * len(self.names):  # killed before its summary
            self.evaluations = population.evaluate()
            self.tell_lost()
        for i in population.alive():
            args, folder = population.settings[i], self.folders[i]
            summary = asdict(args) | {"algorithm": self.script.SCRIPT, "steps": population.step, "origin": None}
            summary |= {"steps_per_second": self.steps_per_second()} | (self.evaluations[i] or {})
            if args.autotune_curv:
                weight = population.tensors["lambda_curv"][i] * population.tensors["gradient_scale"][i]
                summary["curv_weight_found"] = weight.item()
            (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        for resource in (*self.writers, self.population, *self.locks):
            resource.close()


def train(runs: list[Runs]) -> None:
    """Every step of all groups; SystemExit(128 + signal) once Ctrl-C or SIGTERM is saved."""
    script, unfinished = runs[0].script, list(runs)
    total = sum(len(group.names) * group.population.args.total_timesteps for group in runs)
    initial = sum(len(group.names) * group.start for group in runs)
    bar = tqdm(total=total, initial=initial, unit="agent-step", unit_scale=True, file=sys.stdout, disable=None)

    def state() -> str:
        alive = sum(len(group.population.alive()) for group in runs)
        returns = [value for group in runs for i, value in group.last_returns.items() if i in group.population.alive()]
        rate = sum(len(group.population.alive()) * group.steps_per_second() for group in unfinished)
        return f"{alive} members, {rate:.0f} agent-steps/s, median return {np.median(returns or [np.nan]):.1f}"

    try:
        with script.StopSignals() as stop_signals, script.saving_if_it_fails(lambda: [group.save() for group in runs]):
            while unfinished and not stop_signals:
                for group in [group for group in unfinished if group.is_over()]:
                    group.finish()
                    unfinished.remove(group)
                for group in unfinished:
                    group.population.begin_step()
                for group in unfinished:
                    group.end_step()
                    bar.update(len(group.population.alive()))
                if unfinished:
                    first = unfinished[0].population
                    if first.step % first.args.eval_interval == 0:
                        tqdm.write(f"step {first.step:,}: {state()}")
                        sys.stdout.flush()
                    elif first.step % script.LOG_INTERVAL == 0:
                        bar.set_postfix_str(state(), refresh=False)
            for group in unfinished:
                group.save()
        if unfinished:
            tqdm.write(f"stopped at step {max(g.population.step for g in unfinished):,}; the same command goes on")
            raise SystemExit(128 + stop_signals[0])
    finally:
        bar.close()


def main(args: Args, common) -> None:
    script, groups, before = SCRIPTS[args.script], {}, []
    members = make_members(args, common)
    for name, settings in members.items():
        start = find_start(script, name, settings)
        if isinstance(start, str):
            tqdm.write(start)
            before.append("lost before" in start)
        else:
            groups.setdefault(group_of(script, start), []).append(start)
    device, runs = script.set_up_torch(common), []
    try:
        for starts in groups.values():
            runs.append(Runs(script, starts, device))
            starts[:] = [None] * len(starts)  # their checkpoints hold replay buffers
        if runs:
            sizes = " + ".join(str(len(starts)) for starts in groups.values())
            tqdm.write(f"{sizes} members" + "; the first updates wait for torch.compile" * common.compile)
            train(runs)
    finally:
        for group in runs:
            group.close()
    lost = sum(before) + sum(len(group.population.lost) for group in runs)
    tqdm.write(f"{len(members) - lost} of {len(members)} members are finished, in {args.output_dir}")
    if lost:
        sys.exit(1)


def parse_args() -> tuple:
    """The population's own flags; all others are the script's."""
    args, flags = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    return args, tyro.cli(SCRIPTS[args.script].Args, args=flags)


if __name__ == "__main__":
    with user_errors():
        main(*parse_args())
