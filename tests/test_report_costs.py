"""Tables of measured costs: what is compared with what, and what was not measured."""

from __future__ import annotations

from ecocseg.report_costs import costs_table

MACHINE = {"device": "a CPU, 2 cores", "threads": 1, "torch": "2.15", "commit": "abc"}


def test_a_coding_table_divides_by_one_hot_and_leaves_gaps_where_nothing_was_measured():
    rows = [{"operation": operation, "form": form, "cpu_seconds": seconds, "megabytes": 7.4}
            for operation in ("scores", "pseudo_label", "loss", "mixed_loss")
            for form, seconds in (("one_hot", 0.1), ("ecoc", 0.25))]
    asked = {"what": "coding", "batch": 2, "classes": 19, "bits": 40, "size": 512, "stride": 4, "content": "scene",
             "repeats": 5}
    table = costs_table({"arguments": asked, "machine": MACHINE, "rows": rows})
    assert "| loss, true labels | 0.100 s, 7 MB | 0.250 s, 7 MB | - | 2.5 | - |" in table
    assert "| class scores | - | 0.250 s, 7 MB | - | - | - |" in table
    assert "stride 4" in table and "a CPU, 2 cores, 1 thread(s), torch 2.15, commit abc" in table


def test_a_step_table_shows_the_change_from_one_hot():
    rows = [{"form": form, "seconds": seconds, "least": 0.9, "most": 1.3, "cpu_seconds": seconds, "megabytes": 100 * seconds}
            for form, seconds in (("one_hot", 1.0), ("ecoc", 1.05))]
    asked = {"what": "step", "recipe": "demo", "batch": 8, "size": 128}
    lines = costs_table({"arguments": asked, "machine": MACHINE, "rows": rows}).splitlines()
    assert lines[-1] == "| ECOC | 1.050 (0.900 to 1.300) | 1.050 | 105 | +5.0 % | +5.0 % |"
