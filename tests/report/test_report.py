"""The page about runs: what it holds, what it must not do, what it refuses."""

import base64
import hashlib
import html
import importlib.resources
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusal import table

from pgpo_jax import config, report
from pgpo_jax.errors import InputError, printable
from pgpo_jax.logs import MetricsConfig, Writer, reader
from pgpo_jax.report import figures, page, samples

pytest.importorskip("matplotlib", reason="the extra `report` is absent")

ATTACK = "</script><img src=x onerror=alert(1)><!--<script>{{data}}&amp;"
DIVERGENCE = [0.5, 0.0, None, 0.25]


def sample(prompt="1+1=", response=ATTACK, reward=1.0, **more):
    return {
        "prompt": prompt,
        "response": response,
        "answer": "2",
        "reward": reward,
        "feedback": "",
        "has_context": True,
        "teacher_prompt": f"{prompt} the answer is 2",
        **more,
    }


def write_run(folder, *overrides, steps=6, samples=(), every=3, base=0.0):
    """A run as `train` leaves it, with numbers that the tests know."""
    arguments = ["--steps", "6", "--output_dir", str(folder), *overrides]
    settings = config.load(None, arguments)
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump(settings))
    with Writer(folder, MetricsConfig(samples_shown=0), total_steps=6) as writer:
        for step in range(steps + 1):
            if step % every == 0:
                average = 0.25 + 0.05 * step + base
                bounds = {"low": average - 0.1, "high": average + 0.1}
                row = {f"eval/avg@16/{name}": value for name, value in bounds.items()}
                writer.write(step, {"eval/avg@16": average, **row, "time/evaluate": 2.0})
            if step:
                row = {"loss": 0.1, "reward/mean": 0.1 * step + base, "information": 0.1 * step}
                times = {"time/rollout": 1.5, "time/train": 0.5}
                writer.write(step, {**row, "multiplier": math.exp(0.1 * step), **times})
                writer.samples(step, samples)
    return str(folder)


@pytest.fixture
def write(tmp_path):
    return lambda name="run", *overrides, **more: write_run(tmp_path / name, *overrides, **more)


def table_of(*folders, most=1000):
    """The samples as the page gets them, and what it says of them."""
    return samples.sample_table(reader.read_runs(folders), most)


def template(name):
    return (importlib.resources.files("pgpo_jax.report") / "templates" / name).read_text("utf-8")


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, the text of scripts and of the page."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.scripts, self.texts, self._within = [], [], [], None
        self.feed(page)
        self.close()
        self.names = [name for name, _ in self.elements]
        self.text = " ".join(" ".join(self.texts).split())
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag):
        self._within = None

    def handle_data(self, data):
        if self._within == "script":
            self.scripts.append(data)
        elif self._within != "style":
            self.texts.append(data)


# ---- what it holds -------------------------------------------------------------------------------


def test_the_accuracy_on_a_further_set_is_drawn_beside_the_first(write):
    folder = write()
    with (Path(folder) / "metrics.jsonl").open("a") as file:
        for step in (0, 6):
            counts = {"eval/far/questions": 2.0, "eval/far/left_out": 0.0}
            row = {"step": step, "eval/far/avg@16": 0.5, "eval/far/avg@16/low": 0.4}
            file.write(json.dumps({**row, **counts}) + "\n")
    drawn = figures.sections(reader.experiments(reader.read_runs([folder])))
    accuracy = drawn["Learning"][0]
    assert accuracy.title == "Held-out accuracy"
    assert accuracy.legend == [("solid", "avg@k"), ("dashed", "far")]
    rest = [picture.title for picture in drawn.get(figures.EVERYTHING_ELSE, [])]
    assert not [title for title in rest if title.startswith("eval/")]


def test_discovery_is_drawn_with_a_line_style_for_every_method(tmp_path):
    (tmp_path / "config.yaml").write_text(config.dump(config.Config()))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "screening/hard": 3}\n')
    (tmp_path / "screening.json").write_text("{}")
    curve = {"attempts": [1, 2], "share": [0.0, 0.5], "low": [0.0, 0.2], "high": [0.3, 0.8]}
    told = {"methods": {"distillation": curve, "best_of": curve}}
    (tmp_path / "discovery.json").write_text(json.dumps(told))
    (picture,) = figures.sections(reader.experiments(reader.read_runs([tmp_path])))["Discovery"]
    assert picture.legend == [("solid", "distillation"), ("dashed", "best_of")]
    assert "attempts" in picture.svg
    for broken in ("{", "[]", '{"methods": {"a": {}}}', '{"methods": {"a": 1}}'):
        (tmp_path / "discovery.json").write_text(broken)
        with pytest.raises(InputError, match=r"RUN: .*discovery\.json cannot be read \("):
            reader.read_discovery(reader.read_runs([tmp_path])[0])


def test_a_run_becomes_a_page_with_its_curves_numbers_and_configuration(write):
    page = Page(
        report.report([write(samples=[sample(tokens=list("abcd"), divergence=DIVERGENCE)])])
    )
    for part in (
        *("Report on run", "6 updates", "Held-out accuracy", "Reward in training", "Information"),
        *("Multiplier against information", "Seconds a step", "config.yaml of run"),
        "25.0 % [15.0 %, 35.0 %]",  # the first evaluation
        "55.0 % [45.0 %, 65.0 %]",  # the best and the last
        "1.11 / 1.44 / 1.82",  # the multiplier's minimum, mean and maximum
        "9 s 50.0 %",  # six rollouts of 1.5 s, of 18 s in all
        "learning_rate: 1.0e-05",
    ):
        assert part in page.text, part
    assert "Entropy" not in page.text  # the run has none, so there is no empty panel
    assert page.names.count("svg") == page.names.count("figure") >= 8
    first = page.data["samples"][0]
    assert (first["step"], first["reward"], first["context"]) == (1, 1.0, True)
    assert first["teacher"] == "1+1= the answer is 2"
    assert first["tokens"] == list("abcd")
    assert first["divergence"] == DIVERGENCE
    assert first["mean"] == pytest.approx(0.25)


def test_runs_that_differ_only_in_the_seed_are_one_group(write):
    names = [
        write("one", "--seed", "0"),
        write("two", "--seed", "1", base=0.2),
        write("other", "--optimizer.alpha", "0"),
    ]
    found = reader.read_runs(names)
    assert [len(group.runs) for group in reader.experiments(found)] == [2, 1]
    assert [group.label for group in reader.experiments(found)] == [
        "alpha 1.0 (2 runs)",
        "alpha 0.0",
    ]
    assert set(reader.config_differences(found)) == {"seed", "output_dir", "optimizer.alpha"}
    page = Page(report.report(names))
    assert "Report on 3 runs" in page.text
    assert "optimizer.alpha 1.0 1.0 0.0" in page.text
    assert "band from the lowest to the highest seed" in page.text


def test_a_field_that_an_older_run_lacks_is_a_difference(write, tmp_path):
    names = [write("one"), write("two")]
    text = (tmp_path / "two" / "config.yaml").read_text()
    (tmp_path / "two" / "config.yaml").write_text(text.replace("  rho_max: 2.0\n", ""))
    assert reader.config_differences(reader.read_runs(names))["optimizer.rho_max"] == [
        2.0,
        reader.ABSENT,
    ]
    assert "optimizer.rho_max 2.0 (absent)" in Page(report.report(names)).text


def test_names_are_as_much_of_the_path_as_tells_runs_apart(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "run")
    found = reader.read_runs([str(tmp_path / parent / "run") for parent in ("a", "b")])
    assert [run.name for run in found] == ["a/run", "b/run"]


def test_a_band_is_the_range_of_the_runs_that_reached_a_step():
    long = reader.Series(np.array([0, 2, 4, 6]), np.array([1.0, 2.0, np.nan, 4.0]))
    short = reader.Series(np.array([0, 2, 4]), np.array([3.0, 4.0, 5.0]))
    steps, mean, low, high = figures._over_runs([long, short, long])
    assert steps.tolist() == [0, 2, 6]  # two values each
    np.testing.assert_allclose(mean, [5 / 3, 8 / 3, 4])
    np.testing.assert_allclose(low, [1, 2, 4])
    np.testing.assert_allclose(high, [3, 4, 4])


def test_smoothing_keeps_a_line_and_leaves_null_out():
    steps = np.arange(101)
    values = 3.0 * steps
    values[50] = np.nan
    smooth = figures._smooth(reader.Series(steps, values), 5).values
    np.testing.assert_allclose(smooth[2:48], 3.0 * steps[2:48])
    np.testing.assert_allclose(smooth[[0, 50, 100]], [3, 150, 297])
    alone = reader.Series(np.array([1]), np.array([np.nan]))
    assert np.isnan(figures._smooth(alone, 3).values).all()


def test_a_skipped_update_is_no_point_of_information_against_multiplier(write):
    folder = write()
    with (Path(folder) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "information": 0.0, "skipped": 1.0}) + "\n")
    (run,) = reader.read_runs([folder])
    information, _ = figures._paired(run)
    np.testing.assert_allclose(information, [0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_run_without_samples_says_so(write, tmp_path):
    empty, absent = write("empty"), write("absent")
    (tmp_path / "absent" / "samples.jsonl").unlink()
    for folder in (empty, absent):
        rows, said = table_of(folder)
        assert rows == []
        assert said.startswith("This run: no samples (metrics.samples_per_step is 0")
    assert "This run: no samples" in Page(report.report([absent])).text


def test_samples_without_divergence_are_shown_without_colour(write):
    rows, said = table_of(write(samples=[sample()]))
    assert "without the divergence of their tokens" in said
    assert [row["tokens"] for row in rows] == [None] * 6


@pytest.mark.parametrize(
    "broken", [{"tokens": ["a"]}, {"tokens": ["a"], "divergence": [1, 2]}, {"tokens": 1}]
)
def test_tokens_that_do_not_fit_their_divergence_are_not_coloured(write, broken):
    rows, _ = table_of(write(samples=[sample(**broken)]))
    assert [row["tokens"] for row in rows] == [None] * 6


def test_more_samples_than_fit_are_spread_over_the_steps_and_counted(write):
    folders = [write(name, samples=[sample(), sample("2+2=")]) for name in ("one", "two")]
    rows, said = table_of(*folders, most=6)
    assert said.startswith("6 of 24 samples")
    for run in (0, 1):
        steps = [row["step"] for row in rows if row["run"] == run]
        assert (steps[0], steps[-1], len(steps)) == (1, 6, 3)


def test_an_interrupted_run_and_a_torn_last_line_are_told(write):
    folder = Path(write(steps=4, samples=[sample()]))
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("ab") as file:
            file.write('{"step": 5, "prompt": "\u00fc'.encode()[:-1])  # within a character
    page = Page(report.report([str(folder)]))
    assert "has 4 of 6 updates" in page.text
    assert "the last line of metrics.jsonl is torn" in page.text
    assert "the last line of samples.jsonl is torn" in page.text
    assert len(page.data["samples"]) == 4


@pytest.mark.parametrize(
    "values",
    [[None] * 3, [1.0], [None, 2.0, None], [1e308, -1e308], [0.0] * 40, [1e99, 1.0], ["a", True]],
    ids=str,
)
def test_any_values_can_be_drawn(write, values):
    folder = Path(write())
    names = ("information", "multiplier", "grad_norm", "eval/avg@4", "new", "time/rollout")
    rows = [
        dict.fromkeys(names, value) | {"step": step, "loss": 0.0}
        for step, value in enumerate(values)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<svg" in report.report([str(folder)])


def test_more_groups_than_colours_are_told_apart():
    assert len({figures.css_colour(index) for index in range(30)}) == 30


def test_the_page_is_the_same_each_time(write):
    groups = reader.experiments(reader.read_runs([write()]))
    assert figures.sections(groups) == figures.sections(groups)


# ---- what a model wrote stays text ---------------------------------------------------------------


def test_what_a_model_wrote_stays_text(write):
    page = report.report(
        [
            write(
                "<b>run",
                "--reprompt.solution_template",
                "<i>{demonstration}",
                samples=[sample(ATTACK, ATTACK, key=ATTACK, tokens=[ATTACK], divergence=[1.0])],
            ),
            write("other"),
        ]
    )
    seen = Page(page)
    # The two scripts of the template; the parser would have ended one early, or seen an image.
    assert seen.names.count("script") == len(seen.scripts) == 2
    assert not {"img", "b", "iframe", "link", "object", "form"} & set(seen.names)
    first = seen.data["samples"][0]
    assert first["response"] == first["prompt"] == first["tokens"][0] == ATTACK
    assert "<b>run" in seen.text
    assert "reprompt.solution_template <i>{demonstration} null" in seen.text
    assert ATTACK not in page
    assert seen.scripts[1] == "\n" + template("samples.js")  # no part of it was filled in


def test_nothing_on_the_page_asks_for_a_network_or_runs_by_itself(write):
    page = report.report([write(samples=[sample()])])
    seen = Page(page)
    for tag, attributes in seen.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert (value or "").startswith("#"), (tag, name, value)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    policies = [a["content"] for _, a in seen.elements if "http-equiv" in a]
    assert len(policies) == 1 and "default-src 'none'" in policies[0]


def test_identifiers_are_unique_and_what_is_referred_to_exists(write):
    page = report.report([write("one"), write("two", "--optimizer.alpha", "0")])
    identifiers = [a["id"] for _, a in Page(page).elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    referred = re.findall(r'(?:href="|url\()#([^")]+)', page)
    assert len(referred) > 20
    assert set(referred) <= set(identifiers)


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("a\x00b", "a\\x00b"),
        ("\x1b[31mred\x9b", "\\x1b[31mred\\x9b"),
        ("half \ud800", "half \\ud800"),
        ("turned \u202e round", "turned \\u202e round"),
        ("line\r\nline\rend", "line\nline\\rend"),
        ("tab\tend \u03c1 \u6f22 \U0001f600", "tab\\tend \u03c1 \u6f22 \U0001f600"),
    ],
)
def test_what_is_no_visible_character_is_written_out(write, response, shown):
    folder = Path(write())
    record = sample(response=response, tokens=[response], divergence=[0.1])
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, **record}) + "\n")
    ((seen,), _) = table_of(folder)
    assert seen["response"] == seen["tokens"][0] == shown


@given(st.text(st.characters(), max_size=40))
def test_any_text_comes_through_both_ways_of_escaping(text):
    render = page._environment().from_string("{{ text }}\n{{ [text] | tojson }}").render
    escaped, encoded = render(text=text).rsplit("\n", 1)
    assert encoded.isascii() and not set("<>&") & set(encoded)
    assert json.loads(encoded) == [text]
    assert not set("<>\"'") & set(escaped)
    assert html.unescape(escaped) == printable(text)


def test_only_figures_and_the_pages_own_files_are_markup():
    safe = re.findall(r"{{ ([^}]*?) \| safe }}", template("page.html"))
    assert sorted(safe) == ["picture.svg", "script", "style"]
    assert template("page.html").count("| safe") == 3
    assert page._environment().autoescape is True


def test_the_page_allows_the_script_that_stands_on_it_and_no_other(write):
    seen = Page(report.report([write()]))
    digest = base64.b64encode(hashlib.sha256(seen.scripts[1].encode()).digest()).decode()
    (policy,) = (a["content"] for _, a in seen.elements if "http-equiv" in a)
    assert f"script-src 'sha256-{digest}'" in policy


def test_a_huge_response_is_cut_and_what_was_left_out_is_counted(write):
    million = "x" * 2**20
    tokens = ["xx"] * 2**19
    samples = [
        sample(response=million, teacher_prompt=million),
        sample("2+2=", million, tokens=tokens, divergence=[0.5] * len(tokens)),
    ]
    (plain, coloured), _ = table_of(write(steps=1, samples=samples))
    left = 2**20 - report.SHOWN
    assert plain["left"] == {"response": left, "teacher": left}
    assert coloured["left"] == {"response": left}
    assert (
        max(map(len, (plain["response"], plain["teacher"], coloured["response"]))) == report.SHOWN
    )
    assert len(coloured["tokens"]) == len(coloured["divergence"]) == report.SHOWN // 2


# ---- what it refuses -----------------------------------------------------------------------------


def change(name, content):
    """Replaces a file of the run; None deletes it."""

    def act(folder):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return act


FIRST = b'{"step": 1, "loss": 0.1}\n'


@table(
    {
        "no configuration": (
            change("config.yaml", None),
            "RUN: got FOLDER/run, which has no config.yaml; must be the folder of a run "
            "(its output_dir)",
        ),
        "an empty configuration": (
            change("config.yaml", b""),
            "RUN: FOLDER/run/config.yaml holds null; must be fields and values",
        ),
        "a broken configuration": (
            change("config.yaml", b"a: [1"),
            "RUN: FOLDER/run/config.yaml is not valid YAML (line 1: ...)",
        ),
        "a configuration that is no text": (
            change("config.yaml", b"\xff"),
            "RUN: FOLDER/run/config.yaml is not valid YAML (...)",
        ),
        "no metrics": (
            change("metrics.jsonl", None),
            "RUN: got FOLDER/run, which has no metrics.jsonl; it has not begun",
        ),
        "empty metrics": (
            change("metrics.jsonl", b"\n"),
            "RUN: FOLDER/run/metrics.jsonl has no rows yet; must have at least one",
        ),
        "only a torn line": (
            change("metrics.jsonl", b'{"step": 1, "lo'),
            "RUN: FOLDER/run/metrics.jsonl has no rows yet; must have at least one",
        ),
        "a broken line in the middle": (
            change("metrics.jsonl", FIRST + b'{"step": 2, \n' + FIRST),
            "RUN: FOLDER/run/metrics.jsonl:2: got ...; must be one JSON object",
        ),
        "a list": (
            change("metrics.jsonl", FIRST + b"[1]\n"),
            "RUN: FOLDER/run/metrics.jsonl:2: got [1]; must be one JSON object",
        ),
        "a step that is text": (
            change("metrics.jsonl", b'{"step": "1"}\n'),
            "RUN: FOLDER/run/metrics.jsonl:1: got the step '1'; must be ...",
        ),
        "a row without a step": (
            change("samples.jsonl", b"{}\n"),
            "RUN: FOLDER/run/samples.jsonl:1: got the step null; must be ...",
        ),
        "a number that Python does not read": (
            change("metrics.jsonl", FIRST + b'{"step": 1' + b"0" * 5000 + b"}\n" + FIRST),
            "RUN: FOLDER/run/metrics.jsonl:2: got ...; must be one JSON object",
        ),
        "depth": (
            change("samples.jsonl", b"[" * 100_000 + b"\n" + FIRST),
            "RUN: FOLDER/run/samples.jsonl:1: got ...; must be one JSON object",
        ),
    }
)
def test_a_folder_that_is_no_run_is_one_line(given, expected, refused, tmp_path):
    write_run(tmp_path / "run", samples=[sample()])
    given(tmp_path / "run")
    refused(expected, "report", str(tmp_path / "run"))
    assert not (tmp_path / "report.html").exists()


@table(
    {
        "no run": (
            [],
            "RUN: got none; give a run's folder (its output_dir): python -m pgpo_jax.report "
            "runs/quickstart",
        ),
        "a run that is not there": (
            ["none"],
            "RUN: got none, which has no config.yaml; must be the folder of a run (its output_dir)",
        ),
        "a run twice": (["run", "run/../run"], "RUN: got run/../run twice; give every run once"),
        "an output that cannot be": (
            ["run", "-o", "none/report.html"],
            "--output: none/report.html cannot be written (No such file or directory)",
        ),
        "an unknown option": (
            ["run", "--runs"],
            "--runs: no such option; see python -m pgpo_jax.report --help",
        ),
        "an option mistyped": (
            ["run", "--sample", "1"],
            "--sample: no such option; did you mean --samples?",
        ),
        "a negative number": (
            ["run", "--samples", "-1"],
            "--samples: got -1; must be a whole number, at least 0",
        ),
        "no number": (
            ["run", "--samples", "all"],
            "--samples: got all; must be a whole number, at least 0",
        ),
    }
)
def test_bad_arguments_are_one_line(given, expected, refused, tmp_path):
    write_run(tmp_path / "run")
    refused(expected, "report", *given)


def test_without_matplotlib_one_line_names_the_extra(refused, tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    expected = "report: matplotlib is not installed; pip install 'pgpo_jax[report]'"
    refused(expected, "report", "run")


def test_the_command_writes_the_page_and_says_where(write, tmp_path, capsys):
    assert report.main([write(), "-o", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"wrote {tmp_path}/page\.html \(0\.\d MiB\)", said)
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_the_templates_are_installed_with_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["pgpo_jax.report"] == ["templates/*"]


# ---- in a browser --------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def browse(page, tmp_path, name, query=""):
    """The page's elements after its script ran in a headless browser."""
    path = tmp_path / f"{name}.html"
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={tmp_path / name}",
            "--dump-dom",
            path.as_uri() + query,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_the_samples_that_fit_the_address(write, tmp_path):
    samples = [
        sample("right?", tokens=[ATTACK, "\n", "c"], divergence=[0.9, 0.3, -0.1]),
        sample("wrong?", "no", reward=0.0, tokens=["no"], divergence=[None]),
    ]
    page = report.report([write(samples=samples)])
    shown = browse(page, tmp_path, "whole")
    assert shown.count('class="sample"') == 12
    assert "1\u201312 of 12" in shown
    assert "<img" not in shown
    assert 'title="0.9 nats"' in shown
    query = "#samples?reward=0&from=3&to=5&text=WRONG&open=5"
    shown = browse(page, tmp_path, "filtered", query)
    assert shown.count('class="sample"') == 3
    assert "1\u20133 of 3 (12 without filters)" in shown
    assert shown.count("<h3>teacher's prompt</h3>") == 1  # one row is open
    assert 'title="no finite divergence"' in shown
