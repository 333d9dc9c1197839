"""Chromium, and pages in it that complain of nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from browsing import LAPTOP, Opened
from cxr_retrieval.radiograph.phantoms import make_phantom, write_dicom

PATIENCE_MS = 20_000
"""With the rest of the suite on the same two cores."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "chromium is a test requirement: `make test` installs it on Debian"
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / "film of today.dcm"
    write_dicom(make_phantom(1000, "covid19"), path)
    return path


@pytest.fixture
def opened(browser: Browser) -> Iterator[Opened]:
    """Opens a page and keeps what it complains of; none may, and none may ask another host."""
    complaints: list[str] = []
    contexts: list[Any] = []

    def open_page(url: str, expecting: str = "", **options: Any) -> Page:
        context = browser.new_context(viewport=options.pop("viewport", LAPTOP), **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        host = re.match("https?://[^/]+/", url)
        assert host

        def told(message: Any) -> None:
            if message.type in ("error", "warning") and not (expecting and re.search(expecting, message.text)):
                complaints.append(message.text)

        page.on("console", told)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith((host[0], "blob:")) else complaints.append(f"asked {asked.url}"))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
