"""Sweeps: what a file may say, how many trials a cluster holds, and what is written of them; short real ones at the end."""

from __future__ import annotations

import csv
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import load_job, tiny_config, tiny_plain

from ecocseg import config as configuration
from ecocseg import sweep, sweep_page
from ecocseg.errors import InputError, run_main
from ecocseg.sweep import Domain, parse_domain
from ecocseg.sweep_report import Record, Trial, best, csv_text, pareto, ranked, rows, short_names, text_table

SPACES = Path(__file__).resolve().parents[1] / "tune" / "spaces"
BOOKS: dict[str, Any] = {
    "recipe": "demo", "codebooks": True, "search": {"algorithm": "grid"},
    "space": {"coding.codebook.length": [12, 16, 20], "coding.codebook.kind": ["max_min", "text"]}}


def write(path: Path, plain: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(plain))
    return path


def command(*arguments: str) -> int:
    return run_main(lambda: load_job("sweep", "tune").main(list(arguments)))


def check(tmp_path: Path, plain: dict[str, Any], *words: str) -> sweep.Sweep:
    spec = sweep.read_sweep(write(tmp_path / "space.yaml", plain), words)
    sweep.check(spec, sweep.base_config(spec), sweep.domains(spec))
    return spec


@pytest.mark.parametrize(("given", "kind", "values"), [
    ([1, "a", None], "choice", (1, "a", None)), ({"choice": [True]}, "choice", (True,)), ({"int": [2, 4]}, "int", (2, 4)),
    ({"uniform": [0, 1]}, "uniform", (0.0, 1.0)), ({"loguniform": ["1e-5", 1e-3]}, "loguniform", (1e-5, 1e-3))])
def test_a_domain_is_read(given: Any, kind: str, values: tuple[Any, ...]) -> None:
    assert parse_domain("k", given) == Domain(kind, values)


@pytest.mark.parametrize(("given", "said"), [
    (3, "is no domain; use {choice"), ([], "is no domain"), ({"normal": [0, 1]}, "is no domain"),
    ({"uniform": [1, 0]}, "rising numbers, not [1, 0]"), ({"uniform": [0, 1, 2]}, "rising numbers"),
    ({"int": [0, 1.5]}, "rising whole numbers"), ({"uniform": [0, "a"]}, "rising numbers"),
    ({"loguniform": [0, 1]}, "loguniform needs numbers above 0, not 0; use uniform")])
def test_a_domain_that_is_none_is_refused(given: Any, said: str) -> None:
    with pytest.raises(InputError, match=r"^space\.k: .*" + re.escape(said)):
        parse_domain("k", given)


def test_points_depend_on_the_seed_alone_and_stay_inside() -> None:
    space = {"a": parse_domain("a", {"int": [2, 4]}), "b": parse_domain("b", {"loguniform": [1e-4, 1.0]}),
             "c": parse_domain("c", ["x", "y"])}
    drawn = list(itertools.islice(sweep.draws(space, 3), 300))
    assert drawn == list(itertools.islice(sweep.draws(space, 3), 300)) != list(itertools.islice(sweep.draws(space, 4), 300))
    assert {point["a"] for point in drawn} == {2, 3, 4} and {point["c"] for point in drawn} == {"x", "y"}
    logs = np.log10([point["b"] for point in drawn])
    assert logs.min() >= -4 and logs.max() <= 0
    assert np.histogram(logs, 4, (-4, 0))[0].min() > 40  # evenly over the decades: 75 expected, 5 deviations
    grid = sweep.grid({"a": space["a"], "c": space["c"]})
    assert grid == [{"a": a, "c": c} for a in (2, 3, 4) for c in ("x", "y")]
    with pytest.raises(InputError, match="20000 points, more than 10000"):
        sweep.grid({"a": Domain("int", (1, 10000)), "c": space["c"]})


def test_words_of_the_command_go_to_the_sweep_or_to_the_recipe(tmp_path: Path) -> None:
    spec = sweep.read_sweep(write(tmp_path / "mine.yaml", BOOKS), ["search.trials=5", "concurrent=2", "optim.lr=1e-3"])
    assert (spec.name, spec.search.trials, spec.concurrent, spec.overrides) == ("mine", 5, 2, {"optim.lr": 0.001})
    assert sweep.base_config(spec).optim.lr == 0.001


@pytest.mark.parametrize(("changes", "said"), [
    ({"search": {"trails": 9}}, "search.trails: no such key; did you mean 'search.trials'"),
    ({"search": {"trials": 0}}, "search.trials: "),
    ({"scheduler": {"kind": "hyperband"}}, "scheduler.kind: "), ({"space": {}}, "space: nothing to search"),
    ({"recipe": None}, "must say either recipe"), ({"space": {"coding.codebok": [8]}}, "coding.codebok: no such key"),
    ({"space": {"launch.workers": [1, 2]}}, "space.launch.workers: is not searched"),
    ({"space": {"optim.lr": [1e-3]}, "overrides": {"optim.lr": 1}}, "space.optim.lr: has a value under overrides too"),
    ({"space": {"coding.reliability": {"uniform": [0.5, 1.5]}}}, "coding.reliability: "),
    ({"space": {"coding.codebook.length": [2, 16]}}, "coding.codebook.length=2"),
    ({"search": {"algorithm": "grid"}, "space": {"optim.lr": {"uniform": [0.1, 0.2]}}}, "space.optim.lr: a grid needs choice"),
    ({"scheduler": {"kind": "pbt"}, "search": {"algorithm": "random"}}, "space.coding.codebook.length: a running model cannot"),
    ({"scheduler": {"kind": "pbt"}, "space": {"optim.lr": [0.1, 0.2]}}, "search.algorithm: PBT searches by itself, tpe does"),
    ({"scheduler": {"kind": "pbt"}, "concurrent": 2}, "concurrent: PBT's trials all train at the same time"),
    ({"scheduler": {"kind": "asha"}, "overrides": {"train.eval_every": 0}}, "scheduler.kind: asha decides by evaluations"),
    ({"scheduler": {"kind": "asha", "every": 900}, "overrides": {"train.steps": 350, "train.eval_every": 50}},
     "scheduler.every: 900 is not below train.steps 350"),
    ({"codebooks": True}, "search.algorithm: tpe needs training"),
    ({"codebooks": True, "space": {"optim.lr": [0.1]}}, "space.optim.lr: codebooks alone are made by coding.codebook")])
def test_what_cannot_work_is_refused_before_a_trial(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    sound = {"recipe": "demo", "space": {"coding.codebook.length": [12, 16]}}
    check(tmp_path, sound)
    with pytest.raises(InputError, match=re.escape(said)):
        check(tmp_path, sound | changes)


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_space_is_sound(path: Path) -> None:
    spec = sweep.read_sweep(path)
    sweep.check(spec, sweep.base_config(spec), sweep.domains(spec))
    assert spec.description and spec.name == path.stem


def test_trials_fill_the_cluster_and_never_more(tmp_path: Path) -> None:
    one = tiny_config(tmp_path, tmp_path)
    plan = sweep.plan_trials(one, [(4.0, 0)])
    assert (plan.concurrent, plan.each.workers, plan.each.cpus_per_worker) == (4, 1, 1)
    streaming = tiny_config(tmp_path, tmp_path, data__loader="ray", launch__workers=2)
    for nodes in ([(8.0, 0)], [(4.0, 0)] * 4, [(16.0, 8)], [(48.0, 8)] * 2, [(7.0, 3), (64.0, 0)]):
        plan = sweep.plan_trials(streaming, nodes)
        each = plan.each
        assert each.ingest_cpus >= 1 and plan.concurrent >= 1
        assert plan.concurrent * (each.workers * each.cpus_per_worker + each.ingest_cpus) <= sum(c for c, _ in nodes) + 1e-6
        if each.gpu:
            assert plan.concurrent == sum(g for _, g in nodes) // 2  # two workers a trial
    # four cores on two nodes hold one trial of two workers with 1.5 CPU each, and not on four nodes of one
    wide = tiny_config(tmp_path, tmp_path, launch__workers=2, launch__cpus_per_worker=1.5)
    assert sweep.plan_trials(wide, [(2.0, 0), (2.0, 0)]).concurrent == 1
    with pytest.raises(InputError, match=r"2 worker\(s\) with 1.5 CPU each do not fit on the nodes .*\(1, 0\), \(1, 0\)"):
        sweep.plan_trials(wide, [(1.0, 0)] * 4)


def test_more_than_the_cluster_has_is_refused_with_the_numbers(tmp_path: Path) -> None:
    two = tiny_config(tmp_path, tmp_path, launch__workers=2)
    with pytest.raises(InputError, match=r"^concurrent: 3 trials of 2 worker\(s\) do not fit into 4 CPU\(s\) and 0 GPU\(s\) on "
                                         r"1 node\(s\) at a time; 2 do, with 2 worker\(s\) with 1 CPU"):
        sweep.plan_trials(two, [(4.0, 0)], 3)
    with pytest.raises(InputError, match="launch.workers: 2 workers need 2 CPU cores, the cluster has 1"):
        sweep.plan_trials(two, [(1.0, 0)])
    with pytest.raises(InputError, match="launch.workers: 2 workers need 2 GPUs, the cluster has 1"):
        sweep.plan_trials(two, [(16.0, 1)])
    with pytest.raises(InputError, match="^search.trials: 3 trials"):
        sweep.plan_trials(two, [(4.0, 0)], 3, "search.trials")


def test_a_command_for_too_many_workers_ends_at_once(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path / "tiny.yaml", tiny_plain(tiny, tmp_path, launch__workers=999, train__labeled_batch=999,
                                                      train__unlabeled_batch=999))
    space = write(tmp_path / "space.yaml", {"config": str(recipe), "space": {"coding.reliability": [0.5, 0.9]}})
    assert command("--space", str(space)) == 2
    assert "launch.workers: 999 workers need 999 CPU cores, the cluster has" in capsys.readouterr().err
    assert not list(tmp_path.glob("space-*"))  # nothing begun


def test_codebooks_are_ranked_by_separation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = write(tmp_path / "books.yaml", BOOKS | {"space": BOOKS["space"] | {"coding.codebook.length": [2, 12, 16, 20]}})
    assert command("--space", str(space), "--name", "b", f"run.directory={tmp_path}") == 2  # 2 bits name 4 classes
    assert "length=2" in capsys.readouterr().err
    space = write(tmp_path / "books.yaml", BOOKS)
    assert command("--space", str(space), "--name", "b", f"run.directory={tmp_path}") == 0
    said = capsys.readouterr().out
    with open(tmp_path / "b/results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["place"] for row in table] == list("123456")
    order = [(-float(row["of_bound"]), -int(row["column_separation"]), int(row["bits"])) for row in table]
    assert order == sorted(order) and len(set(order)) > 2
    found = configuration.load(None, str(tmp_path / "b/best.yaml"))
    top = table[0]
    assert found.coding.codebook.length == int(top["coding.codebook.length"]) and found.run.name is None
    assert f"best: {top['trial']}; python jobs/train_uda.py --config {tmp_path}/b/best.yaml" in said
    words_NK = sweep.build_codebook(found).matrix  # separation, the long way
    distances = [int((a != b).sum()) for a, b in itertools.combinations(words_NK, 2)]
    columns = [int((a != b).sum()) for a, b in itertools.combinations(words_NK.T, 2)]
    assert min(distances) == int(top["min_distance"]) and round(np.mean(distances), 2) == float(top["mean_distance"])
    assert min(min(c, len(words_NK) - c) for c in columns) == int(top["column_separation"])


def test_an_objective_that_no_codebook_has_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = write(tmp_path / "books.yaml", BOOKS | {"objectives": {"miou": "max"}})
    assert command("--space", str(space), f"run.directory={tmp_path}") == 2
    assert "objectives.miou: is no figure of a codebook; there are of_bound" in capsys.readouterr().err


def test_a_sweep_is_gone_on_with_only_by_its_own_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = write(tmp_path / "books.yaml", BOOKS)
    arguments = ["--space", str(space), f"run.directory={tmp_path}"]
    assert command(*arguments, "--resume") == 2 and "no sweep of 'books'" in capsys.readouterr().err
    assert command(*arguments, "--name", "b") == 0
    assert command(*arguments, "--name", "b") == 2 and "already holds a sweep" in capsys.readouterr().err
    assert command(*arguments, "--name", "b", "--resume", "search.seed=1") == 2
    assert "other settings (seed: 1)" in capsys.readouterr().err
    assert command(*arguments, "--name", "b", "--resume") == 0
    assert command(*arguments, "--name", "c", "--resume", "auto") == 0 and (tmp_path / "c/best.yaml").exists()


def record() -> Record:
    """Two objectives and every state; `a` is best, `b` cheaper, `c` neither, `d` was ahead of all when stopped."""
    def trial(name: str, state: str, bits: int, rate: float, miou: float | None, seconds: float, step: int,
              curve: list[tuple[int, float]], error: str | None = None) -> Trial:
        metrics = {} if miou is None else {"miou": miou, "step_seconds": seconds}
        values = {"coding.codebook.length": bits, "optim.lr": rate}
        return Trial(f"trial-{name}", values, metrics, step, state, 100.0 + step, error, curve)

    trials = [trial("c", "done", 24, 1e-3, 0.40, 0.9, 40, [(20, 0.2), (40, 0.40)]),
              trial("d", "stopped", 16, 1e-2, 0.60, 0.1, 20, [(20, 0.60)]),
              trial("a", "done", 32, 1e-4, 0.50, 0.8, 40, [(20, 0.3), (40, 0.50)]),
              trial("e", "failed", 48, 3e-4, None, 0.0, 0, [], "the loss is <nan> at step 7"),
              trial("b", "done", 12, 2e-3, 0.45, 0.5, 40, [(20, 0.25), (40, 0.45)]),
              trial("f", "running", 12, 5e-3, None, 0.0, 0, [])]
    return Record("s", "what & why", "demo", {"miou": "max", "step_seconds": "min"},
                  {"coding.codebook.length": "choice", "optim.lr": "loguniform"}, trials)


def test_whole_trials_are_ranked_before_stopped_and_failed_ones() -> None:
    found = record()
    assert [trial.name[-1] for trial in ranked(found)] == list("abcdfe")
    top = best(found)
    assert top is not None and top.name == "trial-a" and pareto(found) == {"trial-a", "trial-b"}
    assert Record.from_json(found.to_json()) == found
    nan = record()
    nan.trials[2].metrics["miou"] = float("nan")
    assert [trial.name[-1] for trial in ranked(nan)] == list("bcadfe")
    assert best(Record("s", "", "demo", {"miou": "max"}, {}, [found.trials[3]])) is None


def test_table_and_csv_have_all_trials_and_what_failed() -> None:
    found = record()
    text = text_table(found).splitlines()
    assert text[0].split() == ["place", "trial", "state", "length", "lr", "miou", "step_seconds", "step", "pareto", "error"]
    assert text[1].split() == ["1", "trial-a", "done", "32", "0.0001", "0.5", "0.8", "40", "yes"]
    assert text[-1].endswith("the loss is <nan> at step 7")
    assert text_table(found, most=2).endswith("(4 more in results.csv)")
    table = list(csv.DictReader(csv_text(found).splitlines()))
    assert [row["optim.lr"] for row in table] == ["0.0001", "0.002", "0.001", "0.01", "0.005", "0.0003"]
    assert rows(found)[3]["pareto"] == ""
    assert short_names(["a.kind", "b.kind", "b.seed", "seed"]) == {
        "a.kind": "a.kind", "b.kind": "b.kind", "b.seed": "b.seed", "seed": "seed"}


class Elements(HTMLParser):
    """Start tags with attributes, text, and whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_everything_in_itself() -> None:
    page = Elements(sweep_page.page(record()))
    assert not [attributes for _, attributes in page.found if {"src", "href", "srcset"} & set(attributes)]
    assert "http" not in sweep_page.page(record()) and "@import" not in sweep_page.page(record())
    assert [attributes["aria-label"] for tag, attributes in page.found if tag == "svg"] == [
        "Parallel coordinates", "Best so far", "Learning curves"]
    assert "what & why" in page.text and "the loss is <nan> at step 7" in page.text
    assert "Best: trial-a, miou 0.5, step_seconds 0.8" in page.text and "3 done, 1 stopped, 1 running, 1 failed" in page.text
    for name in "abcdef":
        assert [tag for tag, attributes in page.found if attributes.get("data-trial") == f"trial-{name}"].count("tr") == 1
    lines = {attributes["data-trial"]: attributes for tag, attributes in reversed(page.found)
             if tag == "polyline" and attributes.get("data-trial")}
    assert len(lines) == 6 and "best" in str(lines["trial-a"]["class"]).split() and "best" not in str(lines["trial-b"]["class"])


def test_parallel_lines_lie_where_their_values_say() -> None:
    page = Elements(sweep_page.page(record()))
    lines: dict[str, list[tuple[float, float]]] = {}
    for tag, attributes in page.found:
        if tag == "polyline" and attributes.get("data-trial"):
            points = [tuple(map(float, point.split(","))) for point in str(attributes["points"]).split()]
            lines.setdefault(str(attributes["data-trial"]), points)  # type: ignore[arg-type]
    top, bottom = sweep_page._y(1), sweep_page._y(0)
    heights = {name[-1]: [(bottom - y) / (bottom - top) for _, y in points] for name, points in lines.items()}
    near = {name: pytest.approx(values, abs=0.01) for name, values in {
        "a": [0.75, 0.0, 0.5, 1 - 0.7 / 0.8], "d": [0.25, 1.0, 1.0, 1.0], "c": [0.5, 0.5, 0.0, 0.0], "e": [1.0, np.log10(3) / 2]
    }.items()}  # length by rank of 5 values, rate by logarithm, score upwards, seconds downwards
    assert {name: heights[name] for name in near} == near


def test_best_so_far_counts_whole_trials_only() -> None:
    page = Elements(sweep_page.page(record()))
    front = next(attributes for _, attributes in page.found if attributes.get("class") == "front")
    heights = [float(point.split(",")[1]) for point in str(front["points"]).split()]
    assert heights == sorted(heights, reverse=True) and min(heights) > sweep_page._y(1)  # `d` is on top, and does not count
    minimum = Record("s", "", "demo", {"loss": "min"}, {"k": "choice"}, [
        Trial(str(i), {"k": i}, {"loss": loss}, 5, "done", i) for i, loss in enumerate((3.0, 1.0, 2.0))])
    front = next(a for _, a in Elements(sweep_page.page(minimum)).found if a.get("class") == "front")
    ends = [float(point.split(",")[1]) for point in str(front["points"]).split()]
    assert ends[0] == sweep_page._y(1) and ends[-1] == sweep_page._y(0)


def test_a_page_of_nothing_and_of_one_trial_can_be_made() -> None:
    empty = Record("s", "", "demo", {"miou": "max"}, {"k": "uniform"})
    assert "No trial has a result yet." in Elements(sweep_page.page(empty)).text
    empty.trials.append(Trial("t", {"k": 0.5}, {"miou": 0.5}, 5, "done", 1.0, None, [(5, 0.5)]))
    assert "Best: t" in Elements(sweep_page.page(empty)).text


def test_best_yaml_is_a_configuration(tmp_path: Path) -> None:
    from ecocseg.sweep_report import best_yaml

    text = best_yaml(record(), configuration.load("demo"))
    assert text is not None and text.startswith("# best of 6 trial(s) of sweep s on recipe demo: trial-a, done at step 40;")
    (tmp_path / "best.yaml").write_text(text)
    found = configuration.load(None, str(tmp_path / "best.yaml"))
    assert (found.coding.codebook.length, found.optim.lr, found.run.name, found.recipe) == (32, 1e-4, None, "demo")
    assert json.loads(found.model_dump_json())["train"] == json.loads(configuration.load("demo").model_dump_json())["train"]
