"""Debian's Chromium, driven through its DevTools protocol: open a page, ask it, click it, take its picture."""

import asyncio
import base64
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp
import httpx

CHROMIUM = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--no-first-run")


class Browser:
    """One page of a browser of its own, inside `with`.

    Args:
        folder: where it keeps its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        options = ("--remote-debugging-port=0", f"--user-data-dir={folder}", "--window-size=1300,900")
        self.process = subprocess.Popen([*CHROMIUM, *options, "about:blank"], stderr=subprocess.DEVNULL)

    def __enter__(self) -> "Browser":
        found = self.folder / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not found.exists() or not found.read_text().strip():
            assert time.monotonic() < until, "Chromium opened no port"
            time.sleep(0.1)
        pages = httpx.get(f"http://127.0.0.1:{found.read_text().split()[0]}/json/list", timeout=30).json()
        self.socket = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)

    def open(self, address: str) -> None:
        self._ask("Page.navigate", url=address)

    def evaluate(self, script: str) -> Any:
        """What a script says, awaited where it is a promise."""
        answer = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not self.evaluate(script):
            assert time.monotonic() < until, f"{script} is not true within {seconds} s"
            time.sleep(0.1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def _ask(self, method: str, **params: Any) -> Any:
        async def ask() -> Any:
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(self.socket, max_msg_size=0) as socket,
            ):
                await socket.send_json({"id": 1, "method": method, "params": params})
                while (answer := await socket.receive_json(timeout=60)).get("id") != 1:
                    pass
                assert "error" not in answer, answer
                return answer["result"]

        return asyncio.run(ask())
