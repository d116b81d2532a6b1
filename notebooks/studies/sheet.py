"""A contact sheet of the model's own prompts, none left out."""

import pathlib

import numpy as np

import start
from astraea_jax import checks, metrics, report, video
from astraea_jax.bench import options
from astraea_ports import tiny, wan


def command(
    *,
    output: pathlib.Path = pathlib.Path("out.png"),
    count: int = 24,
    columns: int = 3,
    model: str = "tiny",
    revision: str | None = None,
) -> None:
    """Draws dense videos of the first prompts, in order, with seeds 0, 1, 2, ...

    Args:
      output: A .png or .jpg file.
      count: How many prompts, 1..64.
      columns: Videos in a row.
      model: A model that knows such prompts.
      revision: Of a hub id: a branch, a tag or a commit.
    """
    checks.whole("count", count, 1, len(tiny.captions()))
    checks.whole("columns", columns, 1, len(tiny.captions()))
    options.check_output(output, video.IMAGE_SUFFIXES)
    captions = tiny.captions()[:count]
    pipeline = wan.Pipeline.from_pretrained(model, revision=revision, staged=False)
    videos = []
    with report.Progress() as progress, progress.stage("videos", count) as bar:
        for seed, caption in enumerate(captions):
            result = pipeline(caption, seed=seed)
            videos.append(metrics.to_uint8(np.asarray(result.video[0])))
            bar.advance()
    sheet = video.contact_sheet(videos, captions, columns=columns)
    video.write_image(output, sheet)
    print(f"written: {output}")


if __name__ == "__main__":
    start.run(command)
