"""table.md: metrics.json as Markdown."""

import math
from collections.abc import Mapping, Sequence


def table(metrics: dict) -> str:
    """The evaluation as Markdown: a table a guidance scale, the best of each number of steps in bold."""
    known = metrics["metrics"]
    heads = [_head(name, about) for name, about in known.items()]
    lines = [f"# {metrics['model']}", "", _preamble(metrics), ""]
    for guidance in dict.fromkeys(row["guidance_scale"] for row in metrics["rows"]):
        rows = [row for row in metrics["rows"] if row["guidance_scale"] == guidance]
        lines += [f"## Guidance {guidance:g}", ""]
        lines += ["| steps | solver | grid | NFE | prompts | s / image | " + " | ".join(heads) + " |"]
        lines += ["|---" * (len(heads) + 6) + "|"]
        for steps in sorted({row["steps"] for row in rows}):
            group = [row for row in rows if row["steps"] == steps]
            lines += [_line(row, group, known) for row in group]
        lines += ["", *_left_out_lines(metrics, guidance)]
    lines += _paired_lines(metrics) + _closest_lines(metrics) + _across_lines(metrics) + _workflow_lines(metrics)
    return "\n".join(lines)


def _preamble(metrics: dict) -> str:
    full = metrics["full_steps"]
    chosen = (
        f"Each classical solver is on its best grid for the number of steps and the guidance, chosen by "
        f"{metrics['main_metric']} on {metrics['dataset']['grid_prompts']} other prompts. "
    )
    grids = chosen if any(row["grids"] for row in metrics["rows"]) else ""
    return (
        f"Prompts from `{metrics['dataset']['prompts']}`; same noise for every solver. Consistency to the picture of "
        f"{full['steps']} steps of {full['scheduler']}. {grids}"
        "± is half the 95 % bootstrap interval; best of a step count in bold; † was the reward in training, ↓ is "
        "better low. NFE counts evaluations of the denoiser, prompt and empty prompt together; it and the seconds are "
        "those of a solver alone, though evaluations that several solvers share were made once.\n\n"
        f"{ran_on(metrics)}"
    )


def ran_on(report: Mapping) -> str:
    """Hardware, dtype, size of a batch and versions of metrics.json, as a sentence."""
    dtype = report["dtype"] + (", denoiser in bfloat16" if report["autocast"] else "")
    return (
        f"{report['hardware']}, {dtype}, batches of {report['batch_size']}, torch {report['versions']['torch']}, "
        f"diffusers {report['versions']['diffusers']}."
    )


def _head(name: str, about: dict) -> str:
    return f"{name}{' †' * about['trained_on']}{'' if about['higher_is_better'] else ' ↓'}"


def _line(row: dict, group: Sequence[dict], known: dict) -> str:
    cells = []
    for name, about in known.items():
        if name not in row["metrics"]:
            cells.append("")
            continue
        values = [other["metrics"][name]["mean"] for other in group if name in other["metrics"]]
        best = max(values) if about["higher_is_better"] else min(values)
        value, (low, high) = row["metrics"][name]["mean"], row["metrics"][name]["ci95"]
        digits = _digits(value, high - low)
        text = f"{value:.{digits}f}"
        text = f"**{text}**" if value == best and len(set(values)) > 1 else text
        cells.append(f"{text} ± {(high - low) / 2:.{digits}f}")
    facts = [row[key] for key in ("steps", "solver", "grid", "nfe", "prompts")]
    facts.append(f"{row['seconds_per_image']:.3f}")
    return "| " + " | ".join([*map(str, facts), *cells]) + " |"


def _digits(value: float, width: float) -> int:
    """Decimals that show a value, and the width of its interval where that is small."""
    shown = 3 if abs(value) < 2 else 2
    return max(shown, min(5, 1 - math.floor(math.log10(width)))) if width > 0 else shown


def _left_out_lines(metrics: dict, guidance: float) -> list[str]:
    """Which solvers have no row, and why."""
    steps: dict[tuple[str, str], list[int]] = {}
    for entry in metrics["left_out"]:
        if entry["guidance_scale"] == guidance:
            steps.setdefault((entry["reason"], entry["solver"]), []).append(entry["steps"])
    if not steps:
        return []
    texts = [f"{solver} at {', '.join(map(str, counts))} ({reason})" for (reason, solver), counts in steps.items()]
    return [f"Without a row: {'; '.join(texts)}.", ""]


def _across_lines(metrics: dict) -> list[str]:
    """The learned solver with fewer steps against the best classical one with more."""
    if not metrics["across_steps"]:
        return []
    found = {entry["metric"] for entry in metrics["across_steps"]}
    names = [name for name in metrics["metrics"] if name in found]
    lines = ["## learned with fewer steps, minus the best classical solver with more", ""]
    lines += ["| guidance | learned | classical | " + " | ".join(names) + " |", "|---" * (len(names) + 3) + "|"]
    cells: dict[tuple, dict[str, dict]] = {}
    for entry in metrics["across_steps"]:
        cells.setdefault((entry["guidance_scale"], entry["steps"], entry["steps_b"]), {})[entry["metric"]] = entry
    for (guidance, steps, more), found in sorted(cells.items()):
        texts = [f"{_signed(found[name])} {found[name]['b']}" if name in found else "" for name in names]
        lines.append(f"| {guidance:g} | {steps} steps | {more} steps | " + " | ".join(texts) + " |")
    return [*lines, ""]


def _paired_lines(metrics: dict) -> list[str]:
    main = [entry for entry in metrics["paired"] if entry["metric"] == metrics["main_metric"]]
    if not main:
        return []
    others = list(dict.fromkeys(entry["b"] for entry in main))
    lines = [f"## learned minus the others, {metrics['main_metric']}, paired, with 95 % intervals", ""]
    lines += ["| guidance | steps | " + " | ".join(others) + " |", "|---|---|" + "---|" * len(others)]
    for guidance, steps in sorted({(entry["guidance_scale"], entry["steps"]) for entry in main}):
        here = {e["b"]: e for e in main if (e["guidance_scale"], e["steps"]) == (guidance, steps)}
        texts = [_signed(here[name]) if name in here else "" for name in others]
        lines.append(f"| {guidance:g} | {steps} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def _closest_lines(metrics: dict) -> list[str]:
    """In every metric the row that the learned solver is least surely ahead of; checks against the full steps too."""
    entries = metrics["paired"] + [{**e, "metric": f"{e['metric']}, full steps"} for e in metrics["from_full"]]
    if not entries:
        return []
    lower = {name for name, about in metrics["metrics"].items() if not about["higher_is_better"]}
    found = {entry["metric"] for entry in entries}
    names = [name for name in metrics["metrics"] if name in found]
    names += sorted(found - set(names))
    rivals: dict[tuple, list[dict]] = {}
    for entry in entries:
        rivals.setdefault((entry["guidance_scale"], entry["steps"], entry["metric"]), []).append(entry)

    def surely_ahead(entry: dict) -> float:
        """The end of the interval that is the rival's."""
        low, high = entry["ci95"]
        return -high if entry["metric"] in lower else low

    lines = ["## learned minus its closest rival, in every metric, paired", ""]
    lines += ["| guidance | steps | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for guidance, steps in sorted({cell[:2] for cell in rivals}):
        closest = [min(rivals.get((guidance, steps, name), []), key=surely_ahead, default=None) for name in names]
        texts = [f"{_signed(entry)} {entry['b']}" if entry else "" for entry in closest]
        lines.append(f"| {guidance:g} | {steps} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def _signed(entry: dict) -> str:
    low, high = entry["ci95"]
    digits = _digits(10, high - low)
    return f"{entry['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _interval(entry: dict, scale: float = 1, digits: int = 0) -> str:
    mean, low, high = ("∞" if x is None else f"{scale * x:.{digits}f}" for x in (entry["mean"], *entry["ci95"]))
    return f"{mean} [{low}, {high}]"


def _workflow_lines(metrics: dict) -> list[str]:
    if not metrics["workflow"]:
        return []
    lines = [
        "## Preview and refine, simulated",
        "",
        "A user draws seeds until the check passes: full renders only, or previews first. NFE: all evaluations of all "
        "prompts, over the prompts that ended with a picture.",
        "",
        "| guidance | solver | steps | NFE a picture, full only | NFE a picture, previews first | NFE saved "
        "| s a picture, full only | s a picture, previews first | time saved "
        "| false accepts | false rejects | found, full only | found, previews first |",
        "|---" * 13 + "|",
    ]
    shares = ("false_accepts", "false_rejects", "full_only_success", "preview_first_success")
    for entry in metrics["workflow"]:
        facts = [f"{entry['guidance_scale']:g}", entry["solver"], str(entry["steps"])]
        for unit, digits in (("nfe", 0), ("seconds", 1)):
            facts += [_interval(entry[f"{way}_{unit}"], digits=digits) for way in ("full_only", "preview_first")]
            facts += [_interval(entry[f"saving_{unit}"], scale=100) + " %"]
        facts += [_interval(entry[share], scale=100) + " %" for share in shares]
        lines.append("| " + " | ".join(facts) + " |")
    return [*lines, ""]
