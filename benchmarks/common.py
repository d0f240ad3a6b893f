"""STAND-IN, written only so that plot, report, video and throughput can run before the real common.py is there."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

import sac_pave_continuous
import td3_pave_continuous
from sac_pave_continuous import UserError

SCRIPTS = {script.SCRIPT: script for script in (sac_pave_continuous, td3_pave_continuous)}


@contextlib.contextmanager
def user_errors():
    try:
        yield
    except (UserError, td3_pave_continuous.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@dataclass
class Run:
    path: Path
    algorithm: str
    method: str
    script: object
    args: object
    actor: torch.nn.Module
    critic: torch.nn.Module
    step: int


def load_run(path) -> Run:
    path = Path(path)
    if not (path / "checkpoint.pt").is_file():
        raise UserError(f"{path} is not a run folder: it has no checkpoint.pt")
    try:
        saved = torch.load(path / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        script, args, weights = SCRIPTS[saved["script"]], saved["args"], saved["agent"]
        s = weights["actor.net.0.weight"].shape[1]
        a = weights["critics.0.net.0.weight"].shape[1] - s
        actor, critic = script.Actor(s, a), script.QNetwork(s, a)
        for prefix, net in {"actor.": actor, "critics.0.": critic}.items():
            net.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
            net.requires_grad_(False)
    except Exception as error:
        raise UserError(f"cannot read {path / 'checkpoint.pt'} ({' '.join(str(error).split())[:200]})") from error
    lambdas = [args[name] for name in script.LAMBDAS]
    tuned = script.validate(script.Args(env_id=args["env_id"]))
    method = "auto" if args["autotune_curv"] else "base" if not any(lambdas) else "pave"
    if method == "pave" and lambdas != [getattr(tuned, name) for name in script.LAMBDAS]:
        method = "untuned" if tuple(lambdas) == script.UNTUNED_LAMBDAS else "own"
    if (path / "caps.json").is_file():
        method = "caps"
        args = args | json.loads((path / "caps.json").read_text())
    algorithm = script.SCRIPT.partition("_")[0]
    return Run(path, algorithm, method, script, SimpleNamespace(**args), actor, critic.double(), saved["step"])


def machine() -> dict:
    return {"machine": "stand-in", "torch": torch.__version__, "commit": None}
