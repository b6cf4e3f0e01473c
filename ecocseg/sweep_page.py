"""A sweep's page: parallel coordinates, best so far, learning curves and table in one HTML file that needs nothing else.

The pictures are SVG and the table plain HTML, so all is there without JavaScript; with it, a trial pointed at in one is
shown in the others, a range drawn on an axis keeps the trials inside it, and columns sort.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ecocseg.config import RunConfig
from ecocseg.storage import Storage, join
from ecocseg.sweep_report import (
    Record,
    Trial,
    best,
    best_yaml,
    columns,
    compared,
    csv_text,
    ranked,
    rows,
    short_names,
    shown,
)

WIDTH, HEIGHT, TOP, LEFT, RIGHT, BOTTOM = 1000, 340, 56, 70, 70, 44
"""Pixels of a picture and of its margins."""


def write_results(record: Record, base: RunConfig, sweep_url: str, storage: Storage) -> None:
    """Write results.json, results.csv, index.html and, once there is a best trial, best.yaml to the sweep's folder."""
    files = {"results.json": record.to_json(), "results.csv": csv_text(record).encode(), "index.html": page(record).encode()}
    chosen = best_yaml(record, base)
    if chosen is not None:
        files["best.yaml"] = chosen.encode()
    for name, data in files.items():
        storage.write_bytes(join(sweep_url, name), data)


def page(record: Record) -> str:
    """The whole page."""
    counts = {state: sum(trial.state == state for trial in record.trials) for state in dict.fromkeys(
        trial.state for trial in ranked(record))}
    goals = ", then ".join(f"{name} ({way})" for name, way in record.objectives.items())
    top = best(record)
    said = "No trial has a result yet." if top is None else (
        f"Best: {top.name}, " + ", ".join(f"{name} {shown(top.metrics.get(name))}" for name in record.objectives) + " with "
        + ", ".join(f"{key}={shown(value)}" for key, value in top.values.items()) + ".")
    parts = [f"<h1>Sweep {escape(record.name)}</h1>",
             f"<p>{escape(record.description)}</p>" if record.description else "",
             f"<p>Recipe {escape(record.recipe)}; {len(record.trials)} trial(s): "
             + (", ".join(f"{count} {state}" for state, count in counts.items()) or "none yet")
             + f"; ranked by {escape(goals)}. {escape(said)}</p>"]
    if record.trials:
        marks = _marks(record)
        parts += [_parallel(record, marks), _best_so_far(record, marks), _curves(record, marks), _table(record)]
    return _PAGE.format(title=escape(record.name), style=_STYLE, body="\n".join(parts), script=_SCRIPT)


@dataclass(frozen=True)
class Axis:
    """Where values lie between 0 (bottom) and 1 (top), and the marks beside it."""

    place: Callable[[Any], float]
    marks: list[tuple[float, str]]


def axis(values: Sequence[Any], kind: str = "uniform", flipped: bool = False) -> Axis:
    """An axis for a domain of a kind and the values that occurred; `flipped` has the least on top."""
    def turn(share: float) -> float:
        return 1 - share if flipped else share

    if kind == "choice" or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        names = sorted(set(values)) if numbers else sorted({str(v) for v in values})
        shares = {str(name): turn(0.5 if len(names) == 1 else i / (len(names) - 1)) for i, name in enumerate(names)}
        step = math.ceil(len(names) / 14)
        return Axis(lambda v: shares[str(v)], [(share, shown(name)) for name, share in
                                               list(zip(names, shares.values(), strict=True))[::step]])
    scale: Callable[[float], float] = math.log10 if kind == "loguniform" else float
    low, high = (min(map(scale, values)), max(map(scale, values))) if values else (0.0, 1.0)
    width = high - low

    def place(value: Any) -> float:
        return turn(0.5 if width == 0 else (scale(value) - low) / width)

    ends = [low] if width == 0 else [low + width * i / 4 for i in range(5)]
    marks = [10**end if kind == "loguniform" else end for end in ends]
    if kind == "int":
        marks = sorted({float(round(mark)) for mark in marks})
    return Axis(place, [(place(mark), f"{mark:.3g}") for mark in marks])


def _y(share: float) -> float:
    return round(TOP + (1 - share) * (HEIGHT - TOP - BOTTOM), 1)


def _svg(title: str, description: str, body: list[str], hint: str = "") -> str:
    return (f'<figure><figcaption>{escape(title)} <small>{escape(hint)}</small></figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"><desc>{escape(description)}</desc>'
            + "\n".join(body) + "</svg></figure>")


def _marks(record: Record) -> dict[str, str]:
    """Attributes that a trial's line or dot has in every picture; the better its place, the more strongly it is drawn."""
    top = best(record)
    scored = [trial.name for trial in ranked(record) if compared(record, trial)[0] > -math.inf]
    weights = {name: 1 - 0.7 * i / max(1, len(scored) - 1) for i, name in enumerate(scored)}
    return {trial.name: f'class="trial {trial.state}{" best" if trial is top else ""}" data-trial="{escape(trial.name)}" '
                        f'style="--weight:{weights.get(trial.name, 0.3):.2f}"' for trial in record.trials}


def _tip(record: Record, trial: Trial) -> str:
    said = [f"{key}={shown(value)}" for key, value in trial.values.items()]
    said += [f"{name} {shown(trial.metrics.get(name))}" for name in record.objectives]
    return f"<title>{escape(f'{trial.name} ({trial.state}): ' + ', '.join(said))}</title>"


def _parallel(record: Record, marks: Mapping[str, str]) -> str:
    names = [*record.scales, *record.objectives]
    short, gap = short_names(names), (WIDTH - LEFT - RIGHT) / max(1, len(names) - 1)
    found = {name: [v for t in record.trials if (v := _value(record, t, name)) is not None] for name in names}
    axes = {name: axis(found[name], record.scales.get(name, "uniform"), record.objectives.get(name) == "min") for name in names}
    lines, body = [], []
    for number, name in enumerate(names):
        x, goal = LEFT + number * gap, record.objectives.get(name)
        label = escape(short[name]) + (f" ({goal})" if goal else "")
        kind = "goal" if goal else "key"
        lines.append(f'<line class="axis" x1="{x:.0f}" x2="{x:.0f}" y1="{_y(1)}" y2="{_y(0)}"/>')
        body.append(f'<text class="{kind}" x="{x:.0f}" y="{TOP - 14 - 18 * (number % 2)}">{label}</text>')
        body += [f'<text class="mark" x="{x - 5:.0f}" y="{_y(share) + 4}">{escape(text)}</text>'
                 for share, text in axes[name].marks]
        body.append(f'<line class="range" x1="{x:.0f}" x2="{x:.0f}"/><rect class="brush" data-x="{x:.0f}" x="{x - 12:.0f}" '
                    f'y="{_y(1)}" width="24" height="{_y(0) - _y(1)}"/>')
    for trial in reversed(ranked(record)):  # the best on top
        places = [(LEFT + i * gap, _y(axes[name].place(value))) for i, name in enumerate(names)
                  if (value := _value(record, trial, name)) is not None]
        line = " ".join(f"{x:.0f},{y}" for x, y in places)
        lines.append(f'<polyline {marks[trial.name]} points="{line}">{_tip(record, trial)}</polyline>')
    return _svg("Parallel coordinates", f"One line per trial through its values of {', '.join(names)}; the higher the place in "
                "the ranking, the stronger the line, better objectives on top. The table below has all values.", lines + body,
                "point at a line to find its trial below, drag along an axis to keep a part of it")


def _value(record: Record, trial: Trial, name: str) -> Any:
    value = trial.values.get(name) if name in record.scales else trial.metrics.get(name)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _chart(record: Record, title: str, description: str, xs: Sequence[float], ys: Sequence[float], x_name: str,
           draw: Callable[[Callable[[float, float], str]], list[str]]) -> str:
    """A picture with one axis to the right and the first objective upwards."""
    across, up = axis(xs, "int"), axis(ys)

    def at(x: float, y: float) -> str:
        return f"{LEFT + across.place(x) * (WIDTH - LEFT - RIGHT):.1f},{_y(up.place(y))}"

    body = [f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="{_y(1)}" y2="{_y(0)}"/>'
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(0)}" y2="{_y(0)}"/>'
            f'<text class="key" x="{LEFT}" y="{TOP - 14}">{escape(next(iter(record.objectives)))}</text>'
            f'<text class="mark" x="{WIDTH - RIGHT}" y="{_y(0) + 38}">{x_name}</text>']
    body += [f'<text class="mark" x="{LEFT - 5}" y="{_y(share) + 4}">{text}</text>' for share, text in up.marks]
    body += [f'<text class="key" x="{LEFT + share * (WIDTH - LEFT - RIGHT):.0f}" y="{_y(0) + 18}">{text}</text>'
             for share, text in across.marks]
    return _svg(title, description, body + draw(at))


def _best_so_far(record: Record, marks: Mapping[str, str]) -> str:
    name, way = next(iter(record.objectives.items()))
    ended = sorted((t for t in record.trials if _value(record, t, name) is not None and t.state != "running"),
                   key=lambda t: t.ended or 0)
    if not ended:
        return ""
    counted = {t.name for t in ended if t.state == "done"} or {t.name for t in ended}
    steps: list[tuple[float, float]] = []
    for number, trial in enumerate(ended, 1):
        if trial.name in counted:
            value, before = trial.metrics[name], steps[-1][1] if steps else trial.metrics[name]
            steps += [(number, before), (number, max(value, before) if way == "max" else min(value, before))]
    steps.append((len(ended), steps[-1][1]))

    def draw(at: Callable[[float, float], str]) -> list[str]:
        dots = []
        for number, trial in enumerate(ended, 1):
            x, y = at(number, trial.metrics[name]).split(",")
            dots.append(f'<circle {marks[trial.name]} cx="{x}" cy="{y}" r="5">{_tip(record, trial)}</circle>')
        return [f'<polyline class="front" points="{" ".join(at(x, y) for x, y in steps)}"/>', *dots]

    return _chart(record, "Best so far", f"{name} of each trial in the order in which they ended, and the best of those "
                  "trained to the end.", range(1, len(ended) + 1), [t.metrics[name] for t in ended], "trials ended", draw)


def _curves(record: Record, marks: Mapping[str, str]) -> str:
    drawn = [trial for trial in reversed(ranked(record)) if len(trial.curve) > 1]
    if not drawn:
        return ""
    name = next(iter(record.objectives))

    def draw(at: Callable[[float, float], str]) -> list[str]:
        return [f'<polyline {marks[t.name]} points="{" ".join(at(x, y) for x, y in t.curve)}">{_tip(record, t)}</polyline>'
                for t in drawn]

    return _chart(record, "Learning curves",
                  f"{name} of each trial at its evaluations; where a line ends the scheduler stopped it.",
                  [x for t in drawn for x, _ in t.curve], [y for t in drawn for _, y in t.curve], "step", draw)


def _table(record: Record) -> str:
    table = rows(record)
    names = columns(table)
    short = short_names(names)
    head = "".join(f'<th scope="col"><button title="{escape(name)}">{escape(short[name])}</button></th>' for name in names)
    lines = []
    for row in table:
        raw = {name: "" if row.get(name) is None else str(row[name]) for name in names}
        cells = "".join(f'<td data-value="{escape(raw[name])}">{escape(shown(row.get(name)))}</td>' for name in names)
        lines.append(f'<tr tabindex="0" class="{row["state"]}" data-trial="{escape(row["trial"])}">{cells}</tr>')
    return ('<div class="wide"><table><caption>All trials, best first</caption><thead><tr>' + head + "</tr></thead><tbody>"
            + "\n".join(lines) + "</tbody></table></div>")


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sweep {title}</title><style>{style}</style></head>
<body><main>
{body}
</main><script>{script}</script></body></html>
"""

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2330; --soft: #5b6575; --rule: #c9d0da; --line: #1f5fa8;
  --best: #b4410e; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181f; --ink: #e6eaf0; --soft: #a3adba; --rule: #3a4350;
  --line: #7db4f0; --best: #ff9d5c; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px; }
h1 { font-size: 22px; margin: 0 0 8px; } p { margin: 4px 0; overflow-wrap: anywhere; } figure { margin: 28px 0 0; }
figcaption, caption { font-weight: 600; text-align: left; padding: 4px 0; }
svg { width: 100%; height: auto; } svg text { font-size: 13px; fill: var(--ink); text-anchor: middle;
  paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; pointer-events: none; }
svg text.mark { fill: var(--soft); text-anchor: end; font-size: 12px; } svg text.goal { font-weight: 700; }
.axis { stroke: var(--rule); } .front { fill: none; stroke: var(--best); stroke-width: 2; }
polyline.trial { fill: none; stroke: var(--line); stroke-width: 1.8; stroke-opacity: var(--weight); }
polyline.stopped { stroke-dasharray: 6 4; } polyline.failed, polyline.lost { stroke: var(--soft); stroke-dasharray: 2 5; }
polyline.best { stroke: var(--best); stroke-width: 3; }
circle.trial { fill: var(--line); } circle.stopped { fill: var(--paper); stroke: var(--line); stroke-width: 2; }
circle.best { fill: var(--best); } small { font-weight: 400; color: var(--soft); }
rect.brush { fill: transparent; cursor: ns-resize; touch-action: none; } .range { stroke: var(--best); stroke-width: 8;
  stroke-opacity: .5; } .out { opacity: .08; } tr.out { opacity: .35; }
.shown polyline.trial.lit, polyline.trial:hover { stroke-width: 5; stroke-opacity: 1; } circle.lit { r: 9; }
.wide { overflow-x: auto; margin-top: 28px; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px 3px 0; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible, tr:focus-visible {
  outline: 2px solid var(--line); } tr.lit td { background: color-mix(in srgb, var(--line) 18%, transparent); }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
"""

_SCRIPT = """
const light = (name, on) => { document.body.classList.toggle('shown', on);
  document.querySelectorAll('[data-trial]').forEach(e => e.classList.toggle('lit', on && e.dataset.trial === name)); };
document.querySelectorAll('[data-trial]').forEach(e => {
  for (const [come, go] of [['mouseenter', 'mouseleave'], ['focus', 'blur']]) {
    e.addEventListener(come, () => light(e.dataset.trial, true)); e.addEventListener(go, () => light(null, false)); } });
const ranges = new Map();
const keep = () => { const out = new Set();
  document.querySelectorAll('polyline.trial').forEach(line => { const at = new Map([...line.points].map(p => [p.x, p.y]));
    const svg = line.ownerSVGElement; if (svg.querySelector('.brush')) for (const [x, [top, bottom]] of ranges)
      if (!(at.get(x) >= top - 1 && at.get(x) <= bottom + 1)) out.add(line.dataset.trial); });
  document.querySelectorAll('[data-trial]').forEach(e => e.classList.toggle('out', out.has(e.dataset.trial))); };
document.querySelectorAll('.brush').forEach(brush => { let from = null; const x = Number(brush.dataset.x);
  const range = brush.previousElementSibling, up = () => { from = null; };
  const y = e => new DOMPoint(e.clientX, e.clientY).matrixTransform(brush.getScreenCTM().inverse()).y;
  const show = () => { const [top, bottom] = ranges.get(x) || [0, 0];
    range.setAttribute('y1', top); range.setAttribute('y2', bottom); keep(); };
  brush.addEventListener('pointerdown', e => { from = y(e); ranges.delete(x); show(); brush.setPointerCapture(e.pointerId); });
  brush.addEventListener('pointermove', e => { if (from === null) return;
    ranges.set(x, [Math.min(from, y(e)), Math.max(from, y(e))]); show(); });
  brush.addEventListener('pointerup', up); brush.addEventListener('pointercancel', up); });
document.querySelectorAll('th button').forEach(button => button.addEventListener('click', () => {
  const th = button.parentElement, at = th.cellIndex, up = th.getAttribute('aria-sort') !== 'ascending';
  th.parentElement.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const body = th.closest('table').tBodies[0], value = row => row.cells[at].dataset.value;
  const order = (a, b) => { const x = Number(a), y = Number(b);
    return a === '' || b === '' ? (a === '') - (b === '') : isNaN(x) || isNaN(y) ? a.localeCompare(b) : x - y; };
  [...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b))).forEach(row => body.append(row)); }));
"""
