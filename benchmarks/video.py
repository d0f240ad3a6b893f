"""Runs side by side in one MP4 or GIF, with the actions they take drawn below; needs no display.

    python benchmarks/video.py BASE PAVE --output comparison.mp4

Every run starts from the same state. MuJoCo renders through EGL, or else OSMesa; set MUJOCO_GL to decide yourself.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import imageio_ffmpeg
import tyro
from matplotlib import pyplot as plt
from matplotlib.animation import FFMpegWriter, PillowWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts and benchmarks/ are files, not packages

from benchmarks.evaluate import Episode, Run, UserError, rollout, user_errors
from benchmarks.plot import (
    STYLE,
    WIDTH,
    Dimension,
    EpisodeNumber,
    Labels,
    Paths,
    choose_action,
    colours_of,
    distinct,
    open_runs,
)

DPI = 100  # 900 px wide
PROBE = "import mujoco; context = mujoco.GLContext(8, 8); context.make_current(); context.free()"


def set_up_rendering() -> None:
    """Let pygame draw without a display, and choose a MuJoCo backend that works here; call it before mujoco's import.

    mujoco reads MUJOCO_GL once, when it is imported: so each backend is tried in a process of its own.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return
    for backend in ("egl", "osmesa"):
        environment = os.environ | {"MUJOCO_GL": backend}
        if subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
    if "DISPLAY" not in os.environ:
        os.environ["MUJOCO_GL"] = "egl"  # fails with one exception; the default, GLFW, would add its own warnings


class Camera(gym.Wrapper):
    """Keeps a picture of each state acted on in the current episode of `env`, at most `steps` of them."""

    def __init__(self, env: gym.Env, steps: int):
        super().__init__(env)
        self.steps, self.frames = steps, []

    def reset(self, **kwargs):
        self.frames = []
        return self.env.reset(**kwargs)

    def step(self, action):
        if len(self.frames) < self.steps:
            self.frames.append(self.env.render())
        return self.env.step(action)


def record(run: Run, episode: int, steps: int) -> tuple[Episode, list, int]:
    """An episode (see plot.play), a picture (height, width, 3) of each of its first `steps` states, and their rate."""
    try:
        spec = copy.deepcopy(gym.spec(run.args.env_id))
        spec.kwargs["render_mode"] = "rgb_array"
        if "mujoco" in str(spec.entry_point):
            spec.kwargs["camera_name"] = "track"  # follows the body; gymnasium 1.4's default camera is left behind
        env = run.script.make_env(spec)
        env.reset()
        env.render()
    except Exception as error:  # every backend has its own
        cause = " ".join(str(error).split())
        raise UserError(
            f"cannot render {run.args.env_id} ({type(error).__name__}: {cause}); without a display MuJoCo needs the "
            "Debian package libegl1 or libosmesa6"
        ) from error
    with Camera(env, steps) as camera:
        played = rollout(run, camera, episode + 1).episodes[episode]
        return played, camera.frames, env.metadata.get("render_fps", 30)


def video(
    runs: Paths,
    /,
    labels: Labels = (),
    output: Annotated[Path, tyro.conf.arg(help=".mp4 or .gif")] = Path("video.mp4"),
    episode: EpisodeNumber = 0,
    steps: Annotated[int, tyro.conf.arg(help="length in env steps, a frame each")] = 200,
    dimension: Dimension = None,
) -> None:
    """Play an episode of each run and write the video; UserError where something can't be."""
    writers = {".mp4": FFMpegWriter, ".gif": PillowWriter}
    if output.suffix not in writers:
        raise UserError(f"--output is {output}; it must end in .mp4 or .gif")
    if not output.parent.is_dir():
        raise UserError(f"--output is {output}; there is no folder {output.parent}")
    if steps < 1 or episode < 0:
        raise UserError(f"--steps is {steps} and --episode {episode}; they must be at least 1 and 0")
    agents = distinct(open_runs(runs, labels))
    colours = colours_of(agents)
    set_up_rendering()
    episodes, films, (fps, *_) = zip(*(record(run, episode, steps) for run in agents), strict=True)
    dimension = choose_action(episodes[0], dimension)

    panel = WIDTH / len(agents)  # inches
    height, width = films[0][0].shape[:2]
    heights = (panel * height / width, 1.3)
    figure, (screens, traces) = plt.subplots(
        2,
        len(agents),
        squeeze=False,
        sharex="row",
        sharey="row",
        height_ratios=heights,
        figsize=(WIDTH, sum(heights) + 1),
    )
    figure.suptitle(agents[0].args.env_id)
    pictures, lines = [], []
    for screen, trace, run, played, film, colour in zip(screens, traces, agents, episodes, films, colours, strict=True):
        sm = run.script.smoothness(played.env_actions)
        screen.set_title(f"{run.label}: return {played.rewards.sum():,.1f}, sm {sm:.3f}")
        screen.set_axis_off()
        pictures.append(screen.imshow(film[0]))
        whole = played.env_actions[:steps, dimension]
        trace.plot(whole, color="#dddddd", linewidth=1)
        lines.append(trace.plot([], [], color=colour, linewidth=1.2)[0])
        trace.set_xlabel("step")
    traces[0].set_ylabel(f"action {dimension} (env units)")

    plt.rcParams["animation.ffmpeg_path"] = imageio_ffmpeg.get_ffmpeg_exe()
    writer = writers[output.suffix](fps=fps)
    with writer.saving(figure, output, DPI):
        for step in tqdm(range(max(map(len, films))), unit="frame", disable=None):
            for picture, line, film, played in zip(pictures, lines, films, episodes, strict=True):
                shown = min(step, len(film) - 1)  # an episode that ended stays on its last picture
                picture.set_data(film[shown])
                line.set_data(range(shown + 1), played.env_actions[: shown + 1, dimension])
            writer.grab_frame()
    plt.close(figure)
    print(f"wrote {output}")


def main(arguments: list[str] | None = None) -> None:
    """The command line: `arguments`, or the program's own."""
    with user_errors(), plt.rc_context(STYLE):
        tyro.cli(video, description=__doc__, args=arguments)


if __name__ == "__main__":
    main()
