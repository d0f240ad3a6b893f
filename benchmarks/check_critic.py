"""Is PAVE right on your critic? What goes wrong is mostly silent: the losses fall, but the gradients aren't theirs.

    from benchmarks.check_critic import check_critic
    check_critic(critic, observations, actions)                                             # critic(s, a) returns (B,)
    check_critic(twins, observations, actions, lambda twins, s, a: twins(s, a)[0].squeeze(-1))              # any other

    python -m benchmarks.check_critic my_module:my_function    # which returns those arguments; exit code 1 if one fails

Give it the critic in the mode that it trains in, train() or eval(), and some 64 replayed rows. It works in float64 on a
copy. Each check prints "ok" or "FAILS" and a relative error; where it fails, the likely cause and the cure.
"""

import copy
import pkgutil
import sys
from functools import partial

import torch
import tyro
from torch import nn

from benchmarks.common import UserError, user_errors
from sac_pave_continuous import action_gradient, pave_losses, rademacher_like

SIGMA, STEP, TOLERANCE = 0.01, 1e-5, 1e-4  # right critics are below 1e-6, nn.LayerNorm is above 1e-2
GROUP_NORM = "take nn.GroupNorm(1, H), nn.LayerNorm(H)'s function with the same state_dict"
DETACHED = "a detached tensor, ReLU or a backward pass by hand: take plain operations and nn.SiLU"
FUSED = f"nn.LayerNorm, whose third derivative torch gets wrong (pytorch#175754): {GROUP_NORM}"


def check_critic(critic: nn.Module, observations, actions, forward=nn.Module.__call__, compile: bool = True) -> bool:
    """Whether PAVE is right for q(s, a) = forward(critic, s, a) -> (B,) at these (B, d_s) and (B, d_a), and for the
    parameters of the critic. compile: check torch.compile, too, which takes some 10 s.
    """
    critic, s, a = copy.deepcopy(critic).double(), observations.detach().double(), actions.detach().double()
    parameters = [p for p in critic.parameters() if p.requires_grad]
    all_hold = True
    try:
        for name, error, cause in checks(partial(forward, critic), parameters, s, a, compile):
            holds = error.item() < TOLERANCE  # NaN doesn't hold
            told = f"{name} ({error.item():.0e})"
            print(f"ok    {told}" if holds else f"FAILS {told}\n      likely {cause}")
            all_hold &= holds
    except Exception as error:  # anyone's critic may raise anything
        print(f"FAILS {type(error).__name__}: {error}\n      an in-place operation is batch norm's: {GROUP_NORM}")
        return False
    return all_hold


def checks(q, parameters, s, a, compile):
    """Yield for each check its name, the relative error, and what is likely the cause where that is not about 0."""
    next_s, noise, v = s.roll(1, 0), SIGMA * torch.randn_like(s), rademacher_like(a)
    field, again = action_gradient(q, s, a)[0], action_gradient(q, s, a)[0]
    yield "the same twice", difference(again, field), "dropout, whose masks MPR measures: leave it out, or eval()"
    if difference(again, field) > TOLERANCE:
        return  # all that follows would measure the masks
    halves = torch.cat([action_gradient(q, *half)[0] for half in zip(s.chunk(2), a.chunk(2), strict=True)])
    yield "half the batch gives the same", difference(halves, field), f"batch statistics: {GROUP_NORM}"
    yield "actions are in [-1, 1]", (a.abs().max() - 1).clamp(min=0), "the env's units: rescale them for the critic"

    def losses(delta=1.0):
        return pave_losses(q, s, a, next_s, noise, v, delta)

    vhv = losses().vhv.detach().abs().max()
    yield "v^T H v is not 0", vhv <= 1e-12 * field.abs().max(), "ReLU, whose curvature stays 0: take nn.SiLU"

    def parameter_gradient(value):
        each = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return nn.utils.parameters_to_vector(each)

    weights = nn.utils.parameters_to_vector(parameters).detach()

    def value(term, shift):
        nn.utils.vector_to_parameters(weights + shift, parameters)
        return getattr(losses(1 + 2 * vhv), term)  # with this delta every row is above Curv's kink

    for term, cause in {"mpr": DETACHED, "vfc": DETACHED, "curvature": FUSED}.items():
        gradient, direction = parameter_gradient(value(term, 0)), torch.randn_like(weights)
        ends = value(term, STEP * direction), value(term, -STEP * direction)
        error = (ends[0] - ends[1]) / (2 * STEP) - gradient @ direction  # a central difference knows no autograd
        yield f"parameter gradient of {term}", error.abs() / gradient.norm().clamp(min=1e-9), cause
    if compile:
        torch.compiler.reset()  # after 8 critics torch would compile no more
        runs = torch.compile(losses, fullgraph=True), losses
        error = difference(*(parameter_gradient(sum(run()[:3])) for run in runs))
        yield "compiled equals eager", error, "an autograd.Function of yours: take plain operations, or don't compile"


def difference(left, right):
    """The largest one, relative to the largest entry."""
    return (left - right).abs().max() / right.abs().max().clamp(min=1e-12)


def main(arguments: tyro.conf.Positional[str]) -> None:
    """arguments: module:function, a function that returns check_critic's."""
    try:
        function = pkgutil.resolve_name(arguments)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot find {arguments} ({error}): give module:function") from error
    sys.exit(not check_critic(*function()))


if __name__ == "__main__":
    with user_errors():
        tyro.cli(main, description=__doc__)
