"""One page about one or several runs: `python -m pgpo_jax.report RUN [RUN ...] -o report.html`.

RUN is a run's folder (its output_dir). Runs that differ only in the seed are shown together, with a
band over seeds. The page is one file that asks for nothing from a network: curves, the resolved
configuration, what differs between the runs, and a table of samples with the teacher's prompts and
the divergence of every token as colour.
"""

import argparse
import base64
import hashlib
import html
import importlib.resources
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pgpo_jax.errors import InputError, Parser, printable
from pgpo_jax.logs import ABSENT, Experiment, RunLog, Series, reader
from pgpo_jax.report import figures
from pgpo_jax.report.figures import Picture, find, variable

SHOWN = 4000
"""Characters of a text that the page holds; how many were left out is said there."""

NONE = "\N{EN DASH}"


def report(folders: Sequence[str], samples: int = 1000) -> str:
    """The page as HTML text.

    Args:
      folders: Folders of runs.
      samples: Most samples on the page, spread evenly over runs and steps.

    Raises:
      InputError: What was given is no run, or matplotlib is missing.
    """
    found = reader.read_runs(folders)
    groups = reader.experiments(found)
    table, said = _samples(found, samples)
    pictures = figures.sections(groups)
    parts = [
        ("Runs", _summary(groups)),
        *((title, _section(title, groups, panels)) for title, panels in pictures.items()),
        ("Configuration", _configuration(found)),
    ]
    body = "".join(
        f'<h2 id="{_anchor(title)}">{title}</h2>\n{content}\n'
        for title, content in parts
        if content
    )
    titles = [*(title for title, content in parts if content), "Samples"]
    name = found[0].name if len(found) == 1 else f"{len(found)} runs"
    template = (
        importlib.resources.files("pgpo_jax.report").joinpath("report.html").read_text("utf-8")
    )
    script = template.split("<script>")[1].split("</script>")[0]
    holes = {
        "title": text(f"Report on {name}"),
        "subtitle": text(", ".join(_facts(found))),
        "navigation": " ".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in titles),
        "body": body,
        "samples": f'<p class="soft">{said}</p>' if said else "",
        "data": _json({"runs": [run.name for run in found], "samples": table}),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    # In one pass: what a model wrote is not searched for holes.
    return re.sub(r"\{\{(\w+)\}\}", lambda hole: holes[hole[1]], template)


def text(value: Any) -> str:
    """A value as text in HTML; what is no visible character is written out, as `\\x1b`."""
    return html.escape(printable(str(value)))


# ---- the page's parts ----------------------------------------------------------------------------


def _facts(found: Sequence[RunLog]) -> list[str]:
    """What all runs have in common, in a few words."""
    facts = [f"{max(run.steps for run in found):,} updates"]
    for name, form in (("task.name", "task {}"), ("model.path", "model {}")):
        values = {str(run.config.get(name)) for run in found} - {"None"}
        facts += [form.format(*values)] if len(values) == 1 else []
    return facts


def _summary(groups: Sequence[Experiment]) -> str:
    head = ["run", "seed", "updates", *_NUMBERS, "notes"]
    rows = []
    for index, group in enumerate(groups):
        for run in group.runs:
            cells = [
                f'<td class="name">{_chip(index)}{text(run.name)}</td>',
                _cell(text(run.config.get("seed", NONE)), "number"),
                _cell(f"{run.steps:,}", "number"),
                *(_cell(form(run), "number") for form in _NUMBERS.values()),
                _cell("; ".join(text(note) for note in run.notes)),
            ]
            rows.append("".join(cells))
    empty = not any(run.notes for group in groups for run in group.runs)
    if empty:
        head, rows = head[:-1], [row.removesuffix(_cell("")) for row in rows]
    classes = ["", *["number"] * (2 + len(_NUMBERS)), ""]
    heads = "".join(
        f'<th class="{kind}">{title}</th>' for title, kind in zip(head, classes, strict=False)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{heads}'
        f"</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>"
        '<p class="soft">Accuracy: avg@k on held-out questions with its 95 % interval; the best of '
        f"several noisy values is above what the run can do. {text(figures.reading(groups))}</p>"
    )


def _accuracy(choose: Callable[[np.ndarray], int]) -> Callable[[RunLog], str]:
    """One evaluation's avg@k with its interval; `choose` finds it among the finite values."""

    def form(run: RunLog) -> str:
        if not (found := find(run, figures.EVALUATION)):
            return NONE
        name, series = found
        finite = np.flatnonzero(np.isfinite(series.values))
        place = int(finite[choose(series.values[finite])])
        value, step = float(series.values[place]), int(series.steps[place])
        bounds = [run.metrics.get(f"{name}/{side}") for side in ("low", "high")]
        at = [_percent(_at(bound, step)) for bound in bounds if bound]
        interval = f'<br><span class="soft">[{", ".join(at)}]</span>' if len(at) == 2 else ""
        return _percent(value) + interval

    return form


def _over_steps(metric: str, *functions: Callable[[np.ndarray], Any]) -> Callable[[RunLog], str]:
    def form(run: RunLog) -> str:
        if not (found := find(run, metric)):
            return NONE
        values = found[1].values[np.isfinite(found[1].values)]
        return " / ".join(_number(function(values)) for function in functions)

    return form


_NUMBERS = {
    "first avg@k": _accuracy(lambda values: 0),
    "best": _accuracy(lambda values: int(np.argmax(values))),
    "last": _accuracy(lambda values: -1),
    "mean information": _over_steps("information", np.mean),
    "multiplier: least / mean / most": _over_steps("multiplier", np.min, np.mean, np.max),
}


def _section(title: str, groups: Sequence[Experiment], pictures: Sequence[Picture]) -> str:
    panels = f'<div class="panels">{"".join(map(_figure, pictures))}</div>'
    if len(groups) > 1:
        panels = _chips(groups) + panels
    if title == "Time":
        return panels + _times(groups)
    if title == "Everything else":
        return f"<details><summary>{len(pictures)} further measurements</summary>{panels}</details>"
    return panels


def _figure(picture: Picture) -> str:
    lines = "".join(
        f'<i style="border-top-style: {style}"></i>{text(name)}' for style, name in picture.legend
    )
    note = f"<p>{text(picture.note)}</p>" if picture.note else ""
    return (
        f"<figure><figcaption>{text(picture.title)}<span>{lines}</span></figcaption>"
        f"{picture.svg}{note}</figure>"
    )


def _times(groups: Sequence[Experiment]) -> str:
    """Seconds of every phase, over all of a run's steps."""
    every = [run for group in groups for run in group.runs]
    names = sorted({name for run in every for name in run.metrics if name.startswith("time/")})
    if not names:
        return ""
    chips = {run.name: _chip(row) for row, group in enumerate(groups) for run in group.runs}
    head = "".join(f'<th class="number">{text(name[5:])}</th>' for name in names)
    rows = ""
    for run in every:
        sums = [float(np.nansum(run.metrics[n].values)) if n in run.metrics else 0 for n in names]
        total = sum(sums)
        cells = (
            "".join(
                _cell(
                    f'{_seconds(value)} <span class="soft">{_percent(value / total)}</span>',
                    "number",
                )
                for value in sums
            )
            if total
            else ""
        )
        rows += (
            f'<tr><td class="name">{chips[run.name]}{text(run.name)}</td>{cells}'
            f"{_cell(_seconds(total), 'number')}</tr>"
        )
    return (
        f'<div class="scroll"><table><thead><tr><th>run</th>{head}<th class="number">all</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
        '<p class="soft">Sums over the steps that the run has on record, compilation included; '
        "loading, warm start and saving are not in them.</p>"
    )


def _configuration(found: Sequence[RunLog]) -> str:
    parts = []
    differing = reader.config_differences(found)
    if differing:
        head = "".join(f"<th>{text(run.name)}</th>" for run in found)
        rows = "".join(
            f"<tr><th>{text(name)}</th>{''.join(_cell(_value(value)) for value in values)}</tr>"
            for name, values in differing.items()
        )
        parts.append(
            '<p>What differs between the runs:</p><div class="scroll"><table><thead><tr><th>field'
            f"</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    elif len(found) > 1:
        parts.append("<p>The configurations of the runs are equal.</p>")
    parts += [
        f"<details><summary>config.yaml of {text(run.name)}</summary>"
        f"<pre>{text(run.config_text)}</pre></details>"
        for run in found
    ]
    return "".join(parts)


def _value(value: Any) -> str:
    shown = value if value is ABSENT else reader.show_field(value)
    kept, left = _cut(shown, 300)
    return text(kept) + (
        f' <span class="soft">… {left:,} characters left out</span>' if left else ""
    )


def _chips(groups: Sequence[Experiment]) -> str:
    chips = (f"<li>{_chip(index)}{text(group.label)}</li>" for index, group in enumerate(groups))
    return f'<ul class="chips">{"".join(chips)}</ul>'


def _chip(index: int) -> str:
    return f'<span class="chip" style="background: {variable(index)}"></span>'


def _cell(content: str, kind: str = "") -> str:
    return f'<td class="{kind}">{content}</td>' if kind else f"<td>{content}</td>"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _at(series: Series, step: int) -> float:
    found = series.values[series.steps == step]
    return float(found[0]) if len(found) else math.nan


def _percent(share: float) -> str:
    return NONE if math.isnan(share) else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _seconds(value: float) -> str:
    if value < 600:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 36000 else f"{value / 3600:,.1f} h"


# ---- samples -------------------------------------------------------------------------------------


def _samples(found: Sequence[RunLog], most: int) -> tuple[list[dict[str, Any]], str]:
    """The page's samples, and what is to be said of them."""
    numbered = [
        reader.read_samples(run, lambda number, record, i=index: (number, _sample(i, record)))
        for index, run in enumerate(found)
    ]
    total = sum(map(len, numbered))
    share = most // len(found)
    table = [
        sample for rows in numbered for _, sample in _spread(rows, share if total > most else most)
    ]
    for number, sample in enumerate(table):
        sample["id"] = number
    said = []
    if len(table) < total:
        said.append(
            f"{len(table):,} of {total:,} samples, evenly spread over the steps; "
            "<code>--samples</code> takes more."
        )
    without = [run.name for run, rows in zip(found, numbered, strict=True) if not rows]
    if without:
        named = ", ".join(map(text, without)) if len(found) > 1 else "This run"
        said.append(
            f"{named}: no samples (metrics.samples_per_step is 0, or no update was done yet)."
        )
    if table and not any(sample["tokens"] for sample in table):
        said.append(
            "These samples were written without the divergence of their tokens, so there is "
            "no colour."
        )
    elif table:
        said.append(
            "Colour: how far student and teacher disagree about a token, in nats; a row opens "
            "with a click."
        )
    return table, " ".join(said)


def _spread(rows: list[Any], most: int) -> list[Any]:
    if len(rows) <= most:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, most).round().astype(int)]


def _sample(run: int, record: dict[str, Any]) -> dict[str, Any]:
    """A record of samples.jsonl as the page has it: every text visible and of bounded length."""
    left: dict[str, int] = {}

    def part(name: str, called: str | None = None) -> str | None:
        value = record.get(name)
        if value is None:
            return None
        kept, cut = _cut(value if isinstance(value, str) else json.dumps(value))
        if cut:
            left[called or name] = cut
        return _visible(kept)

    tokens, divergence = _per_token(record) or (None, None)
    finite = [value for value in divergence or [] if value is not None]
    sample = {
        "run": run,
        "step": record["step"],
        "reward": _finite(record.get("reward")),
        "context": record["has_context"] if type(record.get("has_context")) is bool else None,
        "prompt": part("prompt") or "",
        "response": part("response") or "",
        "answer": part("answer"),
        "feedback": part("feedback"),
        "teacher": part("teacher_prompt", "teacher"),
        "mean": sum(finite) / len(finite) if finite else None,
    }
    if tokens and divergence:
        kept = list(_within(tokens))
        if len(kept) < len(tokens):
            left["response"] = sum(map(len, tokens[len(kept) :]))
        else:
            left.pop("response", None)
        tokens, divergence = [_visible(token) for token in kept], divergence[: len(kept)]
    return sample | {"tokens": tokens, "divergence": divergence, "left": left}


def _per_token(record: dict[str, Any]) -> tuple[list[str], list[float | None]] | None:
    """Token texts and their divergences, where the record has both and they fit together."""
    tokens, divergence = record.get("tokens"), record.get("divergence")
    if not (isinstance(tokens, list) and isinstance(divergence, list)):
        return None
    if not all(isinstance(token, str) for token in tokens) or len(tokens) != len(divergence):
        return None
    return tokens, [_finite(value) for value in divergence]


def _within(tokens: Sequence[str]) -> Iterator[str]:
    """The first tokens, as many as have SHOWN characters together."""
    room = SHOWN
    for token in tokens:
        room -= max(len(token), 1)
        if room < 0:
            return
        yield token


def _finite(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
    return value if good else None


def _cut(value: str, most: int = SHOWN) -> tuple[str, int]:
    """The first characters, and how many were left out."""
    return value[:most], max(len(value) - most, 0)


def _visible(value: str) -> str:
    return printable(value.replace("\r\n", "\n"))


def _json(value: Any) -> str:
    """JSON that stays inside its <script>: no `<`, `>` or `&` stands in it, only ASCII."""
    encoded = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return encoded


# ---- the command ---------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """The command line; see the module's docstring."""
    parser = Parser(
        prog="python -m pgpo_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder (its output_dir)")
    parser.add_argument(
        "-o", "--output", default="report.html", help="the page to write (default: %(default)s)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1000,
        help="most samples on the page, spread over runs and steps (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.samples < 0:
        raise InputError(f"--samples: got {options.samples}; must be at least 0")
    path = Path(options.output)
    page = report(options.runs, options.samples)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: {path} cannot be written ({error.strerror})") from error
    print(f"wrote {printable(str(path))} ({len(page) / 2**20:.1f} MiB)")
    return 0
