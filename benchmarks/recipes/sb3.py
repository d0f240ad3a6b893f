"""SAC + PAVE in Stable-Baselines3: PaveSAC adds PAVE to the critic's gradient. train(), save() and load() stay SB3's.

    python -m benchmarks.recipes.sb3    # --lambdas 0 0 0: SB3's own SAC, with SiLU

Copy PaveSAC below the PAVE block, and give it a smooth activation as in train() below: SB3's own is ReLU. The actions
need nothing: SB3 replays them in [-1, 1]. Tested with stable-baselines3 2.9, vector observations and n_steps = 1.
"""

import json
from functools import partial

import torch
import tyro
from stable_baselines3 import SAC
from torch import nn

from sac_pave_continuous import evaluate, make_env, pave_losses, rademacher_like

LAMBDAS = 0.1, 0.005, 0.5  # MPR, VFC, Curv: the paper's for SAC on Pendulum; elsewhere start from 0.1, 0.1, 0.01


# copy from here
@torch.compile  # optional: faster after a minute; it goes on the loss, not on the critic
def critic_terms(critic, s, a, next_s, noise, probe, delta):
    """MPR, VFC and Curv, each the sum over SB3's critics."""

    def one(net):
        def q(s, a):
            return net(torch.cat([critic.extract_features(s, critic.features_extractor), a], dim=1)).squeeze(1)

        return torch.stack(pave_losses(q, s, a, next_s, noise, probe, delta)[:3])

    return sum(one(net) for net in critic.q_networks)


class PaveSAC(SAC):
    def __init__(self, *args, lambdas=(0.1, 0.1, 0.01), sigma=0.01, delta=1.0, **kwargs):
        self.lambdas, self.sigma, self.delta = lambdas, sigma, delta  # save() and load() keep them
        super().__init__(*args, **kwargs)

    def _setup_model(self):  # __init__ and load() end here
        super()._setup_model()
        batch = {}  # SB3's train() calls critic_target(s', .), then critic(s, a), then the critic's optimizer
        self.critic_target.register_forward_pre_hook(lambda _, inputs: batch.update(next_s=inputs[0]))
        self.critic.register_forward_pre_hook(lambda _, inputs: batch.update(s=inputs[0], a=inputs[1]))
        if any(self.lambdas):
            self.critic.optimizer.register_step_pre_hook(lambda *_: self.add_pave_gradients(**batch))

    def add_pave_gradients(self, s, a, next_s):
        """To the TD gradients, which SB3 has just computed on the same batch."""
        noise, probe = self.sigma * torch.randn_like(s), rademacher_like(a)
        terms = critic_terms(self.critic, s, a, next_s, noise, probe, self.delta)
        (terms @ terms.new_tensor(self.lambdas)).backward()
        for name, term in zip(("mpr", "vfc", "curvature"), terms.tolist(), strict=True):
            self.logger.record_mean(f"train/{name}", term)


# to here


def train(lambdas: tuple[float, float, float] = LAMBDAS, seed: int = 1, total_timesteps: int = 20_000) -> nn.Module:
    smooth = {"activation_fn": nn.SiLU}
    model = PaveSAC("MlpPolicy", "Pendulum-v1", lambdas=lambdas, policy_kwargs=smooth, seed=seed, device="cpu")
    model.learn(total_timesteps)
    model.actor.forward = partial(model.actor.forward, deterministic=True)
    return model.actor


if __name__ == "__main__":
    print(json.dumps(evaluate(tyro.cli(train), make_env("Pendulum-v1"), episodes=10)))
