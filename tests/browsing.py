"""What tests of the page in a browser do again and again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, expect

LAPTOP, WALL = {"width": 1366, "height": 768}, {"width": 2560, "height": 1440}
Opened = Callable[..., Page]


def ask(page: Page, film: Path) -> None:
    page.set_input_files("input[type=file]", film)
    expect(page.locator(".verdict")).to_be_visible()
    expect(page.locator("canvas[data-drawn]").first).to_be_visible()


def ask_for(page: Page, cases: int) -> Locator:
    """Asks once more, for so many neighbours: these."""
    page.get_by_role("spinbutton", name="Cases").fill(str(cases))
    page.get_by_role("button", name="Ask again").click()
    near = page.locator(".neighbours .near")
    expect(near).to_have_count(cases)
    return near


def keys_of(near: Locator) -> list[str | None]:
    return [one.get_attribute("data-case") for one in near.all()]


def eventually(page: Page, true: str) -> None:
    """Waits for an expression; Playwright's own way would need what the page's policy forbids."""
    for _ in range(100):
        if page.evaluate(true):
            return
        page.wait_for_timeout(100)
    raise AssertionError(true)


def serious(page: Page) -> list[str]:
    """What axe-core finds that keeps somebody from using the page."""
    found = Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:200]}" for fault in found if fault["impact"] in ("serious", "critical") for node in fault["nodes"]
    ]
