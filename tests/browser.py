"""Chromium without a window, driven through its DevTools protocol over a pipe."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Tab": 9}


def chromium() -> str:
    """The program; skips the test where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("this test needs Chromium (Debian: apt-get install chromium)")
    return found


class Browser:
    """One page. ``problems`` are what it printed to its console, and errors that nothing caught."""

    def __init__(self, profile: Path):
        to_browser, from_browser = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        # The protocol is spoken on descriptors 3 and 4.
        start = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", start, "bash", chromium(), *options, "--remote-debugging-pipe"],
            pass_fds=(to_browser[0], from_browser[1]),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(from_browser[1])
        self.input, self.output = to_browser[1], open(from_browser[0], "rb")
        self.number, self.session, self.events = 0, {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.input, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self) -> dict:
        text = bytearray()
        while (byte := self.output.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text)

    def open(self, path: Path, width: int = 1280, fragment: str = "") -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        end = time.monotonic() + 120
        for url in ("about:blank", path.resolve().as_uri() + fragment):  # or another fragment would not load it anew
            self.call("Page.navigate", url=url)
            while self.evaluate("[location.href, document.readyState].join()") != f"{url},complete":
                assert time.monotonic() < end, f"{url} is not there after two minutes"
                time.sleep(0.02)
            self.events = [] if url == "about:blank" else self.events

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])

    @property
    def problems(self) -> list[dict]:
        bad = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in bad]

    @property
    def requests(self) -> list[str]:
        sent = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [params["request"]["url"].split(",")[0] for params in sent]

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(20)
        os.close(self.input)
        self.output.close()
