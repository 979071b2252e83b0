"""Headless Chromium for tests of pages, driven over the pipe of its debugging protocol; no package needed.

Not a test module. https://chromedevtools.github.io/devtools-protocol names all methods and events.
"""

import base64
import fcntl
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


LAYOUT = """(() => {
    const found = {clipped: [], small: [], over: []};
    found.wide = document.documentElement.scrollWidth - innerWidth;
    found.broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
    for (const image of document.querySelectorAll('figure img')) {
        const bytes = Uint8Array.from(atob(image.src.split(',')[1]), letter => letter.charCodeAt(0));
        const parsed = new DOMParser().parseFromString(new TextDecoder().decode(bytes), 'image/svg+xml');
        const svg = document.importNode(parsed.documentElement, true), size = image.getBoundingClientRect();
        svg.setAttribute('width', size.width), svg.setAttribute('height', size.height);
        image.replaceWith(svg);
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
"""What is wrong with a page: broken images, texts of figures that are cut off, under 7 px or overlapping, and how many
px it is wider than the window. Puts each figure's SVG in place of its image to measure it."""


def executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab.

    Attributes:
        said: console messages and script errors since the last page was opened.
        asked: requested URLs since then, except data URIs.
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
        """The result of a method; records the events that arrive before it."""
        self._number += 1
        request = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._in, json.dumps(request).encode() + b"\0")
        while (found := self._message()).get("id") != self._number:
            self._note(found)
        assert "error" not in found, found
        return found["result"]

    def open(self, path: Path, width: int, scheme: str) -> None:
        """Opens a file in a window `width` px wide, in the light or dark scheme, and waits until it has loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.said, self.asked, self._events = [], [], []
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._note(self._message())

    def value(self, expression: str) -> object:
        """The value of a JavaScript expression as plain data."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self, selector: str) -> Image.Image:
        """The pixels of an element."""
        box = self.value(f"(({{x, y, width, height}}) => [x + scrollX, y + scrollY, width, height])"
                         f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")  # fmt: skip
        clip = dict(zip(("x", "y", "width", "height"), box, strict=True), scale=1)
        found = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return Image.open(io.BytesIO(base64.b64decode(found["data"]))).convert("RGB")

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
    """The same descriptor under a number that Chromium does not use."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


@contextmanager
def opened(folder: Path) -> Iterator[Page]:
    """A tab of a fresh Chromium with its profile in `folder`."""
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
