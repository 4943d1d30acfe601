"""A head that speaks the REST interface of Ray 2.60's jobs, and whose jobs end as they are told to.

A job's `moments` are its states, one for each question after the jobs and the last for all further
ones:

    running, succeeded, stopped
    exit N        the command ended with this code, as Python reports it
    supervisor    the node of the driver died
    down          the head drops the connection
    gone          the head has come back with empty memory
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler


@dataclass
class Job:
    """What will become of a job."""

    moments: list[str]
    log: str = ""
    cuts: list[int] = field(default_factory=list)
    """Lengths after which connections to the log break, in order; later ones last."""
    hangs: int = 0
    """Connections to the log, after those of `cuts`, that stay without a word."""
    is_log_lost: bool = False
    """The whole log cannot be had, as where its node is gone."""

    def next_moment(self) -> str:
        return self.moments.pop(0) if len(self.moments) > 1 else self.moments[0]


@dataclass
class RayHead:
    """The head, and what was asked of it."""

    address: str = ""
    token: str | None = None
    """What clients must send; None: authentication is off."""
    is_silent: bool = False
    """It accepts requests and never answers, as a dead tunnel does."""
    refusals: int = 0
    """Submissions that it will answer with an error, and not take."""
    plans: list[Job] = field(default_factory=list)
    """What becomes of the next jobs, in the order of submission."""
    jobs: dict[str, Job] = field(default_factory=dict)
    submissions: list[dict[str, Any]] = field(default_factory=list)
    """Accepted requests for a job."""
    packages: list[str] = field(default_factory=list)
    """Folders that were sent along."""
    authorizations: list[str | None] = field(default_factory=list)
    """What requests had as their header of this name."""
    num_log_connections: int = 0

    def plan(self, *moments: str, log: str = "step 1\nstep 2\n", **more: Any) -> None:
        """Say what becomes of the next job."""
        self.plans.append(Job(list(moments), log, **more))

    def submitted_ids(self) -> list[str]:
        return [request["submission_id"] for request in self.submissions]


@contextmanager
def run_ray_head() -> Iterator[RayHead]:
    """Run a head for a block, in a thread."""
    head = RayHead()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="ray-head", daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(_start(head), loop).result()
    try:
        yield head
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(head: RayHead) -> web.AppRunner:
    routes = _Routes(head)
    app = web.Application(middlewares=[routes.guard])
    app.router.add_get("/api/version", routes.version)
    app.router.add_get("/api/packages/gcs/{name}", routes.find_package)
    app.router.add_put("/api/packages/gcs/{name}", routes.take_package)
    app.router.add_get("/api/jobs/", routes.list_jobs)
    app.router.add_post("/api/jobs/", routes.submit)
    app.router.add_get("/api/jobs/{id}/logs", routes.log)
    app.router.add_get("/api/jobs/{id}/logs/tail", routes.tail)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    head.address = f"http://{host}:{port}"
    return runner


class _Routes:
    def __init__(self, head: RayHead) -> None:
        self._head = head

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._head.is_silent:
            await asyncio.Event().wait()
        header = request.headers.get("Authorization")
        self._head.authorizations.append(header)
        if self._head.token is None or header == f"Bearer {self._head.token}":
            return await handler(request)
        if header is None:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        return web.Response(status=403, text="Forbidden: Invalid authentication token")

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "none"})

    async def find_package(self, request: web.Request) -> web.Response:
        return web.Response(status=404)

    async def take_package(self, request: web.Request) -> web.Response:
        await request.read()
        self._head.packages.append(request.match_info["name"])
        return web.Response()

    async def list_jobs(self, request: web.Request) -> web.Response:
        # Those that nobody submitted are listed too, without an id of submission.
        answer = [{"type": "DRIVER", "job_id": "01", "status": "RUNNING", "entrypoint": "python"}]
        for job_id, job in list(self._head.jobs.items()):
            moment = job.next_moment()
            if moment == "down":
                assert request.transport is not None
                request.transport.abort()
            elif moment == "gone":
                del self._head.jobs[job_id]
            else:
                answer.append(
                    {"type": "SUBMISSION", "submission_id": job_id, "entrypoint": "?"}
                    | _describe(moment, job)
                )
        return web.json_response(answer)

    async def submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        job_id = body["submission_id"]
        if job_id in self._head.jobs:
            text = f"ValueError: Job with submission_id {job_id} already exists."
            return web.Response(status=400, text=text)
        if self._head.refusals:
            self._head.refusals -= 1
            return web.Response(status=500, text="the head is starting")
        self._head.submissions.append(body)
        self._head.jobs[job_id] = self._head.plans.pop(0)
        return web.json_response({"job_id": job_id, "submission_id": job_id})

    async def log(self, request: web.Request) -> web.Response:
        job = self._head.jobs[request.match_info["id"]]
        if job.is_log_lost:
            return web.Response(status=500, text="Traceback:\nConnectionError: no agent")
        return web.json_response({"logs": job.log})

    async def tail(self, request: web.Request) -> web.StreamResponse:
        self._head.num_log_connections += 1
        job = self._head.jobs[request.match_info["id"]]
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if job.cuts:
            await socket.send_str(job.log[: job.cuts.pop(0)])
            assert request.transport is not None
            request.transport.abort()
        elif job.hangs:
            job.hangs -= 1
            await asyncio.Event().wait()
        else:
            await socket.send_str(job.log)
            while job.moments[0] == "running":
                await asyncio.sleep(0.01)
        return socket


def _describe(moment: str, job: Job) -> dict[str, Any]:
    match moment.split():
        case ["running"]:
            return {"status": "RUNNING", "message": "Job is currently running."}
        case ["succeeded"]:
            return {"status": "SUCCEEDED", "driver_exit_code": 0}
        case ["stopped"]:
            return {"status": "STOPPED", "message": "Job was intentionally stopped."}
        case ["exit", code]:
            reason = f"Job entrypoint command failed with exit code {code}, last available logs"
            message = f"{reason} (truncated to 20,000 chars):\n{job.log}"
            return {"status": "FAILED", "message": message, "driver_exit_code": int(code)}
        case ["supervisor"]:
            message = "Job supervisor actor died: The node died."
            return {"status": "FAILED", "message": message}
        case _:
            raise ValueError(moment)
