"""Is PAVE right on your critic? Most of what can go wrong is silent: the losses fall, and the gradients are not theirs.

    from benchmarks.check_critic import check_critic
    check_critic(critic, observations, actions)                                        # critic(s, a) -> (B,)
    check_critic(lambda s, a: twins(s, a)[0].squeeze(-1), observations, actions, twins)

    python benchmarks/check_critic.py my_module:my_function    # which returns these arguments; exit code 1: not right

Give it the critic in the mode that it is trained in, and some 64 replayed rows. Six checks, all in float64; each prints
"ok" and by how much it is off, or "FAILS" with the likely cause and its cure.
"""

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and benchmarks/ are files, not packages

from sac_pave_continuous import action_gradient, pave_losses, rademacher_like

SIGMA, STEP, DIRECTIONS, TOLERANCE = 0.01, 1e-6, 3, 1e-4  # true critics stay below 1e-6, torch's LayerNorm is at 1e-1
TERMS = ("mpr", "vfc", "curvature")
GROUP_NORM = "nn.GroupNorm(1, H), the same function as nn.LayerNorm(H) and with the same state_dict"
CURES = {  # in the order of the checks
    "actions are in [-1, 1]": "they are in the env's units, by which every term is scaled; divide by the bounds",
    "the same call twice gives the same": "dropout or other noise, which MPR would measure; take it out of the critic",
    "a row alone is as in its batch": f"batch norm, whose rows depend on each other; use {GROUP_NORM}",
    "MPR is 0 at sigma = 0": f"noise or batch statistics; take out dropout, and for batch norm use {GROUP_NORM}",
    "v^T H v is not 0 everywhere": "ReLU or another kinked activation, which Curv can't bend; use SiLU, GELU or tanh",
    "mpr's gradient is its central difference": f"a kink, a detach or a hand-written backward pass; use SiLU, {GROUP_NORM}",
    "vfc's gradient is its central difference": f"a kink, a detach or a hand-written backward pass; use SiLU, {GROUP_NORM}",
    "curvature's gradient is its central difference": (
        "nn.LayerNorm or F.layer_norm, whose third derivative is wrong in torch (pytorch#175754), batch norm, or a "
        f"hand-written backward pass; use {GROUP_NORM}"
    ),
    "compiled equals eager": "an autograd.Function of your own; write it in plain operations, or go without compile",
}
