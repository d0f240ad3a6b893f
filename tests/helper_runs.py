"""A run folder as train() and evaluate.py leave it, of an untrained agent: made in a moment."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks.evaluate import about

BASE = {"lambda_mpr": 0.0, "lambda_vfc": 0.0, "lambda_curv": 0.0}
LEVELS = (0.01, 0.025, 0.05, 0.1)


def make_run(folder, script, returns=(-300.0, -200.0, -100.0), evaluated=True, origin=None, **settings) -> Path:
    """Steps 300; `returns`: of the evaluations at 100, 200, ...; the last one is also evaluation.json's."""
    args = {"env_id": "Pendulum-v1", "total_timesteps": 300, "buffer_size": 1000, "compile": False, "batch_size": 8}
    args = script.validate(script.Args(**args | settings, output_dir=str(folder)))
    run = Path(folder) / f"{args.env_id.rpartition(':')[2]}__{script.SCRIPT}__{args.seed}"
    torch.manual_seed(args.seed)
    with script.make_env(args.env_id) as env, SummaryWriter(run) as writer:
        sizes = env.observation_space.shape[0], env.action_space.shape[0]
        agent = script.Agent(*sizes, args, torch.device("cpu"))
        buffer = script.ReplayBuffer(args.buffer_size, *sizes, torch.device("cpu"))
        script.save_checkpoint(run, 300, agent, buffer, env, origin)
        for i, value in enumerate(returns):
            for tag, number in {"return": value, "smoothness": 0.1, "oscillation": 0.05, "length": 200.0}.items():
                writer.add_scalar(f"eval/{tag}", number, 100 * (i + 1))
    values = {"return_mean": returns[-1], "return_std": 20.0, "smoothness_mean": 0.1, "oscillation": 0.05}
    values |= {"length_mean": 200.0, "episodes": 10}
    (run / "summary.json").write_text(json.dumps(asdict(args) | {"steps": 300, "steps_per_second": 99.0} | values))
    noise = {str(k): {"return_mean": returns[-1] - k, "smoothness_mean": 0.1 + k} for k in LEVELS}
    if evaluated:
        told = values | about(300, 10) | {"random_return": -1000.0, "robustness": noise}
        (run / "evaluation.json").write_text(json.dumps(told))
    return run
