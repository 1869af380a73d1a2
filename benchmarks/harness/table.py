"""Results as Markdown: for the terminal and for `docs/results/` alike."""

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def markdown(result: Result) -> str:
    """Show everything that a run has found.

    Args:
        result: What `generation.py --json` writes.
    """
    parts = [
        f"# Generation, {result['date']}",
        _preface(result),
        "## Settings that the peers were given",
        "Each setting in a process of its own; the best of a peer is marked and used below "
        "(for prompts alone, the best at reading prompts). Ours run as a user gets them.",
        _sweep(result)
        + (
            f"\n\nTaken from an earlier run, `{result['conditions']['settings']}`."
            if result["conditions"]["settings"]
            else ""
        ),
    ]
    for name, one in result["workloads"].items():
        parts += [f"## {name}", _workload(one, result)]
    parts += ["## Start, memory and size", _start(result)]
    if result["quality"]:
        parts += ["## Quality", _quality(result)]
    if result["missing"]:
        parts += ["## Missing", "\n".join(f"- {name}: {why}" for name, why in result["missing"].items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table whose columns are aligned in plain text too."""
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    lines = [
        " | ".join(
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    rule = " | ".join(
        "-" * width if not place else "-" * (width - 1) + ":" for place, width in enumerate(widths)
    )
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def figure(found: Mapping[str, float] | None) -> str:
    """Show a median and its spread."""
    if found is None:
        return ""
    return f"{number(found['median'])} ({number(found['least'])} .. {number(found['most'])})"


def number(value: float) -> str:
    """Show three digits, and all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _preface(result: Result) -> str:
    machine, roof = result["machine"], result["roofline"]
    quota = "" if machine["cpu_quota"] is None else f", quota {machine['cpu_quota']:g}"
    conditions = result["conditions"]
    lines = [
        f"- Command: `{result['command']}`",
        f"- Model: {result['model']}; text: {result['text']}",
        f"- Machine: {machine['cpu']}, {machine['usable_cpus']} of {machine['cores']} cores{quota}, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB, {machine['os']}, Python {machine['python']}; "
        f"{', '.join(machine['instruction_sets'])}",
        f"- Versions: {', '.join(f'{name} {one}' for name, one in sorted(result['versions'].items()))}",
        f"- Rounds: {conditions['rounds']}, programs in turn, each alone (the others are stopped). "
        "Figures are medians (least .. largest round).",
    ]
    worst = max(
        (
            max(one["disturbed"])
            for load in result["workloads"].values()
            for one in load.values()
            if one["disturbed"]
        ),
        default=0.0,
    )
    lines.append(
        f"- Other processes: a lap in which they took more than {conditions['quiet']:.0%} of the CPU time was "
        f"repeated up to {conditions['retries']} times, the least disturbed one counts; the most in a lap "
        f"that counts was {worst:.0%}."
        + (" Programs ran in the real-time class, before other work." if conditions["real_time"] else "")
    )
    if roof:
        every = ", ".join(f"{name} {one / 1e9:.1f}" for name, one in roof["all"].items())
        lines.append(
            f"- Read bandwidth: {roof['bytes_per_s'] / 1e9:.1f} GB/s, the fastest way to read a gigabyte "
            f"({every}). The share of the roofline is tokens/s times the bytes of the weights that a token "
            "reads, over this; what a token reads of the cache is left out."
        )
    return "\n".join(lines)


def _sweep(result: Result) -> str:
    rows = []
    for name, settings in result["sweep"].items():
        best: dict[int, list[str]] = {id(one): [] for one in settings}
        for key, what in (("decode", "new tokens"), ("prefill", "prompts")):
            fine = [one for one in settings if key in one]
            if fine:
                best[id(max(fine, key=lambda one: one[key]["median"]))].append(what)
        rows += [
            (
                name,
                setting(one["setting"]),
                figure(one.get("prefill")),
                figure(one.get("decode")),
                one["problem"][:60] if "problem" in one else " and ".join(best[id(one)]),
            )
            for one in settings
        ]
    header = ("program", "setting", "prompt tokens/s", "new tokens/s", "best at")
    return table(header, rows) if rows else ""


def setting(one: Mapping[str, Any]) -> str:
    """Show a setting."""
    words = [f"{one['threads']} threads" if one.get("threads") else "default threads"]
    return ", ".join(words + [f"{key}={value}" for key, value in one.items() if key != "threads"])


def _workload(programs: Mapping[str, Any], result: Result) -> str:
    single = all(one["speed"] is None or one["speed"]["batch"] == 1 for one in programs.values())
    ours = [name for name, one in programs.items() if one["ours"] and one["speed"]]
    key = "decode_tokens_per_s" if single else "total_tokens_per_s"
    if all(one["speed"] is None or one["speed"]["new_tokens"] < 8 for one in programs.values()):
        key = "prefill_tokens_per_s"
    bandwidth = result["roofline"] and result["roofline"]["bytes_per_s"]
    figures = ("prefill_tokens_per_s", "decode_tokens_per_s") if single else ("total_tokens_per_s",)
    titles = {
        "prefill_tokens_per_s": "prompt tokens/s",
        "decode_tokens_per_s": "new tokens/s",
        "total_tokens_per_s": "new tokens/s in all",
    }
    if key == "prefill_tokens_per_s":
        figures = (key,)
    share = key == "decode_tokens_per_s" and bandwidth
    rows = []
    for name, one in programs.items():
        speed = one["speed"]
        if speed is None:
            rows.append((name, one["problem"][:80], *[""] * (len(figures) + bool(share) + 2 + len(ours))))
            continue
        reads = result["programs"][name]["bytes_a_token"]
        part = f"{speed[key]['median'] * reads / bandwidth:.0%}" if share and reads else ""
        rows.append(
            (
                name,
                setting(one["setting"]),
                *(figure(speed[quantity]) for quantity in figures),
                *((part,) if share else ()),
                one["agreement"],
                f"{max(one['disturbed']):.0%}",
                *(f"{programs[mine]['speed'][key]['median'] / speed[key]['median']:.2f}" for mine in ours),
            )
        )
    header = (
        "program",
        "setting",
        *(titles[quantity] for quantity in figures),
        *(("share of roofline",) if share else ()),
        "tokens as the reference",
        "disturbed",
        *(f"{mine} / this" for mine in ours),
    )
    return table(header, rows) + f"\n\nRatios are of {titles[key]}: above 1, ours is faster."


def _start(result: Result) -> str:
    rows = []
    for name, one in result["programs"].items():
        start, memory = one["start"], one["memory"]
        rows.append(
            (
                name,
                figure(start.get("load_to_first_token_s")),
                figure(start.get("process_to_first_token_s")),
                f"{memory['imported_bytes'] / 1e6:.0f}" if memory else "",
                f"{memory['start_peak_bytes'] / 1e6:.0f}" if memory else "",
                f"{memory['decode_peak_bytes'] / 1e6:.0f}" if memory else "",
                f"{one['size_bytes'] / 1e6:.0f}",
                f"{(memory['decode_peak_bytes'] - memory['imported_bytes']) / one['size_bytes']:.2f}"
                if memory
                else "",
            )
        )
    header = (
        "program",
        "load to first token, s",
        "the same with start and imports, s",
        "after imports, MB",
        "peak of loading, MB",
        "peak of generating, MB",
        "model files, MB",
        "(peak - imports) / files",
    )
    return (
        table(header, rows)
        + "\n\nFiles are in the page cache; the prompt has 16 tokens. Memory is the most resident "
        "memory of the process, its Python, libraries and mapped files included, since its start and since "
        "the model was ready."
    )


def _quality(result: Result) -> str:
    rows = []
    for name, one in result["quality"].items():
        if "problem" in one:
            rows.append((name, one["problem"][:80], "", "", ""))
            continue
        kl = one.get("kl_mean")
        rows.append(
            (
                name,
                f"{one['perplexity']:.3f}",
                "" if kl is None else f"{kl:.2g}",
                "" if kl is None else f"{one['kl_p99']:.2g}",
                "" if kl is None else f"{one['top1']:.1%}",
            )
        )
    scored = max((one.get("tokens_scored", 0) for one in result["quality"].values()), default=0)
    return (
        table(("program", "perplexity", "mean KL", "KL p99", "same likeliest token"), rows)
        + f"\n\n`lmopt.evaluation.perplexity`, {scored} tokens of the same text in windows of {result['context']}, "
        f"on the logits that each program gave; KL in nats from {result['reference'] or 'no reference'}."
    )
