"""metrics.json, table.md and figure.png of an experiment.

metrics.json  "rows": [{"name", "curve", "calls", "gflops", "full_over_this", "seconds_per_image", "against",
              "metrics": {name: {"mean", "ci95"}}, "differences": likewise}], and what the command adds
"""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.quality.lines import LOW_IS_GOOD, METRICS, Line
from benchmarks.quality.study import Study
from data.teacher import library_versions
from evaluation.bootstrap import Estimate
from evaluation.plots import COLOURS, LEARNED, MARKERS, STYLE
from evaluation.report import hardware
from evaluation.table import ran_on
from solver.samplers.latents import denoiser


def report_of(lines: Sequence[Line], study: Study, about: dict) -> dict:
    """All numbers, in plain JSON values; `about` comes first."""
    samples = study.samples
    dtype = str(denoiser(study.pipe).dtype).removeprefix("torch.")
    run = {"hardware": hardware(), "dtype": dtype, "autocast": False, "batch_size": study.batch_size}
    return {
        **about,
        "prompts": len(set(samples.prompts)),
        "pictures": len(samples.prompts),
        "guidance_scale": samples.guidance_scale,
        **run,
        "versions": library_versions(),
        "metrics": {
            name: {"unit": unit, "higher_is_better": name not in LOW_IS_GOOD} for name, unit in METRICS.items()
        },
        "rows": [_row(line, lines[0]) for line in lines],
    }


def _row(line: Line, full: Line) -> dict:
    one = line.measured
    return {
        "name": line.name,
        "curve": one.row.curve,
        "calls": one.calls,
        "gflops": line.gflops,
        "full_over_this": full.gflops / line.gflops,
        "seconds_per_image": one.seconds,
        "against": one.row.against,
        "metrics": {name: _plain(estimate) for name, estimate in line.estimates.items()},
        "differences": {name: _plain(estimate) for name, estimate in line.differences.items()},
    }


def _plain(estimate: Estimate) -> dict:
    return {"mean": estimate.value, "ci95": estimate.ci95}


def write_json(report: dict, path: Path) -> None:
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Table
# ---------------------------------------------------------------------------------------------------------------------


def table(report: dict, title: str, remarks: Sequence[str] = ()) -> str:
    """The report as Markdown: values with intervals, then paired differences."""
    names = [name for name in METRICS if any(name in row["metrics"] for row in report["rows"])]
    heads = [f"{name.replace('_', ' ')}{' ↓' * (name in LOW_IS_GOOD)}" for name in names]
    lines = [f"# {title}", "", _preamble(report), ""]
    lines += ["| | GFLOPs | full / this | s / image | " + " | ".join(heads) + " |", "|---" * (len(names) + 4) + "|"]
    for row in report["rows"]:
        facts = [
            row["name"],
            f"{row['gflops']:.2f}",
            f"{row['full_over_this']:.2f}",
            f"{row['seconds_per_image']:.3f}",
        ]
        lines.append("| " + " | ".join(facts + [_value(row["metrics"].get(name)) for name in names]) + " |")
    lines += ["", "## Paired differences, with 95 % intervals", ""]
    lines += ["| | minus | " + " | ".join(heads) + " |", "|---" * (len(names) + 2) + "|"]
    for row in report["rows"]:
        if row["differences"]:
            cells = [_difference(row["differences"].get(name), name) for name in names]
            lines.append(f"| {row['name']} | {row['against']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *remarks]) + "\n"


def _preamble(report: dict) -> str:
    return (
        f"{report['model']}, {report['pictures']} pictures of {report['prompts']} prompts from "
        f"`{report['prompt_source']}`, guidance {report['guidance_scale']:g}. The first row is what all are compared "
        "with. ± is half the 95 % bootstrap interval. FLOPs are the denoiser's, attention and both branches of the "
        "guidance counted; FLOPs and seconds are those of a row alone, though evaluations that rows share were made "
        "once. In the table of differences, what is surely better than the other row is bold, what is surely worse is "
        f"in italics.\n\n{ran_on(report)}"
    )


def _value(entry: dict | None) -> str:
    if entry is None:
        return ""
    low, high = entry["ci95"]
    return f"{entry['mean']:.2f} ± {(high - low) / 2:.2f}"


def _difference(entry: dict | None, name: str) -> str:
    if entry is None:
        return ""
    low, high = entry["ci95"]
    text = f"{entry['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"
    if low <= 0 <= high:
        return text
    return f"**{text}**" if (low > 0) != (name in LOW_IS_GOOD) else f"*{text}*"


# ---------------------------------------------------------------------------------------------------------------------
# Figure
# ---------------------------------------------------------------------------------------------------------------------


def draw_figure(report: dict, mine: str, path: Path) -> None:
    """A panel a metric over GFLOPs: every method is a curve, or a point, with 95 % intervals.

    Args:
        report: whose first row, the full run, is a dashed line where it is not its own measure.
        mine: the curve in red.
        path: of the PNG file.
    """
    full, *rows = report["rows"]
    curves = list(dict.fromkeys(row["curve"] for row in rows if row["curve"]))
    others = [curve for curve in curves if curve != mine]
    names = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    lines = -(-len(names) // 3)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(lines, 3, figsize=(12, 2.9 * lines + 1), squeeze=False, layout="constrained")
        for axis, name in zip(axes.flat, names, strict=False):
            for i, curve in enumerate(curves):
                points = [(row["gflops"], row["metrics"][name]) for row in rows if row["curve"] == curve]
                colour = LEARNED if curve == mine else COLOURS[others.index(curve) % len(COLOURS)]
                _curve(axis, points, curve, colour, MARKERS[i % len(MARKERS)], 2.0 if curve == mine else 1.2)
            if name in ("caption_check", "frechet_scenes"):
                axis.axhline(full["metrics"][name]["mean"], color="#444444", linestyle="--", linewidth=1)
            axis.set_title(name.replace("_", " "))
            axis.set_ylabel(METRICS[name] + (", low is good" if name in LOW_IS_GOOD else ""))
            axis.set_xlabel("GFLOPs a picture")
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)))
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _curve(axis, points: list[tuple[float, dict]], label: str, colour: str, marker: str, width: float) -> None:
    points = sorted(points, key=lambda point: point[0])
    gflops, means = [x for x, _ in points], [value["mean"] for _, value in points]
    reach = [[abs(value["mean"] - value["ci95"][end]) for _, value in points] for end in (0, 1)]
    settings = {"marker": marker, "markersize": 4.5, "linewidth": width, "elinewidth": 0.8}
    axis.errorbar(gflops, means, reach, color=colour, label=label, alpha=0.9, **settings)
