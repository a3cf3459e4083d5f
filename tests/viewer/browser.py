"""Drives headless Chromium by its DevTools protocol, over a pipe (https://chromedevtools.github.io/devtools-protocol/)."""

import base64
import json
import os
import select
import subprocess
import time
from typing import Any


class Browser:
    """A page in a browser of its own. `dialogs`, `requests` and `errors` have what the page has done since it was opened."""

    def __init__(self, profile, *, width=1280, height=900, dark=False):
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        line = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        line += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
        line += [f"--user-data-dir={profile}", "about:blank"]
        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}', *line]
        self.process = subprocess.Popen(shell, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.buffer, self.number, self.session = b"", 0, None
        self.answers: dict[int, Any] = {}
        self.dialogs: list[str] = []
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def call(self, method, **parameters):
        """Calls a method and returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while self.number not in self.answers:
            self.listen(end - time.monotonic())
            assert time.monotonic() < end, f"{method} is not answered"
        answer = self.answers.pop(self.number)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def listen(self, seconds):
        """Takes what the browser says within some seconds."""
        if not select.select([self.into], [], [], max(seconds, 0))[0]:
            return
        self.buffer += os.read(self.into, 1 << 20)
        *messages, self.buffer = self.buffer.split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self.answers[message["id"]] = message
                continue
            match message["method"], message["params"]:
                case "Page.javascriptDialogOpening", said:
                    self.dialogs.append(said["message"])
                    accept = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                    os.write(self.out, json.dumps(accept | {"sessionId": self.session}).encode() + b"\0")
                case "Network.requestWillBeSent", said:
                    self.requests.append(said["request"]["url"])
                case "Runtime.exceptionThrown", said:
                    self.errors.append(json.dumps(said["exceptionDetails"])[:500])
                case "Log.entryAdded", said if said["entry"]["level"] == "error":
                    self.errors.append(said["entry"]["text"])

    def size(self, width, height):
        """Sets the size of the window, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def open(self, url):
        """Opens an address."""
        self.call("Page.navigate", url=url)

    def run(self, script):
        """Evaluates an expression and returns its value; of a promise, the value that it is kept with."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script, seconds=30):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"!!({script})"):
            assert time.monotonic() < end, (script, self.errors, self.run("document.body.innerText")[:2000])
            self.listen(0.05)

    def key(self, key):
        """Presses a key."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
        known = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0)} | text
        self.call("Input.dispatchKeyEvent", type="keyDown", **known)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path, *, whole=False):
        """Writes the page as a PNG file; `whole`: also what has to be scrolled to."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
