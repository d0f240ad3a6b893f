"""PAVE in Stable-Baselines3, for SAC and TD3: to finish an agent that you have trained, or from scratch.

    model = PaveSAC.load("plain.zip", env=env, lambdas=(0.1, 0.1, 0.01))  # PaveTD3 for a TD3; of ReLU agents as well
    model.load_replay_buffer("plain_buffer.pkl")  # if you saved one; else 5,000 steps are gathered first
    model.learn(10_000, reset_num_timesteps=False)  # 10,000 steps more
    model.save("smooth.zip")  # plain SAC.load("smooth.zip") reads it, without this file

learn(), save(), load(), callbacks and loggers stay SB3's. Copy what is marked below the PAVE block, and for
lambdas="auto" CurvAutotuner and LAMBDA_CURV_BOUNDS as well; actions need nothing, since SB3 replays them in [-1, 1].
Tested with stable-baselines3 2.9. From scratch on Pendulum-v1:

    python -m benchmarks.recipes.sb3    # --lambdas 0 0 0: SB3's own SAC, with SiLU
"""

import json
import warnings
from functools import partial

import torch
import tyro
from stable_baselines3 import SAC, TD3
from stable_baselines3.common.preprocessing import get_action_dim
from torch import nn

from sac_pave_continuous import CurvAutotuner, evaluate, make_env, pave_losses, rademacher_like

LAMBDAS = 0.1, 0.005, 0.5  # MPR, VFC, Curv: the paper's for SAC on Pendulum; elsewhere start from 0.1, 0.1, 0.01


# copy from here, below the PAVE block; it needs the imports of warnings, partial, torch, nn, SAC, TD3, get_action_dim
SMOOTH_RELU = partial(nn.Softplus, beta=10)
AUTO_LAMBDAS = 0.1, 0.0005, 0.01  # of MPR, VFC and, where the search starts, Curv


@torch.compile  # optional: faster after a minute; it goes on the loss, not on the critic
def critic_terms(critic, s, a, next_s, noise, probe, margin):
    """MPR, VFC and Curv (3,), each the sum over SB3's critics, and what auto needs (2,), means over the critics.

    What auto needs: the share of the samples that meet Curv's margin, and the root mean square of grad_a Q.
    """
    terms, measured = [], []
    for net in critic.q_networks:

        def q(s, a, net=net):
            return net(torch.cat([critic.extract_features(s, critic.features_extractor), a], dim=1)).squeeze(1)

        pave = pave_losses(q, s, a, next_s, noise, probe, margin)
        margin_fraction = (pave.vhv < -margin).float().mean()
        gradient_size = pave.gradient.square().mean().sqrt()
        terms.append(torch.stack([pave.mpr, pave.vfc, pave.curvature]))
        measured.append(torch.stack([margin_fraction, gradient_size]))
    return torch.stack(terms).sum(0), torch.stack(measured).mean(0).detach()


def with_smooth_critics(policy_class, activation_fn):
    """A policy class like `policy_class` whose critics have another activation. The actor and all weights' names stay.

    SB3's own policies have one activation_fn for actor and critics, and load() puts weights into whatever function it
    names. A class that is made in a function is saved within the .zip, so that plain SB3 builds the same critics again.
    """

    class SmoothCriticPolicy(policy_class):
        critic_activation_fn = activation_fn

        def make_critic(self, features_extractor=None):
            self.critic_kwargs["activation_fn"] = activation_fn
            return super().make_critic(features_extractor)

    return SmoothCriticPolicy


class Pave:
    """Adds PAVE to the critics' gradient of SB3's SAC or TD3. load() takes the settings of __init__, too."""

    def __init__(
        self,
        *args,
        lambdas=(0.1, 0.1, 0.01),  # of MPR, VFC, Curv; "auto": 0.1, 0.0005 and what it finds; three zeros: SB3's own
        sigma=0.01,  # of MPR's noise, in the units of the observations that the critic gets
        delta=1.0,  # margin of Curv
        critic_activation_fn=SMOOTH_RELU,  # takes ReLU's place in the critics, since that has no curvature
        pave_batch_size=64,  # rows of the minibatch that PAVE uses: fewer are unbiased and cheaper
        gather_steps=5_000,  # transitions that a loaded agent must have, or gather by its policy, before it is updated
        **kwargs,
    ):
        self.lambdas, self.sigma, self.delta = lambdas, sigma, delta  # save() and load() keep them
        self.critic_activation_fn, self.pave_batch_size = critic_activation_fn, pave_batch_size
        self.gather_steps = gather_steps
        super().__init__(*args, **kwargs)

    def _setup_model(self):  # __init__ and load() end here
        if self.lambdas != "auto":  # forget what an earlier auto has found
            self.__dict__.pop("lambda_curv", None)
            self.__dict__.pop("gradient_scale", None)
        if not any(self.lambdas):
            super()._setup_model()
            return
        self.check_settings()
        activation = self.policy_kwargs.get("activation_fn", nn.ReLU)()
        finished = hasattr(self.policy_class, "critic_activation_fn")  # a .zip that was saved from here
        if isinstance(activation, (nn.ReLU, nn.LeakyReLU)) and not finished:
            self.policy_class = with_smooth_critics(self.policy_class, self.critic_activation_fn)
        super()._setup_model()
        if self.lambdas == "auto":
            self.curv_autotuner = CurvAutotuner(0.95, get_action_dim(self.action_space))
            if not hasattr(self, "gradient_scale"):  # a .zip that was saved from here has both numbers
                self.lambda_curv = torch.tensor(AUTO_LAMBDAS[2])  # both on the CPU, whatever the model's device
                self.gradient_scale = torch.tensor(0.0)
        self.was_trained = self.num_timesteps > 0
        batch = {}  # SB3's train() calls critic_target(s', .), then critic(s, a), then the critic's optimizer
        self.critic_target.register_forward_pre_hook(lambda _, inputs: batch.update(next_s=inputs[0]))
        self.critic.register_forward_pre_hook(lambda _, inputs: batch.update(s=inputs[0], a=inputs[1]))
        self.critic.optimizer.register_step_pre_hook(lambda *_: self.add_pave_gradients(**batch))

    def check_settings(self):
        """ValueError where PAVE would be wrong, or the .zip is another algorithm's."""
        own_policy = self.policy_aliases["MlpPolicy"]
        if not issubclass(self.policy_class, own_policy):
            raise ValueError(f"{type(self).__name__} needs a {own_policy.__name__}, not {self.policy_class}")
        if len(self.observation_space.shape or ()) != 1:
            raise ValueError(f"PAVE needs vector observations, not {self.observation_space}")
        if getattr(self, "n_steps", 1) != 1:
            raise ValueError(f"PAVE needs n_steps=1, not {self.n_steps}: its VFC takes the next observation")
        three_weights = not isinstance(self.lambdas, str) and len(self.lambdas) == 3 and min(self.lambdas) >= 0
        if self.lambdas != "auto" and not three_weights:
            told = 'are the weights of MPR, VFC and Curv, none negative, or "auto"'
            raise ValueError(f"lambdas {told}, not {self.lambdas}")

    def _excluded_save_params(self):  # so that plain SB3 reads the .zip without this file
        return [*super()._excluded_save_params(), "curv_autotuner"]

    def train(self, gradient_steps, batch_size=64):
        # A loaded agent is past learning_starts: without its replay buffer SB3 would train it on the first transition
        transitions = self.replay_buffer.size() * self.n_envs
        room = self.replay_buffer.buffer_size * self.n_envs
        enough = min(self.gather_steps, room) if any(self.lambdas) and self.was_trained else 0
        if transitions < enough:
            warnings.warn(f"no update before the replay buffer has {enough:,} transitions (gather_steps)", stacklevel=2)
        else:
            super().train(gradient_steps, batch_size)

    def add_pave_gradients(self, s, a, next_s):
        """To the TD gradients, which SB3 has just computed on the same batch."""
        s, a, next_s = (rows[: self.pave_batch_size] for rows in (s, a, next_s))
        noise, probe = self.sigma * torch.randn_like(s), rademacher_like(a)
        auto = self.lambdas == "auto"
        lambda_mpr, lambda_vfc, lambda_curv = AUTO_LAMBDAS if auto else self.lambdas
        margin = self.delta
        if auto:  # Curv's weight and margin are in units of the action gradient
            lambda_curv, margin = self.curv_autotuner.scaled(self.lambda_curv, self.delta, self.gradient_scale)
            margin = margin.to(s.device)
        terms, measured = critic_terms(self.critic, s, a, next_s, noise, probe, margin)
        (terms @ terms.new_tensor([lambda_mpr, lambda_vfc, lambda_curv])).backward()
        mpr, vfc, curvature, margin_fraction, gradient_size = torch.cat([terms.detach(), measured]).cpu()
        if auto:
            metrics = {"geometry/margin_fraction": margin_fraction, "geometry/action_gradient": gradient_size}
            self.curv_autotuner.step(self.lambda_curv, self.gradient_scale, metrics)
        self.logger.record_mean("train/mpr", mpr.item())
        self.logger.record_mean("train/vfc", vfc.item())
        self.logger.record_mean("train/curvature", curvature.item())
        self.logger.record_mean("train/margin_fraction", margin_fraction.item())
        self.logger.record_mean("train/lambda_curv", float(lambda_curv))


class PaveSAC(Pave, SAC):
    pass


class PaveTD3(Pave, TD3):
    pass


# to here


def train(lambdas: tuple[float, float, float] = LAMBDAS, seed: int = 1, total_timesteps: int = 20_000) -> nn.Module:
    settings = {"pave_batch_size": 256, "policy_kwargs": {"activation_fn": nn.SiLU}, "seed": seed, "device": "cpu"}
    model = PaveSAC("MlpPolicy", "Pendulum-v1", lambdas=lambdas, **settings)
    model.learn(total_timesteps)
    model.actor.forward = partial(model.actor.forward, deterministic=True)
    return model.actor


if __name__ == "__main__":
    print(json.dumps(evaluate(tyro.cli(train), make_env("Pendulum-v1"), episodes=10)))
