"""The playground in a real browser: Chromium, driven by Playwright.

Screenshots are kept in the folder of the environment variable OPENMYTHOS_SCREENSHOTS, if it is set.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving.running import Server, serving, wait_for

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
# --no-sandbox: tests may run as root. The others keep the browser from asking its maker.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
WIDTHS = (320, 1440)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def chains() -> Iterator[Server]:
    """The model that the package ships."""
    with serving("--replicas", "1") as server:
        yield server


@pytest.fixture(scope="module")
def texts(folder: Path) -> Iterator[Server]:
    """A language model."""
    with serving(str(folder), "--replicas", "1") as server:
        yield server


class Page:
    """An open page; whatever it complains about is kept."""

    def __init__(self, browser: Any, server: Server, width: int = 1440) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._console)
        self.page.goto(server.url)
        self.until("document.querySelector('#model').textContent.includes(':')")

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def until(self, expression: str) -> None:
        """Until it is true. By polling: the page's policy allows no eval."""
        wait_for(lambda: self.page.evaluate(expression), 30)

    def set(self, name: str, value: object) -> None:
        """Move a slider, or write into a field."""
        self.page.locator(f"#{name}").fill(str(value))

    def text(self, name: str) -> str:
        found: str = self.page.locator(f"#{name}").inner_text()
        return found

    def generate(self, *, wait: bool = True) -> None:
        self.page.locator("#go").click()
        if wait:
            self.page.wait_for_selector("#stop[disabled]")

    def loops(self, place: int = 0) -> list[int]:
        """The loops of all tokens of an output."""
        tokens = self.page.locator(".output").nth(place).locator(".token")
        return [int(value) for value in tokens.evaluate_all("all => all.map(x => x.dataset.loops)")]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens a page, which must not have complained when the test ends."""
    pages: list[Page] = []

    def open_(server: Server, width: int = 1440) -> Page:
        pages.append(Page(browser, server, width))
        return pages[-1]

    yield open_
    for page in pages:
        page.context.close()
        assert page.complaints == []


def keep(page: Page, name: str) -> None:
    """Keep a screenshot for a person to look at."""
    if folder := os.environ.get("OPENMYTHOS_SCREENSHOTS"):
        page.page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def verdict(page: Page, loops: int) -> dict[str, str]:
    """What the page says of the chain at so many loops."""
    page.set("chain-loops", loops)
    page.page.wait_for_selector(f'#verdict[data-loops="{loops}"]')
    found: dict[str, str] = page.page.locator("#verdict").evaluate("x => ({...x.dataset})")
    return found


def new_chain(page: Page) -> None:
    """Let the page draw another chain."""
    before = page.text("steps")
    page.page.locator("#new-chain").click()
    wait_for(lambda: page.text("steps") != before, 10)


def test_a_chain_turns_right_when_the_loops_suffice(open_page: Any, chains: Server) -> None:
    page = open_page(chains)
    page.set("hops", 30)
    page.until("document.querySelectorAll('#steps li').length === 31")
    for _ in range(8):  # the page draws chains at random: few loops may be right by chance
        page.until("document.querySelectorAll('#strip .right').length > 25")
        wrong, right = verdict(page, 12), verdict(page, 36)
        if wrong["right"] == "false":
            break
        new_chain(page)
    assert (wrong["right"], right["right"]) == ("false", "true")
    # The page's own answer is the API's.
    words = page.page.locator("#steps .table").all_inner_texts()
    start = page.page.locator("#steps li").first.inner_text().split()[-1]
    prompt = " ".join((start, *words[1:]))
    assert chains.complete(prompt, num_loops=36, max_tokens=1).strip() == right["answer"]
    assert chains.complete(prompt, num_loops=12, max_tokens=1).strip() == wrong["answer"]
    # At 12 loops the first 12 lookups or so are right, and some by chance; at 36 all 30.
    page.set("chain-loops", 12)
    assert 8 <= page.page.locator("#steps .right").count() <= 19
    keep(page, "chain-too-few")
    page.set("chain-loops", 36)
    assert page.page.locator("#steps .right").count() == 30
    keep(page, "chain")


def test_a_new_chain_and_the_lens_of_a_lookup(open_page: Any, chains: Server) -> None:
    page = open_page(chains)
    new_chain(page)
    page.until("document.querySelectorAll('#strip .right').length > 0")
    page.page.locator("#chain-map").click(position={"x": 5, "y": 5})
    page.page.wait_for_selector("#lens-table tbody tr")
    assert page.page.locator("#lens-table tbody tr").count() == 64
    assert "After 1 lookups" in page.text("lens-about")
    # The strip is a slider, too.
    page.page.locator("#strip button").nth(29).click()
    assert page.text("chain-loops-value") == "30"


@pytest.mark.parametrize("loops", [2, 8])
def test_tokens_show_the_loops_of_the_api(open_page: Any, texts: Server, loops: int) -> None:
    page = open_page(texts)
    page.set("prompt", "abc")
    page.set("loops", loops)
    page.set("tokens", 12)
    page.generate()
    body = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "seed": 0, "num_loops": loops}
    choice = texts.ask("/v1/completions", body | {"return_loops": True})[1]["choices"][0]
    assert page.loops() == choice["loops"] and max(page.loops()) <= loops
    ids = page.page.locator(".token").evaluate_all("all => all.map(x => Number(x.dataset.id))")
    assert ids == choice["token_ids"]
    assert (
        f"{12 if len(ids) == 12 else len(ids)} tokens" in page.page.locator(".totals").inner_text()
    )


def test_the_lens_of_a_token_ends_with_the_token(open_page: Any, texts: Server) -> None:
    page = open_page(texts)
    page.set("prompt", "abc")
    page.set("loops", 7)
    page.set("tokens", 6)
    page.generate()
    page.page.locator(".token").nth(3).click()
    page.page.wait_for_selector("#lens-table tbody tr")
    rows = page.page.locator("#lens-table tbody tr")
    assert rows.count() == 7
    best = rows.last.get_attribute("data-best")
    assert best == page.page.locator(".token").nth(3).get_attribute("data-id")
    assert page.page.locator("#lens-charts svg").count() == 3
    keep(page, "lens")


def test_an_exit_rule_gives_fewer_loops_and_draws_its_threshold(
    open_page: Any, texts: Server
) -> None:
    page = open_page(texts)
    page.set("loops", 16)
    page.set("tokens", 10)
    page.page.locator("#rule").select_option("kl")
    page.set("threshold", "0.002")
    page.generate()
    assert 1 <= max(page.loops()) < 16
    page.page.locator(".token").first.click()
    page.page.wait_for_selector("#lens-charts .threshold", state="attached")
    assert page.page.locator("#lens-table tbody tr").count() == page.loops()[0]


def test_two_depths_run_side_by_side(open_page: Any, texts: Server) -> None:
    page = open_page(texts)
    page.page.locator("#compare").check()
    page.set("loops", 64)
    page.set("second", 2)
    page.set("tokens", 60)
    page.generate(wait=False)
    page.until("document.querySelectorAll('.output:has(.token)').length === 2")
    assert page.page.locator("#stop").is_enabled()
    page.page.wait_for_selector("#engine-rows .row")
    keep(page, "compare")
    page.page.wait_for_selector("#stop[disabled]", timeout=60_000)
    assert set(page.loops(0)) == {64} and set(page.loops(1)) == {2}


def test_stop_frees_the_row(open_page: Any, texts: Server) -> None:
    page = open_page(texts)
    page.set("loops", 64)
    page.set("tokens", 90)
    page.generate(wait=False)
    page.page.wait_for_selector(".token")
    page.page.locator("#stop").click()
    wait_for(lambda: texts.get("/engine")["rows"] == [], 2)
    assert page.page.locator("#error").is_hidden()


def test_a_reload_cancels(open_page: Any, texts: Server) -> None:
    page = open_page(texts)
    page.set("loops", 64)
    page.set("tokens", 90)
    page.generate(wait=False)
    page.page.wait_for_selector(".token")
    page.page.reload()
    wait_for(lambda: texts.get("/engine")["rows"] == [], 2)


def test_markup_stays_text(open_page: Any, texts: Server) -> None:
    page = open_page(texts)
    attack = "<img src=x onerror=\"document.title='owned'\">"
    page.set("prompt", attack)
    page.set("tokens", 8)
    page.generate()
    page.page.locator("#look").click()
    page.page.wait_for_selector("#prompt-view:not([hidden])")
    page.page.locator("#prompt-map").focus()
    for _ in range(4):
        page.page.keyboard.press("ArrowLeft")
    assert page.page.title() == "OpenMythos playground"
    assert page.page.locator("main img").count() == 0
    keep(page, "prompt")


def test_an_error_of_the_server_is_shown(open_page: Any, texts: Server) -> None:
    page = open_page(texts)
    page.set("prompt", "x" * 200)
    page.generate()
    assert "context of the model is 96" in page.text("error")
    page.set("prompt", "x")
    page.set("tokens", 3)
    page.generate()
    assert page.page.locator("#error").is_hidden() and len(page.loops()) == 3
    page.complaints = [x for x in page.complaints if "400" not in x]


def test_the_keyboard_suffices(open_page: Any, texts: Server) -> None:
    page = open_page(texts)
    keyboard = page.page.keyboard
    page.page.locator("#prompt").focus()
    keyboard.press("ControlOrMeta+a")
    keyboard.type("ab")
    keyboard.press("Tab")
    assert page.page.evaluate("document.activeElement.id") == "loops"
    before = int(page.text("loops-value"))
    keyboard.press("ArrowRight")
    assert int(page.text("loops-value")) == before + 1
    for _ in range(20):
        keyboard.press("Tab")
        if page.page.evaluate("document.activeElement.id") == "go":
            break
    keyboard.press("Enter")
    page.page.wait_for_selector(".token")
    page.page.wait_for_selector("#stop[disabled]")
    for _ in range(3):
        keyboard.press("Tab")
        if page.page.evaluate("document.activeElement.className") == "token":
            break
    keyboard.press("ArrowRight")
    assert (
        page.page.evaluate(
            "[...document.querySelectorAll('.token')].indexOf(document.activeElement)"
        )
        == 1
    )
    keyboard.press("Enter")
    page.page.wait_for_selector("#lens-table tbody tr")


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_page(
    open_page: Any, chains: Server, texts: Server, width: int
) -> None:
    for server in (chains, texts):
        page = open_page(server, width)
        page.page.locator("#compare").check()
        page.set("tokens", 30 if server is texts else 1)
        if server is chains:
            page.set("hops", 60)
            page.until("document.querySelectorAll('#steps li').length === 61")
            verdict(page, 62)
        page.generate()
        page.page.locator(".token").first.click()
        page.page.wait_for_selector("#lens-table tbody tr")
        page.page.locator("#look").click()
        page.page.wait_for_selector("#prompt-view:not([hidden])")
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
        keep(page, f"{'texts' if server is texts else 'chains'}-{width}")


def test_a_key_is_asked_for(browser: Any, folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with serving(str(folder), "--replicas", "1", "--api-key-file", str(keys)) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.locator("#key").fill("secret")
        page.keyboard.press("Enter")
        page.get_by_text("tiny-lm:").wait_for()
        page.locator("#tokens").fill("3")
        page.locator("#go").click()
        page.wait_for_selector(".token")
        assert page.locator("#key-form").is_hidden()
        assert re.search(r"\d tokens", page.locator(".totals").inner_text())
        context.close()
