"""CAPS, the policy-side rival of PAVE (Mysore et al. 2021, arXiv 2012.06644), on the scripts' own SAC and TD3.

    python benchmarks/caps.py sac_pave_continuous --env-id Pendulum-v1 --seed 1

trains the plain algorithm (the critic's lambdas are 0) with two terms added to the actor's loss, pi(s) the
deterministic action in [-1, 1]:

    temporal  lambda_T 1/2 mean (pi(s) - pi(s'))^2                            s' the replayed next state
    spatial   lambda_S 1/2 mean (pi(s) - pi(s + e))^2,  e ~ N(0, sigma^2 I)

Means are over the batch and the action dimensions; gradients flow through both actions. Takes every flag of the script
(`python sac_pave_continuous.py --help`), --resume included, and makes the same run folder with caps.json in it: the
weights and sigma. Go on with a CAPS run through this file: the script alone would resume it without the two terms.
"""

import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal
from unittest import mock

import torch
import tyro
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and benchmarks/ are files, not packages

from benchmarks.evaluate import SCRIPTS, UserError, user_errors

WEIGHTS = {"Pendulum": (1.0, 5.0)}  # (lambda_T, lambda_S) by env; any other env takes the next line
DEFAULT_WEIGHTS = (0.1, 0.5)
SIGMA = 0.2


@dataclass
class Args:
    script: Annotated[Literal["sac_pave_continuous", "td3_pave_continuous"], tyro.conf.Positional]
    """the algorithm; all flags but the ones below are its own"""
    caps_temporal: float | None = None
    """lambda_T; None: 1.0 on Pendulum, else 0.1"""
    caps_spatial: float | None = None
    """lambda_S; None: 5.0 on Pendulum, else 0.5"""
    caps_sigma: float | None = None
    """standard deviation of the spatial term's noise, in the observation's own units; None: 0.2"""


def settings(args: Args, env_id: str, saved: dict | None = None) -> dict[str, float]:
    """What caps.json holds: the flags, or else what is `saved`, or else the env's defaults; UserError if senseless."""
    weights = WEIGHTS.get(re.sub(r"-v\d+$", "", env_id), DEFAULT_WEIGHTS)
    caps = dict(zip(("caps_temporal", "caps_spatial", "caps_sigma"), (*weights, SIGMA), strict=True)) | (saved or {})
    caps |= {name: getattr(args, name) for name in caps if getattr(args, name, None) is not None}
    for name, value in caps.items():
        if not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 0 or a positive number")
    return caps


def caps_loss(actor, observations, next_observations, noise, temporal: float, spatial: float):
    """The two terms, weighted and summed: s, s' (B, d_s), noise e (B, d_s), actor (B, d_s) -> (B, d_a); a scalar."""
    states = torch.cat([observations, next_observations, observations + noise])
    actions, next_actions, near_actions = actor(states).chunk(3)
    return 0.5 * (temporal * F.mse_loss(actions, next_actions) + spatial * F.mse_loss(actions, near_actions))


def train(script: ModuleType, args, caps: dict[str, float]) -> Path:
    """script.train(args) with CAPS in the actor's loss; args: script.Args without PAVE, caps: see `settings`."""
    args = replace(args, **{name: getattr(args, name) or 0.0 for name in script.LAMBDAS})
    if args.autotune_curv or any(getattr(args, name) for name in script.LAMBDAS):
        raise UserError("CAPS leaves the critic plain: no --autotune-curv, and the three lambdas must be 0")
    temporal, spatial, sigma = caps["caps_temporal"], caps["caps_spatial"], caps["caps_sigma"]
    make_plain_run_dir = script.make_run_dir

    class CapsAgent(script.Agent):
        def actor_loss(self, batch: tuple, *noise):
            """The script's actor loss plus the CAPS terms; and what the script returns besides."""
            loss, more = super().actor_loss(batch, *noise)
            if temporal or spatial:  # else no noise is drawn: the plain algorithm, bit for bit
                near = sigma * torch.randn_like(batch[0])
                loss = loss + caps_loss(self.actor, *batch[:2], near, temporal, spatial)
            return loss, more

    def make_run_dir(args) -> Path:
        run_dir = make_plain_run_dir(args)
        (run_dir / "caps.json").write_text(json.dumps(caps, indent=2) + "\n")
        return run_dir

    with mock.patch.multiple(script, Agent=CapsAgent, make_run_dir=make_run_dir):
        return script.train(args)


def main() -> None:
    args, script_flags = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    script = SCRIPTS[args.script]
    sys.argv[1:] = script_flags  # the script reads its own flags, and its settings again where it resumes
    script_args, saved = script.parse_args(), None
    if script_args.resume:
        file = Path(script_args.resume).with_name("caps.json")
        if not file.is_file():
            raise UserError(f"--resume {script_args.resume} is no CAPS run: it has no {file.name} beside it")
        saved = json.loads(file.read_text())
    train(script, script_args, settings(args, script_args.env_id, saved))


if __name__ == "__main__":
    with user_errors():
        main()
