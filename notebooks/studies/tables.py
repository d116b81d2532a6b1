"""The tables of README.md, from the results that lie beside this file.

Each stands between `<!-- table: NAME -->` and `<!-- end -->`, and is written there by this script
alone; the README of the repository may hold some of them too.
"""

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import start
from astraea_jax import files, report
from astraea_jax.checks import Refusal
from search_ship import chosen

RESULTS = pathlib.Path(__file__).parent

MARKED = r"(<!-- table: {} -->\n)(.*?)(<!-- end -->)"

Row = dict[str, Any]


def quality(results: Row) -> str:
    """Every method at 30, 50 and 70 %, the best at 50 % with UniPC first in each group."""
    named = ("method", "reuse", "scope", "branches", "velocity", "rank")
    groups: dict[str, dict[tuple, Row]] = {}
    for row in results["rows"]:
        name = tuple(row.get(each) for each in named)
        share = f"{row['solver']} {round(10 * row['cost'])}0"
        groups.setdefault(row["pattern"], {}).setdefault(name, {})[share] = row
    lines = []
    for pattern in ("first fifth dense", "uniform", "fewer steps"):
        lines.append({"method": f"**{pattern}**"})
        members = sorted(groups[pattern].items(), key=lambda each: -each[1]["unipc 50"]["psnr"])
        for name, cells in members:
            line = dict(zip(named, name, strict=True))
            line["method"] = line["method"].removesuffix("-residual")  # it has a column
            line |= {share: _quality_cell(cells[share]) for share in cells}
            lines.append(line)
    columns = {"method": "method", "reuse": "reuse", "scope": "selection per"}
    columns |= {"branches": "branches", "velocity": "stale velocity", "rank": "tokens by"}
    columns |= {"unipc 30": "30 %", "unipc 50": "50 %", "unipc 70": "70 %"}
    columns |= {"euler 30": "Euler 30", "euler 50": "50", "euler 70": "70"}
    return _markdown(lines, columns) + "\n\n" + _leads(groups["first fifth dense"])


def _quality_cell(row: Row) -> str:
    if row["solver"] == "euler":
        return f"{row['psnr']:.1f}"
    return f"{row['psnr']:.1f} ± {row['psnr_half_width']:.1f} / {row['ssim']:.3f}"


def _leads(rows: dict[tuple, Row]) -> str:
    """How far whole steps are ahead of the best token-wise row, prompt by prompt."""
    said = []
    for solver in ("unipc", "euler"):
        leads = []
        for share in (30, 50, 70):
            cells = [(name[0], row[f"{solver} {share}"]) for name, row in rows.items()]
            whole, tokens = (
                max(
                    (row for name, row in cells if name.startswith(method)),
                    key=lambda row: row["psnr"],
                )
                for method in ("step-level", "astraea")
            )
            lead = np.subtract(whole["psnr_each"], tokens["psnr_each"])
            leads.append(f"{lead.mean():.1f} ± {1.96 * lead.std(ddof=1) / len(lead) ** 0.5:.1f}")
        said.append(f"{', '.join(leads)} dB with {'UniPC' if solver == 'unipc' else 'Euler'}")
    return (
        "The best row of whole steps against the best token-wise one, first fifth dense, prompt by "
        f"prompt, at 30, 50 and 70 %: {'; '.join(said)}."
    )


SEARCHED = {
    "fewer": ("fewer dense steps", "dense", False),
    "uniform": ("uniform", "per block", False),
    "random": ("first fifth dense", "random tokens", False),
    "fixed": ("first fifth dense", "fixed-token", False),
    "block": ("first fifth dense", "per block", False),
    "step": ("first fifth dense", "astraea", False),
    "hand": ("hand-made", "step-level", True),
    "hand corrected": ("hand-made", "step-level-corrected", True),
    "dp": ("sensitivity + DP", None, True),
    "swaps": ("DP + swaps", None, True),
    "whole": ("step-level EA", None, True),
    "all": ("EA", None, True),
}
"""Columns of the search's table: what, method (None is any), and whether the worst prompt stands
beside the mean."""


def search(results: Row) -> str:
    """Every way to find a schedule: the best row of each kind for a solver and a budget."""
    judged = [row for row in results["rows"] if "psnr" in row]
    ships = chosen(results["rows"])
    lines = []
    for solver in ("euler", "unipc"):
        for budget in sorted({row["budget"] for row in judged}):
            line = {"solver": "UniPC" if solver == "unipc" else "Euler"}
            line["budget"] = f"{round(100 * budget)} %"
            for column, (what, method, worst) in SEARCHED.items():
                found = [
                    row
                    for row in judged
                    if (row["solver"], row["budget"]) == (solver, budget)
                    and row["what"].split(":")[0] == what
                    and method in (None, row["method"])
                ]
                if found:
                    line[column] = _decibels(max(found, key=lambda row: row["psnr"]), worst)
            if (solver, budget) in ships:
                line["ships"] = _decibels(ships[solver, budget], worst=True)
            lines.append(line)
    columns = {"solver": "solver", "budget": "budget", "fewer": "fewer steps"}
    columns |= {"uniform": "uniform, per block", "random": "random tokens", "fixed": "FIXED-TOKEN"}
    columns |= {"block": "per block", "step": "one selection a step", "hand": "best by hand"}
    columns |= {"hand corrected": "by hand, corrected", "dp": "skip one + DP"}
    columns |= {"swaps": "DP + swaps", "whole": "whole steps, EA", "all": "levels 0..10, EA"}
    columns |= {"ships": "ships"}
    return _markdown(lines, columns)


def _decibels(row: Row, worst: bool) -> str:
    """PSNR's mean, and the worst prompt in brackets."""
    return f"{row['psnr']:.1f}" + (f" ({row['psnr_worst']:.0f})" if worst else "")


def transfer(results: Row) -> str:
    """Schedules found on earlier weights, on prompts that the search's table is made of too."""
    now = files.read_json(RESULTS / "search.json")["rows"]
    ships, number = chosen(now), results["options"]["heldout_prompts"]

    def mean(row: Row) -> float:
        return float(np.mean(row["psnr_each"][:number]))

    def best(rows: Sequence[Row], what: str, solver: str, budget: float) -> float:
        return max(
            mean(row)
            for row in rows
            if (row["solver"], row["budget"]) == (solver, budget)
            and row["what"].startswith(what)
            and "psnr_each" in row
        )

    lines = []
    for solver, budget in ships:
        cells = {
            "hand": best(now, "hand-made", solver, budget),
            "earlier": best(results["rows"], "transfer: step-level EA", solver, budget),
            "again": mean(ships[solver, budget]),
        }
        line = {"solver": "UniPC" if solver == "unipc" else "Euler"}
        line |= {"budget": f"{round(100 * budget)} %"}
        lines.append(line | {key: f"{value:.1f}" for key, value in cells.items()})
    columns = {"solver": "solver", "budget": "budget", "hand": "best by hand"}
    columns |= {"earlier": "found on earlier weights", "again": "searched again"}
    return _markdown(lines, columns)


def denoise(results: Row) -> str:
    """Steps of the small model on a CPU, driver by driver."""
    shown = {"milliseconds": ".1f", "speedup": ".2f", "bound": ".2f", "share": ".2f"}
    lines = []
    for row in results["rows"]:
        if "share" in row:  # a step, and neither the text nor the decoder
            line = row | {key: format(row[key], form) for key, form in shown.items()}
            line["compile"] = f"{row['compile']:.1f}" if row["compile"] > 0.1 else ""
            lines.append(line)
    columns = {"driver": "driver", "method": "method", "level": "level"}
    columns |= {"milliseconds": "ms a step", "speedup": "speed-up", "bound": "bound"}
    columns |= {"share": "of the bound", "peak": "peak memory", "compile": "compile s"}
    return _markdown(lines, columns)


def attention(results: Row) -> str:
    """Attention of all queries, implementation beside implementation, from the newest run."""
    names = {
        "wan-33": "Wan, 33 frames 480x832",
        "wan-65": "Wan, 65 frames",
        "wan-81": "Wan, 81 frames",
        "wan-14b-720p": "Wan 14B, 81 frames 720x1280",
        "opensora-spatial-15": "OpenSora, spatial, a frame of 15 (head width 72)",
    }
    lines = []
    for shape, name in names.items():
        line: Row = {"shape": name}
        for run in results["timings"]:  # the newest first
            rows = [row for row in run["rows"] if row["shape"] == shape and row["ratio"] == 1]
            cells = {row["implementation"]: row for row in rows}
            if "mosaic" in cells and "mosaic" not in line:
                line |= {name: f"{row['milliseconds']:.3g} ms" for name, row in cells.items()}
                line["mosaic"] += f", {cells['mosaic']['teraflops']:.0f} TFLOP/s"
                line["tokens"] = cells["mosaic"]["queries"]
        lines.append(line)
    columns = {"shape": "shape", "tokens": "tokens", "mosaic": "Pallas Mosaic", "cudnn": "cuDNN"}
    return _markdown(lines, columns)


def wan(results: Row) -> str:
    """Steps of Wan 1.3B, 81 frames: beside the peer in one run, and of the newest run."""
    parts = results["parts"]
    peer, beside, newest = (
        parts[name]["result"] for name in ("peer", "static-81, in the peer's run", "static-81")
    )
    best = min(peer["rows"], key=lambda row: row["milliseconds"])
    name = f"Diffusers {peer['environment']['diffusers']}, `torch.compile`, {best['attention']}"
    lines: list[Row] = [
        {"card": _card(peer), "what": name, "step": f"{best['milliseconds']:.0f}"},
        _step(beside, next(row for row in beside["rows"] if row["method"] == "dense")),
    ]
    for row in newest["rows"]:
        if row["method"] == "dense" or row["level"] < 10:
            lines.append(_step(newest, row))
    columns = {"card": "card", "what": "", "step": "ms a step", "video": "s for 50 steps"}
    more = {"speedup": "speed-up", "share": "of what the operations allow"}
    return _markdown(lines, columns | more)


def reference(results: Row) -> str:
    """Steps of Wan 1.3B with the residual stream in float32, which the command's videos have."""
    result = results["parts"]["reference-81"]["result"]
    lines = [
        _step(result, row)
        for row in result["rows"]
        if row["method"] == "dense" or row["level"] < 10
    ]
    columns = {"card": "card", "what": "tokens", "step": "ms a step", "video": "s for 50 steps"}
    return _markdown(lines, columns | {"speedup": "speed-up", "share": "of what is possible"})


def short(results: Row) -> str:
    """The same of the small model on a CPU, one driver alone."""
    lines = []
    for row in results["rows"]:
        if row["driver"] == "static" and (row["method"] == "dense" or row["level"] < 10):
            what = "dense" if row["method"] == "dense" else f"{10 * row['level']} %"
            line = {"what": what, "step": f"{row['milliseconds']:.0f}"}
            lines.append(line | {key: f"{row[key]:.2f}" for key in ("speedup", "bound")})
    columns = {"what": "tokens", "step": "ms a step", "speedup": "speed-up", "bound": "possible"}
    return _markdown(lines, columns)


def _step(result: Row, row: Row) -> Row:
    return {
        "card": _card(result),
        "what": "dense" if row["method"] == "dense" else f"{10 * row['level']} %",
        "step": f"{row['milliseconds']:.0f}",
        "video": f"{row['projected']:.1f}",
        "speedup": f"{row['speedup']:.2f}",
        "share": f"{row['share']:.2f}",
    }


def _card(result: Row) -> str:
    """The GPU's name, as people say it."""
    return result["environment"]["devices"][0].removeprefix("NVIDIA ").split()[0]


TABLES: dict[str, tuple[str, Callable[[Row], str]]] = {
    "search": ("search.json", search),
    "transfer": ("search_transfer.json", transfer),
    "quality": ("quality.json", quality),
    "denoise": ("denoise.json", denoise),
    "attention": ("attention.json", attention),
    "wan": ("gpu.json", wan),
    "reference": ("gpu.json", reference),
    "cores": ("denoise.json", short),
}


def _markdown(lines: Sequence[Row], columns: dict[str, str]) -> str:
    """As `report.markdown`, with nothing where a line has nothing."""
    filled = [
        {key: "" if line.get(key) is None else line[key] for key in columns} for line in lines
    ]
    return report.markdown(filled, columns)


def made(name: str) -> str:
    """A table as its results have it."""
    file, make = TABLES[name]
    return make(files.read_json(RESULTS / file))


def command(*, readme: pathlib.Path | None = None) -> None:
    """Prints the tables of the results, or writes those that a README has a place for.

    Args:
      readme: A README to write them into; a table that it has no place for is left out.
    """
    if readme is None:
        print("\n\n".join(f"{name}\n\n{made(name)}" for name in TABLES))
        return
    text = files.read_text(readme, what="README to write tables into")
    files.check_output(readme, (readme.suffix.lower(),))
    places = re.findall(r"<!-- table: (\w+) -->", text)
    if not places or set(places) - set(TABLES):
        raise Refusal(
            f"expected `<!-- table: NAME -->` in {readme}, NAME of {', '.join(TABLES)}; got "
            f"{', '.join(places) or 'none'}"
        )
    for name in places:
        pattern = re.compile(MARKED.format(name), re.S)
        if not pattern.search(text):
            raise Refusal(f"expected `<!-- end -->` after `<!-- table: {name} -->` in {readme}")
        text = pattern.sub(lambda found, name=name: f"{found[1]}\n{made(name)}\n\n{found[3]}", text)
    with files.replacing(readme) as partial:
        partial.write_text(text)


if __name__ == "__main__":
    start.run(command)
