"""Is PAVE right on your critic? Most of what can go wrong is silent: the losses fall, but the gradients aren't theirs.

    from benchmarks.check_critic import check_critic
    check_critic(critic, observations, actions)                                            # critic(s, a) -> (B,)
    check_critic(lambda s, a: twins(s, a)[0].squeeze(-1), observations, actions, twins)    # a function of a module

    python benchmarks/check_critic.py my_module:my_function    # returns those arguments; exit code 1 where one fails

Give it the critic in the mode that it trains in (train() or eval()), and some 64 replayed rows. All is in float64. Each
check prints "ok" and the largest relative error, or "FAILS", the likely cause and its cure.
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

from sac_pave_continuous import action_gradient, hutchinson_trace, pave_losses, rademacher_like

SIGMA, STEP, DIRECTIONS, TOLERANCE = 0.01, 1e-5, 3, 1e-4  # right critics are below 1e-6, nn.LayerNorm is above 1e-2
REPEATS = "the same call twice gives the same"
GROUP_NORM = "nn.GroupNorm(1, H), the same function as nn.LayerNorm(H) with the same state_dict"
CAUSES = {
    "actions are in [-1, 1]": "they are in the env's units, which scale every term; rescale them for the critic",
    REPEATS: f"dropout, which MPR would measure, or batch norm's running statistics; leave it out, or use {GROUP_NORM}",
    "a row alone is as in its batch": f"batch norm or other batch statistics; use {GROUP_NORM}",
    "MPR is 0 at sigma = 0": f"batch norm or other batch statistics; use {GROUP_NORM}",
    "v^T H v is not 0 everywhere": "ReLU or other straight pieces, whose curvature nothing can change; use nn.SiLU",
    "gradient of mpr": "ReLU, a detached tensor or a backward pass written by hand; use nn.SiLU and plain operations",
    "gradient of vfc": "ReLU, a detached tensor or a backward pass written by hand; use nn.SiLU and plain operations",
    "gradient of curvature": f"nn.LayerNorm, whose 3rd derivative torch gets wrong (pytorch#175754); use {GROUP_NORM}",
    "compiled equals eager": "a custom autograd.Function, or no C++ compiler; use plain operations, or don't compile",
}


def check_critic(
    q: Callable,
    observations: torch.Tensor,
    actions: torch.Tensor,
    module: nn.Module | None = None,
    compile: bool = True,
) -> bool:
    """Whether PAVE's losses and their gradients are right for the critic q(s, a) -> (B,) at these (B, d_s), (B, d_a).

    module: whose parameters q uses, where q is a mere function: float64 during the call, then as before. A q that is a
    module is copied. compile: also check torch.compile, which takes some 10 s.
    """
    if isinstance(q, nn.Module):
        q = module = copy.deepcopy(q)
    if module is None:
        raise TypeError("q is no nn.Module: pass the module that it uses, check_critic(q, s, a, module)")
    before = {tensor: tensor.data for tensor in (*module.parameters(), *module.buffers())}
    parameters = [p for p in module.parameters() if p.requires_grad]
    s, a = observations.detach().double(), actions.detach().double()
    noise, v, next_s = SIGMA * torch.randn_like(s), rademacher_like(a), s.roll(1, 0)

    def field(s, a):
        return action_gradient(q, s, a)[0]

    def losses(delta=1.0, noise=noise):
        return pave_losses(q, s, a, next_s, noise, v, delta)

    def parameter_gradient(value):
        each = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in each])

    def curvature():
        return hutchinson_trace(q, s, a, v)[0].detach().abs().max()

    def gradient_error(term):
        """Against central differences of the term's value: they share nothing with autograd's way to the parameters."""
        delta = 1 + 2 * curvature()  # every row above Curv's kink, where it has no derivative
        gradient, values = parameter_gradient(getattr(losses(delta), term)), nn.utils.parameters_to_vector(parameters)
        errors = []
        for direction in torch.randn(DIRECTIONS, len(values), device=values.device, dtype=values.dtype):
            ends = []
            for step in (STEP, -STEP):
                nn.utils.vector_to_parameters(values.detach() + step * direction, parameters)
                ends.append(getattr(losses(delta), term).detach())
            nn.utils.vector_to_parameters(values.detach(), parameters)
            errors.append(((ends[0] - ends[1]) / (2 * STEP) - gradient @ direction).abs())
        return max(errors) / gradient.norm().clamp(min=1e-9)  # the norm: what gradient @ direction is on average

    def compiled_error():
        torch.compiler.reset()  # after 8 critics torch would no longer compile, and say nothing
        compiled, eager = torch.compile(losses, fullgraph=True)(), losses()
        gradients = [parameter_gradient(sum(terms[:3])) for terms in (compiled, eager)]
        return max(difference(*pair) for pair in (*zip(compiled, eager, strict=True), gradients))

    checks = (
        lambda: (a.abs().max() - 1).clamp(min=0),
        lambda: difference(field(s, a), field(s, a)),
        lambda: difference(torch.cat([field(*row) for row in zip(s.split(1), a.split(1), strict=True)]), field(s, a)),
        lambda: losses(noise=torch.zeros_like(s)).mpr / field(s, a).square().mean(),
        lambda: curvature() <= 1e-12 * field(s, a).abs().max(),
        *(lambda term=term: gradient_error(term) for term in ("mpr", "vfc", "curvature")),
        compiled_error,
    )
    all_hold = True
    try:
        for tensor, data in before.items():
            tensor.data = data.double() if data.is_floating_point() else data.clone()
        for (name, cause), check in zip(CAUSES.items(), checks, strict=True):
            if check is compiled_error and not compile:
                continue
            try:
                error = float(torch.as_tensor(check()).detach())
                holds, said = error < TOLERANCE, f"{error:.0e}"
            except Exception as exception:  # anyone's critic may raise anything
                holds, said = False, f"{type(exception).__name__}: {' '.join(str(exception).split())[:200]}"
            print(f"{'ok   ' if holds else 'FAILS'} {name} ({said})" + ("" if holds else f"\n      likely {cause}"))
            all_hold = all_hold and holds
            if name == REPEATS and not holds:
                break  # all that follows would measure the noise
    finally:
        for tensor, data in before.items():
            tensor.data = data
    return all_hold


def difference(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The largest one, relative to the largest entry."""
    return (left - right).abs().max() / right.abs().max().clamp(min=1e-12)


def main(critic: tyro.conf.Positional[str]) -> None:
    """critic: module:function, the function without arguments; it returns check_critic's."""
    module, _, function = critic.partition(":")
    sys.path.insert(0, "")
    if not check_critic(*getattr(importlib.import_module(module), function)()):
        sys.exit(1)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
