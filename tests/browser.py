"""Chromium without a window, as far as tests of pages need it: over the pipe of its debugging protocol, no package.

Not a test module. https://chromedevtools.github.io/devtools-protocol names all methods and events.
"""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


LAYOUT = """(() => {
    const found = {clipped: [], small: [], over: []};
    found.wide = document.documentElement.scrollWidth - innerWidth;
    found.broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
    for (const svg of document.querySelectorAll('figure svg')) {
        const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')];
        const boxes = texts.map(text => text.getBoundingClientRect());
        texts.forEach((text, i) => {
            const a = boxes[i], place = text.getScreenCTM(), told = text.textContent;
            const across = a.left < frame.left - 1 || a.right > frame.right + 1;
            if (across || a.top < frame.top - 1 || a.bottom > frame.bottom + 1)
                found.clipped.push(told);
            if (parseFloat(getComputedStyle(text).fontSize) * Math.hypot(place.a, place.b) < 7) found.small.push(told);
            boxes.slice(i + 1).forEach((b, j) => {
                const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                if (width > 1.5 && height > 3) found.over.push([told, texts[i + 1 + j].textContent]);
            });
        });
    }
    return found;
})()"""
"""What is wrong with a page: pictures that are broken, texts of figures that are cut off, under 7 px or over another
one, and how many px it is wider than the window."""


def executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab.

    Attributes:
        said: messages of the console and errors of scripts, since the last page was opened.
        asked: addresses that were asked for, likewise, without data that the page has within.
    """

    def __init__(self, pipe_in: int, pipe_out: int):
        self._in, self._out, self._number, self._rest, self._session = pipe_in, pipe_out, 0, b"", {}
        self.said: list[str] = []
        self.asked: list[str] = []
        self._events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict:
        """What a method answers; events that come before the answer are noted."""
        self._number += 1
        request = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._in, json.dumps(request).encode() + b"\0")
        while (found := self._message()).get("id") != self._number:
            self._note(found)
        assert "error" not in found, found
        return found["result"]

    def open(self, path: Path, width: int, scheme: str) -> None:
        """Opens a file as a window of so many px shows it, in the light or the dark scheme, and waits for all of it."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.said, self.asked, self._events = [], [], []
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._note(self._message())

    def value(self, expression: str) -> object:
        """Of JavaScript, as plain data."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _message(self) -> dict:
        while b"\0" not in self._rest:
            part = os.read(self._out, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def _note(self, event: dict) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        self._events.append(method)
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(params))
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.asked.append(params["request"]["url"])


def beyond_4(descriptor: int) -> int:
    """The same under a number that takes the place of no descriptor that Chromium knows."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


@contextmanager
def opened(folder: Path) -> Iterator[Page]:
    """A tab of a fresh Chromium, which keeps its files in `folder`."""
    (child_in, pipe_in), (pipe_out, child_out) = os.pipe(), os.pipe()
    child_in, child_out = beyond_4(child_in), beyond_4(child_out)
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
    # It reads from descriptor 3 and writes to 4, whatever the numbers of our pipes are.
    command = f'exec "$@" 3<&{child_in} 4>&{child_out}'
    process = subprocess.Popen(
        ["bash", "-c", command, "-", executable(), *options, f"--user-data-dir={folder}", "about:blank"],
        pass_fds=(child_in, child_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(child_in)
    os.close(child_out)
    try:
        page = Page(pipe_in, pipe_out)
        yield page
        page._session = {}
        page.call("Browser.close")
    finally:
        process.kill()
        process.wait(timeout=30)
        os.close(pipe_in)
        os.close(pipe_out)
