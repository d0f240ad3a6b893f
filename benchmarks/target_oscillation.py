"""An experiment: the weight of MPR and VFC tuned towards a change of action a step that a robot's user can state.

    python benchmarks/target_oscillation.py td3_pave_continuous --target-oscillation 0.15 --env-id Pendulum-v1

trains with --autotune-curv (lambda_curv finds itself) and, besides, multiplies --lambda-mpr and --lambda-vfc by e^m:

    m += 0.001 clip(osc / target - 1, -1, 1),  osc = mean |pi(s') - pi(s)| on the minibatch, e^m in [0.01, 300]

osc and the target are in the env's own action units, as oscillation in summary.json. Takes every flag of the script but
--resume, and logs losses/lambda_factor and geometry/oscillation. Whether it earns a place in the scripts is still to be
measured.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and benchmarks/ are files, not packages

from benchmarks.evaluate import SCRIPTS, UserError, user_errors

RATE, BOUNDS = 0.001, (0.01, 300.0)


@dataclass
class Args:
    script: Annotated[Literal["sac_pave_continuous", "td3_pave_continuous"], tyro.conf.Positional]
    """the algorithm; all flags but the one below are its own"""
    target_oscillation: float
    """mean |a_t+1 - a_t| to reach, in the env's own action units"""


def train(script, args, target: float) -> Path:
    """script.train(args) with the factor e^m; UserError for a target that no policy can have, or a resumed run."""
    if not 0 < target < math.inf:
        raise UserError(f"--target-oscillation is {target}; it must be a positive number")
    if args.resume:
        raise UserError("--resume would go on without the factor: start a new run")
    with script.make_env(args.env_id) as env:
        half_range = torch.from_numpy(env.env.action_space.high - env.env.action_space.low) / 2
    plain_losses, log_factor = script.pave_losses, None

    def pave_losses(*inputs):
        losses, factor = plain_losses(*inputs), log_factor.exp().squeeze()
        return losses._replace(mpr=factor * losses.mpr, vfc=factor * losses.vfc)

    class TargetAgent(script.Agent):
        def __init__(self, *inputs):
            nonlocal log_factor
            super().__init__(*inputs)
            log_factor, self.half_range = torch.zeros(1, device=self.device), half_range.to(self.device)

        def update(self, batch: tuple, update_actor: bool) -> dict:
            """The script's update, then a step of m."""
            metrics = super().update(batch, update_actor)
            oscillation = ((self.actor(batch[1]) - self.actor(batch[0])).abs() * self.half_range).mean()
            log_factor.add_(RATE * (oscillation / target - 1).clamp(-1, 1)).clamp_(*map(math.log, BOUNDS))
            return metrics | {"losses/lambda_factor": log_factor.exp()[0], "geometry/oscillation": oscillation}

    with mock.patch.multiple(script, Agent=TargetAgent, pave_losses=pave_losses):
        # cudagraphs: a step of m outside of what the tests record has never been run as a graph
        return script.train(replace(args, autotune_curv=True, cudagraphs=False))


def main() -> None:
    args, script_flags = tyro.cli(Args, description=__doc__, return_unknown_args=True)
    script = SCRIPTS[args.script]
    sys.argv[1:] = script_flags  # the script reads its own flags
    train(script, script.parse_args(), args.target_oscillation)


if __name__ == "__main__":
    with user_errors():
        main()
