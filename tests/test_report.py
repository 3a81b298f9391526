"""The page of a run: what it shows in a real browser, while the run goes on, and what a run writes for it."""

import csv
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from PIL import Image

from ssl_lightning import RunRecord, UserError
from ssl_lightning.cli import main
from ssl_lightning.commands.report import report
from ssl_lightning.loggers import AppendingCSVLogger
from tests.small import digits, simclr, trainer

FIT = ["fit", "--config", "configs/moco_v2/quickstart.yaml", "--config", "configs/overlays/debug.yaml"]
EVIL = "</script><script>document.title = 'taken over'</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoCo v2 that was resumed with another temperature, with a warning of its own and pictures of three epochs."""
    root = tmp_path_factory.mktemp("report")
    views = "--data.views=[{size: 16, count: 2, scale: [0.01, 0.3]}]"  # some of which show nothing
    words = [*FIT, views, "--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu", "--name", "moco"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ssl-lightning"])
        main(words)
        with pytest.warns(UserWarning, match="other hyper-parameters"):
            main([*words, "--trainer.max_epochs", "3", "--model.temperature", "0.9", "--ckpt_path", "last"])
    folder = root / "moco" / "version_0"
    for epoch in range(3):
        (folder / "pictures" / "attention_maps").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + epoch, 30)).save(folder / "pictures" / "attention_maps" / f"{epoch:04d}.png")
    (folder / "pictures" / "attention_maps" / "0003.png").write_bytes(b"\x89PNG\r\n")  # half written
    with (folder / "warnings.txt").open("a") as file:
        file.write(f"2000-01-01T00:00:00+0000\t7\t{EVIL}\n")
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return report(str(run), str(run.parent / "page.html"))


def opened(browser: Any, address: str, width: int = 1200) -> list[str]:
    """Open a page; gives all addresses that it asked for."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(address)
    until(lambda: browser.execute_script("return document.querySelectorAll('.plot .main-svg').length") > 0)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert not browser.get_log("browser")  # neither errors nor what the page's own policy has blocked
    return asked


def until(condition: Any, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


# In a browser


def test_every_plot_draws_its_curves_and_every_picture_is_there(browser: Any, page: Path) -> None:
    asked = opened(browser, page.as_uri())
    assert {address.partition(":")[0] for address in asked} <= {"file", "data"}
    assert asked.count(page.as_uri()) == 1
    assert all(address == page.as_uri() for address in asked if address.startswith("file"))
    drawn = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('.plot')].map(plot => ["
        "plot.parentElement.querySelector('h3').firstChild.textContent.trim(), {"
        "traces: plot.querySelectorAll('.scatterlayer .trace, .barlayer .trace').length,"
        "points: [...plot.querySelectorAll('path.point, path.js-line, .barlayer .point path')]"
        ".filter(path => path.getAttribute('d')).length}]))"
    )
    assert {"Loss", "Probes", "rankme", "Learning rate", "Weight decay", "Momentum of the teacher"} <= drawn.keys()
    assert {"Images per second", "Where the time goes"} <= drawn.keys()
    for title, found in drawn.items():
        assert found["traces"] > 0, title
        assert found["points"] >= found["traces"], title
    assert drawn["Loss"]["traces"] == 2  # with the chance loss
    assert drawn["Where the time goes"]["traces"] == 6
    widths = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert len(widths) > 12  # the views, three maps, four pictures after each start's last epoch, and blank views
    assert all(width > 0 for width in widths)


def test_hovering_a_curve_tells_value_step_and_epoch(browser: Any, page: Path) -> None:
    opened(browser, page.as_uri())
    browser.execute_script("Plotly.Fx.hover('plot-0-0', [{curveNumber: 0, pointNumber: 3}])")
    said = browser.execute_script("return document.querySelector('#plot-0-0 .hoverlayer').textContent")
    assert said.startswith("loss ")
    assert "step 3, epoch 1" in said


def test_the_slider_shows_earlier_epochs(browser: Any, page: Path) -> None:
    opened(browser, page.as_uri())
    shown = "return [...document.querySelectorAll('[data-name=\"attention maps\"] img:not([hidden])')]"
    assert browser.execute_script(f"{shown}.map(image => image.naturalWidth)") == [42]
    slide = "const input = document.querySelector('figure input'); input.value = 0;"
    browser.execute_script(f"{slide} input.dispatchEvent(new Event('input', {{bubbles: true}}))")
    assert browser.execute_script(f"{shown}.map(image => image.naturalWidth)") == [40]
    assert browser.execute_script("return document.querySelector('figure output').value") == "epoch 0"


def test_points_lead_to_their_images(browser: Any, page: Path, run: Path) -> None:
    opened(browser, page.as_uri())
    found = json.loads((run / "map.json").read_text())
    points, labels = len(found["x"]), found["labels"]
    drawn = browser.execute_script("return document.getElementById('map').data.map(trace => trace.customdata)")
    assert [{labels[image] for image in trace} for trace in drawn] == [{label} for label in range(10)]
    assert sorted(image for trace in drawn for image in trace) == [*range(points)]
    tiles = "[...document.querySelectorAll('#picked button')].map(tile => [tile.title, Number(tile.dataset.image)])"
    click = "document.getElementById('map').emit('plotly_click', {points: [{customdata: 5}]});"
    shown = browser.execute_script(f"{click} return {tiles}")
    assert [image for _, image in shown] == [5, *found["neighbors"][5]]
    assert shown[0][0] == f"{found['names'][5]}, {labels[5]}"
    frames = browser.execute_script(
        "return [...document.querySelectorAll('#picked button')].map(tile => tile.className)"
    )
    same = [labels[other] == labels[5] for other in found["neighbors"][5]]
    assert [frame == "same" for frame in frames[1:]] == same
    browser.execute_script("document.getElementById('colors').value = 'clusters'; drawMap()")
    assert browser.execute_script("return document.getElementById('map').data[0].name") == "cluster 1"


def test_the_accuracy_leads_to_the_errors(browser: Any, page: Path, run: Path) -> None:
    opened(browser, page.as_uri())
    kept = json.loads((run / "errors.json").read_text())
    errors = kept["errors"]
    tiles = "return [...document.querySelectorAll('#error-images button')]"

    def shown() -> list[int]:
        return browser.execute_script(f"{tiles}.map(tile => Number(tile.dataset.image))")

    browser.find_element("css selector", "dd a[href='#errors']").click()
    top = "return document.getElementById('errors').getBoundingClientRect().top"
    until(lambda: browser.execute_script(top) < 20)
    assert shown() == [*range(min(60, len(errors)))]
    assert [error["share"] for error in errors] == sorted((error["share"] for error in errors), reverse=True)
    cells = browser.find_elements("css selector", ".confusion button")
    counts = kept["counts"]
    assert len(cells) == sum(counts[a][b] > 0 for a in range(len(counts)) for b in range(len(counts)) if a != b)
    cells[0].click()
    pair = [cells[0].get_attribute(f"data-{name}") for name in ("label", "predicted")]
    assert shown() == [n for n, error in enumerate(errors) if [error["label"], error["predicted"]] == pair] != []
    first = shown()[0]
    browser.find_element("css selector", "#error-images button").click()
    assert shown() == [first, *errors[first]["nearest"]]
    frames = browser.execute_script(f"{tiles}.slice(1).map(tile => tile.className)")
    assert frames == ["same" if kept["labels"][other] == pair[0] else "other" for other in errors[first]["nearest"]]
    said = browser.find_element("id", "error-name").text
    assert said.startswith(f"{kept['names'][first]}: {pair[0]}, taken for {pair[1]} by ")
    browser.find_element("id", "worst").click()
    assert shown()[0] == 0


def test_the_share_of_blank_views_leads_to_them(browser: Any, page: Path, run: Path) -> None:
    opened(browser, page.as_uri())
    kept = json.loads((run / "blank.json").read_text())
    link = browser.find_element("css selector", "dd a[href='#blank']")
    assert link.text == f"{100 * kept['count'] / kept['total']:.1f} %"
    link.click()
    pictures = browser.find_elements("css selector", "#blank img")
    assert len(pictures) == min(24, kept["count"]) > 0
    assert pictures[0].get_attribute("title") == f"view {kept['views'][0]['view']} of {kept['views'][0]['name']}"


def test_what_happened_is_text_and_no_code(browser: Any, page: Path, run: Path) -> None:
    opened(browser, page.as_uri())
    text = browser.execute_script("return document.body.innerText")
    assert browser.title == "moco/version_0"
    assert EVIL in text
    assert "other hyper-parameters than the checkpoint's: temperature 0.9" in text
    assert "went on at step 8" in text
    assert "finished" in text
    assert "MoCoV2" in text


def test_a_phone_scrolls_in_one_direction(browser: Any, page: Path) -> None:
    opened(browser, page.as_uri(), width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 391
    lefts = "return [...document.querySelectorAll('.charts > .card')].map(card => card.getBoundingClientRect().left)"
    assert len(set(browser.execute_script(lefts))) == 1  # a single column
    until(lambda: browser.execute_script("return document.querySelector('.main-svg').clientWidth") <= 390)


def test_nothing_reaches_the_network_from_the_page(browser: Any, page: Path) -> None:
    opened(browser, page.as_uri())
    ask = "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('sent'), () => done('refused'))"
    assert browser.execute_async_script(ask) == "refused"
    assert "Content Security Policy" in str(browser.get_log("browser"))


# While the run goes on


@contextmanager
def watched(folder: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    command = [sys.executable, "-m", "ssl_lightning", "report", str(folder), "--watch"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which tests in the background ignore
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, line
        yield process, int(line.partition("127.0.0.1:")[2].partition("/")[0])
    finally:
        process.kill()
        process.wait()


def drag_across(browser: Any, element: Any) -> None:
    """Drag from a quarter of its width to the middle, which zooms a plot."""
    from selenium.webdriver import ActionChains

    quarter = element.size["width"] // 4
    mouse = ActionChains(browser).move_to_element_with_offset(element, -quarter, 0).click_and_hold()
    mouse.move_by_offset(quarter // 2, 0).move_by_offset(quarter // 2, 0).release().perform()


def answer(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_a_watched_page_follows_the_run_and_ends_with_ctrl_c(browser: Any, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "version_3"
    folder.mkdir()
    shutil.copy(run / "config.yaml", folder)
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    with watched(tmp_path) as (process, port):
        status, text = answer(port, "/")
        assert status == 200
        assert "There are no metrics yet" in text
        before = answer(port, "/stamp")[1]
        (folder / "metrics.csv").write_text("".join(lines[:20]))  # all metrics: a new one reloads the page
        assert answer(port, "/stamp")[1] != before
        assert "Loss" in answer(port, "/")[1]
        assert answer(port, "/../config.yaml")[0] == 404
        assert answer(port, "/", host="example.com")[0] == 403  # a name of another site that leads here

        opened(browser, f"http://127.0.0.1:{port}/")
        shown = "return document.getElementById('plot-0-0').layout.xaxis.range"
        whole = browser.execute_script(shown)
        drag_across(browser, browser.find_element("css selector", "#plot-0-0 .nsewdrag"))
        zoomed = until(lambda: (found := browser.execute_script(shown)) != whole and found)
        points = "return document.getElementById('plot-0-0').data[0].x.length"
        drawn = browser.execute_script(points)
        (folder / "metrics.csv").write_text("".join(lines[:24]) + lines[24][:5])  # half a line; an epoch has ten
        until(lambda: browser.execute_script(points) > drawn)
        assert browser.execute_script(shown) == zoomed

        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in said


@pytest.mark.slow
def test_a_page_can_be_made_at_every_moment_of_writing(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.yaml", tmp_path)
    text = (run / "metrics.csv").read_text()
    first = text.index("\n", text.index("\n") + 1) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for end in [first, *range(first + 1, first + 400, 67), len(text) - 5]:
            (tmp_path / "metrics.csv").write_text(text[:end])
            report(str(tmp_path), str(tmp_path / "page.html"))
    (tmp_path / "metrics.csv").write_text(text[:30])
    with pytest.raises(UserError, match="no metrics yet"):
        report(str(tmp_path), str(tmp_path / "page.html"))


def test_a_resumed_curve_goes_on_where_it_was_resumed(tmp_path: Path) -> None:
    rows = ["epoch,step,train/loss", "0,1,5", "0,3,4", "1,5,9", "1,7,8", "1,5,nan", "1,7,2"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    figures = report(str(tmp_path), str(tmp_path / "page.html")).read_text().partition('id="figures">')[2]
    (trace,) = json.loads(figures.partition("</script>")[0])["plot-0-0"]["data"]
    assert (trace["x"], trace["y"]) == ([1, 3, 5, 7], [5, 4, None, 2])


def test_a_long_run_keeps_its_peaks_in_a_page_of_bounded_size(tmp_path: Path) -> None:
    rows = [f"{step // 100},{step},{9.5 if step == 31234 else 1}" for step in range(100_000)]
    (tmp_path / "metrics.csv").write_text("\n".join(["epoch,step,train/loss", *rows]) + "\n")
    figures = report(str(tmp_path), str(tmp_path / "page.html")).read_text().partition('id="figures">')[2]
    (trace,) = json.loads(figures.partition("</script>")[0])["plot-0-0"]["data"]
    assert len(trace["x"]) <= 2000
    assert (31234, 9.5) in zip(trace["x"], trace["y"], strict=True)
    assert trace["x"][-1] == 99_999


# What the run writes


def test_the_run_writes_where_it_ran_and_what_it_warned_of(run: Path) -> None:
    first, second = json.loads((run / "environment.json").read_text())
    assert (first["step"], second["step"]) == (0, 8)
    assert first["end"] == second["end"] == "finished"
    assert first["method"] == "MoCoV2"
    assert first["command"][:2] == ["fit", "--config"]
    assert first["chance_loss"] > 0
    assert first["versions"].keys() >= {"python", "torch", "ssl_lightning"}
    assert first["hardware"]["device"] == "cpu"
    assert first["processes"]["processes"] == 1
    (line, _) = (run / "warnings.txt").read_text().splitlines()
    assert line.endswith("temperature 0.9 (was 0.2)")
    with open(run / "metrics.csv") as file:
        momenta = [row["train/teacher_momentum"] for row in csv.DictReader(file) if row["train/teacher_momentum"]]
    assert [float(momentum) for momentum in momenta] == pytest.approx([0.98] * 12)  # of every step


@pytest.mark.skipif(shutil.which("lscpu") is None, reason="there is no lscpu to ask for the processor's name")
def test_the_processor_has_the_name_that_the_system_knows(run: Path) -> None:
    printed = subprocess.run(["lscpu", "--json"], capture_output=True, text=True, check=True).stdout
    name = {line["field"]: line["data"] for line in json.loads(printed)["lscpu"]}.get("Model name:")
    if name is None:
        pytest.skip("lscpu prints no name")
    assert json.loads((run / "environment.json").read_text())[0]["hardware"]["processor"] == name


class Ends(L.Callback):
    """Ends a run in its second step."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and self.error is not None:
            raise self.error
        trainer.should_stop = batch_idx == 1


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (None, "stopped early, at step 2"),
        (ValueError("too bad"), "stopped by ValueError: too bad"),
        (SystemExit(143), "stopped by SystemExit: 143"),
    ],
)
def test_the_end_of_a_run_is_written(error: BaseException | None, how: str, tmp_path: Path) -> None:
    show = warnings.showwarning
    logger = AppendingCSVLogger(tmp_path, "", "")
    running = trainer(tmp_path, callbacks=[RunRecord(), Ends(error)], logger=logger, log_every_n_steps=1)
    if error is None:
        running.fit(simclr(), digits(batch_size=16))
    else:
        with pytest.raises(type(error)):
            running.fit(simclr(), digits(batch_size=16))
    assert json.loads((tmp_path / "environment.json").read_text())[0]["end"] == how
    assert warnings.showwarning is show
    text = report(str(tmp_path), str(tmp_path / "page.html")).read_text()
    assert how in text
    assert ">stopped<" in text


def test_a_run_that_was_killed_is_no_longer_running(run: Path, tmp_path: Path) -> None:
    for name in ("metrics.csv", "config.yaml", "environment.json"):
        shutil.copy(run / name, tmp_path)
    starts = json.loads((tmp_path / "environment.json").read_text())
    del starts[-1]["end"], starts[-1]["ended"]
    (tmp_path / "environment.json").write_text(json.dumps(starts))
    assert ">running<" in report(str(tmp_path), str(tmp_path / "page.html")).read_text()
    for file in tmp_path.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)
    text = report(str(tmp_path), str(tmp_path / "page.html")).read_text()
    assert ">stopped<" in text
    assert "without a word; last sign" in text


# Bad input


def test_the_newest_version_of_a_run_is_taken(run: Path, tmp_path: Path) -> None:
    for name, age in (("version_0", 100), ("version_1", 0)):
        (tmp_path / name).mkdir()
        shutil.copy(run / "metrics.csv", tmp_path / name)
        os.utime(tmp_path / name / "metrics.csv", (time.time() - age,) * 2)
    assert f"{tmp_path.name}/version_1</title>" in report(str(tmp_path), str(tmp_path / "page.html")).read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone"], "gone does not exist"),
        (["empty"], "empty is not a run"),
        (["fresh"], "fresh has no metrics yet: wait for its first logged step"),
        (["run", "--output", "none/page.html"], "name a file in a folder that exists"),
        (["run", "--output", "empty"], "name a file in a folder that exists"),
        (["run", "--watch", "--port", "99999"], "choose another port, or leave out --port"),
        (["run", "--colour", "red"], "colour"),
    ],
)
def test_wrong_things_are_answered_in_words(
    words: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    (tmp_path / "empty").mkdir()
    (tmp_path / "fresh").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "fresh")
    before = {*tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as end:
        main(["report", *words])
    assert message in str(end.value.code) + capsys.readouterr().err
    assert {*tmp_path.rglob("*")} == before
