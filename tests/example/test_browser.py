"""The pages in a browser: Debian's Chromium, driven by Playwright, against a server process.

With ``TORNADO_SA_SCREENSHOTS=1`` the pictures in ``docs/screenshots`` are made anew.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.example.support import ROOT, Server, serving
from tests.support import missing

CHROMIUM = shutil.which("chromium")

# As root, without a graphics card, and without looking for Google's servers.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

DESKTOP = {"width": 1080, "height": 860}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        missing("chromium", f"{error}; pip install -e '.[browser]'")
    if CHROMIUM is None:
        missing("chromium", "apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The example server; two processes, so that windows may be served by different ones."""
    with serving(tmp_path, "--processes", "2") as server:
        yield server


class Browser:
    """Windows, and what their consoles complained of."""

    def __init__(self, chromium: Any, server: Server) -> None:
        self._chromium, self._server = chromium, server
        self._contexts: list[Any] = []
        self.complaints: list[str] = []

    def window(self, path: str = "/", viewport: Any = None, **options: Any) -> Any:
        """Open ``path`` in a window of its own."""
        context = self._chromium.new_context(viewport=viewport or DESKTOP, **options)
        context.set_default_timeout(8000)
        self._contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self._note("error", str(error)))
        page.goto(self._server.url + path)
        return page

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture
def browser(chromium: Any, server: Server) -> Iterator[Browser]:
    """After the test no console has complained."""
    browser = Browser(chromium, server)
    yield browser
    browser.close()
    assert browser.complaints == []


def open_account(page: Any, owner: str, balance: str = "", limit: str = "", **more: str) -> None:
    form = page.locator("#open")
    form.get_by_label("Owner").fill(owner)
    form.get_by_label("Currency").fill(more.get("currency", "EUR"))
    form.get_by_label("Opening balance").fill(balance)
    form.get_by_label("Never below").fill(limit)
    form.get_by_role("button", name="Open").click()


def send(
    page: Any, source: str, target: str, amount: str, memo: str = "", presses: int = 1
) -> None:
    form = page.locator("#pay")
    for label, owner in ("From", source), ("To", target):
        select = form.get_by_label(label, exact=True)
        select.select_option(select.locator("option", has_text=owner).get_attribute("value"))
    form.get_by_label("Amount").fill(amount)
    form.get_by_label("Memo").fill(memo)
    form.get_by_role("button", name="Send").click(click_count=presses)


def balance(page: Any, owner: str) -> Any:
    return page.locator("#accounts li", has_text=owner).locator(".money")


def transfers(page: Any) -> Any:
    return page.locator("#transfers li")


def fits(page: Any) -> bool:
    """True if nothing makes the page scroll sideways."""
    width: int = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    return width <= 0


def picture(page: Any, name: str) -> None:
    if os.environ.get("TORNADO_SA_SCREENSHOTS"):
        folder = ROOT / "docs" / "screenshots"
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"{name}.png", animations="disabled", caret="hide")


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def test_from_an_empty_ledger_to_a_transfer(browser: Browser) -> None:
    page = browser.window()
    expect(page.locator("#accounts")).to_contain_text("None yet")
    open_account(page, "Ada", "100")
    expect(page.get_by_text("is open.")).to_be_visible()
    open_account(page, "Bob <b>", limit="-5")
    send(page, "Ada", "Bob <b>", "12.50", "lunch & more")
    expect(page.get_by_text("is done.")).to_be_visible()
    expect(balance(page, "Ada")).to_have_text("87.50 EUR")
    expect(balance(page, "Bob <b>")).to_have_text("12.50 EUR")
    expect(transfers(page)).to_have_count(1)
    expect(transfers(page)).to_contain_text("lunch & more")
    expect(page.locator("#totals")).to_contain_text("books balance")
    page.get_by_role("link", name="Ada").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Ada")
    expect(page.get_by_role("img")).to_have_attribute("aria-label", re.compile("now 87.50 EUR"))


def test_a_transfer_arrives_in_every_open_window(browser: Browser, server: Server) -> None:
    """Served by whichever process; and those that look at one account see it too."""
    for owner in ("Ada", "Bob"):
        server.post("/accounts", {"owner": owner, "currency": "EUR", "balance": 10_000})
    here, there, phone = browser.window(), browser.window(), browser.window(viewport=PHONE)
    account = browser.window("/ledger/2")
    for page in here, there, phone, account:
        expect(page.locator("#live")).to_have_text("Live")
    send(here, "Ada", "Bob", "30", "live")
    for page in there, phone:
        expect(transfers(page)).to_contain_text("live")
        expect(balance(page, "Bob")).to_have_text("130.00 EUR")
        expect(page.locator("#said")).to_have_text("Ada has sent 30.00 EUR to Bob")
    expect(account.locator(".balance")).to_have_text("130.00 EUR")
    # One that is typing is not disturbed, and can pay to an account that was opened meanwhile.
    there.get_by_label("Memo").fill("half")
    server.post("/accounts", {"owner": "Cyd", "currency": "EUR"})
    server.post("/transfers", {"from": 2, "to": 3, "amount": 1})
    expect(balance(there, "Cyd")).to_have_text("0.01 EUR")
    expect(there.get_by_label("Memo")).to_have_value("half")
    send(there, "Ada", "Cyd", "1")
    expect(balance(here, "Cyd")).to_have_text("1.01 EUR")


def test_errors_are_shown_and_what_was_typed_is_kept(browser: Browser, server: Server) -> None:
    page = browser.window()
    open_account(page, "Ada", "ten")
    expect(page.get_by_role("alert")).to_contain_text("Balance must be a number")
    expect(page.get_by_label("Owner")).to_have_value("Ada")
    open_account(page, "Ada", "10")
    open_account(page, "Bob")
    for amount, said in ("11", "insufficient funds"), ("1.234", "at most 2 digits"):
        send(page, "Ada", "Bob", amount, "rent")
        expect(page.get_by_role("alert")).to_contain_text(said)
        expect(page.get_by_label("Amount")).to_have_value(amount)
        expect(page.get_by_label("Amount")).to_be_focused()
    send(page, "Ada", "Bob", "10", "rent")
    expect(balance(page, "Bob")).to_have_text("10.00 EUR")
    assert server.get("/accounts")["accounts"][0]["balance"] == 0
    page.goto(server.url + "/ledger/99")
    expect(page.get_by_role("heading", level=1)).to_have_text("404")
    # What the browser itself says of answers with 4xx. There is nothing else.
    assert all("the server responded with a status of 4" in text for text in browser.complaints)
    assert len(browser.complaints) == 4
    browser.complaints.clear()


def test_it_works_without_javascript(browser: Browser) -> None:
    page = browser.window(java_script_enabled=False)
    open_account(page, "Ada", "10")
    open_account(page, "Bob")
    send(page, "Ada", "Bob", "2.5")
    expect(balance(page, "Bob")).to_have_text("2.50 EUR")


def test_pressing_twice_moves_money_once(browser: Browser, server: Server) -> None:
    for owner in ("Ada", "Bob"):
        server.post("/accounts", {"owner": owner, "currency": "EUR", "balance": 100})
    page = browser.window()
    send(page, "Ada", "Bob", "1", presses=2)
    expect(page.get_by_text("is done.")).to_be_visible()
    assert len(server.get("/transfers")["transfers"]) == 1


def test_windows_survive_a_restart(browser: Browser, tmp_path: Path, server: Server) -> None:
    for owner in ("Ada", "Bob"):
        server.post("/accounts", {"owner": owner, "currency": "EUR", "balance": 100})
    page = browser.window()
    expect(page.locator("#live")).to_have_text("Live")
    assert server.end() == 0
    expect(page.locator("#live")).to_have_text("Reconnecting")
    with serving(tmp_path, "--port", str(server.port)) as again:
        again.post("/transfers", {"from": 1, "to": 2, "amount": 7})
        expect(balance(page, "Bob")).to_have_text("1.07 EUR")
    # Of the attempts to connect while nobody was there.
    assert all("ERR_CONNECTION_REFUSED" in text for text in browser.complaints)
    browser.complaints.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_on_desktop_and_phone(browser: Browser, server: Server, scheme: Any) -> None:
    """Nothing scrolls sideways, however long a name is, and everything has a name of its own."""
    tell_a_story(server)
    for device, viewport in ("desktop", DESKTOP), ("phone", PHONE):
        for name, path in ("ledger", "/"), ("account", "/ledger/1"):
            page = browser.window(path, viewport, color_scheme=scheme)
            expect(page.locator("#live")).to_have_text("Live")
            assert fits(page), (device, name)
            if scheme == "light" and (name, device) != ("account", "phone"):
                picture(page, f"{name}-{device}")
    server.post("/accounts", {"owner": "W" * 100, "currency": "KWD", "balance": 2**63 - 1})
    for path in "/", "/ledger/1", "/ledger/5", "/nothing":
        page = browser.window(path, PHONE, color_scheme=scheme)
        assert fits(page), path
        unnamed = page.locator("input:not([type=hidden]), select").evaluate_all(
            "fields => fields.filter(field => field.labels.length !== 1).map(field => field.name)"
        )
        assert unnamed == []
    browser.complaints = [text for text in browser.complaints if "status of 404" not in text]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Browser, server: Server, scheme: Any) -> None:
    """Every text has a contrast of 4.5 to 1 against what is behind it: WCAG 2.2, level AA."""
    tell_a_story(server)
    for path in "/", "/ledger/1":
        page = browser.window(path, color_scheme=scheme)
        assert page.evaluate(CONTRASTS) == []


def tell_a_story(server: Server) -> None:
    for owner, opening, limit in [
        ("Ada Lovelace", 250_000, 0),
        ("Bäckerei Özil", 18_040, -50_000),
        ("Grace Hopper", 96_500, 0),
        ("Rent, Rosa-Luxemburg-Str.", 0, 0),
    ]:
        account = {"owner": owner, "currency": "EUR", "balance": opening, "limit": limit}
        assert server.post("/accounts", account) == 201
    for source, target, amount, memo in [
        (1, 4, 89_000, "Rent, November"),
        (1, 2, 640, "Bread"),
        (2, 3, 31_500, "Oven, first part"),
        (3, 1, 12_000, "Theatre tickets"),
        (1, 2, 1_275, "Birthday cake"),
        (3, 4, 41_000, "Rent, November"),
        (4, 1, 9_000, "Heating, paid back"),
        (2, 3, 12_500, "Oven, second part"),
        (3, 2, 2_260, "Coffee and cake"),
        (1, 3, 4_999, "Books"),
    ]:
        order = {"from": source, "to": target, "amount": amount, "memo": memo}
        assert server.post("/transfers", order) == 201


CONTRASTS = """
() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const over = (top, below) => {
    const alpha = top.length > 3 ? top[3] : 1;
    return [0, 1, 2].map((i) => top[i] * alpha + below[i] * (1 - alpha));
  };
  const backdrop = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) {
      layers.unshift(parse(getComputedStyle(one).backgroundColor));
    }
    return layers.reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((c) => {
      c /= 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const pale = [];
  for (const element of document.querySelectorAll("body *")) {
    const isText = (node) => node.nodeType === 3 && node.data.trim();
    if (!Array.from(element.childNodes).some(isText)) continue;
    if (element.closest(".unseen, .skip, svg")) continue;
    const behind = backdrop(element);
    const front = over(parse(getComputedStyle(element).color), behind);
    const [dark, light] = [luminance(front), luminance(behind)].sort((a, b) => a - b);
    if ((light + 0.05) / (dark + 0.05) < 4.5) pale.push(element.outerHTML);
  }
  return pale;
}
"""
