"""The page in a headless Chromium, without any network but this computer's."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")  # else playwright's own
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Runs the program; gives its address and the folder that it keeps uploads in."""
    temporary = tmp_path_factory.mktemp("uploads")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "demo" / "web.py", "--config-file", "camvid/street", "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(temporary), "FVCORE_CACHE": str(temporary / "cache")}
    address = f"http://127.0.0.1:{port}"
    # Not the repository's root, so that a path of it would be seen.
    with subprocess.Popen([*command, "--opts", "MODEL.DEVICE", "cpu"], env=environment, cwd=temporary) as process:
        for _ in range(120):
            assert process.poll() is None
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                time.sleep(1)
        yield address, temporary
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert not list(temporary.glob("kmax_d2-*"))  # uploads are deleted


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", *CAMERA])
        yield launched
        launched.close()


@pytest.fixture
def page(browser, server):
    """The page as a visitor sees it; what it asks of other computers is refused and fails the test."""
    address, _ = server
    foreign = []

    def answer(route):
        if route.request.url.startswith(address):
            route.continue_()
        else:
            foreign.append(route.request.url)
            route.abort()

    with browser.new_context(viewport={"width": 1280, "height": 1000}, permissions=["camera"]) as context:
        context.route(lambda url: url.startswith("http"), answer)
        opened = context.new_page()
        opened.set_default_timeout(60_000)
        opened.goto(address)
        yield opened
    assert foreign == []
