"""The README's main job, as a stranger does it: start the server, send the README's first curl, read the answer, stop.

The curl line is taken from README.md, with its port replaced by a free one. Without a curl on the machine, the same
request is made from here.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

ROOT = Path(__file__).parents[1]
README_ADDRESS = "127.0.0.1:8000"
READY_SECONDS = 120
STOP_SECONDS = 60
OPENER = build_opener(ProxyHandler({}))


def readme_curl(address: str) -> list[str]:
    """The README's first curl command, as words, for another address."""
    block = next(block for block in blocks("bash") if block.startswith("curl "))
    return shlex.split(block.replace(README_ADDRESS, address))


def readme_labels() -> list[str]:
    """The labels that the README shows as the answer."""
    return [item["label"] for item in json.loads(blocks("json")[0])["data"]]


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def send(command: list[str]) -> Any:
    """What the command answers, parsed."""
    if shutil.which("curl"):
        return json.loads(subprocess.run([*command, "--fail-with-body"], check=True, capture_output=True).stdout)
    url = next(word for word in command if word.startswith("http"))
    headers = dict(command[i + 1].split(": ") for i, word in enumerate(command) if word == "-H")
    with OPENER.open(Request(url, command[command.index("-d") + 1].encode(), headers), timeout=30) as answer:
        return json.load(answer)


def wait_until_ready(server: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"smoke: the server ended with {server.returncode} before it was ready")
        try:
            with OPENER.open(f"http://{address}/readyz", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    sys.exit(f"smoke: not ready after {READY_SECONDS} s")


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*probe.getsockname())
    command = [str(Path(sys.executable).with_name("secateur")), "serve", "--port", address.split(":")[1]]
    began = time.monotonic()
    records = tempfile.TemporaryDirectory()
    environment = os.environ | {"SECATEUR_STORAGE__URL": f"sqlite:///{records.name}/secateur.db"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        wait_until_ready(server, address)
        ready = time.monotonic() - began
        answer = send(readme_curl(address))
        labels = [item["label"] for item in answer["data"]]
        if labels != readme_labels():
            sys.exit(f"smoke: the README shows {readme_labels()}, the answer is {labels}")
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=STOP_SECONDS)
        if code != 0:
            sys.exit(f"smoke: SIGTERM ended the server with {code}")
    finally:
        server.kill()
        server.wait()
        records.cleanup()
    print(f"smoke: ready after {ready:.1f} s, answered {labels} by {answer['variant']}, stopped with 0")


if __name__ == "__main__":
    main()
