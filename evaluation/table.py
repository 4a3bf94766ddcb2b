"""table.md: metrics.json as Markdown."""

from collections.abc import Sequence


def table(metrics: dict) -> str:
    """The evaluation as Markdown: one table a guidance scale and number of steps, the best of each column in bold."""
    known = metrics["metrics"]
    heads = [_head(name, about) for name, about in known.items()]
    lines = [f"# {metrics['model']}", "", _preamble(metrics), ""]
    for guidance in dict.fromkeys(row["guidance_scale"] for row in metrics["rows"]):
        rows = [row for row in metrics["rows"] if row["guidance_scale"] == guidance]
        lines += [f"## Guidance {guidance:g}, {rows[0]['prompts']} prompts", ""]
        lines += ["| steps | solver | grid | NFE | s / image | " + " | ".join(heads) + " |"]
        lines += ["|---|---|---|---|---|" + "---|" * len(heads)]
        for steps in sorted({row["steps"] for row in rows}):
            group = [row for row in rows if row["steps"] == steps]
            lines += [_line(row, group, known) for row in group]
        lines += [""]
    lines += _paired_lines(metrics) + _workflow_lines(metrics)
    return "\n".join(lines)


def _preamble(metrics: dict) -> str:
    full = metrics["full_steps"]
    dtype = metrics["dtype"] + (", denoiser in bfloat16" if metrics["autocast"] else "")
    return (
        f"Prompts from `{metrics['dataset']['prompts']}`; same noise for every solver. Consistency to the picture of "
        f"{full['steps']} steps of {full['scheduler']}. Each classical solver is on its best grid, chosen by "
        f"{metrics['main_metric']}. ± is half the 95 % bootstrap interval; best of a step count in bold; "
        "† was the reward in training, ↓ is better low. NFE counts calls of the denoiser, guidance included.\n\n"
        f"{metrics['hardware']}, {dtype}, batches of {metrics['batch_size']}, torch {metrics['versions']['torch']}, "
        f"diffusers {metrics['versions']['diffusers']}."
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
        digits = 3 if abs(value) < 2 else 2
        text = f"{value:.{digits}f}"
        text = f"**{text}**" if value == best and len(set(values)) > 1 else text
        cells.append(f"{text} ± {(high - low) / 2:.{digits}f}")
    facts = [row["steps"], row["solver"], row["grid"], row["nfe"], f"{row['seconds_per_image']:.3f}"]
    return "| " + " | ".join([*map(str, facts), *cells]) + " |"


def _paired_lines(metrics: dict) -> list[str]:
    main = [entry for entry in metrics["paired"] if entry["metric"] == metrics["main_metric"]]
    if not main:
        return []
    others = list(dict.fromkeys(entry["b"] for entry in main))
    lines = [f"## learned minus the others, {metrics['main_metric']}, paired, with 95 % intervals", ""]
    lines += ["| guidance | steps | " + " | ".join(others) + " |", "|---|---|" + "---|" * len(others)]
    for guidance, steps in dict.fromkeys((entry["guidance_scale"], entry["steps"]) for entry in main):
        here = {e["b"]: e for e in main if (e["guidance_scale"], e["steps"]) == (guidance, steps)}
        texts = [_signed(here[name]) if name in here else "" for name in others]
        lines.append(f"| {guidance:g} | {steps} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def _signed(entry: dict) -> str:
    low, high = entry["ci95"]
    return f"{entry['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"


def _workflow_lines(metrics: dict) -> list[str]:
    if not metrics["workflow"]:
        return []
    lines = [
        "## Preview and refine, simulated",
        "",
        "A user draws seeds until the caption check passes: full renders only, or previews first.",
        "",
        "| guidance | solver | steps | NFE full only | NFE previews first | NFE saved | time saved | false accepts "
        "| false rejects | found, full only | found, previews first |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in metrics["workflow"]:
        saved = [entry[f"saving_{unit}"] for unit in ("nfe", "seconds")]
        texts = [f"{100 * s['mean']:.0f} % [{100 * s['ci95'][0]:.0f}, {100 * s['ci95'][1]:.0f}]" for s in saved]
        shares = ("false_accepts", "false_rejects", "full_only_success", "preview_first_success")
        texts += [f"{100 * entry[share]:.0f} %" for share in shares]
        costs = [f"{entry[f'{name}_nfe']['mean']:.0f}" for name in ("full_only", "preview_first")]
        facts = [f"{entry['guidance_scale']:g}", entry["solver"], str(entry["steps"])]
        lines.append("| " + " | ".join([*facts, *costs, *texts]) + " |")
    return [*lines, ""]
