"""A page in a real browser: `look` runs this file as a program of its own, with QtWebEngine.

QtWebEngine is Chromium, as a Python package. A page is loaded headless (Qt's `offscreen` platform,
no GPU), everything in it that can be opened is opened, and what happened is told: the console's
messages, every request, what the page's policy blocked, and the answers to questions put to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What a Debian or Ubuntu without a desktop lacks, where the browser does not start.
LIBRARIES = (
    "libnss3 libasound2 libegl1 libgl1 libgbm1 libxkbcommon0 libxkbfile1 libxcomposite1 "
    "libxdamage1 libxrandr2 libxtst6 libdbus-1-3 libfontconfig1"
)
_SECONDS = 60
_OPEN_ALL = """
document.querySelectorAll('details').forEach(d => { d.open = true; });
document.querySelectorAll('*').forEach(e => {
  for (const kind of ['mouseover', 'focus', 'toggle', 'error', 'load'])
    e.dispatchEvent(new Event(kind, {bubbles: false}));
});
document.querySelectorAll('a').forEach(a => a.click());
"""
_LISTEN = """
window.blockedByPolicy = [];
document.addEventListener('securitypolicyviolation', e =>
  window.blockedByPolicy.push(e.violatedDirective + ' ' + e.blockedURI));
"""


@dataclass(frozen=True)
class Seen:
    """What a page did.

    Attributes:
        console: (level, message) of every line; level info, warning or error.
        requests: URLs of everything that it asked for, but itself.
        blocked: "directive URI" of everything that its policy stopped.
        answers: the values of the expressions that were asked, in order.
    """

    console: list[tuple[str, str]]
    requests: list[str]
    blocked: list[str]
    answers: list[Any]


def look(page: Path, questions: Sequence[str] = (), *, dark: bool = False) -> Seen:
    """Load a page, open and click everything in it, and evaluate JavaScript expressions.

    Raises:
        AssertionError: the browser did not start or did not load the page; with what it said.
    """
    asked = json.dumps({"page": str(page), "questions": list(questions)})
    done = subprocess.run(
        [sys.executable, __file__],
        input=asked,
        capture_output=True,
        text=True,
        timeout=2 * _SECONDS,
        check=False,
        env={
            **os.environ,
            "QT_QPA_PLATFORM": "offscreen",
            # Root has no sandbox; a container's /dev/shm is small.
            "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu --disable-dev-shm-usage"
            f" --blink-settings=preferredColorScheme={0 if dark else 1}",
        },
    )
    assert done.returncode == 0, (
        f"the browser ended with {done.returncode}; if a library is missing, install those that "
        f"Chromium needs (Debian's names: {LIBRARIES}):\n{done.stderr[-3000:]}"
    )
    told = json.loads(done.stdout.splitlines()[-1])
    told["console"] = [tuple(line) for line in told["console"]]
    return Seen(**told)


def _main() -> None:
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import (
        QWebEnginePage,
        QWebEngineProfile,
        QWebEngineScript,
        QWebEngineSettings,
        QWebEngineUrlRequestInterceptor,
    )
    from PySide6.QtWidgets import QApplication

    asked = json.loads(sys.stdin.read())
    app = QApplication(["browser"])
    address = QUrl.fromLocalFile(asked["page"])
    told: dict[str, list[Any]] = {"console": [], "requests": [], "blocked": [], "answers": []}

    class Requests(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info: Any) -> None:
            url = info.requestUrl().toString()
            if not told["requests"] and url == address.toString():
                told["requests"].append(None)  # the page itself, once
            else:
                told["requests"].append(url)

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(
            self, level: Any, message: str, line: int, source: str
        ) -> None:
            name = level.name.removesuffix("MessageLevel").lower()
            told["console"].append((name, message))

    profile, requests = QWebEngineProfile(), Requests()
    profile.setUrlRequestInterceptor(requests)
    listener = QWebEngineScript()
    listener.setSourceCode(_LISTEN)
    listener.setInjectionPoint(QWebEngineScript.InjectionPoint.DocumentCreation)
    listener.setWorldId(QWebEngineScript.ScriptWorldId.ApplicationWorld)
    profile.scripts().insert(listener)
    page = Page(profile)
    # As in everybody's browser: a file may ask the network for things, if it tries.
    remote = QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls
    page.settings().setAttribute(remote, True)

    def ask(left: list[str]) -> None:
        if not left:
            world = QWebEngineScript.ScriptWorldId.ApplicationWorld.value
            page.runJavaScript("JSON.stringify(window.blockedByPolicy)", world, finish)
            return

        def answer(value: Any) -> None:
            told["answers"].append(json.loads(value))
            ask(left[1:])

        page.runJavaScript(f"JSON.stringify(({left[0]}) ?? null)", answer)

    def finish(blocked: str) -> None:
        told["blocked"] = json.loads(blocked)
        told["requests"] = [url for url in told["requests"] if url is not None]
        print(json.dumps(told), flush=True)
        os._exit(0)  # Qt's tear-down of a page in use is of no interest

    def loaded(whole: bool) -> None:
        if not whole:
            sys.stderr.write(f"{asked['page']} was not loaded\n")
            os._exit(1)
        page.loadFinished.disconnect(loaded)
        page.runJavaScript(_OPEN_ALL)
        # Time for images to fail, handlers to run, requests to start.
        QTimer.singleShot(700, lambda: ask(list(asked["questions"])))

    page.loadFinished.connect(loaded)
    page.setUrl(address)
    QTimer.singleShot(1000 * _SECONDS, lambda: os._exit(3))
    app.exec()


if __name__ == "__main__":
    _main()
