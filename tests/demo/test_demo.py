"""The command as people type it, and its page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from mnist.demo import __main__ as command
from mnist.demo.reader import read
from tests.processes import PYTHON, ROOT, Finished, finish, left_behind, started, train

DEMO = [*PYTHON, "-m", "mnist.demo"]
DATA_DIR = os.environ.get("MNIST_DATA_DIR", "")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
PATIENCE_S = 120
MISSING = "raise ModuleNotFoundError(\"No module named '{0}'\", name='{0}')\n"
# Points of a stroke, in shares of the paper's width and height.
STROKES = {
    "3": (
        *((0.32, 0.24), (0.40, 0.17), (0.52, 0.15), (0.62, 0.19), (0.66, 0.28), (0.63, 0.38), (0.54, 0.45)),
        *((0.45, 0.47), (0.56, 0.49), (0.66, 0.56), (0.69, 0.66), (0.64, 0.77), (0.54, 0.84), (0.42, 0.84)),
        (0.31, 0.77),
    ),
    "7": ((0.28, 0.20), (0.50, 0.20), (0.72, 0.19), (0.64, 0.38), (0.55, 0.60), (0.47, 0.85)),
    "0": (
        *((0.50, 0.15), (0.40, 0.19), (0.33, 0.32), (0.31, 0.50), (0.34, 0.69), (0.41, 0.81), (0.50, 0.85)),
        *((0.59, 0.81), (0.66, 0.69), (0.69, 0.50), (0.67, 0.32), (0.60, 0.19), (0.50, 0.15)),
    ),
}


def curve(digit: str) -> list[tuple[float, float]]:
    """Many points of a stroke; round but for the 7."""
    points = np.array(STROKES[digit])
    if digit == "7":
        return [tuple(place) for a, b in pairwise(points) for place in np.linspace(a, b, 8)]
    return [tuple(place) for place in CubicSpline(range(len(points)), points)(np.linspace(0, len(points) - 1, 50))]


# --- the command ----------------------------------------------------------------------------------------------


def finish_without(module: str, folder: Path, *arguments: str) -> Finished:
    """Runs the command where a module cannot be imported."""
    (folder / "hidden" / module).mkdir(parents=True)
    (folder / "hidden" / module / "__init__.py").write_text(MISSING.format(module))
    return finish([*DEMO, *arguments], folder, PYTHONPATH=f"{folder / 'hidden'}{os.pathsep}{ROOT}")


def test_help_needs_neither_torch_nor_gradio(tmp_path: Path) -> None:
    done = finish_without("torch", tmp_path, "--help")
    assert done.code == 0, done.err
    assert {"--run", "--host", "--port", "--share", "--no-browser"} <= set(re.findall(r"--[\w-]+", done.out))


def test_without_gradio_one_line_says_what_to_install(tmp_path: Path, smoke_run: Path) -> None:
    done = finish_without("gradio", tmp_path, "--run", str(smoke_run))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"error: the page is made with Gradio: pip install {command.GRADIO}")


def test_the_gradio_that_is_to_be_installed_is_the_one_that_is_tested() -> None:
    assert re.search(rf"^{command.GRADIO}\b", (ROOT / "requirements-dev.txt").read_text(), flags=re.MULTILINE)


def test_without_a_finished_run_one_line_says_what_to_type(tmp_path: Path) -> None:
    done = finish([*DEMO, "--port", "0"], tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "no finished run below runs/; train one (python train_ddp.py)" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "70000"), "--port 70000: must be 0 to 65535"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1: not an address of this machine"),
        (("--host", "no such host"), "--host no such host: not an address of this machine"),
    ],
)
def test_an_address_that_cannot_be_used_is_an_error_of_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = finish([*DEMO, *arguments], tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"error: {message}")


def test_a_port_in_use_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = finish([*DEMO, "--port", str(port)], tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"error: --port {port}: Address already in use; choose another one")


def test_a_browser_is_opened_only_where_there_are_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(command.sys, "platform", "linux")
    monkeypatch.setattr(command.webbrowser, "open", lambda address: bool(opened.append(address)) or True)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not command._open_browser("http://127.0.0.1:1")
    monkeypatch.setenv("DISPLAY", ":0")
    assert command._open_browser("http://127.0.0.1:1")
    assert opened == ["http://127.0.0.1:1"]


# --- the page -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A page that is served, and the model that reads what is drawn on it."""

    process: subprocess.Popen[str]
    address: str
    folder: str
    proxy: socket.socket  # where the command would go to ask another machine anything


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, smoke_run: Path) -> Iterator[Served]:
    """The page with a run of `fast` on MNIST where that is at hand, and one of `smoke`; the proxy never answers."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(smoke_run, folder / "runs" / "smoke")
    name = "smoke"
    if Path(DATA_DIR, "MNIST", "raw").is_dir():
        name = "fast"
        done = finish(train("--num-threads", "1", "--no-pictures", "--run-dir", "runs/fast"), folder)
        assert done.code == 0, done.err
    proxy = socket.create_server(("127.0.0.1", 0))
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    proxies = dict.fromkeys(names, f"http://127.0.0.1:{proxy.getsockname()[1]}")
    start = time.monotonic()
    with proxy, started([*DEMO, "--port", "0", "--run", f"runs/{name}"], folder, **proxies) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        address = re.search(r"http://127\.0\.0\.1:\d+/", lines[1])
        assert address is not None, lines
        print(f"\nthe page is there {time.monotonic() - start:.1f} s after the command was started")
        yield Served(process, address[0], str(folder / "runs" / name / "export" / "best"), proxy)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium without windows."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_FLAGS), timeout=1000 * PATIENCE_S)
        yield browser
        browser.close()


@dataclass
class OpenPage:
    """The page in a window, and what went wrong on it."""

    page: Any
    served: Served
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def draw(self, digit: str) -> None:
        """One stroke with the mouse."""
        box = self.page.locator("#paper canvas").bounding_box()
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in curve(digit)]
        self.page.evaluate(TIMER)
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place)
        self.page.mouse.up()

    def wait_for_answer(self) -> list[str]:
        """Waits until the page shows what `read` says of what is on the paper; returns the digits."""
        content = base64.b64decode(self.page.evaluate("window.pictureOnPaper()").partition(",")[2])
        reading = read(content, self.served.folder, with_layers=False)
        digits = [reading.class_names[answer.digit] for answer in reading.answers]
        shares = [f"{share:.1%}" for answer in reading.answers for share in answer.probabilities]
        notices = [answer.warning or "" for answer in reading.answers]
        self.page.wait_for_function(SHOWS, arg=[digits, shares, notices])
        return digits

    def answer_time_ms(self) -> float:
        """From the end of the last stroke to the last change of the answer, in the browser's time."""
        return float(self.page.evaluate("window.answered - window.drawn"))


TIMER = """() => {
    document.querySelector('#paper canvas').addEventListener('pointerup', () => { window.drawn = performance.now(); });
    const observer = new MutationObserver(() => { window.answered = performance.now(); });
    observer.observe(document.querySelector('#answers'), {subtree: true, childList: true});
}"""


SHOWS = """expected => {
    const texts = kind => [...document.querySelectorAll('#answers ' + kind)].map(element => element.textContent);
    return JSON.stringify(['.digit', '.share', '.notice'].map(texts)) === JSON.stringify(expected);
}"""


@pytest.fixture
def open_page(browser: Any, served: Served) -> Iterator[Callable[..., OpenPage]]:
    """Opens the page in a window of its own; at the end nothing must have left the machine, or gone wrong."""
    contexts, pages = [], []

    def open_page(**settings: Any) -> OpenPage:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE_S)
        opened = OpenPage(page, served)
        pages.append(opened)
        page.on("request", lambda request: opened.requests.append(request.url))
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and opened.errors.append(message.text))
        start = time.monotonic()
        page.goto(served.address)
        page.locator("#paper canvas").wait_for()
        page.wait_for_function("document.querySelector('#run input')?.value")
        print(f"\nthe page can be drawn on after {time.monotonic() - start:.2f} s")
        return opened

    yield open_page
    for context in contexts:
        context.close()
    for opened in pages:
        foreign = [url for url in opened.requests if not url.startswith((served.address, "data:", "blob:"))]
        assert (foreign, opened.errors) == ([], [])
        assert len(opened.requests) > 10


@pytest.mark.launch
@pytest.mark.parametrize("digit", ["3", "7", "0"])
def test_a_digit_drawn_with_the_mouse_is_read(digit: str, open_page: Callable[..., OpenPage]) -> None:
    opened = open_page()
    opened.draw(digit)
    assert opened.wait_for_answer() == [digit]
    print(f"the answer to the whole stroke is there {opened.answer_time_ms():.0f} ms after its end")
    assert opened.page.locator("#layers figure").count() >= 5
    if digit == "3" and "DEMO_PICTURE" in os.environ:  # docs/pictures/demo.png was made like this
        opened.page.screenshot(path=os.environ["DEMO_PICTURE"], full_page=True)
    opened.page.click(".clear")
    opened.page.wait_for_function(SHOWS, arg=[["?"], [""] * 10, [""]])
    opened.draw(digit)
    assert opened.wait_for_answer() == [digit]


@pytest.mark.launch
def test_answers_come_while_one_draws(open_page: Callable[..., OpenPage]) -> None:
    opened = open_page()
    mouse, box = opened.page.mouse, opened.page.locator("#paper canvas").bounding_box()
    mouse.move(box["x"] + 100, box["y"] + 60)
    mouse.down()
    mouse.move(box["x"] + 100, box["y"] + 250, steps=5)
    opened.page.wait_for_function("document.querySelector('#answers .best') !== null")  # the button is still down
    mouse.up()


@pytest.mark.launch
def test_a_photograph_is_read_as_predict_reads_it(open_page: Callable[..., OpenPage]) -> None:
    opened = open_page()
    opened.page.set_input_files("#paper input", ROOT / "docs" / "digit.png")
    opened.page.wait_for_function("window.pictureOnPaper().length > 0")
    content = base64.b64decode(opened.page.evaluate("window.pictureOnPaper()").partition(",")[2])
    assert content == (ROOT / "docs" / "digit.png").read_bytes()
    assert len(opened.wait_for_answer()) == 1
    opened.draw("7")  # a stroke takes the place of the photograph
    opened.wait_for_answer()
    assert opened.page.evaluate("window.pictureOnPaper()").startswith("data:image/png")


@pytest.mark.launch
def test_a_file_that_is_no_picture_gets_the_message_of_predict(open_page: Callable[..., OpenPage]) -> None:
    opened = open_page()
    opened.page.set_input_files("#paper input", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    opened.page.get_by_text("not a picture, or none of AVIF").wait_for()


@pytest.mark.launch
def test_a_picture_can_be_dropped_on_the_paper(open_page: Callable[..., OpenPage]) -> None:
    opened = open_page()
    picture = base64.b64encode((ROOT / "docs" / "digit.png").read_bytes()).decode()
    opened.page.evaluate(
        """async content => {
            const files = new DataTransfer();
            const bytes = await (await fetch('data:image/png;base64,' + content)).blob();
            files.items.add(new File([bytes], 'digit.png', {type: 'image/png'}));
            const paper = document.querySelector('#paper canvas');
            paper.dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true}));
        }""",
        picture,
    )
    opened.page.wait_for_function("window.pictureOnPaper().length > 0")
    assert len(opened.wait_for_answer()) == 1


@pytest.mark.launch
def test_another_model_reads_the_same_drawing(open_page: Callable[..., OpenPage], served: Served) -> None:
    opened = open_page()
    opened.draw("7")
    opened.wait_for_answer()
    opened.page.click("#run input")
    opened.page.get_by_role("option", name="smoke (").click()
    opened.served = replace(served, folder=str(Path(served.folder).parents[2] / "smoke" / "export" / "best"))
    opened.wait_for_answer()


@pytest.mark.launch
def test_layers_are_computed_only_while_they_are_shown(open_page: Callable[..., OpenPage]) -> None:
    opened = open_page()
    title = opened.page.get_by_text("What each layer makes of it")
    title.click()
    opened.page.locator("#layers").wait_for(state="hidden")
    opened.draw("7")
    opened.wait_for_answer()
    assert opened.page.locator("#layers img").count() == 0
    title.click()
    opened.page.locator("#layers img").nth(20).wait_for()


@pytest.mark.launch
def test_a_phone_shows_the_page_without_scrolling_sideways_and_a_finger_draws(
    open_page: Callable[..., OpenPage],
) -> None:
    opened = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, device_scale_factor=2)
    box = opened.page.locator("#paper canvas").bounding_box()
    assert box["width"] >= 300
    assert box["y"] + box["height"] < 600  # the digit below it is in view
    touch = opened.page.context.new_cdp_session(opened.page)
    places = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in curve("7")]
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": places[:1]})
    for place in places[1:]:
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [place]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert opened.wait_for_answer() == ["7"]
    opened.page.locator("#layers img").nth(20).wait_for()
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
    assert opened.page.evaluate("window.scrollY") == 0  # the finger drew, it did not scroll


@pytest.mark.launch
def test_other_machines_cannot_open_the_page_unless_host_says_so(served: Served) -> None:
    port = int(re.findall(r"\d+", served.address)[-1])
    socket.create_connection(("127.0.0.1", port)).close()
    address = command._own_address()
    if not re.fullmatch(r"[\d.]+", address) or address.startswith("127."):
        pytest.skip("this machine has no network")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, port))


@pytest.mark.launch
def test_the_command_sends_nothing_to_other_machines(served: Served) -> None:
    served.proxy.setblocking(False)
    with pytest.raises(BlockingIOError):  # nobody is waiting to be answered
        served.proxy.accept()


@pytest.mark.launch
def test_ctrl_c_ends_it_with_130_and_nothing_is_left(smoke_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    with started([*DEMO, "--port", "0", "--host", "0.0.0.0", "--run", str(smoke_run)], tmp_path) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        port = re.findall(r"\d+", lines[1])[-1]
        assert lines[1].startswith(f"page  http://localhost:{port}/")
        assert lines[2].startswith(f"phone http://{command._own_address()}:{port}/")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, err) == (130, "")
        assert left_behind(process) == []
    assert list(tmp_path.iterdir()) == []
