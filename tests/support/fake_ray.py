"""A `ray` program that plays a cluster, with the words of Ray 2.60, for tests of cluster/submit.

FAKE_RAY_DIR holds `state.json`: `plans`, what will become of each job in the order of submission.
A plan's `moments` are words of `tell`, one for each question after its state and the last for all
further ones; `log` are its lines, and `cuts` the lengths after which connections to it break, in
order. Calls are noted in `calls.jsonl`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PREFIX = "2026-11-22 04:54:11,627\t{level} cli.py:{line} -- {text}\n"


def say(level: str, line: int, text: str) -> None:
    sys.stdout.write(PREFIX.format(level=level, line=line, text=text))


def fail(text: str) -> int:
    kind = text.partition(":")[0].rpartition(".")[2]
    sys.stderr.write(f"Traceback (most recent call last):\n    raise {kind}(message)\n{text}\n")
    return 1


def sum_up(level: str, text: str) -> None:
    for line, words in ((74, "-" * 10), (75, text), (76, "-" * 10)):
        say(level, line, words)


def tell(job_id: str, moment: str, log: list[str]) -> int:
    say("INFO", 42, "Job submission server address: http://127.0.0.1:8265")
    match moment.split():
        case ["running"]:
            say("INFO", 82, f"Status for job '{job_id}': RUNNING")
            say("INFO", 84, "Status message: Job is currently running.")
        case ["succeeded"]:
            sum_up("SUCC", f"Job '{job_id}' succeeded")
        case ["stopped"]:
            say("WARN", 71, f"Job '{job_id}' was stopped")
        case ["exit", code]:
            sum_up("ERR", f"Job '{job_id}' failed")
            reason = f"Job entrypoint command failed with exit code {code}, last available logs"
            say("INFO", 89, f"Status message: {reason} (truncated to 20,000 chars):")
            sys.stdout.write("\n".join(log) + "\n")
        case ["supervisor"]:
            sum_up("ERR", f"Job '{job_id}' failed")
            say("INFO", 89, "Status message: Job supervisor actor died: The node died.")
        case ["down"]:
            return fail(
                "ConnectionError: Failed to connect to Ray at address: http://127.0.0.1:8265."
            )
        case ["denied"]:
            return fail(
                "ray.exceptions.AuthenticationError: Authentication failed: Forbidden: Invalid "
                "authentication token"
            )
        case ["gone"]:
            text = f"Request failed with status code 404: Job {job_id} does not exist."
            return fail(f"RuntimeError: {text}")
        case _:
            raise ValueError(moment)
    return 0


def status(state: dict[str, Any], job_id: str) -> int:
    job = state["jobs"].get(job_id)
    if job is None:
        return tell(job_id, "gone", [])
    moment = job["moments"][0]
    if len(job["moments"]) > 1:
        job["moments"].pop(0)
    if moment == "gone":  # the head came back with empty memory
        state["jobs"].pop(job_id)
    return tell(job_id, moment, job["log"])


def logs(folder: Path, job_id: str) -> int:
    job = load_state(folder)["jobs"].get(job_id)
    if job is None:
        return tell(job_id, "gone", [])
    say("INFO", 42, "Job submission server address: http://127.0.0.1:8265")
    calls = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    earlier = sum(is_about(call, "logs", job_id) for call in calls) - 1
    cut = job["cuts"][earlier] if earlier < len(job["cuts"]) else None
    for line in job["log"][:cut]:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    if cut is not None:
        return 1
    while (job := load_state(folder)["jobs"].get(job_id)) and job["moments"][0] == "running":
        time.sleep(0.02)
    return tell(job_id, job["moments"][0], job["log"]) if job else 1


def is_about(call: dict[str, Any], action: str, job_id: str) -> bool:
    return call["arguments"][1] == action and job_id in call["arguments"]


def load_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def submit(state: dict[str, Any], job_id: str) -> int:
    if job_id in state["jobs"]:
        return fail(f"ValueError: Job with submission_id {job_id} already exists.")
    plan = state["plans"].pop(0)
    if plan.get("refused"):
        return tell(job_id, "denied", [])
    state["jobs"][job_id] = {"log": [], "cuts": [], **plan}
    sum_up("SUCC", f"Job '{job_id}' submitted successfully")
    return 0


def main() -> int:
    folder = Path(os.environ["FAKE_RAY_DIR"])
    call = {
        "arguments": sys.argv[1:],
        "auth_mode": os.environ.get("RAY_AUTH_MODE"),
        "address": os.environ.get("RAY_API_SERVER_ADDRESS"),
    }
    with (folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\n")
    action = sys.argv[2]
    named = [text for text in sys.argv[3:] if not text.startswith("--")]
    ids = [text.partition("=")[2] for text in sys.argv if text.startswith("--submission-id=")]
    if action == "logs":  # runs beside the others, so it writes nothing
        return logs(folder, named[0])
    state = load_state(folder)
    code = submit(state, ids[0]) if action == "submit" else status(state, named[0])
    written = folder / f"state-{os.getpid()}.json"
    written.write_text(json.dumps(state))
    written.replace(folder / "state.json")
    return code


if __name__ == "__main__":
    sys.exit(main())
