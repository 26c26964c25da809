"""The report page: complete and self-contained whatever the run recorded; one error line for an empty run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest
import yaml

from megatron_mopd.commands import report as tool
from megatron_mopd.observe import svg
from megatron_mopd.observe.charts import Line
from megatron_mopd.observe.formats import format_number
from megatron_mopd.observe.page import write_page
from megatron_mopd.observe.palette import ACCURACY, DRAWN, LOAD, OPTIMIZER, SHADES, STUDENT, TEACHERS, THEME
from megatron_mopd.observe.recorded_run import ReportError, read_run

DOMAINS = ["gcd", "sorting", "<i>&words"]
_VOID = {"meta", "link", "img", "br", "hr", "input", "line", "rect", "circle", "path"}


class Page(HTMLParser):
    """Collects ids, links and attributes that could load something, and checks that elements nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.loads, self.texts, self.titles = [], [], [], [], [], []
        self.spans = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        if tag == "span" and "title" in attributes:
            self.spans.append(attributes)
        self.loads += [value for name, value in attributes.items() if name in ("src", "xlink:href", "srcset")]
        assert tag not in ("script", "link", "iframe", "img", "object")

    def handle_startendtag(self, tag, attributes):
        assert tag in _VOID

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] == "title":
            self.titles.append(data)


def checked(path):
    """Parse the page and check that elements are closed, links target existing ids, and nothing is loaded."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) and page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert page.loads == []
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", text), "something is fetched"
    return page


def line(i):
    metrics = {"iteration": i, "loss": 1 / i, "grad_norm": 2 / i, "tokens_per_second": 1000.0 + i, "lr": 1e-3}
    metrics |= {"time/rollout": 1.0, "time/score": 0.5, "time/train": 2.5, "idle/stage_0": 0.25}
    for j, name in enumerate(DOMAINS):
        metrics |= {f"kl/{name}": 1 / (i + j), f"length/{name}": 5.0 + j, f"rollout_entropy/{name}": 0.5}
        metrics |= {f"reward/{name}": 0.5, f"teacher/{name}/kl": 1 / i, f"teacher/{name}/load_hidden": 0.75}
    if i % 10 == 0:
        metrics |= {f"accuracy/{name}": i / 50 for name in DOMAINS} | {"accuracy": i / 50, "pass_at_4": 0.9}
        metrics |= {f"pass_at_4/{name}": 0.9 for name in DOMAINS}
    return metrics


def sample(iteration):
    return {
        "iteration": iteration,
        "domain": "gcd",
        "prompt": "gcd of 8 and 12? <script>",
        "answer": "4",
        "tokens": ["4", " <b>", ""],
        "kl": [0.0, 2.0, None],
        "logprobs": [-0.1, -2.0, -0.5],
        "finished": False,
        "left_out": 0,
        "teachers": {"gcd": 0.7, "self": 0.3},
        "reward": 1.0,
    }


def trace():
    events = [{"ph": "M", "name": "process_name", "pid": k, "args": {"name": n}} for k, n in enumerate("ab")]
    for pid in (0, 1):
        for stage in (0, 1):
            work = ["teacher forward gcd micro-batch 0", "student forward micro-batch 0 chunk 0"]
            kinds = ["TeacherForward", "StudentForward"]
            for number, (name, kind) in enumerate(zip(work, kinds)):
                start = 1e6 * (2 * number + stage)
                event = {"name": name, "cat": kind, "ph": "X", "pid": pid, "tid": 2 * stage}
                events.append(event | {"ts": start, "dur": 1e6})
    return {"traceEvents": events}


def accuracies(directory, values):
    directory.mkdir(parents=True)
    entries = {"iteration": 1} | {f"accuracy/{name}": value for name, value in zip(DOMAINS, values)}
    (directory / "metrics.jsonl").write_text(json.dumps(entries) + "\n")


@pytest.fixture
def demo(tmp_path):
    """A demo directory with everything that a run can record; the run is active, its last line incomplete."""
    accuracies(tmp_path / "base", [0.2, 0.4, 0.5])
    accuracies(tmp_path / "experts" / "gcd", [1.0, 0.0, 0.0])
    accuracies(tmp_path / "experts" / "sorting", [0.0, 0.9, 0.0])
    run = tmp_path / "mopd"
    run.mkdir()
    lines = [json.dumps(line(i)) for i in range(1, 41)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 41, "lo')
    config = {
        "schedule": {"train_iters": 80},
        "routing": {"gcd": {"gcd": 0.7, "self": 0.3}, "default": "self"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    alarms = [
        {"iteration": 0, "message": "teacher 'a' equals the student"},
        {"iteration": 7, "message": "KL <grew>"},
    ]
    (run / "alarms.jsonl").write_text("".join(json.dumps(alarm) + "\n" for alarm in alarms))
    (run / "samples.jsonl").write_text("".join(json.dumps(sample(i)) + "\n" for i in (1, 40)))
    (run / "timeline.json").write_text(json.dumps(trace()))
    prints = {"weights": "a" * 64, "architecture": "b" * 64, "tokenizer": "c" * 64}
    facts = {"ranks": 2, "versions": {"torch": "2.13.0"}, "manifest": {"teachers": {"gcd": prints}}}
    (run / "run.json").write_text(json.dumps(facts))
    return tmp_path


def test_everything_is_on_the_page(demo):
    page = checked(write_page(demo))
    text = " ".join(page.texts)
    anchors = (
        "alarms who-is-good-at-what training domains teachers time pipeline samples configuration provenance"
    )
    assert page.ids == anchors.split()
    wide = (demo / "mopd" / "report.html").read_text().count('<div class="wide">')
    assert wide == 4, "see-saw, time split, pipeline planned and measured scroll on a narrow screen"
    for part in (
        "Iteration 40 of 80",
        "KL <grew>",
        "at the start",
        "gcd 0.7, self 0.3",
        "reward 1",
        "cut off",
        "torch 2.13.0",
        "aaaaaaaaaaaaaaaa",
        "train_iters: 80",
        "rollout 25%",
        "pass@4",
        "teacher gcd",
        "stage 1  idle 50%",
        "a: stages compute nothing 50.0% of the time",
        "gcd of 8 and 12? <script>",
    ):
        assert part in text, part
    assert page.titles.count("teacher forward gcd micro-batch 0, 1.0000 s") == 4, "a box on each stage, twice"
    assert {"sorting", "all", "rollout", "1 to 0.025, between 0.025 and 1"} <= set(page.titles)
    # gcd: (0.8 - 0.2) / 0.8; sorting: (0.8 - 0.4) / 0.5; the third domain has no expert.
    assert {"headroom recovered on gcd: 75%", "headroom recovered on sorting: 80%"} <= set(page.titles)
    assert (
        "headroom recovered on mean: 78%" in page.titles and "mopd (student) on sorting: 80%" in page.titles
    )


def test_tokens_are_coloured_by_their_divergence(demo):
    spans = checked(write_page(demo)).spans
    assert len(spans) == 6, "the newest sample and the first"
    assert [s["title"].split(";")[0] for s in spans[:3]] == [
        "KL 0.0000 nats",
        "KL 2.0000 nats",
        "KL not finite",
    ]
    strengths = [float(re.search(r",([\d.]+)\)", s["style"])[1]) for s in spans[:3]]
    assert strengths == [0.0, 0.85, 0.0]
    assert "probability 0.135" in spans[1]["title"]


def test_a_run_of_an_older_version(tmp_path):
    """Metrics with only a loss, and a configuration with keys that no longer exist."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"iteration": {i}, "loss": {1 / i}}}\n' for i in (1, 2))
    )
    (tmp_path / "config.yaml").write_text("schedule: none\nold: [1]\n")
    (tmp_path / "samples.jsonl").write_text('{"iteration": 1, "tokens": 3}\n')
    page = checked(write_page(tmp_path))
    text = " ".join(page.texts)
    assert page.ids == ["training", "configuration", "provenance"]
    assert "older version" in text and "No see-saw" in text


@pytest.mark.parametrize(
    "prepare, parts",
    [
        (lambda d: None, ["run", "not a directory"]),
        (lambda d: d.mkdir(), ["no metrics.jsonl", "first iteration"]),
        (lambda d: accuracies(d / "inner", [1.0]), ["no metrics.jsonl", "did you mean", "inner"]),
        (lambda d: (d.mkdir(), (d / "metrics.jsonl").write_text('{"iter')), ["no complete line", "again"]),
    ],
)
def test_nothing_to_report_is_one_sentence(tmp_path, capsys, prepare, parts):
    prepare(tmp_path / "run")
    with pytest.raises(SystemExit) as status:
        tool.main([str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert status.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    for part in parts:
        assert part in error
    assert not list(tmp_path.rglob("report.html"))


def test_experts_named_on_the_command_line(tmp_path, capsys):
    accuracies(tmp_path / "a", [0.5, 0.5, 0.5])
    accuracies(tmp_path / "b", [0.9, 0.1, 0.1])
    accuracies(tmp_path / "student", [0.7, 0.5, 0.5])
    arguments = ["--base", str(tmp_path / "a"), "--expert", f"gcd={tmp_path / 'b'}"]
    tool.main([str(tmp_path / "student"), *arguments, "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert "headroom recovered on gcd: 50%" in checked(tmp_path / "page.html").titles
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "student"), "--expert", "gcd"])
    with pytest.raises(ReportError, match="to read accuracies from"):
        read_run(tmp_path / "student", base=tmp_path / "none")


@pytest.mark.parametrize("values", [[3.0], [1.0, 1.0], [0.0, 1e-12, 5.0], [-2.0, 3.0], [1e-9, 1e9]])
def test_charts_of_any_values_stay_inside(values):
    points = list(enumerate(values))
    for log in (False, True):
        for picture in (
            svg.line_chart([Line("a", points, "red")], log=log),
            svg.line_chart([Line("a", points, "red")], percent=True),
            svg.spark(points, "red", log=log),
            svg.stacked_areas([Line("a", [(x, abs(y)) for x, y in points], "red")]),
        ):
            width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', picture).groups())
            places = re.findall(
                r"[ML] (\S+) (\S+?)(?=[ \"])", re.sub("<path[^>]*translate[^>]*>", "", picture)
            )
            assert places
            places += re.findall(r"translate\((\S+) (\S+)\)", picture)
            for x, y in places:
                assert -1 <= float(x) <= width + 1 and -1 <= float(y) <= height + 1
    assert "no data yet" in svg.line_chart([])


def test_charts_belong_to_the_page():
    """Charts are deterministic, use the page's colours and font, and refer to nothing outside."""
    lines = [
        Line("mean", [(1, 0.5), (2, 5.0)], THEME["ink"][0]),
        Line("#1f2933 1.23456", [(1, 1)], "#ff0000"),
    ]
    picture = svg.line_chart(lines, log=True)
    assert picture == svg.line_chart(lines, log=True)
    assert picture.count("stroke: var(--ink)") >= 1 and "fill: var(--muted)" in picture
    for words in ("font-family", "clip-path", "href", " id=", "xmlns", "<defs", "<metadata", "url("):
        assert words not in picture, words
    assert "<title>mean</title>" in picture and "<title>#1f2933 1.23456</title>" in picture
    assert picture.count("<path") > 3 and "translate(" in picture, "few points are marked"


@pytest.mark.filterwarnings("error")
def test_names_that_matplotlib_cannot_write():
    picture = svg.split_bar([("漢字\uffff", 1.0, "red")])
    assert "漢字" in picture


def test_colours_of_the_theme_are_of_the_theme_only():
    others = {*SHADES, *ACCURACY, *TEACHERS, OPTIMIZER, LOAD, *STUDENT["StudentForward"]}
    assert not others & {THEME[name][0] for name in DRAWN}


def test_numbers_to_read():
    found = [format_number(v) for v in (0, 0.1234, 12.34, 1234.4, 12345, 2.5e6, 3e-7, math.nan)]
    assert found == ["0", "0.123", "12.3", "1234", "12.3k", "2.5M", "3.0e-07", "–"]
