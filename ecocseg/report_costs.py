"""Markdown tables of what `jobs/benchmark.py coding` and `step` wrote."""

from __future__ import annotations

from typing import Any

FORMS = {"one_hot": "one-hot", "ecoc": "ECOC", "five_dim": "5-D"}
OPERATIONS = {"scores": "class scores", "pseudo_label": "pseudo-label", "loss": "loss, true labels",
              "mixed_loss": "loss, mixed labels"}


def costs_table(told: dict[str, Any]) -> str:
    """The table of one result, with what it was measured on."""
    asked, machine = told["arguments"], told["machine"]
    where = f"{machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}, commit {machine['commit']}"
    if asked["what"] == "coding":
        title = (f"B {asked['batch']}, N {asked['classes']}, K {asked['bits']}, {asked['size']} x {asked['size']} pixels, "
                 f"stride {asked['stride']}, {asked['content']}, {asked['repeats']} repeats; {where}")
        return "\n".join([title, "", *_coding_lines(told["rows"])])
    title = f"{asked['recipe']}, {asked['batch']} + {asked['batch']} images of {asked['size']} x {asked['size']}; {where}"
    return "\n".join([title, "", *_step_lines(told["rows"])])


def _coding_lines(rows: list[dict[str, Any]]) -> list[str]:
    by = {(row["operation"], row["form"]): row for row in rows}
    lines = ["| operation | one-hot | ECOC | 5-D | ECOC / one-hot | 5-D / ECOC |", "|---|---|---|---|---|---|"]
    for operation, name in OPERATIONS.items():
        found = [by.get((operation, form)) for form in FORMS]
        if operation == "scores":
            found[0] = None  # one-hot's scores are its logits
        one_hot, ecoc, five_dim = (row and row["cpu_seconds"] for row in found)
        cells = ["-" if row is None else f"{row['cpu_seconds']:.3f} s, {row['megabytes']:.0f} MB" for row in found]
        ratios = [f"{ecoc / one_hot:.1f}" if one_hot else "-", f"{five_dim / ecoc:.0f}" if five_dim else "-"]
        lines.append(f"| {name} | {' | '.join(cells + ratios)} |")
    return lines


def _step_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| coding | s a step, median (least to most) | CPU s | peak MB | time | memory |", "|---|---|---|---|---|---|"]
    for row in rows:
        change = [f"{100 * (row[key] / rows[0][key] - 1):+.1f} %" for key in ("seconds", "megabytes")]
        lines.append(f"| {FORMS[row['form']]} | {row['seconds']:.3f} ({row['least']:.3f} to {row['most']:.3f}) | "
                     f"{row['cpu_seconds']:.3f} | {row['megabytes']:.0f} | {change[0]} | {change[1]} |")
    return lines
