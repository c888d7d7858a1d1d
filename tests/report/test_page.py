"""The report page, opened from disk in a real Chromium without network."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright
from typer.testing import CliRunner

from qatkit import QatkitError
from qatkit.cli.main import app
from qatkit.pipeline.export import export_run
from qatkit.pipeline.report import report_run
from qatkit.pipeline.runner import run_stages
from qatkit.pipeline.verify import verify_run
from qatkit.recipe.loading import load_recipe
from qatkit.report import page as page_module
from qatkit.report.content import write_report
from qatkit.report.page import write_page
from qatkit.run.folder import Run
from tests.support.browser import chromium

SHORT = ["stages.dense.max_steps=40", "stages.qat.max_steps=40", "model.args.channels=[8,8]"]
FLAGS = [
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    contexts = []

    def open_(path: Path, scheme: str = "light", width: int = 1240) -> Page:
        context = browser.new_context(
            color_scheme="dark" if scheme == "dark" else "light",
            viewport={"width": width, "height": 900},
            offline=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.said, page.requested = [], []  # type: ignore[attr-defined]
        page.on("console", lambda message: page.said.append(message.text))  # type: ignore[attr-defined]
        page.on("pageerror", lambda error: page.said.append(str(error)))  # type: ignore[attr-defined]
        page.on("request", lambda request: page.requested.append(request.url))  # type: ignore[attr-defined]
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real run with its report."""
    torch.set_num_threads(1)
    run = Run(load_recipe("vision/digits_int4", SHORT), tmp_path_factory.mktemp("runs") / "small")
    run_stages(run)
    export_run(run)
    verify_run(run)
    report_run(run)
    write_page([run.out], run.out / "report.html")
    return run.out


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make the folder of another run, with a report that a function changed."""

    def make(name: str, change: Callable[[dict[str, Any]], object] = lambda report: None) -> Path:
        report = json.loads((folder / "report.json").read_text())
        change(report)
        other = tmp_path / name
        other.mkdir()
        write_report(other, report)
        return other

    return make


def test_the_page_opens_from_disk_without_an_error_a_script_or_the_network(folder: Path, open_page: OpenPage) -> None:
    page = open_page(folder / "report.html")
    assert page.said == []  # type: ignore[attr-defined]
    assert page.requested == [(folder / "report.html").as_uri()]  # type: ignore[attr-defined]
    text = (folder / "report.html").read_text()
    assert "<script" not in text
    references = re.findall(r'(?<= )(?:src|href)="([^"]*)', text) + re.findall(r"url\(([^)]*)", text)
    assert references
    assert all(reference.startswith(("#", "data:")) for reference in references)
    assert len(text) < 300_000


def test_every_picture_is_drawn_with_its_marks(folder: Path, open_page: OpenPage) -> None:
    page = open_page(folder / "report.html")
    drawn = page.evaluate(
        """Object.fromEntries([...document.querySelectorAll("svg[data-figure]")].map(svg => {
            const box = element => element.getBoundingClientRect();
            const marks = [...svg.querySelectorAll(".mark")].filter(mark => box(mark).width + box(mark).height > 0);
            return [svg.dataset.figure, [box(svg).width, box(svg).height, marks.length, svg.ariaLabel]];
        }))"""
    )
    layers = ["conv1", "conv2", "classifier"]
    expected = {
        **{f"run0-{name}": 4 for name in ("size", "latency1", "latency64")},  # three stages and quantize_static
        "run0-dense-loss": 2,
        "run0-dense-accuracy": 1,
        "run0-qat-loss": 3,
        "run0-qat-accuracy": 1,
        **{f"run0-qat-weights{index}": 3 for index in range(len(layers))},  # before, after and the codes
        "run0-layers-wide": 5 * 2 * len(layers),  # five numbers, two stages
    }
    for name, marks in expected.items():
        width, height, found, label = drawn[name]
        assert width > 200, name
        assert height > 100, name
        assert found == marks, name
        assert label, name
    assert drawn["run0-layers-tall"][0] == 0  # the one for phones
    ids = re.findall(r' id="([^"]+)"', (folder / "report.html").read_text())
    assert len(ids) == len(set(ids))


def test_the_page_holds_the_whole_run(folder: Path, open_page: OpenPage) -> None:
    page = open_page(folder / "report.html")
    report = json.loads((folder / "report.json").read_text())
    rows = page.locator("section:has(h2:text-is('Side by side')) tbody tr")
    assert rows.locator("th").all_inner_texts() == ["dense", "ptq", "qat", "quantize_static"]
    assert rows.locator(".passed").count() == 3
    accuracies = [row["test_accuracy"] for row in report["rows"]] + [report["baselines"][0]["runtime_metric"]]
    for accuracy, text in zip(accuracies, rows.all_inner_texts(), strict=True):
        assert f"{accuracy:.2%}" in text
    assert page.locator("pre").inner_text() == (folder / "recipe.yaml").read_text()
    facts = page.locator("dl.facts").inner_text()
    for name, number in report["versions"].items():
        assert f"{name}\n{number}" in facts
    weights = sum(layer["weights"] for layer in report["rows"][2]["layers"])
    parity = page.locator("ul.parity li").nth(2).inner_text()
    assert f"All {weights:,} integer weights in the file's 3 quantized layers equal the trained ones." in parity


CONTRASTS = """() => {
    const rgb = text => text.match(/[\\d.]+/g).map(Number);
    const light = parts => { const [r, g, b] = parts.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92
        : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const ground = element => { for (; element; element = element.parentElement) {
        const parts = rgb(getComputedStyle(element).backgroundColor);
        if (parts.length < 4 || parts[3] > 0) return parts; } return [255, 255, 255]; };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
        if (!own || element.closest("title") || !element.getClientRects().length) continue;
        const style = getComputedStyle(element);
        const a = light(rgb(element.tagName === "text" ? style.fill : style.color)), b = light(ground(element));
        found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.textContent.trim().slice(0, 40)]);
    }
    return found.sort((x, y) => x[0] - y[0]);
}"""


def test_both_themes_have_colours_of_their_own_that_can_be_read(folder: Path, open_page: OpenPage) -> None:
    looks = []
    for scheme in ("light", "dark"):
        page = open_page(folder / "report.html", scheme)
        looks.append(
            page.evaluate(
                """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
                getComputedStyle(document.querySelector("#run0-layers-wide-mark-0 path")).fill,
                getComputedStyle(document.querySelector("[data-figure=run0-size] text")).fill]"""
            )
        )
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 150
        assert contrasts[0][0] >= 4.5, contrasts[:3]  # WCAG AA
    assert all(light != dark for light, dark in zip(*looks, strict=True))


def test_a_phone_never_scrolls_sideways(folder: Path, open_page: OpenPage) -> None:
    page = open_page(folder / "report.html", width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    table = page.locator("section:has(h2:text-is('Side by side')) .scroll")
    assert table.evaluate("box => box.scrollWidth <= box.clientWidth")
    assert table.locator("td[data-column=parity]").first.bounding_box()["x"] < 390
    assert page.locator("[data-figure=run0-layers-tall]").is_visible()
    assert not page.locator("[data-figure=run0-layers-wide]").is_visible()
    sizes = page.evaluate(
        """[...document.querySelectorAll("figure svg text")].filter(text => text.checkVisibility()).map(text => {
            const scale = text.getScreenCTM();  // of a turned label, too
            return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(scale.a, scale.b);
        })"""
    )
    assert min(sizes) > 9  # pixels


def test_on_paper_the_page_is_light_and_whole(folder: Path, open_page: OpenPage) -> None:
    page = open_page(folder / "report.html", "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(24, 32, 43)"
    hidden = page.evaluate("[...document.querySelectorAll('.scroll, pre')].filter(e => e.scrollHeight > e.clientHeight"
                           " + 1 && getComputedStyle(e).overflowY !== 'visible').length")  # fmt: skip
    assert hidden == 0
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_failed_verification_is_loud(changed: Callable[..., Path], open_page: OpenPage) -> None:
    def fail(report: dict[str, Any]) -> None:
        report["rows"][2]["verification"] |= {"passed": False, "failures": ["layer 'conv2': 1 code differs"]}

    folder = changed("failed", fail)
    write_page([folder], folder / "report.html")
    page = open_page(folder / "report.html")
    alarm = page.get_by_role("alert").first
    assert alarm.inner_text() == (
        "Parity of qat FAILED. ONNX Runtime does NOT compute what training computed. Do not deploy this file."
    )
    box = alarm.bounding_box()
    assert box is not None
    assert box["y"] < 300
    assert page.locator(".tile.bad .value").inner_text() == "FAILED"
    assert "layer 'conv2': 1 code differs" in page.locator("li.failed").inner_text()


def test_a_slower_file_is_in_the_headline(changed: Callable[..., Path], open_page: OpenPage) -> None:
    def slow_down(report: dict[str, Any]) -> None:
        for row in report["baselines"]:
            row["latency"] = copy.deepcopy(report["rows"][-1]["latency"])
        for latency in report["rows"][-1]["latency"]:
            latency.update(low_ms=40.0, median_ms=50.0, high_ms=60.0)

    folder = changed("slow", slow_down)
    write_page([folder], folder / "report.html")
    alarms = open_page(folder / "report.html").get_by_role("alert").all_inner_texts()
    assert [text.split(":")[0] for text in alarms] == ["qat is slower than dense", "qat is slower than quantize_static"]


def test_layers_of_a_large_model_are_drawn_in_part_and_listed_in_full(
    changed: Callable[..., Path], open_page: OpenPage
) -> None:
    def grow(report: dict[str, Any]) -> None:
        for row in report["rows"][1:]:
            layer, histogram = row["layers"][1], row["histograms"]["conv2"]
            names = [f"model.layers.{index}.self_attn.q_proj$<&>" for index in range(60)]
            row["layers"] = [{**layer, "name": name, "weights": 1000 + i} for i, name in enumerate(names)]
            row["histograms"] = dict.fromkeys(names, histogram)

    folders = [changed(f"large{index}", grow) for index in range(3)]
    write_page(folders, folders[0] / "report.html")
    assert (folders[0] / "report.html").stat().st_size < 1_500_000
    page = open_page(folders[0] / "report.html", width=390)
    assert page.said == []  # type: ignore[attr-defined]
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("[data-figure^=run1-qat-weights]").count() == 4
    assert "Only the 4 largest of 60 layers are shown" in page.locator("#run1").inner_text()
    assert page.locator("#run1 table.layers").nth(1).locator("tbody tr").count() == 60
    assert "model.layers.59.self_attn.q_proj$<&>" in page.locator("#run1 table.layers").nth(1).inner_text()


def test_several_runs_are_compared_in_one_page(
    folder: Path, changed: Callable[..., Path], open_page: OpenPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(report: dict[str, Any]) -> None:
        report["rows"][2]["test_accuracy"] = 0.1234
        report["rows"].pop(1)
        for row in [*report["rows"], *report["baselines"]]:
            row["latency"] = copy.deepcopy(row["latency"][:1])

    second = changed("second", other)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", str(folder), str(second)])
    assert result.exit_code == 0, result.output
    note, page_line = result.output.splitlines()
    assert f"not comparable between runs: {second} contains a report but no run" in note
    assert page_line == "page: report.html"
    page = open_page(tmp_path / "report.html")
    assert page.said == []  # type: ignore[attr-defined]
    assert page.title() == "2 runs compared · qatkit"
    rows = page.locator("#compared tbody tr")
    names = [text.split("\n")[-1] for text in rows.locator("th").all_inner_texts()]
    assert [name.lstrip("12") for name in names] == ["digits_int4 (small)"] * 4 + ["digits_int4 (second)"] * 3
    assert "12.34%" in rows.nth(5).inner_text()
    for figure, marks in (("size", 7), ("latency1", 7), ("latency64", 4)):
        assert page.locator(f"svg[data-figure=all-accuracy-{figure}] .mark").count() == marks
    for run in ("run0", "run1"):
        assert page.locator(f"#{run} svg[data-figure={run}-qat-weights0]").is_visible()
    page.get_by_role("link", name="2. digits_int4 (second)").click()
    assert page.evaluate("location.hash") == "#run1"


def test_runs_without_a_report_and_runs_named_twice_are_refused(folder: Path, changed: Callable[..., Path]) -> None:
    with pytest.raises(
        QatkitError, match=r"nowhere/report.json: the file does not exist; run `qatkit report nowhere` first"
    ):
        write_page([folder, Path("nowhere")], Path("never.html"))
    with pytest.raises(QatkitError, match="the same run folder was passed twice"):
        write_page([folder, folder / ".." / folder.name], Path("never.html"))
    old = changed("old", lambda report: report.update(schema=0))
    with pytest.raises(QatkitError, match=r"report\.json has schema 0, .*; run `qatkit report .*old` to rewrite"):
        write_page([old], Path("never.html"))
    edited = changed("edited")
    (edited / "report.json").write_text((edited / "report.json").read_text().replace('"passed": true', '"passed": 1'))
    with pytest.raises(QatkitError, match=r"report\.json is corrupt \(the digest .*; restore the file, or run"):
        write_page([edited], Path("never.html"))


def test_without_matplotlib_the_page_is_refused_and_a_report_goes_on_without_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "NEEDS", ("matplotlib", "no_such_package"))
    with pytest.raises(QatkitError, match=r"no_such_package is not installed; run: pip install 'qatkit\[report\]'"):
        write_page([folder], Path("never.html"))
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    last = result.output.splitlines()[-1]
    install = "no_such_package is not installed; run: pip install 'qatkit[report]'"
    assert last == f"no report.html: {install}, then run: qatkit report {folder}"
