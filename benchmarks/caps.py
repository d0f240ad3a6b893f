"""CAPS, the policy-side rival of PAVE (Mysore et al. 2021, arXiv 2012.06644), on the scripts' own SAC and TD3.

    python -m benchmarks.caps sac_pave_continuous --env-id Pendulum-v1 --seed 1

trains the plain algorithm (the critic's lambdas are 0) with two terms added to the actor's loss, pi(s) the
deterministic action in [-1, 1]:

    temporal  lambda_T 1/2 mean (pi(s) - pi(s'))^2                            s' the replayed next state
    spatial   lambda_S 1/2 mean (pi(s) - pi(s + e))^2,  e ~ N(0, sigma^2 I)

Means are over the batch and the action dimensions; gradients flow through both actions. Takes every flag of the script,
--resume included, and three of its own (`python -m benchmarks.caps sac_pave_continuous --help`), and makes the same run
folder. Go on with a CAPS run through this file: the script alone does not know those three.
"""

import math
import sys
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch.nn import functional as F

import sac_pave_continuous
from benchmarks.common import SCRIPTS, require, user_errors

WEIGHTS = {"Pendulum": {"caps_temporal": 1.0, "caps_spatial": 5.0}}  # by env; any other env takes the next line
DEFAULT_WEIGHTS = {"caps_temporal": 0.1, "caps_spatial": 0.5}
# What is None, as an agent's settings are that was trained without CAPS, becomes this
DEFAULTS = {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0, "caps_sigma": 0.2}


def caps_loss(actor, observations, next_observations, noise, temporal: float, spatial: float):
    """The two terms, weighted and summed: s, s' (B, d_s), noise e (B, d_s), actor (B, d_s) -> (B, d_a); a scalar."""
    states = torch.cat([observations, next_observations, observations + noise])
    actions, next_actions, near_actions = actor(states).chunk(3)
    return 0.5 * (temporal * F.mse_loss(actions, next_actions) + spatial * F.mse_loss(actions, near_actions))


def with_caps(script: ModuleType) -> tuple[type, type]:
    """The settings and the agent of a script with CAPS: for its parse_args(settings) and train(args, agent)."""

    @dataclass
    class Args(script.Args):
        lambda_mpr: float | None = 0.0  # CAPS leaves the critic plain
        lambda_vfc: float | None = 0.0  # CAPS leaves the critic plain
        lambda_curv: float | None = 0.0  # CAPS leaves the critic plain
        caps_temporal: float | None = None  # lambda_T; None: 1.0 on Pendulum, else 0.1
        caps_spatial: float | None = None  # lambda_S; None: 5.0 on Pendulum, else 0.5
        caps_sigma: float | None = None  # std of the spatial term's noise, in the observation's own units; None: 0.2

    class Agent(script.Agent):
        def update(self, batch, update_actor: bool) -> dict:
            """As the script's; the noise is drawn here, so that compiled and eager updates draw the same."""
            self.caps_noise = None
            if update_actor and self.has_caps():
                self.caps_noise = self.args.caps_sigma * torch.randn_like(batch[0])
            return super().update(batch, update_actor)

        def has_caps(self) -> bool:
            """Without both weights no noise is drawn: the plain algorithm, bit for bit."""
            return self.args.caps_temporal > 0 or self.args.caps_spatial > 0

        def actor_loss(self, batch, *noise):
            """The script's actor loss plus the CAPS terms; and what to log."""
            loss, metrics = super().actor_loss(batch, *noise)
            if self.has_caps():
                weights = self.args.caps_temporal, self.args.caps_spatial
                caps = caps_loss(self.actor, batch.observations, batch.next_observations, self.caps_noise, *weights)
                loss, metrics = loss + caps, metrics | {"losses/caps": caps}
            return loss, metrics

    return Args, Agent


def validate(args):
    """Return args with each None weight looked up for this env; UserError on a setting that makes no sense."""
    weights = WEIGHTS.get(sac_pave_continuous.env_name(args.env_id), DEFAULT_WEIGHTS)
    require(not args.resume or args.caps_temporal is not None, "--resume is no CAPS run: give one that CAPS began")
    for name, value in (DEFAULTS | weights).items():
        if getattr(args, name) is None:  # also a lambda, after a warm start
            args = replace(args, **{name: value})
    for name in (*weights, "caps_sigma"):
        value = getattr(args, name)
        require(0 <= value < math.inf, f"--{name.replace('_', '-')} is {value}; it must be 0 or a positive number")
    plain = not (args.autotune_curv or args.lambda_mpr or args.lambda_vfc or args.lambda_curv)
    require(plain, "CAPS leaves the critic plain: no --autotune-curv, and the three lambdas must be 0")
    return args


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "nothing"
    require(name in SCRIPTS, f"give {' or '.join(SCRIPTS)} first, not {name}: flags come after it")
    settings, agent = with_caps(SCRIPTS[name])
    SCRIPTS[name].train(validate(SCRIPTS[name].parse_args(settings)), agent)


if __name__ == "__main__":
    with user_errors():
        main()
