"""An episode of two runs side by side, from the same start, the actions they take drawn below: GIF or MP4.

    python benchmarks/video.py BASE PAVE --output comparison.gif        at most 2 MB
    python benchmarks/video.py BASE PAVE --output comparison.mp4 --fps 30 --width 900

Needs no display. MuJoCo renders through EGL; MUJOCO_GL=osmesa is slower and needs no GPU driver.
"""

import copy
import os
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported: it reads this once

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

if __package__ in (None, ""):  # as a plain path, Python has benchmarks/ on its path but not the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import Run, UserError, user_errors
from benchmarks.plot import Dimension, EpisodeNumber, Labels, Paths, choose_action, distinct, looks, open_runs


class Film(NamedTuple):
    """What happened in the first T steps of an episode."""

    frames: list[Image.Image]  # T, of the states acted on
    env_actions: np.ndarray  # (T, d_a), in the env's own units
    rewards: list[float]
    start: np.ndarray  # the first observation
    fps: float  # the env's own


@torch.no_grad()
def record(run: Run, episode: int, steps: int) -> Film:
    """Play evaluate()'s episode number `episode`, at most `steps` steps of it, and take a picture of each."""
    spec = copy.deepcopy(gym.spec(run.args.env_id))
    spec.kwargs["render_mode"] = "rgb_array"
    if "mujoco" in str(spec.entry_point):
        spec.kwargs["camera_name"] = "track"  # follows the body; the default camera is left behind
    frames, env_actions, rewards, over = [], [], [], False
    with run.script.make_env(spec) as env:
        observation, _ = env.reset(seed=10_000 + episode)  # as evaluate() does
        start = observation.copy()
        while not over and len(frames) < steps:
            try:
                frames.append(Image.fromarray(env.render()))
            except Exception as error:  # every backend has its own
                cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
                cure = "MuJoCo needs the Debian package libegl1 or, with MUJOCO_GL=osmesa, libosmesa6"
                raise UserError(f"cannot render {run.args.env_id} ({cause}); {cure}") from error
            action = run.actor(torch.as_tensor(observation, dtype=torch.float32)[None])[0].numpy()
            env_actions.append(env.action(action).ravel())
            observation, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            over = terminated or truncated
        return Film(frames, np.array(env_actions), rewards, start, env.metadata.get("render_fps", 30))


def compose(films: dict[str, Film], step: int, width: int, dimension: int, span: tuple[float, float]) -> Image.Image:
    """One picture of all the films at a step: title, frame, and the action's trace so far; one that ended stays."""
    panel, (low, high) = width // len(films) // 2 * 2, span
    longest = max(len(film.frames) for film in films.values())
    first = next(iter(films.values())).frames[0]
    tall, trace, font = (
        round(panel * first.height / first.width),
        panel // 4,
        ImageFont.load_default(max(9, panel // 24)),
    )
    title = 2 * font.size
    picture = Image.new("RGB", (panel * len(films), (title + tall + trace) // 2 * 2), "white")
    draw = ImageDraw.Draw(picture)
    for i, (label, film) in enumerate(films.items()):
        x, now = i * panel, min(step, len(film.frames) - 1)
        draw.text((x + 6, font.size // 2), label, "black", font)
        picture.paste(film.frames[now].resize((panel, tall), Image.Resampling.LANCZOS), (x, title))
        along = x + 4 + (panel - 8) * np.arange(now + 1) / max(longest - 1, 1)
        up = title + tall + 4 + (trace - 10) * (high - film.env_actions[: now + 1, dimension]) / max(high - low, 1e-9)
        colour = looks(films)[label]["color"]
        draw.line(list(zip(along, up, strict=True)) if now else [(along[0], up[0]), (along[0] + 1, up[0])], colour, 2)
    return picture


def write(films, output: Path, fps: float, width: int, colours: int, megabytes: float, **traced) -> None:
    """Write the video; a GIF's pictures get narrower until it fits."""
    length = max(len(film.frames) for film in films.values())
    rate = next(iter(films.values())).fps  # a frame is a step; with fewer fps some are left out, the speed stays
    kept = np.unique(np.arange(0, length, max(1.0, rate / fps)).astype(int))
    while True:
        pictures = [compose(films, step, width, **traced) for step in kept]
        if output.suffix == ".mp4":
            arrays = np.stack([np.asarray(picture) for picture in pictures])
            return iio.imwrite(output, arrays, plugin="FFMPEG", fps=min(fps, rate), macro_block_size=2)
        sample = Image.fromarray(np.concatenate([np.asarray(p) for p in pictures[:: max(1, len(pictures) // 4)]]))
        palette = sample.quantize(colours)  # one for all, without dithering: what doesn't move stays equal, and small
        flat = [np.asarray(p.quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")) for p in pictures]
        iio.imwrite(output, np.stack(flat), plugin="pillow", duration=1000 / min(fps, rate), loop=0)
        if output.stat().st_size <= 1e6 * megabytes:
            return None
        if width < 200:
            raise UserError(f"{output} has more than {megabytes} MB even 200 pixels wide: lower --steps or --fps")
        width = int(width * 0.85)


def video(
    runs: Paths,
    /,
    labels: Labels = (),
    output: Annotated[Path, tyro.conf.arg(help=".gif or .mp4")] = Path("video.gif"),
    episode: EpisodeNumber = 0,
    steps: Annotated[int, tyro.conf.arg(help="length in env steps")] = 200,
    dimension: Dimension = None,
    fps: Annotated[float, tyro.conf.arg(help="pictures a second; the speed stays the env's own")] = 20.0,
    width: Annotated[int, tyro.conf.arg(help="pixels of all panels; a GIF that is too large gets narrower")] = 800,
    colours: Annotated[int, tyro.conf.arg(help="of a GIF's palette")] = 64,
    megabytes: Annotated[float, tyro.conf.arg(help="what a GIF may have")] = 2.0,
) -> None:
    """Play an episode of each run and write the video; UserError where something can't be."""
    if output.suffix not in (".gif", ".mp4") or not output.parent.is_dir():
        raise UserError(f"--output is {output}; it must end in .mp4 or .gif, in a folder that is there")
    for name, value, least in (("steps", steps, 1), ("episode", episode, 0), ("fps", fps, 1), ("width", width, 100)):
        if value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    if not 2 <= colours <= 256:
        raise UserError(f"--colours is {colours}; it must be from 2 to 256")
    shown = distinct(open_runs(runs, labels))
    films = {label: record(run, episode, steps) for label, run in shown}
    first = next(iter(films.values()))
    dimension = choose_action(first.env_actions, dimension)
    traces = [film.env_actions[:, dimension] for film in films.values()]
    titles = {}
    for (label, run), film in zip(shown, films.values(), strict=True):
        sm = run.script.smoothness(film.env_actions)
        titles[f"{label}: return {sum(film.rewards):,.0f}, sm {sm:.2f}, {len(film.rewards)} steps"] = film
    span = min(map(np.min, traces)), max(map(np.max, traces))
    write(titles, output, fps, width, colours, megabytes, dimension=dimension, span=span)
    print(f"wrote {output}: {output.stat().st_size / 1e6:.2f} MB, action {dimension} below")


def main(arguments: list[str] | None = None) -> None:
    """The command line: `arguments`, or the program's own."""
    with user_errors():
        tyro.cli(video, description=__doc__, args=arguments)


if __name__ == "__main__":
    main()
