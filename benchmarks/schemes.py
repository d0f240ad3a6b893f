"""Ways to differentiate PAVE's critic loss for the twin critics, and what the fastest for this very MLP would gain.

    python benchmarks/schemes.py
    python benchmarks/schemes.py --threads 1

Schemes, by how they get v^T (d2Q/da2) v and the action gradients at (s, a), (s + e, a) and (s', a):
    reverse over reverse   torch.func.grad twice: the scripts' own pave_losses
    forward over reverse   torch.func.jvp of torch.func.grad, along v
    nested jvp             torch.func.jvp of torch.func.jvp, along v; torch.func.grad for the gradients
    closed form            the derivatives of a SiLU MLP with two hidden layers, written out: fits no other critic

Each for the twins as two calls, or stacked: one call on both critics' parameters (torch.vmap; the closed form with
torch.baddbmm); eager and compiled. First the parameter gradients of each, eager in float64 and then as timed, are
compared with those of pave_losses, eager in float64; "fails" is what differs, or torch can't run. Then the sides take
turns: TD loss and the three terms of both critics, forward and backward, the TD target given; sizes and floor as in
throughput.py. Prints a table, writes schemes.csv and schemes.json.
"""

import copy
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from torch.func import functional_call, jvp, stack_module_state
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and benchmarks/ are files, not packages

from benchmarks.evaluate import user_errors
from benchmarks.throughput import Row, Settings, floor, milliseconds, prepare, rows, table, write
from sac_pave_continuous import PaveLosses, QNetwork, action_gradient, pave_losses, rademacher_like

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the gradients, relative to the largest
OWN = "reverse over reverse, two calls, compiled"  # what the scripts do


def losses(trace, gradients, q_values, delta) -> PaveLosses:
    """From v^T (d2Q/da2) v (..., B), grad_a Q at the three points (..., 3B, d_a) and Q (..., B), each with (...)."""
    gradient, noisy_gradient, next_gradient = gradients.chunk(3, dim=-2)
    return PaveLosses(
        mpr=(noisy_gradient - gradient).square().mean((-2, -1)),
        vfc=(next_gradient - gradient).square().mean((-2, -1)),
        curvature=torch.relu(trace + delta).mean(-1),
        trace=trace,
        gradient=gradient,
        q_values=q_values,
    )


def three_points(s, a, next_s, state_noise):
    return torch.cat([s, s + state_noise, next_s]), torch.cat([a, a, a])


def forward_over_reverse(q, s, a, next_s, state_noise, probe, delta) -> PaveLosses:
    (gradient, q_values), (hessian_times_probe, _) = jvp(lambda a: action_gradient(q, s, a), (a,), (probe,))
    others = action_gradient(q, torch.cat([s + state_noise, next_s]), torch.cat([a, a]))[0]
    return losses((hessian_times_probe * probe).sum(-1), torch.cat([gradient, others]), q_values, delta)


def nested_jvp(q, s, a, next_s, state_noise, probe, delta) -> PaveLosses:
    trace = jvp(lambda a: jvp(lambda a: q(s, a), (a,), (probe,))[1], (a,), (probe,))[1]
    gradients, q_values = action_gradient(q, *three_points(s, a, next_s, state_noise))
    return losses(trace, gradients, q_values[: len(s)], delta)


def closed_form(q, s, a, next_s, state_noise, probe, delta) -> PaveLosses:
    """q: a QNetwork, or its parameters w1 (..., h, d_s + d_a), b1 (..., h), w2, b2, w3, b3.

    Taylor mode: with f = SiLU and w1_a the action columns, the second coefficient of Q along v is
    w3 f''(z2) (w2 f'(z1) w1_a v)^2 + dQ/dh1 f''(z1) (w1_a v)^2: one matmul besides those of the action gradients.
    """
    w1, b1, w2, b2, w3, b3 = q.parameters() if isinstance(q, torch.nn.Module) else q

    def linear(x, w, b):
        return F.linear(x, w, b) if w.dim() == 2 else torch.baddbmm(b[:, None], x.expand(2, *x.shape[-2:]), w.mT)

    def silu(z):
        sigmoid = torch.sigmoid(z)
        return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))

    def second_derivative(z):
        sigmoid = torch.sigmoid(z)
        return sigmoid * (1 - sigmoid) * (2 + z * (1 - 2 * sigmoid))

    z1 = linear(torch.cat(three_points(s, a, next_s, state_noise), dim=-1), w1, b1)
    h1, slope1 = silu(z1)
    z2 = linear(h1, w2, b2)
    h2, slope2 = silu(z2)
    by_h1 = (w3 * slope2) @ w2  # dQ/dh1
    w1_a, n = w1[..., s.shape[-1] :], len(s)
    gradients = (by_h1 * slope1) @ w1_a

    z1, z2, h2, by_h1, slope1 = (at_all[..., :n, :] for at_all in (z1, z2, h2, by_h1, slope1))  # now at (s, a) only
    tangent1 = probe @ w1_a.mT
    tangent2 = (slope1 * tangent1) @ w2.mT
    trace = (w3 * second_derivative(z2) * tangent2**2 + by_h1 * second_derivative(z1) * tangent1**2).sum(-1)
    return losses(trace, gradients, linear(h2, w3, b3).squeeze(-1), delta)


SCHEMES = {
    "reverse over reverse": pave_losses,
    "forward over reverse": forward_over_reverse,
    "nested jvp": nested_jvp,
    "closed form": closed_form,
}


def twin_loss(scheme: Callable, stacked: bool, dtype, device="cpu", batch=256, sizes=(17, 6), delta=1.0):
    """The loss of two fixed critics on a fixed minibatch as a function, and their parameters, a pair or stack each."""
    torch.manual_seed(1)
    critics = [QNetwork(*sizes).to(dtype) for _ in range(2)]
    s, next_s, a, target = (torch.randn(batch, *shape) for shape in ((sizes[0],), (sizes[0],), (sizes[1],), ()))
    inputs = s, a.tanh(), next_s, 0.01 * torch.randn_like(s), rademacher_like(a)
    *inputs, target = (x.to(device, dtype) for x in (*inputs, target))
    for critic in critics:
        critic.to(device)

    def total(pave):
        td = (pave.q_values - target).square().mean(-1)  # the weights make the terms' gradients alike, so all count
        return (td + 1e7 * pave.mpr + 1e3 * pave.vfc + pave.curvature).sum()

    if not stacked:
        pairs = list(zip(*(critic.parameters() for critic in critics), strict=True))
        return lambda: total(scheme(critics[0], *inputs, delta)) + total(scheme(critics[1], *inputs, delta)), pairs
    stack = stack_module_state(critics)[0]
    if scheme is closed_form:
        return lambda: total(closed_form(tuple(stack.values()), *inputs, delta)), list(stack.values())
    skeleton = copy.deepcopy(critics[0]).to("meta")

    def of_one(parameters):
        return scheme(lambda s, a: functional_call(skeleton, parameters, (s, a)), *inputs, delta)

    return lambda: total(torch.vmap(of_one)(stack)), list(stack.values())


def step(loss: Callable, parameters: list) -> list[torch.Tensor]:
    """One loss, forward and backward; the gradients, both critics' in one tensor."""
    leaves = [leaf for entry in parameters for leaf in (entry if isinstance(entry, tuple) else [entry])]
    for leaf in leaves:
        leaf.grad = None
    loss().backward()
    return [torch.stack([p.grad for p in entry]) if isinstance(entry, tuple) else entry.grad for entry in parameters]


def error(gradients: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Largest difference in any parameter's gradient, relative to the largest value in the reference's."""
    pairs = zip(gradients, reference, strict=True)
    return max(((g.cpu() - r.cpu()).abs().max() / r.abs().max().cpu()).item() for g, r in pairs)


def main(args: Settings) -> None:
    prepare(args)
    reference = step(*twin_loss(pave_losses, False, torch.float64))
    sides, found = {"floor": floor(args)}, []
    combinations = list(itertools.product(SCHEMES, (False, True), (False, True)))
    for name, stacked, compiled in tqdm(combinations, "compiling", unit="side", disable=None, leave=False):
        side = ", ".join((name, "stacked" if stacked else "two calls", "compiled" if compiled else "eager"))
        try:
            for dtype in (torch.float32,) if compiled else (torch.float64, torch.float32):
                loss, parameters = twin_loss(SCHEMES[name], stacked, dtype, args.device)
                loss = torch.compile(loss) if compiled else loss
                off = error(step(loss, parameters), reference)
                if not off < TOLERANCE[dtype]:
                    raise ArithmeticError(f"gradients are off by {off:.1g}")
        except Exception as failure:
            reason = str(failure).strip().partition("\n")[0][:40] or type(failure).__name__
            found.append(Row("schemes", "", side, f"fails: {reason}", None, "ms", "", None, None, None))
            continue
        sides[side] = functools.partial(step, loss, parameters)
    found = rows("schemes", "", milliseconds(sides, args, "schemes"), "ms", ("floor", OWN)) + found
    print(table(found))
    write(args.output_dir / "schemes", found)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Settings, description=__doc__))
