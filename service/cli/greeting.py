"""The line that a newcomer copies: printed once the service really answers."""

import json
import shlex
import threading
import time
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from service.settings import Settings

POLL_SECONDS = 0.25
# A text of each demo task; any other task is asked with a text that says what to do.
EXAMPLES = {
    "spam": "Congratulations, you have won a prize! Reply with your bank details.",
    "icd10": "Fracture of lower end of left radius, initial encounter",
    "language": "Der Eintrag wurde gespeichert.",
}


def greet_when_ready(settings: Settings) -> None:
    """Watch readiness from a thread of its own, and print a curl line that works as soon as there is one."""
    threading.Thread(target=_greet, args=(settings,), name="secateur-greeting", daemon=True).start()


def curl_line(settings: Settings, reads: str = "text") -> str:
    """A request to the default task, or the first one, as a line for a shell; reads: text or image."""
    task = asked_task(settings)
    if reads == "image":
        return f"curl -s {address(settings)}/classify -F task={task} -F image=@IMAGE.png"
    body = json.dumps({"task": task, "inputs": EXAMPLES.get(task, "Put your text here.")}, ensure_ascii=False)
    return f"curl -s {address(settings)}/classify -H 'content-type: application/json' -d {shlex.quote(body)}"


def asked_task(settings: Settings) -> str:
    return settings.default_task or next(iter(settings.tasks))


def address(settings: Settings) -> str:
    """Where this machine reaches the service; an address that means all interfaces is reached by loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.server.host, settings.server.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.server.port}"


def _greet(settings: Settings) -> None:
    # No proxy: the environment's would be asked for an address that only this machine has.
    opener = build_opener(ProxyHandler({}))
    while True:
        try:
            with opener.open(f"{address(settings)}/readyz", timeout=5):
                pass
            with opener.open(f"{address(settings)}/info", timeout=5) as answer:
                reads = json.load(answer)["tasks"][asked_task(settings)]["reads"]
            break
        except (URLError, OSError):
            time.sleep(POLL_SECONDS)
    print(f"ready, try:\n\n  {curl_line(settings, reads)}\n", flush=True)
