"""One episode of each run side by side, all from the same start, the action's trace below: GIF or MP4.

    python -m benchmarks.video BASE PAVE --output comparison.gif
    python -m benchmarks.video BASE PAVE --output comparison.mp4 --fps 50

Needs no display. MuJoCo renders through EGL; MUJOCO_GL=osmesa is slower and needs no GPU driver.
"""

import copy
import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
if "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported, which reads it once

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import tyro
from matplotlib import pyplot as plt
from PIL import Image

from benchmarks import plot
from benchmarks.common import Episode, Run, UserError, require, user_errors
from benchmarks.plot import Dimension, EpisodeNumber, Labels, Paths, Steps


def record(run: Run, episode: int, steps: int, fps: float) -> tuple[Episode, list[np.ndarray], int, float]:
    """A whole episode, pictures of its first `steps` steps, env steps from one to the next, and pictures a second."""
    spec = copy.deepcopy(gym.spec(run.args.env_id))
    spec.kwargs["render_mode"] = "rgb_array"
    if "mujoco" in str(spec.entry_point):
        spec.kwargs["camera_name"] = "track"  # follows the body; the default camera is left behind
    played = plot.play(run, episode)
    try:
        with run.script.make_env(spec) as env:
            rate = env.metadata.get("render_fps", 30)
            stride, frames = max(1, round(rate / fps)), []
            env.reset(seed=run.script.EVALUATION_SEED + episode)  # as evaluate() does
            for step, action in enumerate(played.actions[:steps]):
                if step % stride == 0:
                    frames.append(env.render())
                env.step(action)
    except Exception as error:  # every backend has its own
        cure = "MuJoCo needs the Debian package libegl1 or, with MUJOCO_GL=osmesa, libosmesa6"
        raise UserError(f"cannot render {run.args.env_id} ({' '.join(str(error).split())}); {cure}") from error
    return played, frames, stride, rate / stride


def draw(shown, films, dimension: int, steps: int, dpi: float) -> list[np.ndarray]:
    """The video's pictures: a panel for each run with its caption, and the action's trace so far below."""
    episodes, frames, (stride, *_), _ = zip(*films, strict=True)
    colours = plot.colours_of(label for label, _ in shown)
    height, width = np.shape(frames[0][0])[:2]
    tall = plot.WIDTH / len(shown) * height / width
    size = {"figsize": (plot.WIDTH, tall + 1.9), "height_ratios": (tall, 1.2), "dpi": dpi}
    figure, (screens, traces) = plt.subplots(2, len(shown), sharex="row", sharey="row", squeeze=False, **size)
    moving = []
    for (label, _), played, film, screen, trace in zip(shown, episodes, frames, screens, traces, strict=True):
        oscillation = np.abs(np.diff(played.env_actions, axis=0)).mean()
        told = f"return {played.rewards.sum():,.0f}, oscillation {oscillation:.3f}, {len(played.rewards):,} steps"
        screen.set_title(f"{label}\n", fontsize=14, fontweight="bold", color=colours[label])
        screen.text(0.5, 1.02, told, fontsize=12, ha="center", va="bottom", transform=screen.transAxes)
        screen.set_axis_off()
        trace.plot(played.env_actions[:steps, dimension], color="#dddddd", linewidth=1)
        trace.set(xlabel="step", xlim=(0, min(steps, max(len(e.rewards) for e in episodes))))
        moving.append((screen.imshow(film[0]), *trace.plot([], [], color=colours[label], linewidth=1.5)))
    traces[0].set_ylabel(f"action {dimension}")
    pictures = []
    for i in range(max(map(len, frames))):
        for (screen, line), film, played in zip(moving, frames, episodes, strict=True):
            screen.set_data(film[min(i, len(film) - 1)])  # an episode that ended stays on its last picture
            so_far = played.env_actions[: min(steps, i * stride + 1), dimension]
            line.set_data(range(len(so_far)), so_far)
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    plt.close(figure)
    return pictures


def video(
    runs: Paths,
    labels: Labels = (),
    output: Annotated[Path, tyro.conf.arg(help=".gif or .mp4")] = Path("video.gif"),
    episode: EpisodeNumber = 0,
    dimension: Dimension = None,
    steps: Steps = 300,
    fps: Annotated[float, tyro.conf.arg(help="pictures a second; the speed stays the env's own")] = 17.0,
    dpi: Annotated[int, tyro.conf.arg(help="pixels an inch, of 9 inches: fewer make a smaller file")] = 100,
) -> None:
    """Play an episode of each run and write the video."""
    fit = output.suffix in (".gif", ".mp4") and output.parent.is_dir()
    require(fit, f"--output is {output}; it must end in .gif or .mp4, in a folder that is there")
    require(steps > 1 and fps >= 1, f"--steps is {steps} and --fps {fps:g}; they must be at least 2 and 1")
    shown = plot.name_seeds(plot.open_runs(runs, labels))
    films = [record(run, episode, steps, fps) for _, run in shown]
    dimension, rate = plot.choose_action(films[0][0].env_actions[:steps], dimension), films[0][3]
    pictures = draw(shown, films, dimension, steps, dpi)
    if output.suffix == ".gif":  # one palette and no dithering, so that what stands still costs nothing
        sample = Image.fromarray(np.concatenate(pictures[:: max(1, len(pictures) // 5)]))
        look = {"palette": sample.quantize(48, dither=Image.Dither.NONE), "dither": Image.Dither.NONE}
        first, *rest = (Image.fromarray(picture).quantize(**look) for picture in pictures)
        first.save(output, save_all=True, append_images=rest, duration=round(100 / rate) * 10, loop=0, optimize=False)
    else:
        height, width = (size // 2 * 2 for size in pictures[0].shape[:2])  # even, as MP4's codec wants it
        iio.imwrite(output, np.stack(pictures)[:, :height, :width], plugin="FFMPEG", fps=rate, macro_block_size=2)
    print(f"wrote {output}: {len(pictures)} pictures, {output.stat().st_size / 1e6:.2f} MB, action {dimension} below")


if __name__ == "__main__":
    with user_errors(), plt.rc_context(plot.STYLE):
        tyro.cli(video, description=__doc__)
