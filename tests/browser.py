"""Headless Chromium for tests that read pages as people see them; without one they are skipped.

What a page says on its console and what it asks the network for is kept by Chromium's own log and read from there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


class Page:
    """A tab of the browser."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show `url`, forgetting what was logged before. `width` and `height` are those of the page itself."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(url)

    def run(self, script: str):
        """What a JavaScript function body returns."""
        return self.driver.execute_script(script)

    @property
    def text(self) -> str:
        """All that can be read, shadow trees included."""
        return self.run(_ALL_TEXT)

    def wait_for(self, *texts: str, seconds: float = 30) -> str:
        """`text` once it has all of these; fails where that takes too long."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            WebDriverWait(self.driver, seconds, 0.2).until(lambda _: all(one in self.text for one in texts))
        except TimeoutException:
            missing = [one for one in texts if one not in self.text]
            pytest.fail(f"after {seconds} s the page lacks {missing}; it says: {self.text[:2000]}")
        return self.text

    def errors(self) -> list[str]:
        """Of the console, since `open`."""
        return [one["message"] for one in self.driver.get_log("browser") if one["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """URLs that the page asked for since `open`, but for those that are their own content."""
        told = [json.loads(one["message"])["message"] for one in self.driver.get_log("performance")]
        urls = [one["params"]["request"]["url"] for one in told if one["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("data:", "blob:", "chrome:", "chrome-untrusted:"))]

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """What is shown, or the whole length of the page."""
        if whole:
            height = self.run("return document.documentElement.scrollHeight")
            width = self.run("return window.innerWidth")
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.save_screenshot(str(path))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a Chromium with an empty profile. Skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver_binary = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver_binary):
        pytest.skip("no chromium and chromedriver here (Debian's packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_binary))
    try:
        yield Page(driver)
    finally:
        driver.quit()


_ALL_TEXT = """
function read(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent;
  if (node.nodeType !== Node.ELEMENT_NODE && node.nodeType !== Node.DOCUMENT_FRAGMENT_NODE) return "";
  if (["SCRIPT", "STYLE", "TEMPLATE"].includes(node.nodeName)) return "";
  const inner = [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes];
  return inner.map(read).join(" ");
}
return read(document.body);
"""
